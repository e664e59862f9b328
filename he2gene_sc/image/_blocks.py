"""Which blocks of an image are read for which spots, and reading each stored chunk once."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._pixels import to_rgb_uint8

#: Bytes of RGB pixels in one block, and of decoded chunks kept for the next ones.
BLOCK_BYTES = 32 * 1024**2
CACHE_BYTES = 256 * 1024**2
_MIN_CELL, _MAX_CELL = 512, 4096


@dataclass(frozen=True)
class Block:
    """A rectangle of source pixels ``[top, bottom) × [left, right)`` and the spots that are cut from it."""

    top: int
    bottom: int
    left: int
    right: int
    spots: np.ndarray


def plan_blocks(
    extents: np.ndarray, row_step: int, *, align: int, height: int, width: int, max_bytes: int = BLOCK_BYTES
) -> list[Block]:
    """Group spots into blocks that are read whole.

    Spots are sorted into bands of ``row_step`` rows; a band whose rectangle is larger than ``max_bytes`` is cut along
    x. A single window larger than ``max_bytes`` still makes a block of its own.

    Parameters
    ----------
    extents
        ``(n, 4)`` integers: top, bottom, left, right of the source pixels that a spot needs, inside the image.
    row_step
        Rows of a band: the chunk height of the image.
    align
        Block edges are multiples of it (except at the border of the image).
    height, width
        Size of the image.
    """
    middle = (extents[:, 0] + extents[:, 1]) // 2
    bands = middle // row_step
    order = np.lexsort((extents[:, 2], bands))
    blocks: list[Block] = []
    for band in np.unique(bands):
        members = order[bands[order] == band]
        e = extents[members]
        top = max(0, int(e[:, 0].min()) // align * align)
        bottom = min(height, -(-int(e[:, 1].max()) // align) * align)
        columns = max(1, max_bytes // (3 * max(1, bottom - top)))
        start = 0
        while start < len(members):
            left = max(0, int(e[start, 2]) // align * align)
            rights = np.maximum.accumulate(e[start:, 3])
            fits = int(np.searchsorted(rights, left + columns, side="right"))
            stop = start + max(1, fits)
            right = min(width, -(-int(rights[stop - start - 1]) // align) * align)
            blocks.append(Block(top, bottom, left, right, members[start:stop]))
            start = stop
    return blocks


def row_step(array: Any) -> int:
    """Rows that are worth reading at once: the chunk height, brought into a sensible range by whole multiples."""
    rows = _chunk_shape(array)[0]
    if rows < _MIN_CELL:
        return rows * -(-_MIN_CELL // rows)
    return min(rows, _MAX_CELL)


def _chunk_shape(array: Any) -> tuple[int, int]:
    chunks = getattr(array, "chunks", None)
    if chunks is None:
        return 1024, 1024
    if hasattr(array, "dask"):
        return max(chunks[1]), max(chunks[2])
    return int(chunks[1]), int(chunks[2])


class BlockSource:
    """Reads rectangles of RGB uint8 from numpy, dask or zarr, each stored chunk once.

    Decoded cells (whole chunks, small ones put together) are kept until the last block that needs them, within
    ``CACHE_BYTES``. A numpy array is sliced in place.

    Parameters
    ----------
    array
        ``(c, y, x)``.
    factor
        What :func:`he2gene_sc.image.check_pixels` returned.
    blocks
        The blocks in the order in which they will be read.
    """

    def __init__(self, array: Any, factor: float, blocks: list[Block]):
        self._array = array
        self._factor = factor
        self._height, self._width = int(array.shape[1]), int(array.shape[2])
        self._in_memory = isinstance(array, np.ndarray)
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._last_use: dict[tuple[int, int], int] = {}
        if not self._in_memory:
            rows, columns = _chunk_shape(array)
            self._cell = tuple(n * -(-_MIN_CELL // n) if n < _MIN_CELL else n for n in (rows, columns))
            for i, block in enumerate(blocks):
                for cell in self._cells(block):
                    self._last_use[cell] = i
        self._n_read = 0
        # Blocks are put together in the same memory by turns: touching new pages costs more than the copying.
        largest = max(((b.bottom - b.top) * (b.right - b.left) for b in blocks), default=0)
        self._buffers = [np.empty(0 if self._in_memory else 3 * largest, np.uint8) for _ in range(2)]

    def read(self, block: Block) -> np.ndarray:
        """Return the pixels of the next block, ``(3, rows, columns)`` uint8, valid until the next call but one."""
        if self._in_memory:
            return to_rgb_uint8(self._array[:, block.top : block.bottom, block.left : block.right], self._factor)
        self._fill(self._cells(block))
        shape = (3, block.bottom - block.top, block.right - block.left)
        out = self._buffers[self._n_read % 2][: math.prod(shape)].reshape(shape)
        ch, cw = self._cell
        for iy, ix in self._cells(block):
            y0, x0 = iy * ch, ix * cw
            pixels = self._cache[iy, ix]
            top, bottom = max(block.top, y0), min(block.bottom, y0 + pixels.shape[1])
            left, right = max(block.left, x0), min(block.right, x0 + pixels.shape[2])
            out[:, top - block.top : bottom - block.top, left - block.left : right - block.left] = pixels[
                :, top - y0 : bottom - y0, left - x0 : right - x0
            ]
        self._evict()
        return out

    def _cells(self, block: Block) -> list[tuple[int, int]]:
        ch, cw = self._cell
        return [
            (iy, ix)
            for iy in range(block.top // ch, -(-block.bottom // ch))
            for ix in range(block.left // cw, -(-block.right // cw))
        ]

    def _fill(self, cells: list[tuple[int, int]]) -> None:
        """Decode the missing cells, neighbours in a row by one read where they are kept equally long."""
        missing = [cell for cell in cells if cell not in self._cache]
        ch, cw = self._cell
        start = 0
        while start < len(missing):
            stop = start + 1
            iy, ix = missing[start]
            until = self._last_use[iy, ix]
            while (
                stop < len(missing)
                and missing[stop] == (iy, ix + stop - start)
                and self._last_use[missing[stop]] == until
            ):
                stop += 1
            y0, y1 = iy * ch, min(self._height, (iy + 1) * ch)
            x0, x1 = ix * cw, min(self._width, (ix + stop - start) * cw)
            strip = to_rgb_uint8(np.asarray(self._array[:, y0:y1, x0:x1]), self._factor)
            for i in range(stop - start):
                self._cache[iy, ix + i] = strip[:, :, i * cw : (i + 1) * cw]
            start = stop

    def _evict(self) -> None:
        for cell in [cell for cell in self._cache if self._last_use[cell] <= self._n_read]:
            del self._cache[cell]
        self._n_read += 1
        size = sum(pixels.nbytes for pixels in self._cache.values())
        while size > CACHE_BYTES and len(self._cache) > 1:
            size -= self._cache.popitem(last=False)[1].nbytes
