"""Find the entries of a table that our functions wrote, by the records in ``uns``; other entries are never overwritten.

A record ``uns[key]`` holds the function (``verb``), the keys that it wrote (``written``) and a digest of each value
(``signatures``). An entry is ours if a record names it and its value is unchanged. Predictions of version 0.6.0 and earlier
have no list of keys: these follow from ``key_added``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import pandas as pd

from .keys import OWN_TABLE, SLOTS, SPATIAL, Keys
from .signatures import is_unchanged
from .validate import format_list

if TYPE_CHECKING:
    from anndata import AnnData

#: Keys of ``uns`` that have a fixed meaning here, in spatialdata or in scanpy.
RESERVED = (OWN_TABLE, SPATIAL, "spatial", "spatialdata_attrs")


def public_name(verb: str) -> str:
    """Return the public name of a verb; verbs outside ``hg.tl`` are recorded with their namespace."""
    return f"hg.{verb}" if "." in verb else f"hg.tl.{verb}"


def is_prediction(record: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether ``hg.tl.predict`` wrote a record."""
    return isinstance(record, Mapping) and {"weights_sha256", "layer"} <= set(record)


def is_record_of(verb: str, record: Any) -> bool:
    """Whether a verb wrote a record."""
    if verb == "predict":
        return is_prediction(record)
    return isinstance(record, Mapping) and record.get("verb") == verb


def is_result(record: Any) -> bool:
    """Whether any verb wrote a record."""
    return is_prediction(record) or (isinstance(record, Mapping) and {"verb", "params"} <= set(record))


def recorded_keys(key: str, record: Any) -> dict[str, list[str]]:
    """Return the keys that a record names, by slot."""
    if not isinstance(record, Mapping):
        return {}
    if isinstance(written := record.get("written"), Mapping):
        return {str(slot): [str(name) for name in np.ravel(names)] for slot, names in written.items()}
    return Keys(key, str(record["layer"])).written() if is_prediction(record) else {}


def unchanged_keys(table: AnnData, key: str, record: Any = None) -> dict[str, list[str]]:
    """Return the keys that the record ``uns[key]`` names, by slot, if they exist and are unchanged."""
    record = table.uns.get(key) if record is None else record
    stored = record.get("signatures", {}) if isinstance(record, Mapping) else {}
    found: dict[str, list[str]] = {}
    for slot, names in recorded_keys(key, record).items():
        digests = [str(digest) for digest in np.ravel(stored.get(slot, []))]
        digests = digests if len(digests) == len(names) else [""] * len(names)
        there = getattr(table, slot)
        found[slot] = [
            name
            for name, digest in zip(names, digests, strict=True)
            if name in there and is_unchanged(table, slot, name, digest)
        ]
    return found


def check_free(table: AnnData, verb: str, key: str, *, parameter: str = "key_added", **slots: Iterable[str]) -> None:
    """Raise, before any work, if a verb would overwrite entries that it did not write; ``slots`` hold the keys to write."""
    planned = {slot: list(names) for slot, names in slots.items()}
    if key in RESERVED:
        raise ValueError(f"`{parameter}`: uns[{key!r}] is reserved; choose another name")
    check_case(table, parameter, {**planned, "uns": [key, *planned.get("uns", [])]})
    record = table.uns.get(key)
    if record is not None and not is_record_of(verb, record):
        raise ValueError(
            f"`{parameter}`: uns[{key!r}] exists and was not written by {public_name(verb)}; choose another name, or rename or "
            "delete it first"
        )
    named = recorded_keys(key, record) if record is not None else _without_record(table, verb, key, planned)
    unchanged = named if record is None else unchanged_keys(table, key, record)
    existing = [(slot, n) for slot, names in planned.items() for n in names if n in getattr(table, slot)]
    foreign = [(slot, n) for slot, n in existing if n not in named.get(slot, [])]
    changed = [entry for entry in existing if entry not in foreign and entry[1] not in unchanged.get(entry[0], [])]
    if foreign:
        lost = f". If it was, its record uns[{key!r}] is missing: anndata.concat keeps it with uns_merge='first'"
        raise ValueError(
            f"`{parameter}`: {_format_entries(foreign)} and was not written by {public_name(verb)}; choose another name, or rename or delete "
            f"it first{lost if record is None else ''}"
        )
    if changed:
        raise ValueError(
            f"`{parameter}`: {_format_entries(changed)} and was changed after {public_name(verb)} wrote it; keep it under another name, "
            "delete it, or choose another name for the result"
        )


def owns_spatial(table: AnnData) -> bool:
    """Whether ``obsm["spatial"]`` holds the centres that ``hg.tl.predict`` wrote."""
    mark = table.uns.get(SPATIAL)
    signature = mark.get("signature") if isinstance(mark, Mapping) else None
    return mark is not None and "spatial" in table.obsm and is_unchanged(table, "obsm", "spatial", signature)


def foreign_keys(table: AnnData) -> dict[str, list[str]]:
    """Return the keys of a table that no verb wrote, or that were changed since, by slot."""
    results = [key for key, record in table.uns.items() if is_result(record)]
    found = {}
    for slot in SLOTS:
        known = {name for key in results for name in unchanged_keys(table, key).get(slot, [])}
        known |= {*results, *RESERVED} if slot == "uns" else set()
        known |= {"spatial"} if slot == "obsm" and owns_spatial(table) else set()
        found[slot] = [str(n) for n in getattr(table, slot) if n is not None and n not in known]
    return found


def check_case(table: AnnData, parameter: str, slots: Mapping[str, Iterable[str]]) -> None:
    """Raise for names that differ only in case from existing ones, or that the index of a frame has."""
    for slot, names in slots.items():
        there = {str(name).lower(): str(name) for name in getattr(table, slot) if name is not None}
        index = getattr(table, slot).index.name if slot in ("obs", "var") else None
        for name in names:
            other = there.get(name.lower(), name)
            if other != name and name not in getattr(table, slot):
                raise ValueError(
                    f"`{parameter}`: {slot} has {other!r}, which differs from {name!r} only in case, and a store cannot hold "
                    "both; choose another name, or rename it first"
                )
            if index is not None and str(index).lower() == name.lower():
                raise ValueError(f"`{parameter}`: the index of {slot} is named {index!r}; choose another name")


def _without_record(table: AnnData, verb: str, key: str, slots: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the keys of a complete prediction whose record ``anndata.concat`` has dropped; empty if it is incomplete."""
    if verb != "predict" or not slots.get("layers"):
        return {}
    keys = Keys(key, slots["layers"][0])
    layer, embedding = table.layers.get(keys.layer), table.obsm.get(keys.embedding)
    proba, annotation = table.obsm.get(keys.proba), table.obs.get(keys.annotation)
    whole = (
        getattr(layer, "dtype", None) == np.float32
        and getattr(embedding, "dtype", None) == np.float32
        and isinstance(proba, pd.DataFrame)
        and isinstance(annotation, pd.Series)
        and set(annotation.dropna().astype(str)) <= set(proba.columns.astype(str))
        and keys.confidence in table.obs
    )
    return keys.written() if whole else {}


def _format_entries(entries: list[tuple[str, str]]) -> str:
    first, *others = [f"{slot}[{name!r}]" for slot, name in entries]
    return f"{first} exists" + (f" (so does {format_list(others)})" if others else "")
