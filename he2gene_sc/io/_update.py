"""Update the store of an object: write changed elements beside the old ones, and exchange them."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.concurrent_changes import NOT_COMPARED
from .._core.differences import Change, Difference, read_elements, spatial_difference, table_difference
from .._core.element_results import is_as_written
from .._core.elements import check_files
from .._core.keys import ATTRS, MAPPINGS, OWN_TABLE
from .._core.ownership import is_result, recorded_keys
from .._core.rasters import entries_of, levels
from .._core.sources import folder_of, sources
from .._core.stores import (
    KINDS,
    SAVED,
    elements,
    fingerprint,
    fingerprints,
    new_id,
    noted,
    remember,
    root_attrs,
    saved_by,
    without_store_attrs,
)
from ._files import WAITING, put_folder, swap, sync, sync_tree
from ._staging import METADATA, stage, stage_metadata
from ._storable import check_table
from ._store import STAGING, RootMetadata, locked
from ._tiled import TiledImage

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def update(sdata: SpatialData, store: Path, *, overwrite: bool) -> None:
    """Write new and changed elements; ``store`` is the one that ``sdata`` was read from."""
    interrupted = (store / STAGING).exists()
    with locked(store) as staging:
        if interrupted:
            _rename_waiting(sdata)
        as_compared = fingerprints(store)
        before = root_attrs(store) or {}
        saved = saved_by(before)
        attrs = user_attrs(sdata.attrs)
        changes, unchanged = _compare(sdata, store, before)
        if not overwrite and saved_by(sdata.attrs).get("attrs") != saved.get("attrs"):
            attrs = _merge_attrs(user_attrs(before), attrs)
        attrs_differ = _attrs_difference(user_attrs(before), attrs)
        if not overwrite:
            _refuse_loss(sdata, store, changes, attrs_differ, saved)
        _refuse_links_elsewhere(store, changes)
        ids: dict[str, str] = {}
        if changes or attrs_differ or interrupted:
            stage(staging, [c for c in changes if not c.metadata_only], store)
            stage_metadata(staging, [c for c in changes if c.metadata_only], store)
            sync_tree(staging)
            root = {**attrs, "spatialdata_attrs": before.get("spatialdata_attrs", {})}
            with _restore_on_error(store, staging) as (metadata, undo):
                metadata.unconsolidate()
                for change in sorted(changes, key=lambda c: KINDS.index(c.kind)):
                    _exchange_element(change, store, staging, undo)
                    ids[change.key] = new_id(store / change.path)
                if attrs_differ:
                    ids["attrs"] = new_id(attrs)
                if saved or ids:
                    root[ATTRS] = {**attrs.get(ATTRS, {}), SAVED: {**saved, **ids}}
                metadata.write(root)
            reopen(sdata, store, changes)
        as_saved = [*unchanged, *([] if attrs_differ else ["attrs"])]
        known = {**saved_by(sdata.attrs), **{key: saved[key] for key in as_saved if key in saved}, **ids}
        sdata.attrs = {**attrs, ATTRS: {**attrs.get(ATTRS, {}), SAVED: known}} if known else attrs
        written = {place: fingerprint(store, *place) for place in (*((c.kind, c.name) for c in changes), ("attrs", ""))}
        remember(
            sdata, {place: state for place, state in as_compared.items() if "/".join(place) in unchanged} | written
        )


def _rename_waiting(sdata: SpatialData) -> None:
    """Rename elements that were read between the two renames of a killed save, which the lock has finished."""
    for kind, name, element in list(sdata.gen_elements()):
        if name.endswith(WAITING):
            del getattr(sdata, kind)[name]
            if name.removesuffix(WAITING) not in sdata:
                getattr(sdata, kind)[name.removesuffix(WAITING)] = element


# --- What differs ----------------------------------------------------------------------------------------------------


def _compare(sdata: SpatialData, store: Path, attrs: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """Compare every element with the store, whose root has ``attrs``; return the changes, and the unchanged elements."""
    there = elements(store)
    names = {name.casefold(): (kind, name) for kind, name in there}
    stored = read_elements(
        store, {kind for kind, name, _ in sdata.gen_elements() if (kind, name) in there} - {"tables"}
    )
    changes, unchanged = [], []
    for kind, name, element in sdata.gen_elements():
        if kind == "tables":
            check_table(f"sdata[{name!r}]", element)
        check_files(f"{kind}[{name!r}]", element)
        if (kind, name) not in there:
            if other := names.get(name.casefold()):
                existing = "of that name" if other[1] == name else f"{other[1]!r}, which differs only in case"
                raise ValueError(f"{kind} {name!r} cannot be saved: the store has {other[0]} {existing}; rename yours")
            changes.append(Change(kind, name, element))
            continue
        difference = Difference(lost=["all of it: it cannot be read, or is not in the consolidated metadata"])
        with contextlib.suppress(Exception):
            # Elements that cannot be read count as different; only `overwrite` replaces them.
            if kind == "tables":
                difference = table_difference(store / kind / name, element)
                difference.of_verbs = _of_verbs(difference.uns, difference.lost)
            elif name in stored:
                difference = spatial_difference(kind, name, stored[name], element)
                sides = ((attrs, stored[name]), (sdata.attrs, element))
                if difference.lost and all(is_as_written(side, kind, name, value) for side, value in sides):
                    difference.of_verbs = {item for item in difference.lost if " rows of " in item}
        if difference:
            changes.append(Change(kind, name, element, difference))
        else:
            unchanged.append(f"{kind}/{name}")
    return changes, unchanged


def _of_verbs(uns: Mapping[str, Any], lost: list[str]) -> set[str]:
    """Return the lost items that our functions wrote, by the records in ``uns``."""
    written = {f"uns[{key!r}]" for key, record in uns.items() if is_result(record)}
    for key, record in uns.items():
        if is_result(record):
            written.update(f"{slot}[{name!r}]" for slot, names in recorded_keys(key, record).items() for name in names)
    ours = {item for item in lost if item in written or any(item.startswith(f"{start}[") for start in written)}
    return ours | ({item for item in lost if " rows of " in item} if OWN_TABLE in uns else set())


def _refuse_loss(
    sdata: SpatialData, store: Path, changes: list[Change], attrs: Difference, saved: Mapping[str, str]
) -> None:
    """Raise if the save would overwrite data that the object does not have."""
    mine, known = saved_by(sdata.attrs), noted(sdata)
    lost, is_uncertain = [], False
    for key, kind, difference in [(c.key, c.kind, c.difference) for c in changes] + [("attrs", "attrs", attrs)]:
        if not difference:
            continue
        as_read = mine.get(key) == saved.get(key)
        place = (kind, key.partition("/")[2])
        if place in known.files:
            as_read = as_read and known.files[place].is_same(fingerprint(store, *place))
        maybe = known.possible_changes.get(place, set())
        of_verbs = set() if NOT_COMPARED in maybe else difference.of_verbs - maybe
        items = [item for item in difference.lost if not (as_read and item in of_verbs)]
        # Pixels do not change as a side effect, and cannot be recovered.
        if not as_read or (kind == "images" and not difference.metadata_only):
            items += difference.altered
        uncertain = [
            item for item in difference.altered if item not in items and (item in maybe or NOT_COMPARED in maybe)
        ]
        if items or uncertain:
            since = "" if as_read else " (another process saved it after you read it)"
            noted_items = [f"{item} (another process may have changed it after you read it)" for item in uncertain]
            lost.append(f"{key}{since}: {', '.join(items + noted_items)}")
            is_uncertain |= bool(uncertain)
    if lost:
        why = (
            " Files of this store are newer than this Python process, and `sdata` differed from them when hg first used it. If "
            "you changed these values yourself, pass overwrite=True."
        )
        raise FileExistsError(
            f"Saving `sdata` would remove data that only the store {str(store)!r} holds: {'; '.join(lost)}. Read the store again, "
            f"or pass overwrite=True to replace it.{why if is_uncertain else ''}"
        )


def _refuse_links_elsewhere(store: Path, changes: list[Change]) -> None:
    """Raise for elements that a link puts on another file system, across which folders cannot be exchanged."""
    for change in changes:
        place = (store / change.path).resolve()
        place = next((part for part in (place, *place.parents) if part.exists()), store)
        if place.stat().st_dev != store.stat().st_dev or place.parent.stat().st_dev != store.stat().st_dev:
            raise ValueError(
                f"`sdata`: {change.kind} {change.name!r} of the store {str(store)!r} is a link to {str(place)!r} on another file "
                "system, and cannot be replaced there; move the folder itself into the store, or save to another path"
            )


def user_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes as JSON reads them, without the entries that belong to the store."""
    plain: dict[str, Any] = {}
    for key, value in without_store_attrs(attrs).items():
        try:
            plain.update(json.loads(json.dumps({key: value}, default=_to_json)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`sdata`: attrs[{key!r}] cannot be saved: {error}; text, numbers, lists and dicts can. Convert it, or delete it: "
                f"del sdata.attrs[{key!r}]"
            ) from error
    return plain


def _to_json(value: Any) -> Any:
    """Convert numbers and arrays of numpy for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"it holds {value!r} of type {type(value).__name__}")


def _attrs_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> Difference:
    found = Difference()
    for key in found.note("attrs", there, here):
        if there[key] != here[key]:
            found.altered.append(f"attrs[{key!r}]")
    return found


def _merge_attrs(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Merge attributes of the object with those that another process has added to the store."""
    merged = {**there, **here}
    for key in set(there) & set(here):
        if isinstance(there[key], Mapping) and isinstance(here[key], Mapping):
            merged[key] = _merge_attrs(there[key], here[key])
    return merged


# --- Exchange --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _restore_on_error(store: Path, staging: Path) -> Iterator[tuple[RootMetadata, list[Callable[[], object]]]]:
    """Restore everything if the block raises, also on Ctrl-C."""
    metadata = RootMetadata(store, staging)
    undo: list[Callable[[], object]] = []
    try:
        yield metadata, undo
    except BaseException:
        for step in reversed(undo):
            step()
        metadata.restore()
        raise


def _exchange_element(change: Change, store: Path, staging: Path, undo: list[Callable[[], object]]) -> None:
    """Exchange the old element with the new one; register the undo step first."""
    if change.metadata_only:
        for name in METADATA:
            new, old = staging / "metadata" / change.path / name, store / change.path / name
            if new.exists() and old.exists():
                before = new.with_name(f"{name}-old")
                before.write_bytes(old.read_bytes())
                undo.append(partial(before.replace, old))
                new.replace(old)
                sync(old.parent)
        return
    # A link stays a link: its target is exchanged.
    new, old = staging / "new" / change.path, (store / change.path).resolve()
    if not old.parent.exists():
        # The first element of its kind comes with its group, and so do other new ones.
        new, old = new.parent, old.parent
    if not new.exists():
        return
    undo.append(partial(_put_back, new, old, old.stat().st_ino if old.exists() else None))
    put_folder(new, old)


def _put_back(new: Path, old: Path, inode: int | None) -> None:
    """Undo an exchange if it has taken place."""
    if inode is None and not new.exists():
        old.rename(new)
    elif inode is not None and old.stat().st_ino != inode:
        swap(new, old)


def reopen(sdata: SpatialData, store: Path, changes: list[Change]) -> None:
    """Reopen lazy values from the present store: of written elements, and of others that read what was replaced."""
    written = {change.key: (store / change.path).resolve() for change in changes if not change.metadata_only}
    lazy = []
    for kind, name, element in list(sdata.gen_elements()):
        replaced = None if f"{kind}/{name}" in written else list(written.values())
        if kind == "tables":
            _reopen_table(element, store / kind / name, replaced)
            continue
        parts = [level.data for level in levels(element)] if kind in ("images", "labels") else [element]
        if any(_is_stale(part, replaced) for part in parts):
            lazy.append((kind, name))
    stored = read_elements(store, {kind for kind, _ in lazy})
    with warnings.catch_warnings(action="ignore"):
        for kind, name in lazy:
            getattr(sdata, kind)[name] = stored[name]


def _is_stale(values: Any, replaced: list[Path] | None) -> bool:
    """Whether dask reads one of the ``replaced`` folders (``None``: any), or may do so; arrays in memory do not."""
    folders = [folder_of(source) for source in sources(values) if not isinstance(source, TiledImage)]
    if replaced is None:
        return bool(folders)
    return bool(replaced) and any(
        folder is None or any(folder.resolve().is_relative_to(path) for path in replaced) for folder in folders
    )


def _reopen_table(table: AnnData, path: Path, replaced: list[Path] | None) -> None:
    import zarr
    from anndata.experimental import read_elem_lazy

    group = zarr.open_group(path, mode="r", use_consolidated=False)
    if _is_stale(table.X, replaced):
        table.X = read_elem_lazy(group["X"])
    if table.raw is not None and _is_stale(table.raw.X, replaced):
        raw = table.raw.to_adata()
        raw.X = read_elem_lazy(group["raw/X"])
        table.raw = raw
    places: list[tuple[str, Any, Mapping[str, Any]]]
    places = [(slot, getattr(table, slot), entries_of(table, slot)) for slot in (*MAPPINGS, "uns")]
    for where, entries, values in places:
        for key, value in values.items():
            if isinstance(value, Mapping):
                places.append((f"{where}/{key}", value, value))
            elif _is_stale(value, replaced):
                entries[key] = read_elem_lazy(group[f"{where}/{key}"])
