"""Record the state of an object's store when a public function first uses it, so that later changes are detected."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any

import numpy as np

from .concurrent_changes import find_possible_changes, is_moved, is_young
from .keys import ATTRS

if TYPE_CHECKING:
    import os

    from anndata import AnnData
    from spatialdata import SpatialData

#: Kinds of elements; tables last, since they name the others.
KINDS = ("images", "labels", "points", "shapes", "tables")
ROOT_FILES = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
#: ``sdata.attrs["he2gene"]["saved"]``: id of the save that last changed an element, and a digest of what it wrote. An object
#: that was read before that save has another id.
SAVED = "saved"
#: Rows that are compared to identify a slide, and the fraction of entries that may be zero on one side only.
_N_ROWS, _OTHER_COUNTS = 200, 0.05
#: Length of an id, and of the digest that follows it.
_ID = 12


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the files of an element."""

    facts: int  # names, sizes and times
    places: int = 0  # inodes of the files, times of their folders
    change_times: int = 0

    def is_same(self, other: Fingerprint) -> bool:
        """Whether no file was changed or replaced.

        A file counts as replaced if its time of change is new, and so is its inode or the time of its folder, even if its own
        time was set back. Permissions and hard links alter only the first; network and temporary files only the others.
        """
        return self.facts == other.facts and (self.places == other.places or self.change_times == other.change_times)


@dataclass
class _Noted:
    """Recorded state of the store of an object."""

    path: str  # sdata.path, may be relative
    place: Path  # resolved path
    files: dict[tuple[str, str], Fingerprint]
    # Differences at that time, which another process may have caused.
    possible_changes: dict[tuple[str, str], set[str]] = field(default_factory=dict)


_NOTED: weakref.WeakKeyDictionary[SpatialData, _Noted] = weakref.WeakKeyDictionary()


def resolved(path: str | Path) -> Path:
    """Return the absolute path of a store, with links resolved."""
    return Path(path).expanduser().resolve()


def store_around(place: Path) -> Path | None:
    """Return the outermost zarr store that a place lies in."""
    inside = [folder for folder in place.absolute().parents if any((folder / name).is_file() for name in ROOT_FILES)]
    return inside[-1] if inside else None


def elements(store: Path) -> set[tuple[str, str]]:
    """Return kind and name of every element in the folder of a store, whether in the consolidated metadata or not."""
    return {
        (kind, path.name)
        for kind in KINDS
        if (store / kind).is_dir()
        for path in (store / kind).iterdir()
        if not path.name.startswith(".") and any((path / name).is_file() for name in ROOT_FILES)
    }


def fingerprints(store: Path) -> dict[tuple[str, str], Fingerprint]:
    """Return a fingerprint of the files of every element (of images only the metadata), and of the attributes."""
    return {place: fingerprint(store, *place) for place in (*elements(store), ("attrs", ""))}


def fingerprint(store: Path, kind: str, name: str) -> Fingerprint:
    """Return hashes of the files of an element; for ``attrs``, of the user's root attributes."""
    if kind == "attrs":
        return Fingerprint(hash(tuple(sorted(_user_attrs(_attrs(store)).items()))))
    element = store / kind / name
    files = list(_files(element))
    folders = sorted({(element / file).parent for file, _ in files})
    return Fingerprint(
        hash(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in files)),
        hash((*(stat.st_ino for _, stat in files), *(folder.stat().st_mtime_ns for folder in folders))),
        hash(tuple(stat.st_ctime_ns for _, stat in files)),
    )


