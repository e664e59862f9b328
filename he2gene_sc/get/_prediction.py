"""Names, values and a table of the predicted genes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.genes import columns_of, positions_of, symbols_in
from .._core.keys import OWN_TABLE, Keys
from .._core.lazy import is_large
from .._core.logs import warn
from .._core.matrix import dense, layer_label, layer_names, matrix_of
from .._core.names import annotation_target
from .._core.predictions import (
    IF_NONE_RELIABLE,
    embedding_of,
    gene_flags,
    predicted_layer,
    predicting_model,
    record_of,
    symbols_of,
)
from .._core.spots import get_table
from .._settings import settings

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene


def genes(
    data: SpatialData | AnnData,
    *,
    reliable: bool | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
) -> list[str]:
    """List the predicted genes, best held-out correlation first.

    :func:`he2gene_sc.get.predicted` returns a table of these genes without missing values, for scanpy and squidpy.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    reliable
        ``True``: only reliable genes; ``False``: only the others; ``None``: all.
    prediction_key
        ``key_added`` of predict.
    table_key
        Table, if several have predictions.

    Returns
    -------
    list of str
        Names in ``var_names``.

    Raises
    ------
    ValueError
        If the table has no prediction.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> "ERBB2" in hg.get.genes(sdata)
    True
    """
    validate.arguments(genes, locals())
    keys = Keys(prediction_key)
    table = get_table(data, table_key, prediction_key=prediction_key)
    if keys.predicted not in table.var:
        raise ValueError(f"`data` holds no prediction {prediction_key!r}; run hg.tl.predict first")
    chosen = gene_flags(table, keys.predicted)
    if reliable is not None:
        chosen = chosen & (gene_flags(table, keys.reliable) == reliable)
    var = table.var[chosen]
    return var.sort_values(keys.pcc, ascending=False, kind="stable").index.tolist()


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
        If the table has no prediction. If genes are not in its layer, also if the model does not know them, ``model`` is another
        model, or the embedding was changed since predict wrote it.

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
            source = predicting_model(record, model)
            positions = positions_of(source, model_genes)
            weights, bias = (
                np.asarray(source.tensors[f"genes.{part}"][..., positions], np.float32) for part in ("weight", "bias")
            )
            computed = np.maximum(embedding_of(table, prediction_key) @ weights + bias, 0)
            values[:, missing] = np.where(np.isnan(values[:, missing]), computed, values[:, missing])
    return pd.DataFrame(values, index=table.obs_names, columns=names)


def predicted(
    data: SpatialData | AnnData,
    reliable: bool | None = None,
    *,
    layer: str | None = "he2gene",
    prediction_key: str = "he2gene",
    table_key: str | None = None,
) -> AnnData:
    """Return a table of the predicted genes without missing values; ``X`` is the prediction.

    scanpy, squidpy and decoupler do not skip missing values. Genes that the model does not know, and spots without a prediction,
    are NaN in the layer. A single one makes every p-value NaN, or makes every such gene significant.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to. It is not changed.
    reliable
        ``True``: only reliable genes; ``False``: only the others; ``None``: all predicted genes.
    layer
        Layer of the table that becomes ``X``, for example ``"he2gene_adapted"``. Default: the layer of ``prediction_key``.
        ``None``: ``X``, which holds the measured values in a measured table.
    prediction_key
        ``key_added`` of predict.
    table_key
        Table, if several have predictions.

    Returns
    -------
    anndata.AnnData
        A copy that shares no memory with ``data``:

        ``.X``
            The layer, float32: natural log of (1 + counts per 10,000) for a prediction.
        ``.obs``
            All columns. Spots without values are dropped, with a warning; unused categories are removed.
        ``.var``
            All columns, including ``he2gene_pcc`` and ``he2gene_reliable``. Genes keep the order of the table.
        ``.obsm``
            ``"spatial"``, the embedding ``"X_he2gene"`` and the probabilities of the classes.
        ``.uns``
            Colours of the categories, ``"spatial"`` (images for scanpy and squidpy), the region that the table annotates,
            and the record of the prediction.

        Names and texts are Python strings, not pandas' string type: R readers and older versions of anndata read the h5ad file.

        Other layers, graphs and embeddings are left out, because they are based on other values or other spots.

    Raises
    ------
    TypeError
        If ``data`` is neither an object nor a table.
    ValueError
        If there is no prediction, the layer does not exist, no gene matches ``reliable``, or no spot has values; or if the layer
        is lazy and these genes would exceed ``hg.settings.memory_limit``.

    See Also
    --------
    he2gene_sc.get.genes : Names of the predicted genes.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> import scanpy as sc
    >>> sdata = hg.datasets.toy((6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> adata = hg.get.predicted(sdata)
    >>> sc.tl.rank_genes_groups(adata, "pathologist")
    """
    validate.arguments(predicted, locals())
    from anndata import AnnData

    table = get_table(data, table_key, prediction_key=prediction_key)
    record, keys = record_of(table, prediction_key), Keys(prediction_key)
    source = None if layer is None else predicted_layer(table, prediction_key, layer)
    columns = _columns(table, keys, reliable)
    chosen = matrix_of(table[:, columns], source)
    if hasattr(chosen, "dask") and is_large(*chosen.shape):
        raise ValueError(
            f"`reliable` is {reliable}: {len(columns):,} genes of {table.n_obs:,} spots need {4e-9 * table.n_obs * len(columns):,.1f} "
            f"GB, more than hg.settings.memory_limit ({settings.memory_limit / 1e9:,.1f} GB); use reliable=True, read some genes with "
            "hg.get.expression(data, genes), or raise the limit"
        )
    values = np.asarray(dense(chosen), np.float32)
    rows, kept = _complete(values, layer_label(source))
    obs, var = _with_plain_texts(table.obs.iloc[rows]), _with_plain_texts(table.var.iloc[columns[kept]])
    own_record = {name: _with_plain_texts(value) for name, value in deepcopy(dict(record)).items()}
    uns: dict[str, Any] = {keys.uns: own_record}
    for name in obs.columns[[column.dtype.name == "category" for _, column in obs.items()]]:
        before = obs[name].cat.categories
        obs[name] = obs[name].cat.remove_unused_categories()
        colors = table.uns.get(f"{name}_colors")
        if colors is not None and len(colors) == len(before):
            is_used = before.isin(obs[name].cat.categories)
            uns[f"{name}_colors"] = [color for color, used in zip(colors, is_used, strict=True) if used]
    for name in {"spatial", keys.rows}.intersection(table.uns):
        uns[name] = deepcopy(table.uns[name])
    if source is not None:
        # Tells scanpy that the values are natural logarithms already. Versions of anndata before 0.12 read no `None`.
        uns["log1p"] = {"base": np.e}
        uns[OWN_TABLE] = {"by": "hg.get.predicted", "X": source}
    obsm = {name: table.obsm[name] for name in ("spatial", keys.embedding, keys.proba) if name in table.obsm}
    obsm = {
        name: _with_plain_texts(value.iloc[rows]) if hasattr(value, "iloc") else value[rows]
        for name, value in obsm.items()
    }
    if (attrs := annotation_target(table)) is not None:
        # Regions whose spots are all dropped are not annotated.
        regions = obs[attrs["region_key"]].astype(str).unique().tolist()
        uns["spatialdata_attrs"] = {**attrs, "region": regions if len(regions) > 1 else regions[0]}
    return AnnData(X=values[np.ix_(rows, kept)], obs=obs, var=var, obsm=obsm, uns=uns)


def _columns(table: AnnData, keys: Keys, reliable: bool | None) -> np.ndarray:
    """Return the positions of the chosen genes."""
    flags = gene_flags(table, keys.predicted)
    n_predicted = int(flags.sum())
    if not n_predicted:
        raise ValueError(
            f"`data`: no gene of the table was predicted (var[{keys.predicted!r}] is False everywhere); predict again, with "
            "genes='all' for a table of all genes of the model"
        )
    if reliable is not None:
        flags = flags & (gene_flags(table, keys.reliable) == reliable)
    if not flags.any():
        model = table.uns[keys.uns].get("model")
        raise ValueError(
            f"`reliable` is {reliable}: model {model!r} calls none of the {n_predicted:,} predicted genes reliable; use "
            f"reliable=None for all of them (hg.pl.predictability shows their accuracy in training). You can {IF_NONE_RELIABLE}"
            if reliable
            else f"`reliable` is False: all {n_predicted:,} predicted genes are reliable; use reliable=None"
        )
    names = table.var_names[flags]
    if names.has_duplicates:
        raise ValueError(
            f"`data`: var_names {names[names.duplicated()].unique().tolist()[:5]} occur twice; run "
            "adata.var_names_make_unique() on the table first"
        )
    return np.flatnonzero(flags)


def _complete(values: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of spots with values, and of genes that all these spots have; warn of those left out."""
    missing = np.isnan(values)
    if np.isinf(values).any():
        raise ValueError(f"`layer`: {where} holds {int(np.isinf(values).sum())} infinite value(s); predict again")
    rows = np.flatnonzero(~missing.all(axis=1))
    if not len(rows):
        raise ValueError(f"`layer`: {where} is NaN for all {len(values)} spots; predict again")
    kept = np.flatnonzero(~missing[rows].any(axis=0))
    if not len(kept):
        raise ValueError(
            f"`layer`: {where} has no gene that all {len(rows)} predicted spots have, because the regions of the table were "
            "predicted for different genes; pass the rows of one region only"
        )
    what = ("spots that were not predicted", "genes that are NaN for some spots")
    numbers = zip((len(rows), len(kept)), values.shape, what, strict=True)
    if left_out := [f"{total - n:,} of {total:,} {name}" for n, total, name in numbers if n < total]:
        warn(f"left out of {where}: {', '.join(left_out)}")
    return rows, kept


def _with_plain_texts(value: Any) -> Any:
    """Copy a table with its names and texts as Python strings, which anndata writes as plain arrays; others are returned."""
    if not isinstance(value, pd.DataFrame):
        return value
    texts = [
        name for name, column in value.items() if isinstance(column.dtype, pd.StringDtype) and column.notna().all()
    ]
    out = value.astype(dict.fromkeys(texts, object))
    out.index = out.index.astype(object)
    return out
