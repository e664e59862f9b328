"""``hg.get.expression``: predicted values of any gene of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.genes import columns_of, symbols_in
from .._core.keys import Keys
from .._core.matrix import dense, layer_names, matrix_of
from .._core.model_genes import positions_of
from .._core.predictions import embedding_of, gene_flags, predicting_model, record_of, symbols_of
from .._core.spots import get_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene


def expression(
    data: SpatialData | AnnData,
    genes: str | Sequence[str],
    *,
    model: str | Path | HE2Gene | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the predicted expression of genes at every spot.

    Values are read from the layer. Missing values (at some spots, or of a deleted layer) are computed by the model from the
    embedding in ``obsm``. No image is read.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    genes
        One gene or several: names in ``var_names``, in the column given to predict as ``gene_symbols``, or of the model.
    model
        Model of the prediction, for genes that are not in the layer. Default: the bundled model.
    prediction_key
        ``key_added`` of predict.
    table_key
        Table, if several have predictions.

    Returns
    -------
    pandas.DataFrame
        One row per spot and one column per gene, named as in ``genes``; float32, natural log of (1 + counts per 10,000). NaN for
        spots outside the image.

    Raises
    ------
    ValueError
        If there is no prediction; or if genes must be computed and the model does not know them, another model is given, or the
        embedding was changed since predict wrote it.

    See Also
    --------
    he2gene_sc.get.predicted : A table of all predicted genes.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, genes=["ERBB2"], show_progress_bar=False)
    >>> hg.get.expression(sdata, ["ERBB2", "ESR1"]).shape
    (16, 2)
    """
    validate.arguments(expression, locals())
    names = [str(gene) for gene in validate.names(genes, "genes", one=True)]
    if not names:
        raise ValueError("`genes` is empty; name at least one gene; hg.get.genes(data) lists the predicted genes")
    table = get_table(data, table_key, prediction_key=prediction_key)
    record, keys = record_of(table, prediction_key), Keys(prediction_key)
    symbols = symbols_of(table, record, None)
    columns = columns_of(table, names, symbols)
    in_layer = np.append(gene_flags(table, keys.predicted), False)[columns] & (record["layer"] in layer_names(table))
    values = np.full((table.n_obs, len(names)), np.nan, np.float32)
    if in_layer.any():
        values[:, in_layer] = dense(matrix_of(table, record["layer"])[:, columns[in_layer]])
    embedding = table.obsm.get(keys.embedding)
    if embedding is not None or not in_layer.all():
        inside = slice(None) if embedding is None else np.isfinite(np.asarray(embedding)).all(axis=1)
        missing = np.flatnonzero(~in_layer | np.isnan(values[inside]).any(axis=0))
        if len(missing):
            table_symbols = symbols_in(table, symbols)
            model_genes = [str(table_symbols[columns[i]]) if columns[i] >= 0 else names[i] for i in missing]
            stored, computed = values[:, missing], _compute(table, model_genes, record, model, prediction_key)
            values[:, missing] = np.where(np.isnan(stored), computed, stored)
    return pd.DataFrame(values, index=table.obs_names, columns=names)


def _compute(
    table: AnnData, genes: list[str], record: Mapping[str, Any], model: str | Path | HE2Gene | None, prediction_key: str
) -> np.ndarray:
    """Compute the expression of genes of the model from the embedding, ``(n, g)``."""
    source = predicting_model(record, model)
    positions = positions_of(source, genes)
    weights, bias = (
        np.asarray(source.tensors[f"genes.{part}"][..., positions], np.float32) for part in ("weight", "bias")
    )
    return np.maximum(embedding_of(table, prediction_key) @ weights + bias, 0)
