"""``hg.io.save``: write changed elements; a store holds complete old or new elements at any moment."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .._core import validate
from .._core.differences import Change
from .._core.elements import check_files, check_spatialdata
from .._core.keys import ATTRS
from .._core.rasters import levels
from .._core.stores import (
    KINDS,
    ROOT_FILES,
    SAVED,
    elements,
    fingerprints,
    new_id,
    note,
    remember,
    resolved,
    root_attrs,
    store_around,
)
from ._files import check_writable, link_tree, put_folder, sync_tree
from ._staging import write
from ._storable import check_names, check_table
from ._store import STAGING, RootMetadata, is_store, locked
from ._update import reopen, update, user_attrs

if TYPE_CHECKING:
    from spatialdata import SpatialData


def save(sdata: SpatialData, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a SpatialData object to a zarr store, also to the one that it was read from.

    In its own store, only new or changed elements are written, and only the changed layers and matrices of a table. Images
    that are unchanged are neither written nor read. Elements that the object does not have are kept. Each element is
    written beside the old one and exchanged with it by one call of the file system: after any interruption, the store
    opens and holds the old or the new element, complete.

    Parameters
    ----------
    sdata
        The object.
    path
        Store to write. Default: the store of ``sdata``.
    overwrite
        Own store: also replace or remove what only the store has, and values that differ for an unknown reason. Other
        stores: replace them.

    Returns
    -------
    pathlib.Path
        The store.

    Raises
    ------
    ValueError
        If ``path`` is ``None`` and the object has no store, or an element or a value of ``sdata.attrs`` cannot be written.
    FileExistsError
        If something would be lost without ``overwrite``, or ``path`` is not a SpatialData store.
    FileNotFoundError
        If the object's store, or one that an element reads lazily, does not exist.
    BlockingIOError
        If another process is saving to the store.
    OSError
        If it could not be written, for example because the disk is full. The store is unchanged.

    Notes
    -----
    A save that was killed leaves ``.he2gene_save`` in the store, or ``.NAME.he2gene_save`` beside a new one; the next
    save removes it. See :doc:`/saving`.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> store = hg.io.save(sdata, "slide.zarr")
    >>> sdata["table"].obs["seen"] = True
    >>> hg.io.save(sdata) == store  # only the table is written
    True
    """
    validate.arguments(save, {"overwrite": overwrite})
    check_spatialdata(sdata)
    for kind in KINDS:
        check_names(getattr(sdata, kind), f"{kind} has the element")
    note(sdata, replaces=overwrite)
    path = None if path is None else validate.folder_or_file(path, "path")
    # Links are followed: the store is replaced, not the link to it.
    own = None if sdata.path is None else resolved(sdata.path)
    target = own if path is None else resolved(path)
    if target is None:
        raise ValueError("`path` is None and `sdata` was not read from a store; name the store to write")
    if path is None and not target.exists():
        raise FileNotFoundError(
            f"`path` is None and the store of `sdata`, {str(target)!r}, does not exist: was it moved, or has the "
            "working folder changed? Read it again with spatialdata.read_zarr, or name the store to write"
        )
    if target == own and target.exists() and is_store(target):
        update(sdata, target, overwrite=overwrite)
    elif own is not None and target in own.parents:
        raise ValueError(f"`path` {str(target)!r} holds the store of `sdata`, {str(own)!r}; choose a path beside it")
    else:
        check_target(target, overwrite=overwrite)
        _copy(sdata, target, overwrite=overwrite)
        sdata.path = target
        remember(sdata, fingerprints(target))
    sdata.path = target
    return target


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise, before any work, if a path must not be replaced, or lies in a store."""
    if not target.exists():
        if (store := store_around(target)) is not None:
            raise ValueError(
                f"`path` {str(target)!r} lies inside the zarr store {str(store)!r} and would become a part of it; choose a "
                f"path beside it: {str(store.parent / target.name)!r}"
            )
    elif not is_store(target):
        raise FileExistsError(f"`path` {str(target)!r} exists and is not a SpatialData zarr store; choose another")
    elif not overwrite:
        raise FileExistsError(
            f"`path` {str(target)!r} is another store; choose another path, or pass overwrite=True (--overwrite)"
        )


def check_place(target: Path, n_bytes: int) -> None:
    """Raise, before any work, if a store cannot be written, or the disk has no room for ``n_bytes``."""
    folder = next((place for place in (target, *target.parents) if place.exists()), target.parent)
    inside = [folder]
    if folder == target:
        with locked(target):
            inside += [target / kind for kind in KINDS if (target / kind).is_dir()]
            inside += [target / kind / name for kind, name in elements(target) if kind == "tables"]
    for place in inside:
        check_writable(place, f"the store {str(target)!r}")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(
            f"the store {str(target)!r} needs at least {n_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free in "
            f"{str(folder)!r}; make room, or choose another place"
        )


def least_bytes(sdata: SpatialData, *, images: bool) -> int:
    """Estimate the least size of a prediction: one well compressed layer per table, and the images."""
    n_bytes = sum(2 * table.n_obs * table.n_vars for table in sdata.tables.values())
    if images:
        n_bytes += sum(levels(image)[0].data.nbytes for image in sdata.images.values()) // 3
    return n_bytes


def _copy(sdata: SpatialData, target: Path, *, overwrite: bool) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"`path` {str(target)!r} lies in a file; choose a path in a folder") from error
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(locked(target, beside=True))
        # Check again under the lock: another process may have written the store.
        check_target(target, overwrite=overwrite)
        if target.exists():
            stack.enter_context(locked(target))
        new = staging / "new"
        for kind, name, element in sdata.gen_elements():
            if kind == "tables":
                check_table(f"sdata[{name!r}]", element)
            check_files(f"{kind}[{name!r}]", element)
        attrs = user_attrs(sdata.attrs)
        write(new, {name: element for _, name, element in sdata.gen_elements()}, attrs)
        saved = {f"{kind}/{name}": new_id(new / kind / name) for kind, name, _ in sdata.gen_elements()}
        attrs[ATTRS] = {**attrs.get(ATTRS, {}), SAVED: {**saved, "attrs": new_id(attrs)}}
        RootMetadata(new, staging).write({**(root_attrs(new) or {}), **attrs})
        if target.exists():
            # Keep files that a user has put into the folder.
            for path in target.iterdir():
                if path.name not in (*KINDS, *ROOT_FILES) and not path.name.startswith(STAGING):
                    link_tree(path, new / path.name)
        sync_tree(new)
        put_folder(new, target)
    sdata.attrs = attrs
    reopen(sdata, target, [Change(kind, name, element) for kind, name, element in sdata.gen_elements()])
