"""What training has found so far, on files without a name: memory does not grow with the number of sections."""

from __future__ import annotations

import errno
import pickle
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

#: Bytes that the start of an array is a multiple of.
_ALIGNED = 64
#: Left free on a disk.
_SPARE_BYTES = 2**24


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuse what a disk has no room for: a memory map on a full one ends the process without a word."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: training needs {n_bytes:,} bytes here, {free:,} are free; free them, or set TMPDIR to a folder "
            "on another disk",
            str(folder),
        )


def spilled(found: Iterable[T]) -> list[T]:
    """Move the contiguous arrays of objects to one file, each as it comes; read-only, they take memory only where they are read.

    A map keeps its file open, and a process may open about a thousand: so it is one file for all, where joblib maps each array
    for itself.
    """
    kept: list[tuple[bytes, list[slice]]] = []
    with tempfile.TemporaryFile(prefix="he2gene-") as file:
        for one in found:
            buffers: list[pickle.PickleBuffer] = []
            rest = pickle.dumps(one, protocol=5, buffer_callback=buffers.append)
            views = [buffer.raw() for buffer in buffers]
            check_room(Path(tempfile.gettempdir()), sum(view.nbytes + _ALIGNED for view in views))
            places = []
            for view in views:
                start = file.tell()
                file.write(view)
                places.append(slice(start, start + view.nbytes))
                file.write(bytes(-file.tell() % _ALIGNED))
            kept.append((rest, places))
            del one, buffers, views
        file.flush()
        mapped = np.memmap(file, np.uint8, mode="r").data if file.tell() else memoryview(b"")
    # What is unpickled never left this process: only the arrays lie in the file.
    return [pickle.loads(rest, buffers=[mapped[place] for place in places]) for rest, places in kept]
