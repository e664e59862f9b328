"""Files: errors that name them; writing that survives a kill or a power cut, by exchange, synchronisation and hard links."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .._core import validate
from .._core.stores import store_around

#: Suffix of a new folder between two renames, if the file system cannot exchange folders.
WAITING = "-he2gene-new"

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


@contextlib.contextmanager
def described(kind: type[Exception], problem: str, advice: str = "") -> Iterator[None]:
    """Turn any error of a library into one that names the file; the type of some, which say enough, stays."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except MemoryError as error:
        raise MemoryError(f"{problem}, or there is too little memory for it ({error}){advice}") from error
    except Exception as error:  # libraries raise various errors for damaged bytes
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        raise kind(f"{problem} ({text}){advice}") from error


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names by ``renameat2`` (Linux) or ``renamex_np`` (macOS); return ``False`` if not possible."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if hasattr(libc, "renameat2"):
        result = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        result = libc.renamex_np(os.fsencode(a), os.fsencode(b), _RENAME_SWAP)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def swap(new: Path, old: Path) -> None:
    """Exchange two folders, atomically if the system can.

    Otherwise, the new folder is first renamed to a visible name beside the old one. After a kill between the renames, one
    of the two exists and is complete; ``finish_swap`` restores it.
    """
    if not exchange(new, old):
        waiting, aside = old.with_name(old.name + WAITING), new.with_name(new.name + "-old")
        new.rename(waiting)
        try:
            old.rename(aside)
            waiting.rename(old)
        except BaseException:
            if not old.exists():
                aside.rename(old)
            waiting.rename(new)
            raise
        aside.rename(new)
    sync(new.parent)
    sync(old.parent)


def put_folder(new: Path, place: Path) -> None:
    """Put a new folder in its place, in exchange for the old one if there is one."""
    if place.exists():
        swap(new, place)
    else:
        # Fails if a non-empty folder has been created there meanwhile.
        new.rename(place)
        sync(place.parent)


def finish_swap(place: Path) -> None:
    """Finish a swap that was killed between two renames."""
    waiting = place.with_name(place.name + WAITING)
    if place.exists():
        remove(waiting)
    elif waiting.exists():
        waiting.rename(place)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot synchronise a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all its content to disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def copy_modes(old: Path, new: Path) -> None:
    """Copy the permissions of folders and files from the old element to the new one."""
    metadata = [old / name for name in ("zarr.json", ".zgroup", ".zattrs") if (old / name).exists()]
    folders, files = (place.stat().st_mode for place in (old, (*metadata, old)[0]))
    # Some network file systems have no permissions.
    with contextlib.suppress(OSError):
        for place in (new, *new.rglob("*")):
            if place.is_dir():
                place.chmod(folders)
            elif metadata and place.stat().st_nlink == 1:  # a hard link already shares them
                place.chmod(files)


def link_tree(source: Path, target: Path) -> None:
    """Copy a file or folder by hard links if the file system has them, else by copying the files."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link, symlinks=True)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        shutil.copy2(source, target)


def replace_file(path: Path, data: bytes, staging: Path) -> None:
    """Replace the content of a file atomically; ``staging`` is a folder on the same file system."""
    new = staging / f"{path.name}.new"
    new.write_bytes(data)
    if path.exists():
        shutil.copymode(path, new)
    sync(new)
    new.replace(path)
    sync(path.parent)


def put_file(path: Path, data: bytes) -> None:
    """Write a file atomically, following links; an existing file stays unchanged on failure."""
    path = path.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        replace_file(path, data, Path(staging))


def check_new_file(path: str | Path, parameter: str, suffixes: tuple[str, ...] = (), *, overwrite: bool) -> Path:
    """Raise, before any work, if a file cannot be written, must not be replaced, or lies in a zarr store.

    Without ``suffixes``, any is valid.
    """
    place = validate.folder_or_file(path, parameter).absolute()
    if suffixes and place.suffix.lower() not in suffixes:
        raise ValueError(f"`{parameter}` {str(place)!r} ends in {place.suffix!r}; {' or '.join(suffixes)} is needed")
    # Links are followed, as put_file follows them.
    folder = place.resolve().parent
    if place.is_dir() or not folder.is_dir():
        raise ValueError(f"`{parameter}` {str(place)!r} is a folder, or lies in a folder that does not exist")
    if (store := store_around(place.resolve())) is not None:
        raise ValueError(f"`{parameter}` {str(place)!r} lies in the store {str(store)!r}; name a file beside it")
    check_writable(folder, f"`{parameter}` {str(place)!r}")
    if place.exists() and not overwrite:
        raise FileExistsError(
            f"`{parameter}` {str(place)!r} exists; choose another name, or pass overwrite=True (--overwrite)"
        )
    return place


def check_own_files(table: Path, columns: str, what: str, others: Iterable[Path] = ()) -> None:
    """Raise if a file exists that another command wrote. Own tables begin with ``columns``."""
    found = [path for path in (table, *others) if path.exists()]
    if table.is_file():
        with table.open("rb") as file:
            start = file.read(len(columns))
        if start in (b"", columns.encode()):  # an empty file: nothing is lost
            return
    if found:
        raise FileExistsError(
            f"{what}: {str(found[0])!r} exists and was not written by this command, so it is not replaced; name another place, or "
            "remove it"
        )


def check_folder(path: str | Path, parameter: str) -> Path:
    """Raise, before any work, if a folder cannot be made or written to, or lies in a zarr store."""
    folder = validate.folder_or_file(path, parameter).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    store = store_around(folder / "any")
    if store is not None or not there.is_dir():
        what = f"the store {str(store)!r}" if store is not None else f"the file {str(there)!r}"
        raise ValueError(f"`{parameter}` {str(path)!r} is or lies in {what}; name another folder")
    check_writable(there, f"`{parameter}` {str(path)!r}")
    return folder


def check_writable(folder: Path, what: str) -> None:
    """Raise if no file can be created in a folder; permissions and file system type do not show this reliably."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        kind = PermissionError if error.errno == errno.EROFS else type(error)
        raise kind(
            error.errno,
            f"{what} lies in a folder that cannot be written to ({error.strerror}: {str(folder)!r}); choose another place",
        ) from error


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
