"""``hg.io.save``: a store that is replaced whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .._core import validate

if TYPE_CHECKING:
    from spatialdata import SpatialData

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_RENAME_SWAP = 2


def save(sdata: SpatialData, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a SpatialData object to a zarr store, also to the one that it was read from.

    The new store is written beside the old one, and the two are swapped by one call of the file system: whoever looks,
    at any moment and after any interruption, finds the old store or the new one, whole. Then the old one is removed. A
    leftover of an interrupted run is a hidden folder ``.NAME.<id>.tmp`` beside the store, which may be deleted.

    Parameters
    ----------
    sdata
        The object.
    path
        Store to write. Default: the one that ``sdata`` is backed by.
    overwrite
        Whether another store that stands at ``path`` may be replaced; the one that ``sdata`` is backed by always may.

    Returns
    -------
    pathlib.Path
        The store.

    Raises
    ------
    ValueError
        If ``path`` is ``None`` and the object has no store.
    FileExistsError
        If ``path`` exists and is no SpatialData store, or is another than that of ``sdata`` without ``overwrite``.
    OSError
        If it could not be written, for example because the disk is full; the old store is as it was.

    Notes
    -----
    Linux and macOS swap atomically. On other systems, and on file systems that cannot swap, the old store is renamed
    away first; a kill between the two renames leaves both stores whole, under the names ``.NAME.<id>.old`` and
    ``.NAME.<id>.tmp``.
    """
    validate.arguments(save, locals())
    if path is None and sdata.path is None:
        raise ValueError("`path` is None and `sdata` was not read from a store; say where to write")
    # A link is followed: what is replaced is the store, not the link to it.
    target = Path(path if path is not None else sdata.path).expanduser().resolve()
    own = sdata.path is not None and target == Path(sdata.path).expanduser().resolve()
    check_target(target, overwrite=overwrite or own)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="zarr v3 autosharding")
            sdata.write(temporary, update_sdata_path=False)
        _sync(temporary)
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
    finally:
        # After a swap this is the old store, after a failure the unfinished new one.
        if temporary.exists():
            shutil.rmtree(temporary)
    sdata.path = target
    return target


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a path that must not be replaced, before any work is done."""
    if not target.exists():
        return
    if not is_store(target):
        raise FileExistsError(f"`path` {str(target)!r} exists and is no SpatialData zarr store; choose another")
    if not overwrite:
        raise FileExistsError(
            f"`path` {str(target)!r} is another store; choose another path, or pass overwrite=True (--overwrite)"
        )


def is_store(path: Path) -> bool:
    """Whether a folder is a zarr group written by spatialdata."""
    for name, keys in (("zarr.json", ("attributes", "spatialdata_attrs")), (".zattrs", ("spatialdata_attrs",))):
        if (path / name).is_file():
            content = json.loads((path / name).read_text(encoding="utf-8"))
            for key in keys:
                content = content.get(key) if isinstance(content, dict) else None
            if content is not None:
                return True
    return False


def _sync(store: Path) -> None:
    """Bring the files to disk before the swap makes them the only copy."""
    if not hasattr(os, "sync"):
        return
    for file in store.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _swap(new: Path, old: Path) -> None:
    """Exchange two folders, atomically where the system can."""
    if _exchange(new, old):
        return
    aside = old.with_name(new.name.removesuffix(".tmp") + ".old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names by ``renameat2`` (Linux) or ``renamex_np`` (macOS); ``False`` where that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        result = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(os.fsencode(a), os.fsencode(b), _RENAME_SWAP)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))
