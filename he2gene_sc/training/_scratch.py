"""Keep intermediate results of training in unnamed files, so that memory does not grow with the number of sections."""

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

#: Alignment of arrays in a file, in bytes.
_ALIGNMENT = 64
#: Free space that must remain on the disk.
_SPARE_BYTES = 2**24


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise if a disk has too little space: a memory map on a full disk would kill the process without an error."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: training needs {n_bytes:,} bytes here, {free:,} are free; free them, or set TMPDIR to a folder "
            "on another disk",
            str(folder),
        )


def spill(items: Iterable[T]) -> list[T]:
    """Move the contiguous arrays of objects to one file and map them read-only; they use memory only when they are read.

    All objects share one file, since a process can keep only about a thousand files open; joblib would map each array separately.
    """
    kept: list[tuple[bytes, list[slice]]] = []
    with tempfile.TemporaryFile(prefix="he2gene-") as file:
        for item in items:
            buffers: list[pickle.PickleBuffer] = []
            pickled = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
            views = [buffer.raw() for buffer in buffers]
            check_room(Path(tempfile.gettempdir()), sum(view.nbytes + _ALIGNMENT for view in views))
            places = []
            for view in views:
                start = file.tell()
                file.write(view)
                places.append(slice(start, start + view.nbytes))
                file.write(bytes(-file.tell() % _ALIGNMENT))
            kept.append((pickled, places))
            del item, buffers, views
        file.flush()
        mapped = np.memmap(file, np.uint8, mode="r").data if file.tell() else memoryview(b"")
    # Unpickling is safe: the pickles stayed in this process, and the file holds only arrays.
    return [pickle.loads(pickled, buffers=[mapped[place] for place in places]) for pickled, places in kept]
