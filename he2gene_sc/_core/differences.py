"""Differences between an object and the store that it was read from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import logs
from .equality import is_same_value, same_array, same_column
from .keys import MAPPINGS
from .rasters import entries_of, levels, systems_of
from .sources import folder_of, sources

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass
class Difference:
    """Differences between an element in memory and its copy on disk."""

    lost: list[str] = field(default_factory=list)  # on disk, not in memory
    altered: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)  # in memory only
    kept: list[str] = field(default_factory=list)  # unchanged parts of a table, as paths in its group
    of_verbs: set[str] = field(default_factory=set)  # lost entries that our functions wrote, and remove when outdated
    metadata_only: bool = False  # only transformations or channel names differ
    uns: Mapping[str, Any] = field(default_factory=dict)  # uns of the table on disk
    frames: Mapping[str, Any] = field(default_factory=dict)  # obs and var on disk

    def __bool__(self) -> bool:
        return bool(self.lost or self.altered or self.added)

    def note(self, where: str, stored: Iterable[str], current: Iterable[str]) -> list[str]:
        """Record keys that only one side has; return the keys that both have."""
        stored, current = list(stored), set(current)
        self.lost += [f"{where}[{key!r}]" for key in stored if key not in current]
        self.added += [f"{where}[{key!r}]" for key in sorted(current.difference(stored))]
        return [key for key in stored if key in current]


@dataclass(frozen=True)
class Change:
    """Element to write; ``difference`` is ``None`` if the store does not have it."""

    kind: str
    name: str
    element: Any
    difference: Difference | None = None

    @property
    def path(self) -> Path:
        return Path(self.kind, self.name)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def metadata_only(self) -> bool:
        return self.difference is not None and self.difference.metadata_only

    @property
    def kept(self) -> list[str]:
        return [] if self.difference is None else self.difference.kept


def read_elements(store: Path, kinds: set[str]) -> dict[str, Any]:
    """Read the elements of some kinds without spatialdata's warnings; skip elements that cannot be read."""
    import spatialdata as sd

    if not kinds:
        return {}
    with warnings.catch_warnings(action="ignore"), logs.silence("spatialdata", "ome_zarr"):
        found = sd.read_zarr(store, selection=tuple(sorted(kinds)), on_bad_files="warn")
    return {name: element for _, name, element in found.gen_elements()}


def table_difference(path: Path, table: AnnData) -> Difference:
    """Compare a table with its copy on disk, column by column and layer by layer."""
    import zarr
    from anndata.io import read_elem

    found = Difference()
    with warnings.catch_warnings(action="ignore"):
        group: Any = zarr.open_group(path, mode="r", use_consolidated=False)
        frames = {axis: read_elem(group[axis]) for axis in ("obs", "var")}
        uns = read_elem(group["uns"]) if "uns" in group else {}
        for axis, names in (("obs", table.obs_names), ("var", table.var_names)):
            stored, current = frames[axis].index.astype(str), names.astype(str)
            _compare_names(found, axis, stored, current)
            equal = _compare_frame(found, axis, frames[axis], getattr(table, axis))
            # Before version 0.8, anndata stored categories separately from their column.
            if stored.equals(current) and group[axis].attrs.get("encoding-version") == "0.2.0":
                found.kept += [f"{axis}/{key}" for key in equal if "/" not in key and key != names.name]
        for part, value, is_same in (("X", table.X, _is_same_array), ("raw", table.raw, partial(_is_same_raw, found))):
            in_store = part in group and group[part].attrs.get("encoding-type") != "null"
            if in_store and value is not None:
                (found.kept if is_same(group[part], value) else found.altered).append(part)
            elif in_store or value is not None:
                (found.lost if in_store else found.added).append(part)
        _compare_mapping(found, "uns", uns, table.uns)
        for slot in MAPPINGS:
            current = entries_of(table, slot)
            stored = list(group[slot].keys()) if slot in group else []
            for key in found.note(slot, stored, current):
                if _is_same_array(group[slot][key], current[key]):
                    found.kept.append(f"{slot}/{key}")
                else:
                    found.altered.append(f"{slot}[{key!r}]")
    found.uns, found.frames = uns, frames
    return found


def _compare_names(found: Difference, axis: str, stored: Any, current: Any) -> None:
    if stored.equals(current):
        return
    missing = ~np.isin(stored, current)
    if n_missing := max(missing.sum(), len(stored) - len(current)):
        found.lost.append(f"{n_missing} of {len(stored)} rows of {axis} ({', '.join(stored[missing][:3])}, …)")
    else:
        found.altered.append(f"{axis}_names")


def _compare_frame(found: Difference, where: str, stored: Any, current: Any) -> list[str]:
    """Compare two frames; return the equal columns."""
    both = found.note(where, map(str, stored.columns), map(str, current.columns))
    if len(stored) != len(current):
        found.altered.append(where)
        return []
    equal = [key for key in both if is_same_value(stored[key], current[key])]
    found.altered += [f"{where}[{key!r}]" for key in both if key not in equal]
    order = [str(key) for key in current.columns if str(key) in both]
    if order != both or stored.index.name != current.index.name:
        found.altered.append(f"order of {where}")
    return equal


