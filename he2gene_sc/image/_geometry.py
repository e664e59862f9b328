"""From micrometres to pixels: which level is read, and how many of its pixels a window spans; sides of windows are checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ._pyramid import Pyramid

#: Relative slack, so that a µm/px that went through an affine and back chooses what it chose before.
_SLACK = 1e-3


@dataclass(frozen=True)
class WindowPlan:
    """How one window is cut."""

    um: float  # side on tissue
    factor: int  # blocks of factor × factor pixels are averaged; a power of two
    size: int  # side in averaged pixels


@dataclass(frozen=True)
class ReadPlan:
    """How a slide is read."""

    level: int  # that all windows are cut from
    scale: float  # pixels of level 0 per pixel of it
    mpp: float  # of it
    windows: tuple[WindowPlan, ...]


def plan_windows(
    pyramid: Pyramid, mpp: float, windows_um: tuple[float, ...], input_px: int | Sequence[int]
) -> ReadPlan:
    """Choose one level for all windows, and the size in pixels of each.

    It is the coarsest that gives the finest window ``um / input_px``. Wider windows are averaged from it by powers
    of two within that bound, so every pixel is read once and pyramids do not change patches.
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


#: Pixels across a window from which on it shows something.
MIN_PX = 8


def check_windows(windows_um: Any) -> tuple[float, ...]:
    """Return the sides of windows in µm as a tuple of floats; anything but positive numbers in order is an error."""
    listed = isinstance(windows_um, Collection) and not isinstance(windows_um, str | bytes | Set | Mapping)
    sides = list(windows_um) if listed and getattr(windows_um, "ndim", 1) == 1 else []
    if not sides or not all(
        isinstance(um, Real) and not isinstance(um, bool) and 0 < float(um) < math.inf for um in sides
    ):
        raise ValueError(f"`windows_um` is {windows_um!r}; a list of sides in µm, finite and above 0, is needed")
    return tuple(float(um) for um in sides)
