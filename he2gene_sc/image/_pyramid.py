"""An image at one or several resolutions, in numpy, dask or zarr arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """One resolution of an image."""

    array: Any  # (c, y, x) numpy, dask or zarr
    scale: float = 1.0  # pixels of level 0 per pixel of this level

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.array.shape[1])

    @property
    def width(self) -> int:
        """Columns."""
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
        """Rows of level 0."""
        return self.levels[0].height

    @property
    def width(self) -> int:
        """Columns of level 0."""
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
