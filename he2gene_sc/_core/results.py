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

import pandas as pd

from . import validate
from .elements import is_object
from .invalidate import remove_derived, same_values, warn_removed
from .keys import Keys
from .ownership import is_record_of, signatures_of, unchanged_keys
from .signatures import same_digest

if TYPE_CHECKING:
    from anndata import AnnData

_MAPPINGS = ("layers", "obsm", "varm", "obsp", "varp", "uns")


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
    if is_object(data):
        objects = [data]
    elif isinstance(data, Iterable) and not isinstance(data, str | Mapping):
        objects = list(data)
    else:
        raise TypeError(f"`data` is a {type(data).__name__}; a SpatialData or AnnData object, or several, are needed")
    found = []
    for item in objects:
        if not is_object(item):
            raise TypeError(f"`data` holds a {type(item).__name__}; SpatialData or AnnData objects are needed")
        tables = item.tables if hasattr(item, "tables") else {"": item}
        if table_key is not None and hasattr(item, "tables"):
            validate.existing_key(table_key, tables, "table_key")
        written = [
            name
            for name, table in tables.items()
            if (table_key is None or name in (table_key, "")) and is_record_of(verb, table.uns.get(key))
        ]
        if not written:
            raise ValueError(f"`key` {key!r}: `data` holds no such result; run hg.tl.{verb} first")
        validate.not_ambiguous(written, "table_key")
        found.append(tables[written[0]])
    if not found:
        raise ValueError("`data` is empty; at least one object is needed")
    return found


def find_result(data: Any, verb: str, key: str, table_key: str | None = None) -> Mapping[str, Any]:
    """Return the record that a verb wrote to ``uns[key]`` of an object, a table, or the first of several."""
    return find_results(data, verb, key, table_key)[0].uns[key]


def write_result(
    table: AnnData,
    verb: str,
    key: str,
    *,
    params: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    **slots: Mapping[str, Any],
) -> None:
    """Write all results of a verb at once, or none if it is interrupted; ``slots`` map slot to key to value.

    ``uns[key]`` gets ``verb``, ``params``, ``written`` (keys by slot), ``signatures`` of the values, and the ``facts``.
    Entries that only an earlier run of the verb wrote under the same key are removed. Results that were computed from
    changed values are removed with a warning.
    """
    write_results([(table, _result(verb, key, params, facts, slots))], stacklevel=3)


def write_to_all(
    tables: Sequence[AnnData], verb: str, key: str, *, params: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write one record into all of several tables, or into none; parameters as for :func:`write_result`."""
    write_results([(table, _result(verb, key, params, facts, {})) for table in tables], stacklevel=3)


def write_results(results: Sequence[tuple[AnnData, Result]], stacklevel: int = 2) -> None:
    """Write results into all tables, or into none."""
    removed: list[str] = []
    with ExitStack() as undo:
        for table, result in results:
            if table.is_view:
                table._init_as_actual(table.copy())
            undo.enter_context(restore_on_error(table))
            removed += _write(table, result)
        # Warn inside the block: a filter may turn the warning into an exception.
        warn_removed(removed, stacklevel=stacklevel + 1)


@contextmanager
def restore_on_error(table: AnnData) -> Iterator[None]:
    """Restore every slot of a table if the block raises, also on Ctrl-C."""
    # anndata 0.13 and later list X among the layers, as None.
    mappings = {
        name: {key: slot[key] for key in slot if key is not None}
        for name, slot in ((name, getattr(table, name)) for name in _MAPPINGS)
    }
    frames = {name: getattr(table, name).copy() for name in ("obs", "var")}
    try:
        yield
    except BaseException:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _restore(table, mappings, frames)
        raise


def _restore(table: AnnData, mappings: Mapping[str, dict], frames: Mapping[str, pd.DataFrame]) -> None:
    for name, frame in frames.items():
        setattr(table, name, frame)
    for name, before in mappings.items():
        slot = getattr(table, name)
        for key in [key for key in slot if key is not None and key not in before]:
            del slot[key]
        for key, value in before.items():
            if key not in slot or slot[key] is not value:
                slot[key] = value


def _result(verb: str, key: str, params: Mapping, facts: Mapping | None, slots: Mapping) -> Result:
    given = {name: value for name, value in params.items() if value is not None}
    return Result(verb, key, {"verb": verb, "params": given, **(facts or {})}, slots)


def _write(table: AnnData, result: Result) -> list[str]:
    """Write one result; return the keys of the results that were removed."""
    before = table.uns.get(result.key)
    old = unchanged_keys(table, result.key) if is_record_of(result.verb, before) else {}
    removed = remove_derived(table, _changed(table, result, old, before), keep=result.key)
    for slot, names in old.items():
        for name in names:
            if name in getattr(table, slot) and name not in result.slots.get(slot, {}):
                del getattr(table, slot)[name]
    for slots in (result.slots, result.unrecorded):
        for slot, values in slots.items():
            for name, value in values.items():
                getattr(table, slot)[name] = value
    written = {slot: list(values) for slot, values in result.slots.items() if values}
    table.uns[result.key] = {**result.record, "written": written, "signatures": signatures_of(table, written)}
    return removed


def _changed(table: AnnData, result: Result, old: Mapping[str, Sequence[str]], before: Any) -> set[str]:
    """Return the names of layers, columns of ``obs`` and results that will change."""
    changed = set()
    for slot in ("layers", "obs"):
        values, there = result.slots.get(slot, {}), getattr(table, slot)
        names = dict.fromkeys([*values, *old.get(slot, [])])
        changed |= {n for n in names if n not in values or n not in there or not _same(slot, there[n], values[n])}
    if result.verb == "predict":
        labels = Keys(result.key).annotation
        # Other facts, such as package versions, do not change values.
        return changed | ({result.key, labels} if changed & {*result.slots["layers"], labels} else set())
    facts = result.record.keys() - {"verb", "params"}
    is_other = isinstance(before, Mapping) and any(not same_digest(before.get(n), result.record[n]) for n in facts)
    return changed | ({result.key} if is_other else set())


def _same(slot: str, before: Any, after: Any) -> bool:
    return same_values(before, after) if slot == "layers" else same_digest(pd.Series(before), pd.Series(after))


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
