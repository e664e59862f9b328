"""Write elements beside those of a store: whole, or the parts that differ, or their metadata alone."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core import logs
from .._core.differences import Change, Difference
from ._files import copy_modes, link_tree, remove
from ._storable import parts_of, storable
from ._store import RootMetadata

if TYPE_CHECKING:
    from anndata import AnnData

#: Files of a group that hold its attributes.
METADATA = ("zarr.json", ".zattrs")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what zarr, anndata and spatialdata say that a user can do nothing about."""
    import anndata

    strings = anndata.settings.override(allow_write_nullable_strings=True)
    with warnings.catch_warnings(), strings, logs.silence("spatialdata", "ome_zarr"):
        warnings.simplefilter("ignore")
        yield


def write(
    folder: Path, members: Mapping[str, Mapping[str, Any]], attrs: Mapping[str, Any], formats: Any = None
) -> None:
    """Write elements to a new store, without the root's consolidated metadata where ``formats`` are given."""
    import spatialdata as sd

    tables = {name: storable(f"sdata[{name!r}]", table) for name, table in members.get("tables", {}).items()}
    with quiet():
        try:
            new = sd.SpatialData(**{**members, "tables": tables}, attrs=dict(attrs))
            new.write(folder, update_sdata_path=True, consolidate_metadata=formats is None, sdata_formats=formats)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # Of anndata: the key that could not be written.
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise ValueError(f"`sdata` cannot be written: {error}{notes}; the store is as it was") from error


def stage(staging: Path, changes: list[Change], store: Path) -> None:
    """Write elements to ``staging/new``; parts of tables that are the same become links."""
    if not changes:
        return
    members: dict[str, dict[str, Any]] = {}
    for change in changes:
        element = _skeleton(change.element, change.difference) if change.kind == "tables" else change.element
        members.setdefault(change.kind, {})[change.name] = element
    write(staging / "new", members, {}, formats=_formats(store))
    for change in changes:
        for part in change.difference.kept if change.difference is not None else ():
            target = staging / "new" / change.path / part
            remove(target)
            if not target.parent.exists():
                target.parent.mkdir()
                for name in (".zgroup", *METADATA):
                    if (store / change.path / part).with_name(name).exists():
                        link_tree((store / change.path / part).with_name(name), target.with_name(name))
            link_tree(store / change.path / part, target)
        if change.difference is not None and change.difference.kept:
            for axis in ("obs", "var"):
                _name_columns(staging / "new" / change.path / axis, list(getattr(change.element, axis).columns))
        if change.difference is not None:
            copy_modes(store / change.path, staging / "new" / change.path)


def _name_columns(frame: Path, columns: list[str]) -> None:
    """Note all columns of a frame in their order, of which some became links."""
    current = (frame / "zarr.json").is_file()
    path = frame / ("zarr.json" if current else ".zattrs")
    metadata = json.loads(path.read_bytes())
    (metadata["attributes"] if current else metadata)["column-order"] = columns
    path.write_text(json.dumps(metadata))


def _skeleton(table: AnnData, difference: Difference | None) -> AnnData:
    """Return a table without the parts that are to become links."""
    if difference is None or not difference.kept:
        return table
    return parts_of(table, difference.kept)


def _formats(store: Path) -> list[Any]:
    """Return the formats that keep a store in its version of zarr."""
    from spatialdata._io import format as formats

    current = (store / "zarr.json").is_file()
    name = "SpatialDataContainerFormatV02" if current else "SpatialDataContainerFormatV01"
    return [getattr(formats, name)()]


def stage_metadata(staging: Path, changes: list[Change], store: Path) -> None:
    """Write transformations and channel names into copies of the metadata of their elements."""
    import spatialdata as sd

    if not changes:
        return
    shadow = staging / "metadata"
    for change in changes:
        for folder in [Path(), Path(change.kind), *_groups(store, change.path)]:
            (shadow / folder).mkdir(parents=True, exist_ok=True)
            for name in ("zarr.json", ".zgroup", ".zattrs", ".zarray"):
                if (store / folder / name).is_file() and not (shadow / folder / name).exists():
                    (shadow / folder / name).write_bytes((store / folder / name).read_bytes())
    RootMetadata(shadow, _folder(staging / "shadow")).unconsolidate()
    members: dict[str, dict[str, Any]] = {}
    for change in changes:
        members.setdefault(change.kind, {})[change.name] = change.element
    with quiet():
        new = sd.SpatialData(**members)
        new.path = shadow
        for change in changes:
            new.write_transformations(change.name)
            if change.difference is not None and "channel names" in change.difference.altered:
                new.write_channel_names(change.name)


def _groups(store: Path, path: Path) -> list[Path]:
    children = [child for child in (store / path).iterdir() if child.is_dir()]
    return [path, *(path / child.name for child in children)]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
