"""The layer that ``hg.tl.evaluate`` compares: its model, the spots that it was adapted to, and its genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.expression import Scale, log_expression
from ..._core.genes import columns_of, match_genes, match_names, symbols_in
from ..._core.keys import Keys
from ..._core.matrix import layer_names, matrix_of
from ..._core.ownership import is_prediction, is_record_of
from ..._core.predictions import (
    adaptation_spots,
    bundled_model,
    predicting_model,
    prediction_of,
    record_of,
    source_layer,
)
from ..._core.spots import get_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ...models import HE2Gene

#: Name of the prediction in the tables of an evaluation; an adapted layer keeps its own name.
MODEL = "he2gene"


@dataclass(frozen=True, eq=False)
class EvaluatedLayer:
    """A layer that predict, adapt or another model wrote."""

    name: str
    predictor: str  # its name in the tables
    adapted: bool
    fitted_on: np.ndarray | None  # spots, (n_obs,) bool; None if an older version did not record them
    values: Any  # as stored; of another model as logarithms
    is_predicted: np.ndarray  # genes, (n_vars,) bool
    record: Mapping[str, Any] = field(default_factory=dict)  # of the prediction
    model: HE2Gene | None = None


def table_with(
    data: SpatialData | AnnData, layer: str, prediction_key: str | None, table_key: str | None
) -> tuple[AnnData, bool]:
    """Return the table with the layer, and whether another model than ours predicted it."""
    ours = layer in (Keys().layer, prediction_key) or prediction_named(data, str(prediction_key))
    if prediction_key is not None and ours:
        return get_table(data, table_key, prediction_key=prediction_key), False
    table = get_table(data, table_key, layer=layer)
    key = prediction_of(table, layer)
    if key is not None:
        raise ValueError(
            f"`layer` {layer!r} is of prediction {key!r} of hg.tl.predict, not of another model; pass prediction_key={key!r}"
        )
    return table, True


def other_layer(table: AnnData, layer: str, scale: Scale) -> EvaluatedLayer:
    """Read a layer that another model predicted."""
    steps = source_layer(table, layer)[1]
    values = log_expression(table, layer, scale=scale, expected="log")
    is_predicted = np.asarray(np.isfinite(values).any(axis=0))
    return EvaluatedLayer(layer, layer, bool(steps), adaptation_spots(table, steps), values, is_predicted)


def find_layer(table: AnnData, keys: Keys, layer: str, model: str | Path | HE2Gene | None) -> EvaluatedLayer:
    """Find the layer of the prediction, or a layer that was adapted from it."""
    record = record_of(table, keys.key_added)
    own = record["layer"]
    name = own if layer in (Keys().layer, keys.key_added) else layer
    origin, steps = source_layer(table, name)
    if origin != own or (name != own and not steps):
        adapted = [
            key
            for key, other in table.uns.items()
            if is_record_of("adapt", other) and source_layer(table, key)[0] == own
        ]
        others = [key for key, other in table.uns.items() if is_prediction(other) and other["layer"] == name]
        hint = f"; {name!r} is another prediction, pass prediction_key={others[0]!r}" if others else ""
        raise ValueError(
            f"`layer` {name!r} is neither prediction {keys.key_added!r} of hg.tl.predict nor adapted from it by hg.tl.adapt, valid: "
            f"{[own, *adapted]}{hint or '; if another model predicted it, pass prediction_key=None'}"
        )
    if name not in table.layers:
        raise ValueError(
            f"`layer` {name!r} has a record in uns, but the layer was removed, layers: {sorted(layer_names(table))}; run "
            f"{'hg.tl.adapt' if steps else 'hg.tl.predict'} again"
        )
    return EvaluatedLayer(
        name,
        name if steps else MODEL,
        bool(steps),
        adaptation_spots(table, steps),
        matrix_of(table, name),
        table.var[keys.predicted].to_numpy(bool),
        record,
        bundled_model(record) if model is None else predicting_model(record, model),
    )


def prediction_named(data: Any, key: str) -> bool:
    """Return whether a table of the object holds a prediction of that name."""
    tables = data.tables.values() if hasattr(data, "tables") else [data]
    return any(is_prediction(getattr(table, "uns", {}).get(key)) for table in tables)


def genes_in_common(
    table: AnnData, other: AnnData, known: np.ndarray, genes: Sequence[str] | None, gene_symbols: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns of both tables that hold the same predicted gene (``known``, ``(n_vars,)``) of ``genes``."""
    names = symbols_in(other, gene_symbols)
    columns = np.arange(table.n_vars)
    if other is not table:
        columns, _ = match_names(names, table.var_names, table.var.get("ensembl_id", table.var_names))
    usable = (columns >= 0) & known[columns] & ~pd.Series(columns).duplicated().to_numpy()
    if not usable.any():
        raise ValueError(
            f"`data`: no measured gene was predicted; predicted: {list(table.var_names[known][:3])}, measured: "
            f"{list(other.var_names[:3])}. If gene symbols are in a column of var, pass its name as `gene_symbols`"
        )
    if genes is not None:
        if not len(genes):
            raise ValueError("`genes` is empty; name at least one gene, or use None for all")
        wanted_names = list(dict.fromkeys(str(gene) for gene in genes))
        wanted = columns_of(table, wanted_names, gene_symbols)
        absent = [gene for gene, column in zip(wanted_names, wanted, strict=True) if column not in set(columns[usable])]
        if absent:
            raise ValueError(
                f"`genes` {absent[:5]} were not both predicted and measured; hg.get.genes lists the predicted genes"
            )
        usable &= np.isin(columns, wanted)
    chosen = np.flatnonzero(usable)
    return columns[chosen], chosen


def training_facts(
    table: AnnData, columns: np.ndarray, keys: Keys, model: HE2Gene | None, gene_symbols: str | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the training mean of each gene, and gene panels of the table and, if it is available, of the model."""
    mean = np.array(table.var[keys.mean] if keys.mean in table.var else np.full(table.n_vars, np.nan), float)
    panels = {"all genes": np.ones(len(columns), bool), "reliable": table.var[keys.reliable].to_numpy(bool)[columns]}
    if model is not None:
        symbols = gene_symbols if gene_symbols in table.var else None
        matched = match_genes(model, table, None, symbols)
        position = np.full(table.n_vars, -1)
        position[matched.columns] = matched.positions
        facts = model.genes.iloc[position[columns]]
        is_known = position[columns] >= 0
        panels["target"] = is_known & (facts["group"] == "target").to_numpy()
        panels["most variable"] = is_known & facts["variable"].to_numpy(bool)
        mean[columns] = np.where(np.isnan(mean[columns]) & is_known, facts["mean"], mean[columns])
    return mean[columns], {name: mask for name, mask in panels.items() if mask.any()}
