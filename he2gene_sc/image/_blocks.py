"""Plan which blocks of an image are read for which spots, and read each stored chunk once."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._pixels import to_rgb_uint8

#: Most bytes of RGB pixels in one block, and of decoded chunks cached for later blocks.
BLOCK_BYTES = 32 * 1024**2
CACHE_BYTES = 256 * 1024**2
_MIN_CELL, _MAX_CELL = 512, 4096


@dataclass(frozen=True)
class Block:
    """A rectangle of source pixels ``[top, bottom) × [left, right)`` and the spots whose windows it holds."""

    top: int
    bottom: int
    left: int
    right: int
    spots: np.ndarray


def plan_blocks(
    extents: np.ndarray, row_step: int, *, align: int, height: int, width: int, max_bytes: int = BLOCK_BYTES
) -> list[Block]:
    """Group spots into blocks of an image, each of which is read at once.

    ``extents`` ``(n, 4)`` holds the top, bottom, left and right pixels that each spot needs. Spots are grouped in bands of
    ``row_step`` rows. A band is split along x where it exceeds ``max_bytes`` or has a gap wider than ``row_step``.
    """
    middle = (extents[:, 0] + extents[:, 1]) // 2
    bands = middle // row_step
    order = np.lexsort((extents[:, 2], bands))
    blocks: list[Block] = []
    for band in np.unique(bands):
        members = order[bands[order] == band]
        extent = extents[members]
        top = max(0, int(extent[:, 0].min()) // align * align)
        bottom = min(height, -(-int(extent[:, 1].max()) // align) * align)
        columns = max(1, max_bytes // (3 * max(1, bottom - top)))
        start = 0
        while start < len(members):
            left = max(0, int(extent[start, 2]) // align * align)
            rights = np.maximum.accumulate(extent[start:, 3])
            n_fitting = int(np.searchsorted(rights, left + columns, side="right"))
            gaps = np.flatnonzero(extent[start + 1 :, 2] - rights[:-1] > row_step)
            n_fitting = min(n_fitting, int(gaps[0]) + 1) if len(gaps) else n_fitting
            stop = start + max(1, n_fitting)
            right = min(width, -(-int(rights[stop - start - 1]) // align) * align)
            blocks.append(Block(top, bottom, left, right, members[start:stop]))
            start = stop
    return blocks


def row_step(array: Any) -> int:
    """Return the number of rows to read at once: the chunk height, raised by whole multiples if small, capped if large."""
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
    """Reads rectangles of RGB uint8 pixels from a numpy, dask or zarr array, each stored chunk once.

    Cells (one or several chunks) are cached until the last block that needs them, up to ``CACHE_BYTES``. A numpy array is
    sliced without a copy.
    """

    def __init__(self, array: Any, factor: float, blocks: list[Block], extents: np.ndarray):
        self._array = array
        self._factor = factor
        self._height, self._width = int(array.shape[1]), int(array.shape[2])
        self._in_memory = isinstance(array, np.ndarray)
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        # Indices of the blocks that need each cell, ascending.
        self._uses: dict[tuple[int, int], list[int]] = {}
        self._needed: list[list[tuple[int, int]]] = []
        if not self._in_memory:
            rows, columns = _chunk_shape(array)
            # Small chunks are merged: a read through dask costs more than one from zarr or an image file.
            least = _MIN_CELL if hasattr(array, "dask") else _MIN_CELL // 2
            self._cell = tuple(n * -(-least // n) if n < least else n for n in (rows, columns))
            self._needed = [self._cells(extents[block.spots]) for block in blocks]
            for i, cells in enumerate(self._needed):
                for cell in cells:
                    self._uses.setdefault(cell, []).append(i)
        self._n_read = 0
        # Two buffers are used in turn: touching new memory pages costs more than copying pixels.
        largest = max(((b.bottom - b.top) * (b.right - b.left) for b in blocks), default=0)
        self._buffers = [np.empty(0 if self._in_memory else 3 * largest, np.uint8) for _ in range(2)]

    def read(self, block: Block) -> np.ndarray:
        """Return the pixels of the next block, ``(3, rows, columns)`` uint8; the call after the next one overwrites them."""
        if self._in_memory:
            pixels = self._array[:, block.top : block.bottom, block.left : block.right]
            return to_rgb_uint8(pixels, self._factor, corner=(block.top, block.left))
        needed = self._needed[self._n_read]
        self._fill(needed)
        shape = (3, block.bottom - block.top, block.right - block.left)
        out = self._buffers[self._n_read % 2][: math.prod(shape)].reshape(shape)
        ch, cw = self._cell
        for iy, ix in needed:
            y0, x0 = iy * ch, ix * cw
            pixels = self._cache[iy, ix]
            top, bottom = max(block.top, y0), min(block.bottom, y0 + pixels.shape[1])
            left, right = max(block.left, x0), min(block.right, x0 + pixels.shape[2])
            out[:, top - block.top : bottom - block.top, left - block.left : right - block.left] = pixels[
                :, top - y0 : bottom - y0, left - x0 : right - x0
            ]
        self._evict()
        return out

    def _cells(self, extents: np.ndarray) -> list[tuple[int, int]]:
        """List the cells that cover some extents, row by row."""
        ch, cw = self._cell
        spans = np.column_stack(
            [extents[:, 0] // ch, -(-extents[:, 1] // ch), extents[:, 2] // cw, -(-extents[:, 3] // cw)]
        )
        return sorted(
            {
                (iy, ix)
                for top, bottom, left, right in np.unique(spans, axis=0).tolist()
                for iy in range(top, bottom)
                for ix in range(left, right)
            }
        )

    def _fill(self, cells: list[tuple[int, int]]) -> None:
        """Decode cells that are not cached; neighbours in a row that the same blocks need are read together."""
        missing = [cell for cell in cells if cell not in self._cache]
        ch, cw = self._cell
        start = 0
        while start < len(missing):
            stop = start + 1
            iy, ix = missing[start]
            uses = self._uses[iy, ix]
            while (
                stop < len(missing) and missing[stop] == (iy, ix + stop - start) and self._uses[missing[stop]] == uses
            ):
                stop += 1
            y0, y1 = iy * ch, min(self._height, (iy + 1) * ch)
            x0, x1 = ix * cw, min(self._width, (ix + stop - start) * cw)
            strip = to_rgb_uint8(np.asarray(self._array[:, y0:y1, x0:x1]), self._factor, corner=(y0, x0))
            for i in range(stop - start):
                self._cache[iy, ix + i] = strip[:, :, i * cw : (i + 1) * cw]
            start = stop

    def _evict(self) -> None:
        for cell in [cell for cell in self._cache if self._uses[cell][-1] <= self._n_read]:
            del self._cache[cell]
        size = sum(pixels.nbytes for pixels in self._cache.values())
        if size > CACHE_BYTES:
            for cell in sorted(self._cache, key=self._next_use, reverse=True):
                if size <= CACHE_BYTES or len(self._cache) == 1:
                    break
                size -= self._cache.pop(cell).nbytes
        self._n_read += 1

    def _next_use(self, cell: tuple[int, int]) -> int:
        uses = self._uses[cell]
        return uses[bisect_right(uses, self._n_read)]
