"""Write elements to a staging folder of a store: complete, only the parts that differ, or only their metadata."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._core import logs
from .._core.differences import Change
from ._files import copy_modes, link_tree, remove
from ._storable import parts_of, storable
from ._store import RootMetadata

#: Files with the attributes of a group.
METADATA = ("zarr.json", ".zattrs")


@contextlib.contextmanager
def without_library_warnings() -> Iterator[None]:
    """Suppress warnings of zarr, anndata and spatialdata about which a user can do nothing."""
    import anndata

    strings = anndata.settings.override(allow_write_nullable_strings=True)
    with warnings.catch_warnings(action="ignore"), strings, logs.silence("spatialdata", "ome_zarr"):
        yield


def write(folder: Path, elements: Mapping[str, Any], attrs: Mapping[str, Any], formats: Any = None) -> None:
    """Write elements to a new store; with ``formats``, without consolidated metadata at the root."""
    import spatialdata as sd
    from anndata import AnnData

    stored = {
        name: storable(f"sdata[{name!r}]", element) if isinstance(element, AnnData) else element
        for name, element in elements.items()
    }
    with without_library_warnings():
        try:
            new = sd.SpatialData.init_from_elements(stored, attrs=dict(attrs))
            new.write(folder, update_sdata_path=True, consolidate_metadata=formats is None, sdata_formats=formats)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # anndata notes the key that could not be written.
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise ValueError(f"`sdata` cannot be written: {error}{notes}; the store is unchanged") from error


def stage(staging: Path, changes: list[Change], store: Path) -> None:
    """Write elements to ``staging/new``; unchanged parts of tables are hard links."""
    from spatialdata._io import format as formats

    if not changes:
        return
    elements = {c.name: parts_of(c.element, c.kept) if c.kept else c.element for c in changes}
    # The formats of spatialdata for the zarr version of the store.
    version = "V02" if (store / "zarr.json").is_file() else "V01"
    write(staging / "new", elements, {}, formats=[getattr(formats, f"SpatialDataContainerFormat{version}")()])
    for change in changes:
        old, new = store / change.path, staging / "new" / change.path
        for part in change.kept:
            remove(new / part)
            if not (new / part).parent.exists():
                (new / part).parent.mkdir()
                for name in (".zgroup", *METADATA):
                    if (old / part).with_name(name).exists():
                        link_tree((old / part).with_name(name), (new / part).with_name(name))
            link_tree(old / part, new / part)
        if change.kept:
            for axis in ("obs", "var"):
                _name_columns(new / axis, list(getattr(change.element, axis).columns))
        if change.difference is not None:
            copy_modes(old, new)


def _name_columns(frame: Path, columns: list[str]) -> None:
    """Write the order of all columns of a frame, of which some are hard links."""
    current = (frame / "zarr.json").is_file()
    path = frame / ("zarr.json" if current else ".zattrs")
    metadata = json.loads(path.read_bytes())
    (metadata["attributes"] if current else metadata)["column-order"] = columns
    path.write_text(json.dumps(metadata))


def stage_metadata(staging: Path, changes: list[Change], store: Path) -> None:
    """Write transformations and channel names into copies of the metadata of their elements."""
    import spatialdata as sd

    if not changes:
        return
    shadow = staging / "metadata"
    for change in changes:
        children = [child.relative_to(store) for child in (store / change.path).iterdir() if child.is_dir()]
        for folder in [Path(), Path(change.kind), change.path, *children]:
            (shadow / folder).mkdir(parents=True, exist_ok=True)
            for name in ("zarr.json", ".zgroup", ".zattrs", ".zarray"):
                if (store / folder / name).is_file() and not (shadow / folder / name).exists():
                    (shadow / folder / name).write_bytes((store / folder / name).read_bytes())
    (staging / "shadow").mkdir()
    RootMetadata(shadow, staging / "shadow").unconsolidate()
    with without_library_warnings():
        new = sd.SpatialData.init_from_elements({change.name: change.element for change in changes})
        new.path = shadow
        for change in changes:
            new.write_transformations(change.name)
            if change.difference is not None and "channel names" in change.difference.altered:
                new.write_channel_names(change.name)
