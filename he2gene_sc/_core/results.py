"""Find and write the results of verbs (public functions that write into tables).

A verb calls ``check_free`` before its work and :func:`write_result` after it. Results that depend on changed values are
removed, with a warning. An exception while writing (also a warning turned into one) leaves the table unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import validate
from .elements import is_object, objects_in
from .keys import MAPPINGS, Keys
from .logs import warn
from .matrix import dense
from .ownership import is_record_of, unchanged_keys
from .rasters import entries_of
from .signatures import same_digest, slot_digest

if TYPE_CHECKING:
    from anndata import AnnData

#: Values that are compared at once.
_BLOCK = 1 << 24
#: Parameters that name the input of a function: a layer, a column of ``obs``, another result, a prediction.
_INPUT_PARAMETERS = ("layer", "measured", "counts", "groupby", "domain_key", "key", "prediction")


@dataclass(frozen=True)
class Result:
    """Everything that one run of a verb writes into a table."""

    verb: str
    key: str  # the record is written to uns[key]
    record: Mapping[str, Any]
    slots: Mapping[str, Mapping[str, Any]]
    unrecorded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def find_results(data: Any, verb: str, key: str, table_key: str | None = None) -> list[AnnData]:
    """Return the table of each object in which a verb wrote ``uns[key]``; ``data`` is one object or table, or several."""
    found: list[AnnData] = []
    for item in objects_in(data):
        tables = item.tables if hasattr(item, "tables") else {"": item}
        if table_key is not None and hasattr(item, "tables"):
            tables = {validate.existing_key(table_key, tables, "table_key"): tables[table_key]}
        written = {name: table for name, table in tables.items() if is_record_of(verb, table.uns.get(key))}
        if not written:
            raise ValueError(f"`key` {key!r}: `data` holds no such result; run hg.tl.{verb} first")
        validate.not_ambiguous(written, "table_key")
        found += written.values()
    return found


def find_result(data: Any, verb: str, key: str, table_key: str | None = None) -> Mapping[str, Any]:
    """Return the record that a verb wrote to ``uns[key]`` of an object, a table, or the first of several."""
    return find_results(data, verb, key, table_key)[0].uns[key]


def write_result(
    tables: AnnData | Sequence[AnnData],
    verb: str,
    key: str,
    *,
    params: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    **slots: Mapping[str, Any],
) -> None:
    """Write all results of a verb into one or several tables, or none if it is interrupted; ``slots`` map slot to key to value.

    ``uns[key]`` gets ``verb``, ``params``, ``written`` (keys by slot), ``signatures`` of the values, and the ``facts``.
    Entries that only an earlier run of the verb wrote under the same key are removed.
    """
    given = {name: value for name, value in params.items() if value is not None}
    result = Result(verb, key, {"verb": verb, "params": given, **(facts or {})}, slots)
    write_results([(table, result) for table in ([tables] if is_object(tables) else tables)])


def write_results(results: Sequence[tuple[AnnData, Result]]) -> None:
    """Write results into all tables, or into none."""
    removed: list[str] = []
    with ExitStack() as undo:
        for table, result in results:
            if table.is_view:
                table._init_as_actual(table.copy())
            undo.enter_context(restore_on_error(table))
            removed += _write(table, result)
        # Warn inside the block: a filter may turn the warning into an exception.
        warn_removed(removed)


@contextmanager
def restore_on_error(table: AnnData) -> Iterator[None]:
    """Restore every slot of a table if the block raises, also on Ctrl-C."""
    before = {name: entries_of(table, name) for name in (*MAPPINGS, "uns")}
    frames = {name: getattr(table, name).copy() for name in ("obs", "var")}
    try:
        yield
    except BaseException:
        with warnings.catch_warnings(action="ignore"):
            for name, frame in frames.items():
                setattr(table, name, frame)
            for name, entries in before.items():
                slot = getattr(table, name)
                for key in {**entries_of(table, name), **entries}:
                    if key not in entries:
                        del slot[key]
                    elif key not in slot or slot[key] is not entries[key]:
                        slot[key] = entries[key]
        raise


def _write(table: AnnData, result: Result) -> list[str]:
    """Write one result; return the keys of the results that were removed."""
    before = table.uns.get(result.key)
    old = unchanged_keys(table, result.key) if is_record_of(result.verb, before) else {}
    removed = remove_derived(table, _changed(table, result, old, before), keep=result.key)
    _delete(table, {slot: set(names).difference(result.slots.get(slot, ())) for slot, names in old.items()})
    for slots in (result.slots, result.unrecorded):
        for slot, values in slots.items():
            for name, value in values.items():
                getattr(table, slot)[name] = value
    written = {slot: list(values) for slot, values in result.slots.items() if values}
    signatures = {
        slot: [slot_digest(table, slot, name) for name in names] for slot, names in written.items() if slot != "uns"
    }
    table.uns[result.key] = {**result.record, "written": written, "signatures": signatures}
    return removed


def _changed(table: AnnData, result: Result, old: Mapping[str, Sequence[str]], before: Any) -> set[str]:
    """Return the names of layers, columns of ``obs`` and results that will change."""
    changed = set()
    for slot, is_same in (("layers", same_values), ("obs", lambda a, b: same_digest(pd.Series(a), pd.Series(b)))):
        values, there = result.slots.get(slot, {}), getattr(table, slot)
        names = dict.fromkeys([*values, *old.get(slot, [])])
        changed |= {n for n in names if n not in values or n not in there or not is_same(there[n], values[n])}
    if result.verb == "predict":
        labels = Keys(result.key).annotation
        # Other facts, such as package versions, do not change values.
        return changed | ({result.key, labels} if changed & {*result.slots["layers"], labels} else set())
    facts = result.record.keys() - {"verb", "params"}
    is_other = isinstance(before, Mapping) and any(not same_digest(before.get(n), result.record[n]) for n in facts)
    return changed | ({result.key} if is_other else set())


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
            written = unchanged_keys(table, key)
            names.update([key], *written.values())
            _delete(table, {**written, "uns": [key, *written.get("uns", ())]})
        removed += found
    return removed


def _delete(table: AnnData, entries: Mapping[str, Iterable[str]]) -> None:
    for slot, names in entries.items():
        for name in names:
            if name in getattr(table, slot):
                del getattr(table, slot)[name]


def warn_removed(removed: list[str]) -> None:
    """Warn of results that were removed, if any."""
    if removed:
        warn(
            f"results that were computed from changed values were removed: uns {sorted(set(removed))}, with their layers and "
            "columns; run the functions that wrote them again"
        )


def _depends_on(record: Any, names: set[str]) -> bool:
    if not isinstance(record, Mapping) or not {"verb", "params"} <= set(record):
        return False
    params = record["params"]
    read = [params.get(name) for name in _INPUT_PARAMETERS]
    if "layer" not in params or "annotation_key" in params:
        read.append(params.get("prediction_key"))
    return any(isinstance(name, str) and name in names for name in read)


def scores_of(table: AnnData, keys: Keys) -> dict[str, tuple[str, str]]:
    """Return the key in ``obsm`` and the title suffix of each gene set; scores of the predicted layer take precedence."""
    runs = [
        (record["params"].get("layer"), key, record["results"])
        for key, record in table.uns.items()
        if is_record_of("programmes", record) and isinstance(table.obsm.get(key), pd.DataFrame)
    ]
    found = {}
    for layer, key, results in sorted(runs, key=lambda run: run[0] == keys.layer):
        suffix = "" if layer == keys.layer else f" ({'measured' if layer is None else layer})"
        for name, reliable in zip(results["source"], results["reliable"], strict=True):
            if name in table.obsm[key]:
                found[name] = key, suffix if reliable or layer is None else f"{suffix} (not reliable)"
    return found
