"""A whole image: at low resolution, the darkness of its squares, and a hash of its pixels that does not depend on the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._blocks import row_step
from ._geometry import Level, Pyramid, direct
from ._pixels import to_rgb_uint8
from ._reader import halve

#: Least side of a square in pixels of the level that is read, and the most pixels per side that are read.
_MIN_SIDE, _MAX_SIDE = 4, 64
#: Least difference between the brightest and the darkest pixel of an image that is not blank.
_CONTRAST = 8
#: Blocks for the hash: number per side of the image, and side in pixels.
_N_BLOCKS, _BLOCK_PX = 4, 256
#: Least standard deviation of a block that is not blank, and number of such blocks that identify a slide.
_LEAST_SD, _LEAST_BLOCKS = 3.0, 2
#: Largest chunk that is read whole.
_MAX_CHUNK_BYTES = 2**26


def read_reduced(pyramid: Pyramid, max_pixels: int, factor: float = 1.0) -> np.ndarray:
    """Read an image averaged to at most ``max_pixels`` pixels, ``(3, h, w)`` uint8, strip by strip."""
    large_levels = [level for level in pyramid.levels if level.height * level.width >= max_pixels]
    level = large_levels[-1] if large_levels else pyramid.levels[0]
    n_halvings = 0
    while max(1, level.height >> n_halvings) * max(1, level.width >> n_halvings) > max_pixels:
        n_halvings += 1
    array = direct(level.array)
    step = -(-row_step(array) // 2**n_halvings) * 2**n_halvings
    strips: list[np.ndarray] = []
    for top in range(0, level.height, step):
        strip = to_rgb_uint8(np.asarray(array[:, top : top + step]), factor)
        if strip.shape[1] < 2**n_halvings and strips:
            continue
        for _ in range(n_halvings):
            strip = halve(strip)
        strips.append(strip)
    return np.concatenate(strips, axis=1)


@dataclass(frozen=True, eq=False)
class Darkness:
    """Darkness of squares of an image."""

    mean: np.ndarray  # (n,) 255 - mean of channels, with black as white; NaN outside the image
    blank: bool  # whether all pixels of all squares are nearly equal


def read_darkness(pyramid: Pyramid, centres: np.ndarray, side: float, factor: float = 1.0) -> Darkness:
    """Read squares around centres ``(n, 2)`` (pixels of level 0) from the coarsest level that resolves them."""
    level = max(
        (entry for entry in pyramid.levels if entry.scale == 1 or side / entry.scale >= _MIN_SIDE),
        key=lambda entry: entry.scale,
    )
    inside = ((centres >= 0) & (centres < [pyramid.width, pyramid.height])).all(1)
    half = max(1, min(_MAX_SIDE, round(side / level.scale)) // 2)
    # The last row or column of a reduced level may be missing.
    places = np.minimum((centres[inside] / level.scale).astype(int), [level.width - 1, level.height - 1])
    blocks = _read_blocks(
        level, [(slice(max(0, y - half), y + half), slice(max(0, x - half), x + half)) for x, y in places]
    )
    mean = np.full(len(centres), np.nan)
    darkness, low, high = [], 255, 0
    for block in blocks:
        pixels = to_rgb_uint8(block, factor, paint_black=False)
        low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
        darkness.append(255 - float(to_rgb_uint8(block, factor).mean()))
    mean[inside] = darkness
    return Darkness(mean, bool(darkness) and high - low < _CONTRAST)


def pixels_sha256(pyramid: Pyramid, factor: float = 1.0) -> str | None:
    """Hash the size of level 0 and the pixels of up to 16 of its blocks; ``None`` if almost all blocks are blank.

    The hash does not depend on file format, chunks, further levels, alpha, or whether pixels are uint8 or float. Glass may have
    the same pixels on two slides, so blocks of glass alone give no hash.

    Examples
    --------
    >>> import numpy as np
    >>> from he2gene_sc.image import Pyramid, pixels_sha256
    >>> image = np.random.default_rng(0).integers(0, 256, (3, 900, 700), np.uint8)
    >>> pixels_sha256(Pyramid.single(image)) == pixels_sha256(Pyramid.single(image / np.float32(255)), 255.0)
    True
    >>> pixels_sha256(Pyramid.single(np.full((3, 900, 700), 255, np.uint8))) is None
    True
    """
    rows, columns = _block_slices(pyramid.height), _block_slices(pyramid.width)
    blocks = _read_blocks(pyramid.levels[0], [(y, x) for y in rows for x in columns])
    digest = hashlib.sha256(f"{pyramid.height} {pyramid.width}".encode())
    n_textured = 0
    for block in blocks:
        # Pixels far from the spots may be NaN, since predict never reads them.
        finite = np.clip(np.nan_to_num(block), 0, 255 / factor) if block.dtype.kind == "f" else block
        pixels = to_rgb_uint8(finite, factor, paint_black=False)
        n_textured += bool(pixels.std() >= _LEAST_SD)
        digest.update(pixels.tobytes())
    return digest.hexdigest() if n_textured >= min(_LEAST_BLOCKS, len(blocks)) else None


def _block_slices(n: int) -> list[slice]:
    """Return the blocks for the hash along a side of ``n`` pixels."""
    middles = (np.arange(_N_BLOCKS) + 0.5) * n / _N_BLOCKS
    starts = np.unique(np.clip(middles - _BLOCK_PX / 2, 0, max(0, n - _BLOCK_PX)).astype(int))
    return [slice(start, start + _BLOCK_PX) for start in starts.tolist()]


def _read_blocks(level: Level, places: Sequence[tuple[slice, slice]]) -> list[np.ndarray]:
    """Read blocks (rows, columns) of a level; those of a dask array are read together."""
    import dask

    array = direct(level.array)
    chunks = getattr(array, "chunks", None) or ()
    is_one_chunk = [
        len(sizes) == 1 if isinstance(sizes, tuple) else sizes >= n
        for sizes, n in zip(chunks, array.shape, strict=False)
    ]
    if chunks and all(is_one_chunk) and math.prod(array.shape) * array.dtype.itemsize <= _MAX_CHUNK_BYTES:
        # Each block would read this chunk.
        array = np.asarray(array[:, :, :])
    return [np.asarray(block) for block in dask.compute(*(array[:, rows, columns] for rows, columns in places))]
