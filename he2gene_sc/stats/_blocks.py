"""Blocks of genes for computations in limited memory."""

from __future__ import annotations

from collections.abc import Iterator

#: Values per block: 4 MB in double precision, which fits into a processor cache.
_BLOCK_SIZE = 2**19


def column_blocks(shape: tuple[int, int], size: int = _BLOCK_SIZE) -> Iterator[slice]:
    """Yield slices of the columns of an ``(n, g)`` array with about ``size`` values each."""
    n, g = shape
    step = max(1, size // max(1, n))
    for start in range(0, g, step):
        yield slice(start, min(g, start + step))
