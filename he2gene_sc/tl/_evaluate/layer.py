"""The layer that ``hg.tl.evaluate`` compares, its model, and the spots that it was adapted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._core.keys import Keys
from ..._core.matrix import layer_names
from ..._core.ownership import is_prediction, is_record_of
from ..._core.predictions import prediction_of, source_layer
from ..._core.spots import get_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Name of the prediction in the tables of an evaluation; an adapted layer keeps its own name.
MODEL = "he2gene"


@dataclass(frozen=True, eq=False)
class EvaluatedLayer:
    """A layer that predict, adapt or another model wrote."""

    name: str
    predictor: str  # its name in the tables
    adapted: bool
    fitted_on: np.ndarray | None  # spots, (n_obs,) bool; None if an older version did not record them


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


def find_layer(table: AnnData, keys: Keys, layer: str) -> EvaluatedLayer:
    """Find the layer of the prediction, or a layer that was adapted from it."""
    own = table.uns[keys.uns]["layer"]
    name = own if layer in (Keys().layer, keys.key_added) else layer
    origin, steps = source_layer(table, name)
    if origin != own or (name != own and not steps):
        adapted = [
            key
            for key, record in table.uns.items()
            if is_record_of("adapt", record) and source_layer(table, key)[0] == own
        ]
        others = [key for key, record in table.uns.items() if is_prediction(record) and record["layer"] == name]
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
    return EvaluatedLayer(name, name if steps else MODEL, bool(steps), adaptation_spots(table, steps))


def adaptation_spots(table: AnnData, steps: Sequence[str]) -> np.ndarray | None:
    """Return the spots that adapted layers were fitted on, ``(n_obs,)`` bool; ``None`` if they were not recorded."""
    columns = [f"{step}_measured" for step in steps]
    if not all(column in table.obs for column in columns):
        return None
    return np.logical_or.reduce([np.zeros(table.n_obs, bool), *(table.obs[c].to_numpy(bool) for c in columns)])


def prediction_named(data: Any, key: str) -> bool:
    """Return whether a table of the object holds a prediction of that name."""
    tables = data.tables.values() if hasattr(data, "tables") else [data]
    return any(is_prediction(getattr(table, "uns", {}).get(key)) for table in tables)
