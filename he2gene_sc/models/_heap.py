"""Keep freed memory in the process for the next layer of a network."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_LARGE_THRESHOLD, _LARGE_PAD = 2**30, 2**28
#: Values that glibc's dynamic thresholds reach in a process that allocates large arrays.
_DEFAULT_MMAP, _DEFAULT_TRIM, _DEFAULT_PAD = 2**25, 2**26, 2**17


@contextlib.contextmanager
def keep_heap(device: str = "cpu") -> Iterator[None]:
    """Let glibc reuse the large arrays that a network on the CPU frees, and return them to the system afterwards.

    Mapping arrays above 32 MB anew takes longer than the convolutions (``tests/benchmarks/bench_predict.py``).
    """
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, _LARGE_THRESHOLD, _LARGE_THRESHOLD, _LARGE_PAD)
    try:
        yield
    finally:
        _set(libc, _DEFAULT_MMAP, _DEFAULT_TRIM, _DEFAULT_PAD)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, mmap: int, trim: int, pad: int) -> None:
    for option, value in ((_MMAP_THRESHOLD, mmap), (_TRIM_THRESHOLD, trim), (_TOP_PAD, pad)):
        libc.mallopt(ctypes.c_int(option), ctypes.c_int(value))
