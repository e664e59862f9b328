"""Image files to arrays of pixels: what can be read by region lazily, the rest decoded once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._raster import build_levels

if TYPE_CHECKING:
    import tifffile

logger = logging.getLogger("he2gene_sc")

#: Pixels of an image that is decoded into memory: 3.6 GB as RGB.
MAX_PIXELS = 1_200_000_000
_PILLOW = {".jpg", ".jpeg", ".png"}
_TIFF = {".tif", ".tiff", ".btf", ".ome"}
_SLIDES = {".svs", ".ndpi", ".scn"}
_guard = threading.Lock()

#: µm per pixel that a slide scanner can have; resolution tags outside it are print settings.
_PLAUSIBLE_MPP = (0.05, 10.0)
_UNITS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}


@dataclass(frozen=True)
class Decoded:
    """Levels ``(3, h, w)`` uint8, finest first, and µm per pixel where the file states it."""

    levels: list[Any]
    mpp: float | None


def decode(path: Path) -> Decoded:
    """Read an image file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the type is not supported, or the image is no RGB H&E image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`path` {str(path)!r}: no such file")
    suffix = path.suffix.lower()
    if suffix in _PILLOW:
        return Decoded(build_levels(decode_flat(path)), None)
    if suffix in _TIFF:
        return _decode_tiff(path)
    if suffix in _SLIDES:
        return _decode_slide(path)
    raise ValueError(f"`path` {path.name!r}: {suffix or 'no'} type; valid: {sorted(_PILLOW | _TIFF | _SLIDES)}")


def decode_flat(path: Path) -> np.ndarray:
    """Decode a JPEG or PNG once, ``(3, h, w)`` uint8; what is transparent becomes white.

    Pillow's guard against decompression bombs stops at 179 million pixels, which real slides pass; it is replaced by
    our own bound of ``MAX_PIXELS``.
    """
    from PIL import Image, UnidentifiedImageError

    with _without_pillow_guard():
        try:
            image = Image.open(path)
        except UnidentifiedImageError as error:
            raise ValueError(f"`path` {path.name!r} is no image that Pillow can read") from error
        with image:
            _check_size(path, *image.size)
            try:
                if image.mode in ("RGBA", "PA") or (image.mode == "P" and "transparency" in image.info):
                    image = image.convert("RGBA")
                elif image.mode in ("P", "CMYK", "YCbCr"):
                    # Four channels of ink are no RGB with alpha.
                    image = image.convert("RGB")
                pixels = np.asarray(image)
            except OSError as error:
                raise ValueError(f"`path` {path.name!r} is truncated or damaged: {error}") from error
    return _to_rgb(pixels, path)


@contextmanager
def _without_pillow_guard() -> Iterator[None]:
    from PIL import Image

    with _guard:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"`path` {path.name!r} has {width} × {height} pixels, over the {MAX_PIXELS:,} that are decoded into memory; "
            "convert it to a tiled pyramidal TIFF (for example `vips tiffsave in.jpg out.tif --tile --pyramid`)"
        )


def _to_rgb(pixels: np.ndarray, path: Path) -> np.ndarray:
    """``(h, w[, c])`` to ``(3, h, w)`` uint8."""
    from ..image import check_pixels, to_rgb_uint8

    channels = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    factor = check_pixels(channels.shape[0], channels.dtype, channels, path.name)
    if channels.dtype == np.uint8 and channels.shape[0] == 3:
        return np.ascontiguousarray(channels)
    return np.ascontiguousarray(to_rgb_uint8(channels, factor, paint_black=False))


def _decode_tiff(path: Path) -> Decoded:
    import tifffile

    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise ValueError(f"`path` {path.name!r} is no TIFF file: {error}") from error
    _check_whole(file, path)
    series = file.series[0]
    mpp = _tiff_mpp(file)
    tiled = all(level.keyframe.is_tiled for level in series.levels)
    if not tiled:
        height, width = (
            series.sizes.get(axis, series.sizes.get(name, 0)) for axis, name in (("Y", "height"), ("X", "width"))
        )
        _check_size(path, width, height)
        pixels = np.squeeze(series.asarray())
        file.close()
        if pixels.ndim == 3 and pixels.shape[0] in (3, 4) and pixels.shape[2] not in (3, 4):
            pixels = np.moveaxis(pixels, 0, -1)
        return Decoded(build_levels(_to_rgb(pixels, path)), mpp)
    levels = [_lazy_level(level, path) for level in series.levels]
    return Decoded(_only_smaller(levels), mpp)


