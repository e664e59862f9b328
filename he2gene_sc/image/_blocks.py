"""Plan which blocks of an image are read for which spots, and read each stored chunk once."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
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
    extents: np.ndarray, row_step: int, *, align: int, height: int, width: int, max_bytes: int
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
    sliced without a copy. Several threads may read at once, up to ``at_once`` consecutive blocks.
    """

    def __init__(self, array: Any, factor: float, blocks: list[Block], extents: np.ndarray, at_once: int = 1):
        self._array = array
        self._factor = factor
        self._height, self._width = int(array.shape[1]), int(array.shape[2])
        self._in_memory = isinstance(array, np.ndarray)
        self._blocks = blocks
        self._lock = threading.Lock()
        self._cache: dict[tuple[int, int], Future[np.ndarray]] = {}
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
        self._unread = set(range(len(blocks)))
        # Buffers are used in turn: touching new memory pages costs more than copying pixels.
        largest = max(((b.bottom - b.top) * (b.right - b.left) for b in blocks), default=0)
        self._buffers = [np.empty(0 if self._in_memory else 3 * largest, np.uint8) for _ in range(at_once + 1)]

    def read(self, i: int) -> np.ndarray:
        """Return the pixels of block ``i``, ``(3, rows, columns)`` uint8; the block ``at_once + 1`` later overwrites them."""
        block = self._blocks[i]
        if self._in_memory:
            pixels = self._array[:, block.top : block.bottom, block.left : block.right]
            return to_rgb_uint8(pixels, self._factor, corner=(block.top, block.left))
        with self._lock:
            # A cell is decoded by the first thread that needs it; the others wait for it.
            own = [cell for cell in self._needed[i] if cell not in self._cache]
            for cell in own:
                self._cache[cell] = Future()
            cells = {cell: self._cache[cell] for cell in self._needed[i]}
        self._decode(own, cells)
        shape = (3, block.bottom - block.top, block.right - block.left)
        out = self._buffers[i % len(self._buffers)][: math.prod(shape)].reshape(shape)
        ch, cw = self._cell
        for (iy, ix), decoded in cells.items():
            y0, x0 = iy * ch, ix * cw
            pixels = decoded.result()
            top, bottom = max(block.top, y0), min(block.bottom, y0 + pixels.shape[1])
            left, right = max(block.left, x0), min(block.right, x0 + pixels.shape[2])
            out[:, top - block.top : bottom - block.top, left - block.left : right - block.left] = pixels[
                :, top - y0 : bottom - y0, left - x0 : right - x0
            ]
        with self._lock:
            self._evict(i)
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

    def _decode(self, missing: list[tuple[int, int]], cells: dict[tuple[int, int], Future[np.ndarray]]) -> None:
        """Decode cells that are not cached; pass an error on to threads that wait for them."""
        # Neighbours in a row that the same blocks need are read together.
        strips: list[list[tuple[int, int]]] = []
        for iy, ix in missing:
            if strips and strips[-1][-1] == (iy, ix - 1) and self._uses[iy, ix - 1] == self._uses[iy, ix]:
                strips[-1].append((iy, ix))
            else:
                strips.append([(iy, ix)])
        ch, cw = self._cell
        try:
            for strip in strips:
                y0, x0 = strip[0][0] * ch, strip[0][1] * cw
                y1, x1 = min(self._height, y0 + ch), min(self._width, x0 + len(strip) * cw)
                rgb = to_rgb_uint8(np.asarray(self._array[:, y0:y1, x0:x1]), self._factor, corner=(y0, x0))
                for i, cell in enumerate(strip):
                    cells[cell].set_result(rgb[:, :, i * cw : (i + 1) * cw])
        except BaseException as error:
            for cell in missing:
                if not cells[cell].done():
                    cells[cell].set_exception(error)
            raise

    def _evict(self, i: int) -> None:
        """Forget cells that no further block needs, and those needed last where there are too many."""
        self._unread.discard(i)
        first = min(self._unread, default=len(self._blocks))
        decoded = {cell: future for cell, future in self._cache.items() if future.done()}
        for cell in [cell for cell in decoded if self._uses[cell][-1] < first]:
            del self._cache[cell], decoded[cell]
        size = sum(future.result().nbytes for future in decoded.values())
        if size > CACHE_BYTES:
            next_use = {cell: next(use for use in self._uses[cell] if use >= first) for cell in decoded}
            for cell in sorted(decoded, key=next_use.__getitem__, reverse=True):
                if size <= CACHE_BYTES or len(self._cache) == 1:
                    break
                size -= self._cache.pop(cell).result().nbytes
