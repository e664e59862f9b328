"""From micrometres to pixels: which level is read, and how many of its pixels a window spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._pyramid import Pyramid

#: Relative slack, so that a µm/px that went through an affine and back chooses what it chose before.
_SLACK = 1e-3


@dataclass(frozen=True)
class WindowPlan:
    """How one window is cut.

    Attributes
    ----------
    um
        Side of the window on tissue, µm.
    factor
        Block of ``factor × factor`` source pixels that is averaged into one; a power of two.
    size
        Side of the patch, in averaged pixels.
    """

    um: float
    factor: int
    size: int


@dataclass(frozen=True)
class ReadPlan:
    """How a slide is read.

    Attributes
    ----------
    level
        Index of the level that all windows are cut from.
    scale
        Pixels of level 0 per pixel of that level.
    mpp
        µm per pixel of that level.
    windows
        One entry a window, in the order asked for.
    """

    level: int
    scale: float
    mpp: float
    windows: tuple[WindowPlan, ...]


def plan_windows(
    pyramid: Pyramid, mpp: float, windows_um: tuple[float, ...], input_px: int | Sequence[int]
) -> ReadPlan:
    """Choose the level and the size in pixels of each window.

    One level is read for all windows: the coarsest that still gives the finest window the µm/px that the encoder will
    see (``um / input_px``). Wider windows are averaged from the same pixels by powers of two as long as that bound
    holds for them too. So every pixel is read once, and an image gives the same patches with or without a pyramid.

    Parameters
    ----------
    pyramid
        The image.
    mpp
        µm per pixel of level 0.
    windows_um
        Sides of the windows, µm.
    input_px
        Side that windows are resized to, pixels; one for all of them, or one a window.

    Raises
    ------
    ValueError
        If ``mpp`` or a window is not a positive finite number.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"`mpp` is {mpp}; a positive number of µm per pixel is needed")
    if not windows_um or any(not (math.isfinite(um) and um > 0) for um in windows_um):
        raise ValueError(f"`windows_um` is {windows_um}; positive sizes in µm are needed")
    sides = [input_px] * len(windows_um) if isinstance(input_px, int | np.integer) else list(input_px)
    seen = [um / px * (1 + _SLACK) for um, px in zip(windows_um, sides, strict=True)]
    finest = min(seen)
    level = max((i for i, entry in enumerate(pyramid.levels) if i == 0 or entry.scale * mpp <= finest))
    scale = pyramid.levels[level].scale
    source_mpp = mpp * scale
    windows = []
    for um, needed in zip(windows_um, seen, strict=True):
        factor = 2 ** max(0, math.floor(math.log2(needed / source_mpp)))
        windows.append(
            WindowPlan(um=um, factor=factor, size=max(1, math.floor(um / (source_mpp * factor) + 0.5 + 1e-6)))
        )
    return ReadPlan(level=level, scale=scale, mpp=source_mpp, windows=tuple(windows))