def _check_whole(file: tifffile.TiffFile, path: Path) -> None:
    """Refuse a file that ends before its pixels do, which a lazy array would notice in the middle of a run."""
    if not file.series:
        raise ValueError(f"`path` {path.name!r} holds no image; it may be truncated")
    for level in file.series[0].levels:
        for page in level.pages:
            if page is None:
                continue
            end = max((a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
            size = page.parent.filehandle.size
            if end > size:
                raise ValueError(f"`path` {path.name!r} is truncated: {end:,} bytes are needed, {size:,} are there")


def _lazy_level(level: tifffile.TiffPageSeries, path: Path) -> Any:
    import dask.array as da
    import zarr

    store = level.aszarr(level=0)
    return _lazy_rgb(da.from_zarr(zarr.open(store, mode="r")), level.axes, path)


def _lazy_rgb(array: Any, axes: str, path: Path) -> Any:
    """Bring a lazy array with the given axes into ``(3, h, w)`` uint8, without reading it."""
    from ..image import check_pixels, to_rgb_uint8

    channel = "S" if "S" in axes else "C"
    for axis in axes:
        if axis not in ("Y", "X", channel):
            if array.shape[axes.index(axis)] != 1:
                raise ValueError(
                    f"`path` {path.name!r} has axes {axes} of shape {array.shape}; one RGB plane is needed"
                )
            array, axes = array.squeeze(axes.index(axis)), axes.replace(axis, "", 1)
    if channel not in axes:
        check_pixels(1, array.dtype, None, path.name)
    array = array.transpose([axes.index(a) for a in (channel, "Y", "X")])
    if array.dtype == np.uint8 and array.shape[0] == 3:
        return array
    n = array.shape[0]
    sample = np.asarray(array[:, :: max(1, array.shape[1] // 64), :: max(1, array.shape[2] // 64)])
    factor = check_pixels(n, array.dtype, sample, path.name)
    array = array.rechunk({0: n})
    return array.map_blocks(
        to_rgb_uint8,
        factor,
        paint_black=False,
        dtype=np.uint8,
        chunks=((3,), *array.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint8),
    )


def _only_smaller(levels: list[Any]) -> list[Any]:
    """Drop levels that are no smaller than the one before, such as label images."""
    kept = [levels[0]]
    for level in levels[1:]:
        if level.shape[1] < kept[-1].shape[1] and level.shape[2] < kept[-1].shape[2]:
            kept.append(level)
    return kept


def _tiff_mpp(file: tifffile.TiffFile) -> float | None:
    """µm per pixel from OME metadata, an Aperio description, or resolution tags in metric units."""
    page = file.series[0].keyframe
    if file.is_ome and file.ome_metadata:
        import xml.etree.ElementTree as ET

        for pixels in ET.fromstring(file.ome_metadata).iterfind(".//{*}Pixels"):
            if pixels.get("PhysicalSizeX"):
                return float(pixels.get("PhysicalSizeX")) * _UNITS.get(pixels.get("PhysicalSizeXUnit", "µm"), np.nan)
    for entry in (page.description or "").split("|"):
        name, _, value = entry.partition("=")
        with suppress(ValueError):
            if name.strip() == "MPP":
                return float(value)
    unit = page.tags.get("ResolutionUnit")
    resolution = page.tags.get("XResolution")
    if resolution is not None and unit is not None and int(unit.value) == 3:
        pixels, centimetres = resolution.value
        mpp = 1e4 * centimetres / pixels if pixels else 0.0
        if _PLAUSIBLE_MPP[0] <= mpp <= _PLAUSIBLE_MPP[1]:
            return mpp
    return None


def _decode_slide(path: Path) -> Decoded:
    try:
        import tiffslide
    except ImportError as error:
        raise ImportError(f"reading {path.suffix} needs tiffslide: pip install 'he2gene_sc[svs]'") from error
    import dask.array as da

    slide = tiffslide.TiffSlide(path)
    group = slide.zarr_group
    levels = [_lazy_rgb(da.from_zarr(group[str(i)]), "YXS", path) for i in range(slide.level_count)]
    mpp = slide.properties.get(tiffslide.PROPERTY_NAME_MPP_X)
    return Decoded(_only_smaller(levels), float(mpp) if mpp else None)
