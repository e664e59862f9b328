"""A whole image at low resolution, read in strips, and the darkness of squares of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._blocks import row_step
from ._pixels import to_rgb_uint8
from ._pyramid import Pyramid, direct
from ._reader import halve


def read_reduced(pyramid: Pyramid, max_pixels: int, factor: float = 1.0) -> np.ndarray:
    """Read an image averaged down to at most ``max_pixels``, ``(3, h, w)`` uint8, strip by strip."""
    enough = [level for level in pyramid.levels if level.height * level.width >= max_pixels]
    level = enough[-1] if enough else pyramid.levels[0]
    times = 0
    while max(1, level.height >> times) * max(1, level.width >> times) > max_pixels:
        times += 1
    array = direct(level.array)
    step = -(-row_step(array) // 2**times) * 2**times
    strips: list[np.ndarray] = []
    for top in range(0, level.height, step):
        strip = to_rgb_uint8(np.asarray(array[:, top : top + step]), factor)
        if strip.shape[1] < 2**times and strips:
            continue
        for _ in range(times):
            strip = halve(strip)
        strips.append(strip)
    return np.concatenate(strips, axis=1)


#: Pixels of a level that a square should have a side, and the most that are read.
_FINE, _MOST = 4, 64
#: Values between darkest and brightest pixel from which an image is not blank.
_CONTRAST = 8


@dataclass(frozen=True, eq=False)
class Darkness:
    """What squares of an image look like."""

    mean: np.ndarray  # (n,) 255 - mean of channels, black as white; NaN outside
    blank: bool  # all pixels of all squares alike


def read_darkness(pyramid: Pyramid, centres: np.ndarray, side: float, factor: float = 1.0) -> Darkness:
    """Read squares around centres ``(n, 2)`` (pixels of level 0) from the coarsest level that still shows them."""
    level = max((e for e in pyramid.levels if e.scale == 1 or side / e.scale >= _FINE), key=lambda e: e.scale)
    inside = ((centres >= 0) & (centres < [pyramid.width, pyramid.height])).all(1)
    half = max(1, min(_MOST, round(side / level.scale)) // 2)
    # The last row or column of a reduced level may be missing.
    last = [level.width - 1, level.height - 1]
    places = np.minimum((centres[inside] / level.scale).astype(int), last)
    array = direct(level.array)
    blocks = [array[:, max(0, y - half) : y + half, max(0, x - half) : x + half] for x, y in places]
    if blocks and hasattr(blocks[0], "dask"):
        import dask

        blocks = dask.compute(*blocks)
    mean = np.full(len(centres), np.nan)
    found, low, high = [], 255, 0
    for block in map(np.asarray, blocks):
        shown = to_rgb_uint8(block, factor, paint_black=False)
        low, high = min(low, int(shown.min())), max(high, int(shown.max()))
        found.append(255 - float(to_rgb_uint8(block, factor).mean()))
    mean[inside] = found
    return Darkness(mean, bool(found) and high - low < _CONTRAST)
