"""A whole image at low resolution, read in strips."""

from __future__ import annotations

import numpy as np

from ._blocks import row_step
from ._direct import direct
from ._pixels import to_rgb_uint8
from ._pyramid import Pyramid
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
