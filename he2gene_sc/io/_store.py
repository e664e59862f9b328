"""Files of a SpatialData store: attributes, lock and root metadata."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._core.stores import KINDS, ROOT_FILES, root_attrs
from ._files import WAITING, finish_swap, remove, replace_file, sync

if TYPE_CHECKING:
    from filelock import BaseFileLock

#: Name of the temporary folder of a save; the next save removes a leftover.
STAGING = ".he2gene_save"


def is_store(path: Path) -> bool:
    """Whether a folder is a zarr group written by spatialdata."""
    return "spatialdata_attrs" in (root_attrs(path) or {})


# --- Lock ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(store: Path, *, beside: bool = False) -> Iterator[Path]:
    """Lock a store against other processes. Yield an empty temporary folder, in the store or ``beside`` a new one."""
    place = store.parent / f".{store.name}{STAGING}" if beside else store / STAGING
    lock_path = place.with_name(f"{place.name}.lock")
    lock = _acquire(lock_path, store)
    try:
        try:
            if place.exists():
                _clear(store, place, beside)
            place.mkdir()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()
        lock.release()


def _clear(store: Path, place: Path, beside: bool) -> None:
    """Remove the leftovers of a killed save."""
    if beside:
        finish_swap(store)
    else:
        for path in [path for kind in KINDS for path in (store / kind).glob("*")]:
            if path.name.endswith(WAITING):
                finish_swap(path.with_name(path.name.removesuffix(WAITING)))
            elif path.is_symlink():
                finish_swap(path.resolve())
    remove(place)


def _acquire(path: Path, store: Path) -> BaseFileLock:
    from filelock import FileLock, Timeout

    for _ in range(100):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise type(error)(
                error.errno, f"the store {str(store)!r} cannot be written: {error.strerror}; choose another place"
            ) from error
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"another process is saving to the store {str(store)!r}; save again when that is done"
            ) from None
        # The previous owner may have removed the file just before it was locked.
        descriptor = getattr(lock._context, "lock_file_fd", None)
        with contextlib.suppress(FileNotFoundError):
            if descriptor is None or os.path.samestat(os.fstat(descriptor), path.stat()):
                return lock
        lock.release()
    raise BlockingIOError(f"several processes are saving to the store {str(store)!r}; save again later")


# --- Root metadata ---------------------------------------------------------------------------------------------------


class RootMetadata:
    """Files at the root of a store, each replaced atomically, and restored after a failure."""

    def __init__(self, store: Path, staging: Path) -> None:
        self.store, self.staging = store, staging
        self.version: Literal[2, 3] = 3 if (store / "zarr.json").is_file() else 2
        self.before = {name: (store / name).read_bytes() for name in ROOT_FILES if (store / name).is_file()}
        (staging / "root").mkdir()
        for name, content in self.before.items():
            # Write the copies now, so that a full disk cannot prevent restoring.
            (staging / "root" / name).write_bytes(content)

    def unconsolidate(self) -> None:
        """Remove the consolidated metadata, which describe the old elements."""
        if self.version == 2:
            remove(self.store / ".zmetadata")
            sync(self.store)
            return
        content = json.loads(self.before["zarr.json"])
        if content.pop("consolidated_metadata", None) is not None:
            replace_file(self.store / "zarr.json", _dump(content), self.staging)

    def write(self, attrs: Mapping[str, Any]) -> None:
        """Write attributes and consolidate the metadata of the present elements."""
        consolidated = _consolidated(self.store, self.version)
        if self.version == 3:
            content = json.loads(self.before["zarr.json"]) | {"attributes": dict(attrs)}
            content["consolidated_metadata"] = json.loads(consolidated["zarr.json"])["consolidated_metadata"]
            replace_file(self.store / "zarr.json", _dump(content), self.staging)
            return
        content = json.loads(consolidated[".zmetadata"])
        content["metadata"][".zattrs"] = dict(attrs)
        replace_file(self.store / ".zattrs", _dump(attrs), self.staging)
        replace_file(self.store / ".zmetadata", _dump(content), self.staging)

    def restore(self) -> None:
        """Restore the previous files."""
        for name in ROOT_FILES:
            if name in self.before:
                (self.staging / "root" / name).replace(self.store / name)
            else:
                remove(self.store / name)
        sync(self.store)


def _dump(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode()


def _consolidated(store: Path, version: Literal[2, 3]) -> dict[str, bytes]:
    """Return the root files with zarr's consolidated metadata, without writing them in place."""
    import zarr
    from zarr.storage import LocalStore

    files: dict[str, bytes] = {}

    class Captured(LocalStore):
        async def set(self, key: str, value: Any) -> None:
            files[key] = value.to_bytes()

        def set_sync(self, key: str, value: Any) -> None:
            files[key] = value.to_bytes()

    # zarr warns of parquet files and of the user's own files.
    with warnings.catch_warnings(action="ignore"):
        zarr.consolidate_metadata(Captured(store), zarr_format=version)
    return files
