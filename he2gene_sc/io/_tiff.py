"""TIFF files and whole-slide images: find the scan, µm per pixel, and levels that can be read by region."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.logs import logger
from ..image import check_channel_names, check_pixels
from ._colour import colour_of
from ._files import described
from ._tiled import TiledImage, pages_of

if TYPE_CHECKING:
    import tifffile

#: Names of images in scanner files that are not the scan.
_NOT_SCAN = {"thumbnail", "label", "macro", "map", "overview"}
#: Largest number of pixels of a tile, which is decoded as a whole.
_MAX_TILE = 2**26
#: Tolerances of the sides of a pyramid level: a fraction, and a few pixels of rounding.
_OFF_SHAPE, _OFF_PX = 0.02, 2

#: Plausible µm per pixel of a slide scanner; resolution tags outside are print settings.
_PLAUSIBLE_MPP = (0.05, 10.0)
#: Plausible µm per pixel in the metadata of a scan or a downscaled copy; values outside are in another unit.
_STATED_MPP = (0.02, 50.0)
#: Pixels are not square if their sides differ by more than this fraction.
_MAX_ANISOTROPY = 0.05
#: An image that is larger than the only RGB image by this factor is the scan.
_SCAN_FACTOR = 4
_UNITS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}


@contextmanager
def opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF file; raise errors that name the file if its directory is damaged."""
    import tifffile

    with described(ValueError, f"`path` {path.name!r} is not a TIFF file"):
        file = tifffile.TiffFile(path)
    with file:
        with described(ValueError, f"`path` {path.name!r} has a damaged directory", "; convert it again"):
            file.series  # noqa: B018 - read it here, where errors are caught
        yield file


def scan_of(file: tifffile.TiffFile, path: Path) -> tifffile.TiffPageSeries:
    """Return the scan among the images of a file: the largest RGB image that is not a thumbnail, label or macro image."""
    series = [s for s in file.series if s.levels and s.keyframe is not None]
    if not series:
        raise ValueError(f"`path` {path.name!r} has no image; it may be truncated")
    named = [s for s in series if s.name.lower() not in _NOT_SCAN] or series
    scan = max([s for s in named if _may_be_rgb(s)] or named, key=_n_pixels)
    others = [s for s in named if s is not scan]
    # One grey plane is a mask; several are fluorescence or a stack, and then the RGB image is a thumbnail.
    largest = max([s for s in named if _n_channels(s) != 1] or named, key=_n_pixels)
    if _may_be_rgb(scan) and _n_pixels(largest) > _SCAN_FACTOR * _n_pixels(scan):
        raise ValueError(
            f"`path` {path.name!r} holds an RGB image of {_size_text(scan)} beside one of {_size_text(largest)} that is not "
            f"RGB (axes {largest.axes}, shape {largest.shape}) and seems to be the scan; save only the H&E image, as RGB"
        )
    if scan is not named[0] or any(_n_pixels(s) > _n_pixels(scan) / 2 and _may_be_rgb(s) for s in others):
        logger.warning(
            "%r holds %d images: the largest %sis read, %s; the others are %s",
            path.name,
            len(named),
            "" if _n_pixels(scan) == max(map(_n_pixels, named)) else "that is RGB ",
            _size_text(scan),
            ", ".join(_size_text(s) for s in others),
        )
    return scan


def _may_be_rgb(series: tifffile.TiffPageSeries) -> bool:
    channels = _n_channels(series)
    return channels in (3, 4) or (channels == 1 and getattr(series.keyframe.photometric, "name", "") == "PALETTE")


def _n_channels(series: tifffile.TiffPageSeries) -> int | None:
    """Count the channels; ``None`` for a stack."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    channels = sizes.pop("S", 1) * sizes.pop("C", 1)
    return channels if all(n == 1 for axis, n in sizes.items() if axis not in "YX") else None


def size_of(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    """Return height and width."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return int(sizes.get("Y", 1)), int(sizes.get("X", 1))


