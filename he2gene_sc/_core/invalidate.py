"""Invalidate results in a table that depend on values that have changed, by their records in ``uns``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .matrix import dense
from .ownership import unchanged_keys

if TYPE_CHECKING:
    from anndata import AnnData

#: Values that are compared at once.
_BLOCK = 1 << 24
#: Parameters that name the input of a function: a layer, a column of ``obs``, another result, a prediction.
_INPUT_PARAMETERS = ("layer", "measured", "counts", "groupby", "domain_key", "key", "prediction")


def same_values(before: Any, after: Any) -> bool:
    """Whether two layers are equal, NaN included; compared block by block."""
    if before.shape != after.shape:
        return False
    step = max(1, _BLOCK // max(1, after.shape[1]))
    blocks = (slice(start, start + step) for start in range(0, len(after), step))
    return all(np.array_equal(dense(before[rows]), dense(after[rows]), equal_nan=True) for rows in blocks)


def remove_derived(table: AnnData, names: Iterable[str], keep: str | None = None) -> list[str]:
    """Remove results that depend, directly or not, on changed layers, columns or results, except ``uns[keep]``.

    Return their keys in ``uns``. Entries that a user has changed are kept. Call it inside ``restore_on_error``.
    """
    names, removed = set(names), []
    while found := [key for key, record in table.uns.items() if key != keep and _depends_on(record, names)]:
        for key in found:
            names.add(key)
            names.update(*remove_result(table, key).values())
        removed += found
    return removed


def remove_result(table: AnnData, key: str) -> dict[str, list[str]]:
    """Remove a record and the entries that it names; return these entries."""
    written = unchanged_keys(table, key)
    del table.uns[key]
    for slot, keys in written.items():
        for name in keys:
            if name in getattr(table, slot):
                del getattr(table, slot)[name]
    return written


def warn_removed(removed: list[str], stacklevel: int) -> None:
    """Warn of results that were removed, if any."""
    if removed:
        warnings.warn(
            f"results that were computed from changed values were removed: uns {sorted(set(removed))}, with their layers and "
            "columns; run the functions that wrote them again",
            stacklevel=stacklevel + 1,
        )


def _depends_on(record: Any, names: set[str]) -> bool:
    if not isinstance(record, Mapping) or not {"verb", "params"} <= set(record):
        return False
    params = record["params"]
    read = [params.get(name) for name in _INPUT_PARAMETERS]
    if "layer" not in params or "annotation_key" in params:
        read.append(params.get("prediction_key"))
    return any(isinstance(name, str) and name in names for name in read)
