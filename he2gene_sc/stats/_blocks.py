"""Working through many genes a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

#: Numbers of a block: 4 MB in double precision, which a processor's cache holds.
_BLOCK_SIZE = 2**19


def column_blocks(shape: tuple[int, int], size: int = _BLOCK_SIZE) -> Iterator[slice]:
    """Slices of the columns of an ``(n, g)`` array, of about ``size`` numbers each."""
    n, g = shape
    step = max(1, size // max(1, n))
    for start in range(0, g, step):
        yield slice(start, min(g, start + step))
