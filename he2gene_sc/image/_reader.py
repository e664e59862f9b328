"""``PatchReader`` reads the windows of many spots as uint8 batches, block by block, while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._blocks import BLOCK_BYTES, Block, BlockSource, plan_blocks, row_step
from ._geometry import Pyramid, ReadPlan, direct, plan_windows
from ._pixels import reflect_index

#: Rows that are averaged at once: an even number, so small that sums stay in the processor's cache.
_ROWS_AT_ONCE = 64
#: Batches that are prepared while the caller uses one.
_AHEAD = 3


@dataclass(frozen=True)
class PatchBatch:
    """Patches of a batch of spots."""

    index: np.ndarray  # (b,) rows of the reader's centres
    patches: tuple[np.ndarray, ...]  # one (b, 3, size, size) uint8 per window


class PatchReader:
    """Reads one or more square windows (µm) around each spot, at ``centres`` ``(n, 2)`` in pixels of level 0.

    Batches come in the order of stored chunks, so that a chunk is decoded once; each holds the indices of its spots. Windows
    are reflected at the borders. The next ``n_readers`` blocks are read in a thread each. Memory is bounded by one block
    more and the chunks between them. Batch sizes differ by at most one spot: a small last batch would use other kernels,
    whose rounding depends on the number of threads. ``allocate`` makes the arrays of the batches, for example page-locked
    ones for a GPU.

    Examples
    --------
    >>> import numpy as np
    >>> from he2gene_sc.image import PatchReader, Pyramid
    >>> image = np.full((3, 200, 300), 200, np.uint8)
    >>> reader = PatchReader(Pyramid.single(image), np.array([[150.0, 100.0]]), 1.0, windows_um=(50.0,), input_px=32)
    >>> [batch.patches[0].shape for batch in reader]
    [(1, 3, 50, 50)]
    """

    def __init__(
        self,
        pyramid: Pyramid,
        centres: np.ndarray,
        mpp: float,
        *,
        windows_um: tuple[float, ...],
        input_px: int | Sequence[int],
        batch_size: int = 32,
        factor: float = 1.0,
        allocate: Callable[[tuple[int, ...]], np.ndarray] | None = None,
        n_readers: int = 1,
    ):
        centres = np.asarray(centres, dtype=float)
        if centres.ndim != 2 or centres.shape[1] != 2 or not np.isfinite(centres).all():
            raise ValueError(f"`centres` has shape {centres.shape}; finite x and y of each spot, (n, 2), are needed")
        outside = (centres < 0).any(1) | (centres[:, 0] > pyramid.width) | (centres[:, 1] > pyramid.height)
        if outside.any():
            raise ValueError(f"`centres` has {int(outside.sum())} spots outside the image, first {centres[outside][0]}")
        self.plan: ReadPlan = plan_windows(pyramid, mpp, tuple(windows_um), input_px)
        self.centres = centres
        self.mpp = mpp
        self.n_spots = len(centres)
        self.batch_size = batch_size
        self.allocate = allocate
        self.n_readers = n_readers
        self._factor = factor
        self.source: Any = direct(pyramid.levels[self.plan.level].array)
        self._height, self._width = int(self.source.shape[1]), int(self.source.shape[2])
        # First column and row of each window, in pixels averaged by its factor.
        self._starts = []
        low = np.full((self.n_spots, 2), np.iinfo(np.int64).max)
        high = np.zeros((self.n_spots, 2), np.int64)
        for window in self.plan.windows:
            corner = centres / (self.plan.scale * window.factor) - window.size / 2
            # The tolerance absorbs rounding errors of centres at half pixels.
            start = np.floor(corner + 0.5 + 1e-4).astype(np.int64)
            stop = start + window.size
            self._starts.append(start)
            # Where a border halves a window, its reflection reads one pixel more than the window.
            n = np.array([max(1, self._width // window.factor), max(1, self._height // window.factor)])
            low = np.minimum(low, np.clip(np.minimum(start, 2 * n - 1 - stop), 0, n - 1) * window.factor)
            high = np.maximum(high, np.clip(np.maximum(stop, 1 - start), 1, n) * window.factor)
        self._extents = np.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], axis=1)
        self._blocks: list[Block] = plan_blocks(
            self._extents,
            row_step(self.source),
            align=max(window.factor for window in self.plan.windows),
            height=self._height,
            width=self._width,
            max_bytes=BLOCK_BYTES,
        )

    def __len__(self) -> int:
        return -(-self.n_spots // self.batch_size)

    @property
    def batches(self) -> list[np.ndarray]:
        """Indices of the spots of each batch, in the order of iteration."""
        order = np.concatenate([block.spots for block in self._blocks]) if self._blocks else np.empty(0, np.intp)
        return np.array_split(order, len(self)) if len(self) else []

    def __iter__(self) -> Iterator[PatchBatch]:
        return self.read_batches(None)

    def read_batches(self, numbers: Collection[int] | None) -> Iterator[PatchBatch]:
        """Yield the batches with these numbers in their order (``None``: all); only the pixels that they need are read.

        A thread prepares the next batches.
        """
        batches = self._batches(numbers)
        pool = ThreadPoolExecutor(1, thread_name_prefix="he2gene-patches")
        try:
            pending = deque(pool.submit(next, batches, None) for _ in range(_AHEAD))
            while (batch := pending.popleft().result()) is not None:
                pending.append(pool.submit(next, batches, None))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
            batches.close()

    def _batches(self, numbers: Collection[int] | None) -> Generator[PatchBatch, None, None]:
        batches, blocks = self.batches, self._blocks
        if numbers is not None:
            batches = [batches[i] for i in sorted(numbers)]
            kept = np.zeros(self.n_spots, bool)
            kept[np.concatenate([*batches, np.empty(0, np.intp)])] = True
            cropped = (replace(block, spots=block.spots[kept[block.spots]]) for block in blocks)
            blocks = [block for block in cropped if len(block.spots)]
        allocate = self.allocate or (lambda shape: np.empty(shape, np.uint8))
        n_readers = min(self.n_readers, max(1, len(blocks)))
        source = BlockSource(self.source, self._factor, blocks, self._extents, n_readers)

        largest = max(window.factor for window in self.plan.windows)

        def load(i: int) -> dict[int, np.ndarray]:
            """Read a block, and average it by each power of two up to the largest factor."""
            reduced, factor = {1: source.read(i)}, 1
            while factor < largest:
                reduced[2 * factor] = halve(reduced[factor])
                factor *= 2
            return reduced

        remaining = iter(batches)
        index, filled = next(remaining, None), 0
        patches: tuple[np.ndarray, ...] = ()
        pool = ThreadPoolExecutor(n_readers, thread_name_prefix="he2gene-blocks")
        try:
            # The next blocks are decoded and averaged while patches are cut from this one.
            pending = deque(pool.submit(load, i) for i in range(min(n_readers, len(blocks))))
            for i, block in enumerate(blocks):
                reduced = pending.popleft().result()
                pending.extend(pool.submit(load, j) for j in range(i + n_readers, len(blocks))[:1])
                for spot in block.spots:
                    assert index is not None
                    if not filled:
                        shapes = [(len(index), 3, window.size, window.size) for window in self.plan.windows]
                        patches = tuple(map(allocate, shapes))
                    for w, window in enumerate(self.plan.windows):
                        self._cut(reduced[window.factor], block, w, spot, patches[w][filled])
                    filled += 1
                    if filled == len(index):
                        yield PatchBatch(index, patches)
                        index, filled = next(remaining, None), 0
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self, pixels: np.ndarray, block: Block, window: int, spot: int, out: np.ndarray) -> None:
        plan = self.plan.windows[window]
        x, y = (int(v) for v in self._starts[window][spot])
        top, left = block.top // plan.factor, block.left // plan.factor
        height, width = max(1, self._height // plan.factor), max(1, self._width // plan.factor)
        if x >= 0 and y >= 0 and x + plan.size <= width and y + plan.size <= height:
            out[:] = pixels[:, y - top : y - top + plan.size, x - left : x - left + plan.size]
            return
        rows = reflect_index(y, plan.size, height) - top
        columns = reflect_index(x, plan.size, width) - left
        out[:] = pixels[:, rows[:, None], columns]


def halve(pixels: np.ndarray) -> np.ndarray:
    """Average 2 × 2 pixels, rounding halves up; an odd last row or column is dropped unless it is the only one."""
    if pixels.shape[1] == 1 or pixels.shape[2] == 1:
        pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] == 1), (0, pixels.shape[2] == 1)), mode="edge")
    height, width = pixels.shape[1] // 2 * 2, pixels.shape[2] // 2 * 2
    out = np.empty((len(pixels), height // 2, width // 2), np.uint8)
    for top in range(0, height, _ROWS_AT_ONCE):
        # Two neighbours in a row are read as one uint16: adding its bytes is three times as fast as strided access.
        pairs = np.ascontiguousarray(pixels[:, top : min(height, top + _ROWS_AT_ONCE), :width]).view(np.uint16)
        total = (pairs & 255) + (pairs >> 8)
        out[:, top // 2 : (top + total.shape[1]) // 2] = (total[:, 0::2] + total[:, 1::2] + 2) >> 2
    return out
