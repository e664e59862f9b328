"""Levels of an image, and windows: the level to read, and the size in pixels of each window on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

#: Relative tolerance: rounding of µm/px by an affine transformation must not change the level or a factor.
_SLACK = 1e-3
#: Least side of a window in pixels.
MIN_PX = 8
#: Largest side of a window in µm: a metre.
_MAX_UM = 1e6


@dataclass(frozen=True)
class Level:
    """One resolution of an image."""

    array: Any  # (c, y, x) numpy, dask or zarr
    scale: float = 1.0  # pixels of level 0 per pixel of this level

    @property
    def height(self) -> int:
        return int(self.array.shape[1])

    @property
    def width(self) -> int:
        return int(self.array.shape[2])


@dataclass(frozen=True)
class Pyramid:
    """Levels ``(c, y, x)`` of one image, finest first; their scales increase from 1."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("`levels` is empty: an image needs at least one level")
        for level in self.levels:
            if len(level.array.shape) != 3:
                raise ValueError(f"`levels` holds an array of shape {level.array.shape}; (c, y, x) is needed")
        scales = [level.scale for level in self.levels]
        if scales[0] != 1.0 or any(b <= a for a, b in zip(scales, scales[1:], strict=False)):
            raise ValueError(f"`levels` has the scales {scales}; they must start at 1 and increase")

    @classmethod
    def single(cls, array: Any) -> Pyramid:
        """Wrap one array ``(c, y, x)``."""
        return cls((Level(array),))

    @property
    def height(self) -> int:
        return self.levels[0].height

    @property
    def width(self) -> int:
        return self.levels[0].width


def direct(array: Any) -> Any:
    """Return the zarr array, or image of ``read_he``, that a dask array reads; otherwise the array itself.

    Reading it directly is faster: dask searches the graph of the whole image for every block. A cropped or rechunked image is
    returned unchanged.
    """
    name, layers = getattr(array, "name", None), getattr(getattr(array, "dask", None), "layers", None)
    original = f"original-{name}"
    if layers is None or set(layers) != {name, original} or len(layers[original]) != 1:
        return array
    (source,) = dict(layers[original]).values()
    source = getattr(source, "value", source)
    known = getattr(source, "reads_regions", False) or type(source).__module__.split(".")[0] == "zarr"
    same = getattr(source, "shape", None) == array.shape and getattr(source, "dtype", None) == array.dtype
    return source if known and same else array


@dataclass(frozen=True)
class WindowPlan:
    """Size of one window in pixels, and how its pixels are averaged."""

    um: float  # side on tissue
    factor: int  # blocks of factor × factor pixels are averaged; a power of two
    size: int  # side in averaged pixels


@dataclass(frozen=True)
class ReadPlan:
    """Level from which a slide is read, and the windows that are cut from it."""

    level: int  # index of the level that all windows are cut from
    scale: float  # pixels of level 0 per pixel of this level
    mpp: float  # µm per pixel of this level
    windows: tuple[WindowPlan, ...]


def plan_windows(
    pyramid: Pyramid, mpp: float, windows_um: tuple[float, ...], input_px: int | Sequence[int]
) -> ReadPlan:
    """Choose one level for all windows, and the size in pixels of each.

    The level is the coarsest one with at most ``um / input_px`` µm per pixel for the finest window. Pixels of wider windows are
    averaged by powers of two up to the same bound. So every pixel is read once, and a pyramid does not change the patches.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"`mpp` is {mpp}; a positive number of µm per pixel is needed")
    if not windows_um or any(not (math.isfinite(um) and um > 0) for um in windows_um):
        raise ValueError(f"`windows_um` is {windows_um}; positive sizes in µm are needed")
    sides = [input_px] * len(windows_um) if isinstance(input_px, int | np.integer) else list(input_px)
    max_mpp = [um / px * (1 + _SLACK) for um, px in zip(windows_um, sides, strict=True)]
    finest = min(max_mpp)
    level = max((i for i, entry in enumerate(pyramid.levels) if i == 0 or entry.scale * mpp <= finest))
    scale = pyramid.levels[level].scale
    source_mpp = mpp * scale
    windows = []
    for um, limit in zip(windows_um, max_mpp, strict=True):
        factor = 2 ** max(0, math.floor(math.log2(limit / source_mpp)))
        windows.append(
            WindowPlan(um=um, factor=factor, size=max(1, math.floor(um / (source_mpp * factor) + 0.5 + 1e-6)))
        )
    return ReadPlan(level=level, scale=scale, mpp=source_mpp, windows=tuple(windows))


def check_windows(windows_um: Any) -> tuple[float, ...]:
    """Return the sides of windows in µm as a tuple of floats; raise unless they are an ordered list of positive numbers."""
    listed = isinstance(windows_um, Collection) and not isinstance(windows_um, str | bytes | Set | Mapping)
    sides = list(windows_um) if listed and getattr(windows_um, "ndim", 1) == 1 else []
    if not sides or not all(
        isinstance(um, Real) and not isinstance(um, bool) and 0 < float(um) <= _MAX_UM for um in sides
    ):
        raise ValueError(
            f"`windows_um` is {windows_um!r}; a list of sides in µm, above 0 and up to {_MAX_UM:,.0f}, is needed"
        )
    return tuple(float(um) for um in sides)
