"""What an object holds otherwise than the store that it was read from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import logs
from .equality import is_same_value, same_array, same_column
from .rasters import levels, zarr_folders

if TYPE_CHECKING:
    import zarr
    from anndata import AnnData

MAPPINGS = ("layers", "obsm", "varm", "obsp", "varp")


@dataclass
class Difference:
    """How an element in memory differs from that on disk."""

    lost: list[str] = field(default_factory=list)  # lies on disk and not in memory
    altered: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)  # is in memory alone
    kept: list[str] = field(default_factory=list)  # parts of a table that are the same, by their path in it
    of_verbs: set[str] = field(default_factory=set)  # lost ones that our verbs wrote, and remove when outdated
    metadata_only: bool = False  # only transformations or channel names differ
    uns: Mapping[str, Any] = field(default_factory=dict)  # of the table on disk
    frames: Mapping[str, Any] = field(default_factory=dict)  # obs and var on disk

    def __bool__(self) -> bool:
        return bool(self.lost or self.altered or self.added)

    def note(self, where: str, there: Iterable[str], here: Iterable[str]) -> list[str]:
        """Note what only one side holds; return what both hold."""
        there, here = list(there), set(here)
        self.lost += [f"{where}[{key!r}]" for key in there if key not in here]
        self.added += [f"{where}[{key!r}]" for key in sorted(here.difference(there))]
        return [key for key in there if key in here]


@dataclass(frozen=True)
class Change:
    """An element that is to be written; ``difference`` is ``None`` where the store does not have it."""

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


def read_elements(store: Path, kinds: set[str]) -> dict[str, Any]:
    """Read the elements of some kinds, without what spatialdata says of them; those that cannot be read are left out."""
    import spatialdata as sd

    if not kinds:
        return {}
    with warnings.catch_warnings(), logs.silence("spatialdata", "ome_zarr"):
        warnings.simplefilter("ignore")
        found = sd.read_zarr(store, selection=tuple(sorted(kinds)), on_bad_files="warn")
    return {name: element for _, name, element in found.gen_elements()}


def table_difference(path: Path, table: AnnData) -> Difference:
    """Compare a table with what lies on disk, column by column and layer by layer."""
    import zarr
    from anndata.io import read_elem

    found = Difference()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group: Any = zarr.open_group(path, mode="r", use_consolidated=False)
        frames = {axis: read_elem(group[axis]) for axis in ("obs", "var")}
        uns = read_elem(group["uns"]) if "uns" in group else {}
        for axis, names in (("obs", table.obs_names), ("var", table.var_names)):
            there, here = frames[axis].index.astype(str), names.astype(str)
            _names(found, axis, there, here)
            alike = _frame(found, axis, frames[axis], getattr(table, axis))
            # Versions of anndata before 0.8 kept categories apart from their column.
            if there.equals(here) and group[axis].attrs.get("encoding-version") == "0.2.0":
                found.kept += [f"{axis}/{key}" for key in alike if "/" not in key and key != names.name]
        _part(found, "X", group, table.X)
        _mapping(found, "uns", uns, table.uns)
        for slot in MAPPINGS:
            # Newer versions of anndata have X among the layers, under None.
            here = {key: value for key, value in dict(getattr(table, slot)).items() if key is not None}
            there = list(group[slot].keys()) if slot in group else []
            for key in found.note(slot, there, here):
                _part(found, f"{slot}/{key}", group, here[key])
        _raw(found, group, table)
    found.uns, found.frames = uns, frames
    return found


def _names(found: Difference, axis: str, there: Any, here: Any) -> None:
    if there.equals(here):
        return
    gone = ~np.isin(there, here)
    n_gone = max(gone.sum(), len(there) - len(here))
    if n_gone:
        found.lost.append(f"{n_gone} of {len(there)} rows of {axis} ({', '.join(there[gone][:3])}, …)")
    else:
        found.altered.append(f"{axis}_names")


def _frame(found: Difference, where: str, there: Any, here: Any) -> list[str]:
    """Compare two frames; return the columns that are the same."""
    both = found.note(where, map(str, there.columns), map(str, here.columns))
    if len(there) != len(here):
        found.altered.append(where)
        return []
    alike = [key for key in both if is_same_value(there[key], here[key])]
    found.altered += [f"{where}[{key!r}]" for key in both if key not in alike]
    order = [str(key) for key in here.columns if str(key) in both]
    if order != both or there.index.name != here.index.name:
        found.altered.append(f"order of {where}")
    return alike


def _mapping(found: Difference, where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    here = {str(key): value for key, value in here.items() if value is not None or str(key) in there}
    for key in found.note(where, map(str, there), here):
        if isinstance(there[key], Mapping) and isinstance(here[key], Mapping):
            _mapping(found, f"{where}[{key!r}]", there[key], here[key])
        elif not is_same_value(there[key], here[key]):
            found.altered.append(f"{where}[{key!r}]")


def _part(found: Difference, where: str, group: zarr.Group, value: Any) -> None:
    """Compare one array of a table, without reading it whole where it is large."""
    name = where.replace("/", "['", 1) + "']" if "/" in where else where
    there = group.get(where)
    if there is None or value is None:
        if there is not None:
            found.lost.append(name)
        elif value is not None:
            found.added.append(name)
        return
    if _same_part(there, value):
        found.kept.append(where)
    else:
        found.altered.append(name)


def _same_part(there: Any, value: Any) -> bool:
    from anndata.io import read_elem

    encoding = there.attrs.get("encoding-type", "")
    if encoding in ("csr_matrix", "csc_matrix"):
        if getattr(value, "format", None) != encoding[:3] or tuple(there.attrs["shape"]) != value.shape:
            return False
        if there["data"].dtype != value.data.dtype:
            return False
        return all(
            same_array(there[part], getattr(value, part).astype(there[part].dtype, copy=False))
            for part in ("indptr", "indices", "data")
        )
    if encoding == "array" and hasattr(value, "dtype") and not hasattr(value, "tocsr"):
        return same_array(there, value)
    return is_same_value(read_elem(there), value)


def _raw(found: Difference, group: Any, table: AnnData) -> None:
    there = group.get("raw")
    if there is not None and there.attrs.get("encoding-type") == "null":
        there = None
    if there is None or table.raw is None:
        if there is not None:
            found.lost.append("raw")
        elif table.raw is not None:
            found.added.append("raw")
        return
    from anndata.io import read_elem

    alike = _same_part(there["X"], table.raw.X) and is_same_value(read_elem(there["var"]), table.raw.var)
    varm = list(there["varm"].keys()) if "varm" in there else []
    both = found.note("raw.varm", varm, map(str, table.raw.varm.keys()))
    alike &= len(both) == len(varm) == len(table.raw.varm)
    alike = alike and all(_same_part(there["varm"][key], table.raw.varm[key]) for key in both)
    (found.kept if alike else found.altered).append("raw")


# --- Elements in space -----------------------------------------------------------------------------------------------


def spatial_difference(kind: str, name: str, there: Any, here: Any, *, data: bool = True) -> Difference:
    """Compare an image, labels, points or shapes with what lies on disk; pixels are read only if they may differ.

    Without ``data``, where it lies and the names of channels alone.
    """
    found = Difference()
    if not data:
        pass
    elif kind in ("images", "labels"):
        if not _same_raster(there, here):
            found.altered.append("pixels")
    elif kind == "shapes":
        _rows(found, name, there.to_wkb(), here.to_wkb())
    elif getattr(there, "_name", None) != getattr(here, "_name", ()):
        _rows(found, name, there.compute(), here.compute())
    data_differ = bool(found)
    _transformations(found, there, here)
    if kind == "images" and channels(there) != channels(here):
        found.altered.append("channel names")
    found.metadata_only = bool(found) and not data_differ
    return found


def _rows(found: Difference, name: str, there: Any, here: Any) -> None:
    """Compare shapes or points, row by row and column by column."""
    if not same_column(there.index.to_series(), here.index.to_series()):
        found.altered.append(f"index of {name}")
        _names(found, name, there.index.astype(str), here.index.astype(str))
    _frame(found, name, there, here)


def _transformations(found: Difference, there: Any, here: Any) -> None:
    """Compare where two elements lie, in each coordinate system."""
    from spatialdata.models import get_axes_names
    from spatialdata.transformations import get_transformation

    before, now = (get_transformation(element, get_all=True) for element in (there, here))
    axes = tuple(axis for axis in get_axes_names(here) if axis != "c")
    for name in found.note("transformations", before, now):
        if not np.array_equal(*(way[name].to_affine_matrix(axes, axes) for way in (before, now))):
            found.altered.append(f"transformations[{name!r}]")


def channels(element: Any) -> list[str]:
    """Names of the channels of an image."""
    first = levels(element)[0]
    return [str(name) for name in first.coords["c"].values] if "c" in first.coords else []


def _same_raster(there: Any, here: Any) -> bool:
    before, now = levels(there), levels(here)
    if len(before) != len(now):
        return False
    return all(
        a.dims == b.dims and a.shape == b.shape and a.dtype == b.dtype and _same_pixels(a.data, b.data)
        for a, b in zip(before, now, strict=True)
    )


def _same_pixels(there: Any, here: Any) -> bool:
    place = _source(there)
    if place is not None and place == _source(here):
        return True
    import dask.array as da

    a = da.asarray(there)
    b = da.asarray(here).rechunk(a.chunks)
    unequal = a != b
    if a.dtype.kind == "f":
        unequal &= ~(da.isnan(a) & da.isnan(b))
    return not bool(unequal.any().compute())


def _source(array: Any) -> str | None:
    """Return the zarr array that a dask array reads as it stands, rechunked or not; ``None`` for any other."""
    layers = getattr(getattr(array, "dask", None), "layers", {})
    as_it_stands = ("original-from-zarr", "from-zarr", "rechunk-merge", "rechunk-split", "rechunk-p2p")
    if not all(name.startswith(as_it_stands) for name in layers):
        return None
    found = {str(folder.resolve()) for folder in zarr_folders(array)}
    return found.pop() if len(found) == 1 else None