def root_attrs(store: Path) -> dict[str, Any] | None:
    """Return the attributes of the root group; ``None`` if the folder is not a zarr group."""
    for name in ("zarr.json", ".zattrs"):
        if (store / name).is_file():
            try:
                content = json.loads((store / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"the store {str(store)!r} is damaged: {name} is not JSON ({error})") from error
            content = content.get("attributes", {}) if isinstance(content, dict) and name == "zarr.json" else content
            if isinstance(content, dict):
                return content
    return None


def _attrs(store: Path) -> dict[str, Any]:
    """Return the root attributes; empty if damaged, which raises where they are read."""
    with contextlib.suppress(OSError, ValueError):
        return root_attrs(store) or {}
    return {}


def without_store_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes without the entries that belong to the store."""
    kept = {key: value for key, value in attrs.items() if key != "spatialdata_attrs"}
    if isinstance(kept.get(ATTRS), Mapping):
        kept[ATTRS] = {key: value for key, value in kept[ATTRS].items() if key != SAVED}
        if not kept[ATTRS]:
            del kept[ATTRS]
    return kept


def _user_attrs(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return each attribute as JSON, without empty ones and those that belong to the store."""
    kept = without_store_attrs(attrs).items()
    return {str(key): _as_json(value) for key, value in kept if not (isinstance(value, Mapping) and not value)}


def _as_json(value: Any) -> str:
    def plain(part: Any) -> Any:
        return part.tolist() if isinstance(part, np.generic | np.ndarray) else repr(part)

    try:
        return json.dumps(json.loads(json.dumps(value, default=plain)), sort_keys=True)
    except (TypeError, ValueError):
        return repr(value)


def saved_by(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return the id of the save that last changed each element."""
    ours = attrs.get(ATTRS)
    saved = ours.get(SAVED) if isinstance(ours, Mapping) else None
    return {str(key): str(value) for key, value in saved.items()} if isinstance(saved, Mapping) else {}


def new_id(written: Path | Mapping[str, Any]) -> str:
    """Return a new id of a save, followed by a digest of what it wrote that is the same in every process."""
    return uuid.uuid4().hex[:_ID] + _short_digest(written)


def _short_digest(written: Path | Mapping[str, Any]) -> str:
    if isinstance(written, Path):
        facts: Any = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in _files(written)]
    else:
        facts = sorted(_user_attrs(written).items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:_ID]


def _possible_changes(sdata: SpatialData, store: Path) -> dict[tuple[str, str], set[str]]:
    """List elements that another process may have changed since the object was read."""
    root = _attrs(store)
    mine, saved = saved_by(sdata.attrs), saved_by(root)

    def is_as_saved(key: str, there: Path | Mapping[str, Any]) -> bool:
        return mine.get(key, "") == saved.get(key) and mine[key][_ID:] == _short_digest(there)

    young = set()
    for kind, name in elements(store):
        path = store / kind / name
        if name not in getattr(sdata, kind) or is_as_saved(f"{kind}/{name}", path):
            continue
        files = [path.lstat(), path.stat(), *(stat for _, stat in _files(path))]
        if is_moved(store.stat(), path.parent.stat()) or is_young(*files):
            young.add((kind, name))
    found = find_possible_changes(sdata, store, young) if young else {}
    root_files = [store / name for name in ROOT_FILES if (store / name).is_file()]
    if is_young(*(path.stat() for path in root_files)) and not is_as_saved("attrs", root):
        there, here = _user_attrs(root), _user_attrs(sdata.attrs)
        found["attrs", ""] = {f"attrs[{key!r}]" for key in there if there[key] != here.get(key)}
    return found


def digest(store: Path, chosen: Iterable[tuple[str, str]] | None = None) -> str:
    """Return a hash of all files of all or ``chosen`` elements by name, size and time, the same in every process."""
    facts = [
        (kind, name, file, stat.st_size, stat.st_mtime_ns)
        for kind, name in sorted(elements(store) if chosen is None else chosen)
        for file, stat in _files(store / kind / name, pixels=True)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def newest_mtime(store: Path, chosen: Iterable[tuple[str, str]]) -> int:
    """Return the time of the newest file of some elements, in nanoseconds; 0 without files."""
    return max(
        (stat.st_mtime_ns for kind, name in chosen for _, stat in _files(store / kind / name, pixels=True)), default=0
    )


def _files(element: Path, *, pixels: bool = False) -> Iterator[tuple[str, os.stat_result]]:
    raster = element.parent.name == "images" and not pixels
    paths = [*element.glob("*"), *element.glob("*/.zarray"), *element.glob("*/zarr.json")]
    for path in sorted(set(paths)) if raster else sorted(element.rglob("*")):
        stat = path.stat()
        # Temporary files change the times of their folder.
        if not S_ISDIR(stat.st_mode):
            yield str(path.relative_to(element)), stat


def note(sdata: SpatialData, *, replaces: bool = False) -> None:
    """Record path and files of an object's store on first use; raise if the path now leads elsewhere.

    With ``replaces``, the object replaces the store and may have other counts.
    """
    if not isinstance(sdata.path, str | Path):
        return
    path, place = str(sdata.path), resolved(sdata.path)
    known = _NOTED.get(sdata)
    if known is not None and (known.path == path or known.place == place):
        if known.place != place:
            raise FileNotFoundError(
                f"`sdata` was read from the store {str(known.place)!r}, but its path {path!r} now leads to {str(place)!r}: the "
                f"working folder, or a link, has changed. Go back with os.chdir({str(known.place.parent)!r}), or read the store "
                "again by its absolute path"
            )
        known.path = path
    elif place.is_dir():
        if not replaces and not Path(path).is_absolute():
            _check_counts(sdata, path, place)
        # Files may come and go while another process saves.
        with contextlib.suppress(OSError):
            _NOTED[sdata] = _Noted(path, place, fingerprints(place))
            if not replaces:
                _NOTED[sdata].possible_changes = _possible_changes(sdata, place)


def remember(sdata: SpatialData, state: Mapping[tuple[str, str], Fingerprint]) -> None:
    """Record the files that an object was read from, or that were just written to its store."""
    _NOTED[sdata] = _Noted(str(sdata.path), resolved(str(sdata.path)), {**noted(sdata).files, **state})


def noted(sdata: SpatialData) -> _Noted:
    """Return what was recorded of an object's store; empty if nothing was, or if the object has another store now."""
    path, place = str(sdata.path), resolved(str(sdata.path))
    found = _NOTED.get(sdata)
    return found if found is not None and found.place == place else _Noted(path, place, {})


def _check_counts(sdata: SpatialData, path: str, place: Path) -> None:
    """Raise if a relative path leads to the store of another slide, as shown by the counts of its tables."""
    for name, table in sdata.tables.items():
        other = False
        # Tables that cannot be read are skipped here.
        with contextlib.suppress(OSError, KeyError, ValueError):
            other = _has_other_counts(place / "tables" / name, table)
        if other:
            raise FileNotFoundError(
                f"`sdata` was read by the relative path {path!r}, which leads to {str(place)!r}, whose table {name!r} holds the "
                "counts of another slide: has the working folder changed? Go back with os.chdir, or read the store again by its "
                f"absolute path. If you changed the counts yourself: sdata.path = Path({str(place)!r})"
            )


def _has_other_counts(group_path: Path, table: AnnData) -> bool:
    """Whether the zeros of a table differ from those on disk at the same names; filters, scaling or logarithms keep them."""
    import zarr
    from anndata.io import read_elem, sparse_dataset

    group: Any = zarr.open_group(group_path, mode="r", use_consolidated=False)
    if table.X is None or "X" not in group or not (table.obs_names.is_unique and table.var_names.is_unique):
        return False
    rows, columns = (
        own.get_indexer(np.asarray(read_elem(group[axis][group[axis].attrs["_index"]]), object))
        for axis, own in (("obs", table.obs_names), ("var", table.var_names))
    )
    first, shared = rows[:_N_ROWS] >= 0, columns >= 0
    stored = sparse_dataset(group["X"]) if hasattr(group["X"], "keys") else group["X"]
    there, here = (
        x.toarray() if hasattr(x, "toarray") else np.asarray(x)
        for x in (stored[: len(first)], table.X[rows[: len(first)][first]])
    )
    there, here = there[first][:, shared] != 0, here[:, columns[shared]] != 0
    limits = (_OTHER_COUNTS * there.sum(), _OTHER_COUNTS * here.sum())
    return bool((there & ~here).sum() > limits[0] and (here & ~there).sum() > limits[1])
