"""Keep the memory of the last layer for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_KEPT, _PAD = 2**30, 2**28
#: Where glibc's own, moving thresholds end up in a process that allocates large arrays.
_USUAL_MMAP, _USUAL_TRIM, _USUAL_PAD = 2**25, 2**26, 2**17


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Let glibc reuse the large arrays that a network frees, and return them to the system afterwards.

    Mapping arrays above 32 MB afresh takes longer than the convolutions (``tests/benchmarks/bench_predict.py``).
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, _KEPT, _KEPT, _PAD)
    try:
        yield
    finally:
        _set(libc, _USUAL_MMAP, _USUAL_TRIM, _USUAL_PAD)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, mmap: int, trim: int, pad: int) -> None:
    for option, value in ((_MMAP_THRESHOLD, mmap), (_TRIM_THRESHOLD, trim), (_TOP_PAD, pad)):
        libc.mallopt(ctypes.c_int(option), ctypes.c_int(value))