def _compare_mapping(found: Difference, where: str, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    current = {str(key): value for key, value in current.items() if value is not None or str(key) in stored}
    for key in found.note(where, map(str, stored), current):
        if isinstance(stored[key], Mapping) and isinstance(current[key], Mapping):
            _compare_mapping(found, f"{where}[{key!r}]", stored[key], current[key])
        elif not is_same_value(stored[key], current[key]):
            found.altered.append(f"{where}[{key!r}]")


def _is_same_array(stored: Any, value: Any) -> bool:
    """Whether an array of a table equals its copy on disk; large arrays are compared by blocks."""
    from anndata.io import read_elem

    encoding = stored.attrs.get("encoding-type", "")
    if encoding in ("csr_matrix", "csc_matrix"):
        if getattr(value, "format", None) != encoding[:3] or tuple(stored.attrs["shape"]) != value.shape:
            return False
        if stored["data"].dtype != value.data.dtype:
            return False
        return all(
            same_array(stored[part], getattr(value, part).astype(stored[part].dtype, copy=False))
            for part in ("indptr", "indices", "data")
        )
    if encoding == "array" and hasattr(value, "dtype") and not hasattr(value, "tocsr"):
        return same_array(stored, value)
    return is_same_value(read_elem(stored), value)


def _is_same_raw(found: Difference, stored: Any, raw: Any) -> bool:
    from anndata.io import read_elem

    equal = _is_same_array(stored["X"], raw.X) and is_same_value(read_elem(stored["var"]), raw.var)
    varm = list(stored["varm"].keys()) if "varm" in stored else []
    both = found.note("raw.varm", varm, map(str, raw.varm.keys()))
    equal &= len(both) == len(varm) == len(raw.varm)
    return equal and all(_is_same_array(stored["varm"][key], raw.varm[key]) for key in both)


# --- Elements in space -----------------------------------------------------------------------------------------------


def spatial_difference(kind: str, name: str, stored: Any, current: Any, *, data: bool = True) -> Difference:
    """Compare an image, labels, points or shapes with the copy on disk; read pixels only if they may differ.

    Without ``data``, compare only transformations and channel names.
    """
    from spatialdata.models import get_axes_names

    found = Difference()
    if not data:
        pass
    elif kind in ("images", "labels"):
        before, now = levels(stored), levels(current)
        if len(before) != len(now) or not all(
            a.dims == b.dims and a.shape == b.shape and a.dtype == b.dtype and _same_pixels(a.data, b.data)
            for a, b in zip(before, now, strict=True)
        ):
            found.altered.append("pixels")
    elif kind == "shapes" or getattr(stored, "_name", None) != getattr(current, "_name", ()):
        before, now = (side.to_wkb() if kind == "shapes" else side.compute() for side in (stored, current))
        if not same_column(before.index.to_series(), now.index.to_series()):
            found.altered.append(f"index of {name}")
            _compare_names(found, name, before.index.astype(str), now.index.astype(str))
        _compare_frame(found, name, before, now)
    data_differ = bool(found)
    ways = systems_of(stored), systems_of(current)
    axes = tuple(axis for axis in get_axes_names(current) if axis != "c")
    for system in found.note("transformations", *ways):
        if not np.array_equal(*(way[system].to_affine_matrix(axes, axes) for way in ways)):
            found.altered.append(f"transformations[{system!r}]")
    if kind == "images" and channels(stored) != channels(current):
        found.altered.append("channel names")
    found.metadata_only = bool(found) and not data_differ
    return found


def channels(element: Any) -> list[str]:
    """Return the channel names of an image."""
    first = levels(element)[0]
    return [str(name) for name in first.coords["c"].values] if "c" in first.coords else []


def _same_pixels(stored: Any, current: Any) -> bool:
    path = _zarr_path(stored)
    if path is not None and path == _zarr_path(current):
        return True
    import dask.array as da

    a = da.asarray(stored)
    b = da.asarray(current).rechunk(a.chunks)
    unequal = a != b
    if a.dtype.kind == "f":
        unequal &= ~(da.isnan(a) & da.isnan(b))
    return not bool(unequal.any().compute())


def _zarr_path(array: Any) -> str | None:
    """Return the path of the zarr array that a dask array reads unchanged, rechunked or not; ``None`` for other arrays."""
    layers = getattr(getattr(array, "dask", None), "layers", {})
    plain_steps = ("original-from-zarr", "from-zarr", "rechunk-merge", "rechunk-split", "rechunk-p2p")
    if not all(name.startswith(plain_steps) for name in layers):
        return None
    found = {str(folder.resolve()) for folder in map(folder_of, sources(array)) if folder is not None}
    return found.pop() if len(found) == 1 else None