def _n_pixels(series: tifffile.TiffPageSeries) -> int:
    return math.prod(size_of(series))


def _size_text(series: tifffile.TiffPageSeries) -> str:
    height, width = size_of(series)
    return f"{width} × {height}"


def check_series(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> list[int] | None:
    """Return the positions of red, green and blue if others than stored; raise if the metadata describe no RGB plane."""
    channels = _n_channels(series)
    if channels is None:
        raise ValueError(
            f"`path` {path.name!r} has axes {series.axes} of shape {series.shape}; one RGB plane is needed"
        )
    height, width = size_of(series)
    if height * width == 0:
        raise ValueError(f"`path` {path.name!r} has {width} × {height} pixels")
    if not _may_be_rgb(series) and getattr(series.keyframe.photometric, "name", "") != "SEPARATED":
        check_pixels(channels, series.dtype, None, path.name)
    if "C" in series.axes and (pixels := _ome_pixels(file, series)) is not None:
        names = [channel.get("Name") or channel.get("Fluor") or "" for channel in pixels.iterfind("{*}Channel")]
        order = check_channel_names(names, path.name)
        if order is not None and len(order) == channels and order != sorted(order):
            return order
    return None


def orientation_of(series: tifffile.TiffPageSeries) -> int:
    """Return the orientation tag, 1 to 8; 1 is upright, also for invalid tags."""
    with suppress(TypeError, ValueError):
        value = int(series.keyframe.tags.valueof(274, 1))
        return value if 1 <= value <= 8 else 1
    return 1


def is_tiled(series: tifffile.TiffPageSeries) -> bool:
    """Whether an image can be read by region."""
    pages = pages_of(series.levels[0])
    return bool(pages) and all(page.keyframe.is_tiled and page.keyframe.imagedepth == 1 for page in pages)


def tiled_levels(
    file: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path, order: list[int] | None
) -> list[TiledImage]:
    """Return the levels of a tiled image, finest first; decode some tiles of each to detect damage early."""
    number = file.series.index(series)
    levels: list[TiledImage] = []
    for i, level in enumerate(series.levels):
        pages = pages_of(level)
        if not pages:
            continue
        rows, columns = pages[0].keyframe.chunks[:2]
        if rows * columns > _MAX_TILE:
            raise ValueError(
                f"`path` {path.name!r} has tiles of {columns} × {rows} pixels; convert it, for example: "
                f"vips tiffsave {path.name} OUT.tif --tile --pyramid"
            )
        array = TiledImage(path, number, i, pages)
        if not levels or _is_level(array.shape, levels):
            if levels and (n := _n_lost(levels[0], array)):
                logger.warning("%r: level %d lacks %d tiles that the scan has; it is not used", path.name, i, n)
                continue
            levels.append(array)
    samples = [level.probe() for level in levels]
    # Use a large sample to see whether float pixels go up to 1 or to 255.
    sample = levels[-1].probe(64) if len(levels) > 1 or samples[0].dtype.kind == "f" else samples[0]
    sample = np.concatenate([samples[0], sample], axis=1)
    colour = colour_of(pages_of(series.levels[0])[0].keyframe, sample, path.name, order)
    for image, own in zip(levels, samples, strict=True):
        if own.shape[0] != sample.shape[0] or own.dtype != sample.dtype:
            raise ValueError(f"`path` {path.name!r} has levels of different channels or types")
        image.colour = colour
    return levels


def _is_level(shape: tuple[int, ...], levels: list[TiledImage]) -> bool:
    """Whether an image is smaller than the previous level and has the aspect ratio of the first; label images do not."""
    (_, height, width), (_, full_height, full_width) = shape, levels[0].shape
    if height >= levels[-1].shape[1] or width >= levels[-1].shape[2]:
        return False
    expected = full_width / full_height * height
    return abs(width - expected) <= _OFF_SHAPE * expected + _OFF_PX


def _n_lost(full: TiledImage, level: TiledImage) -> int:
    """Count the tiles that a downscaled level lacks where the scan has tiles; some scanners write such files."""
    lacks = level.lacks
    if not lacks.any():
        return 0
    there = ~full.lacks
    # Number of scan tiles per tile of the level, from pixels, since grids are rounded up; half a tile is the margin.
    steps = [n * full.shape[i] / level.shape[i] / full.chunks[i] for i, n in enumerate(level.chunks) if i]

    def shown(place: int, step: float) -> slice:
        margin = min(1.0, step) / 2
        first = int(place * step + margin)
        return slice(first, max(first + 1, int(np.ceil((place + 1) * step - margin))))

    return sum(bool(there[shown(y, steps[0]), shown(x, steps[1])].any()) for y, x in np.argwhere(lacks))


def check_whole(series: tifffile.TiffPageSeries, path: Path) -> None:
    """Raise if a file is truncated, which a lazy array would only detect in the middle of a run."""
    for level in series.levels:
        for page in level.pages:
            if page is None:
                continue
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
            size = page.parent.filehandle.size
            if end > size:
                raise ValueError(f"`path` {path.name!r} is truncated: {end:,} bytes are needed, it has {size:,}")


def mpp_of(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> float | None:
    """Return µm per pixel from OME metadata, an Aperio description, or metric resolution tags."""
    pixels = _ome_pixels(file, series)
    if pixels is not None and pixels.get("PhysicalSizeX"):
        unit = pixels.get("PhysicalSizeXUnit", "µm")
        units = [_UNITS.get(name, np.nan) for name in (unit, pixels.get("PhysicalSizeYUnit", unit))]
        with suppress(ValueError):
            x = float(pixels.get("PhysicalSizeX")) * units[0]
            y = float(pixels.get("PhysicalSizeY")) * units[1] if pixels.get("PhysicalSizeY") else x
            return _check_mpp(x, y, "its OME metadata", path)
    page = series.keyframe
    for entry in (page.description or "").split("|"):
        name, _, stated = entry.partition("=")
        with suppress(ValueError):
            if name.strip() == "MPP":
                return _check_mpp(float(stated), float(stated), "its Aperio description", path)
    with suppress(TypeError, ValueError, ZeroDivisionError):
        if int(page.tags.valueof(296, 0)) == 3:
            x, y = (
                1e4 * centimetres / n
                for n, centimetres in (page.tags.valueof(282), page.tags.valueof(283, page.tags.valueof(282)))
            )
            if _PLAUSIBLE_MPP[0] <= x <= _PLAUSIBLE_MPP[1]:
                return _check_mpp(x, y, "its resolution tags", path)
    return None


def _check_mpp(x: float, y: float, where: str, path: Path) -> float | None:
    """Return the stated µm per pixel if it is square and plausible for a scan; else warn and return ``None``."""
    if not (np.isfinite([x, y]).all() and x > 0 and y > 0):
        return None
    if abs(x - y) > _MAX_ANISOTROPY * max(x, y):
        problem = "pixels that are not square; resample the image, or give `mpp`"
    elif not _STATED_MPP[0] <= x <= _STATED_MPP[1]:
        problem = "which is not plausible for a scan; the unit may be wrong: give `mpp`"
    else:
        return x
    logger.warning("%r: %s state %.4g × %.4g µm per pixel, %s; this is not used", path.name, where, x, y, problem)
    return None


def _ome_pixels(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Any:
    """Return the element ``Pixels`` of an image in OME metadata; ``None`` if missing or damaged."""
    if not (file.is_ome and file.ome_metadata):
        return None
    with suppress(ET.ParseError):
        found = list(ET.fromstring(file.ome_metadata).iterfind(".//{*}Pixels"))
        number = file.series.index(series)
        return found[number] if number < len(found) else found[0] if found else None
    logger.warning("the OME metadata of %r are damaged", file.filename)
    return None
