"""Read a whole image at low resolution in strips, and the darkness of squares of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._blocks import row_step
from ._pixels import to_rgb_uint8
from ._pyramid import Pyramid, direct
from ._reader import halve


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


#: Least side of a square in pixels of the level that is read, and the most pixels per side that are read.
_MIN_SIDE, _MAX_SIDE = 4, 64
#: Least difference between the brightest and the darkest pixel of an image that is not blank.
_CONTRAST = 8


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
    last = [level.width - 1, level.height - 1]
    places = np.minimum((centres[inside] / level.scale).astype(int), last)
    array = direct(level.array)
    blocks = [array[:, max(0, y - half) : y + half, max(0, x - half) : x + half] for x, y in places]
    if blocks and hasattr(blocks[0], "dask"):
        import dask

        blocks = dask.compute(*blocks)
    mean = np.full(len(centres), np.nan)
    darkness, low, high = [], 255, 0
    for block in map(np.asarray, blocks):
        pixels = to_rgb_uint8(block, factor, paint_black=False)
        low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
        darkness.append(255 - float(to_rgb_uint8(block, factor).mean()))
    mean[inside] = darkness
    return Darkness(mean, bool(darkness) and high - low < _CONTRAST)
