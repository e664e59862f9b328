"""Read image files as arrays of pixels: lazily by region if possible, otherwise decoded once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.memory import memory_of_machine
from ..image import check_pixels, to_rgb_uint8
from ._colour import colour_of
from ._files import described
from ._raster import build_levels
from ._tiff import check_series, check_whole, is_tiled, mpp_of, opened, orientation_of, scan_of, size_of, tiled_levels

if TYPE_CHECKING:
    import tifffile
    from PIL.Image import Image as PillowImage

#: Largest number of pixels that are decoded into memory: 3.6 GB as RGB.
MAX_PIXELS = 1_200_000_000
#: Bytes per pixel while an image is decoded: as stored, converted, and as planes.
_BYTES_PER_PIXEL = 8
_TIFF = {".tif", ".tiff", ".btf", ".ome", ".svs", ".ndpi", ".scn"}
#: Suffixes of supported files.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"} | _TIFF
_guard = threading.Lock()

#: Supported modes of Pillow.
_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr"}
#: Number of channels by the colour type in a PNG header: grey, and grey with alpha, of any depth.
_PNG_GREY = {0: 1, 4: 2}
#: Steps along y and x that turn an image of orientation 1 to 4 upright; after y and x are exchanged, one of 5 to 8.
_UPRIGHT = ((1, 1), (1, -1), (-1, -1), (-1, 1))


@dataclass(frozen=True)
class Decoded:
    """Pixels and metadata of an image file."""

    levels: list[Any]  # (3, h, w) uint8, finest first, upright
    mpp: float | None  # µm per pixel, if the file states it
    orientation: int = 1  # in the file, as in TIFF and EXIF: 1 upright, 2 to 8 mirrored or rotated


def decode(path: Path) -> Decoded:
    """Read an image file."""
    if path.is_dir():
        raise IsADirectoryError(
            f"`path` {str(path)!r} is a folder; an image file is needed (a zarr store: spatialdata.read_zarr)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"`path` {str(path)!r}: no such file")
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"`path` {path.name!r}: {suffix or 'no'} type; valid: {sorted(IMAGE_SUFFIXES)}")
    with path.open("rb") as stream:
        is_tiff = stream.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    # Whatever the suffix of a TIFF, Pillow would read only the first of its images.
    return _decode_tiff(path) if suffix in _TIFF or is_tiff else _decode_flat(path)


def _decode_flat(path: Path) -> Decoded:
    """Decode a JPEG or PNG; alpha is painted on white.

    Pillow refuses images above 179 million pixels, which real slides exceed; ``MAX_PIXELS`` replaces that limit.
    """
    from PIL import ExifTags, Image

    with _without_pillow_guard():
        with described(ValueError, f"`path` {path.name!r} is not an image that Pillow can read"):
            image = Image.open(path)
        with image:
            _check_size(path, *image.size)
            _check_mode(image, path)
            with described(ValueError, f"`path` {path.name!r} is truncated or damaged"):
                image.load()
                # Pillow itself turns a TIFF upright on loading.
                orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
                mode = "RGBA" if image.has_transparency_data else "RGB"
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    channels = np.moveaxis(pixels, -1, 0)
    if mode == "RGBA":
        factor = check_pixels(4, channels.dtype, channels, path.name)
        channels = to_rgb_uint8(channels, factor, paint_black=False)
    orientation = int(orientation) if orientation in range(1, 9) else 1
    return Decoded(build_levels(_upright(channels, orientation)), None, orientation)


def _check_mode(image: PillowImage, path: Path) -> None:
    """Raise for grey images (also those without a mode in Pillow) and unsupported colours."""
    if image.format == "PNG":
        with path.open("rb") as stream:
            header = stream.read(26)
        if channels := _PNG_GREY.get(header[25]):
            check_pixels(channels, np.dtype(np.uint8), None, path.name)
    if image.mode not in _MODES:
        check_pixels(len(image.getbands()), np.dtype(np.uint8), None, path.name)
        raise ValueError(f"`path` {path.name!r} holds {image.mode} colours; save it as RGB")


def _upright(channels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image upright, as planes of one channel each."""
    turned = channels.transpose(0, 2, 1) if orientation > 4 else channels
    down, across = _UPRIGHT[(orientation - 1) % 4]
    turned = turned[:, ::down, ::across]
    if turned.flags.c_contiguous:
        return turned
    # Plane by plane: eight times as fast as `np.ascontiguousarray` for channels that lie pixel by pixel.
    out = np.empty(turned.shape, turned.dtype)
    for plane, channel in zip(out, turned, strict=True):
        plane[:] = channel
    return out


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
    if width * height == 0:
        raise ValueError(f"`path` {path.name!r} has {width} × {height} pixels")
    free = memory_of_machine()
    needed = _BYTES_PER_PIXEL * width * height
    if width * height > MAX_PIXELS:
        problem = f"more than the {MAX_PIXELS:,} that can be decoded into memory"
    elif needed > free:
        problem = f"and decoding them takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    else:
        return
    raise ValueError(
        f"`path` {path.name!r} has {width} × {height} pixels, {problem}; "
        "convert it to a tiled pyramidal TIFF (for example `vips tiffsave in.jpg out.tif --tile --pyramid`)"
    )


def _decode_tiff(path: Path) -> Decoded:
    with opened(path) as file:
        series = scan_of(file, path)
        order = check_series(file, series, path)
        check_whole(series, path)
        mpp, orientation = mpp_of(file, series, path), orientation_of(series)
        if is_tiled(series):
            if orientation != 1:
                raise ValueError(
                    f"`path` {path.name!r} is stored mirrored or rotated (orientation tag {orientation}); turn it upright "
                    f"first, for example: vips autorot {path.name} OUT.tif[tile,pyramid]"
                )
            return Decoded(tiled_levels(file, series, path, order), mpp)
        return Decoded(build_levels(_upright(_decode_strips(series, path, order), orientation)), mpp, orientation)


def _decode_strips(series: tifffile.TiffPageSeries, path: Path, order: list[int] | None) -> np.ndarray:
    """Decode an image that cannot be read by region, to ``(3, h, w)`` uint8."""
    height, width = size_of(series)
    _check_size(path, width, height)
    advice = "; convert the file again, for example: vips tiffsave IN OUT.tif --tile --pyramid"
    with described(OSError, f"`path` {str(path)!r} is damaged or cannot be decoded", advice):
        pixels = series.asarray()
    axes = "".join(axis if axis in "YX" else "c" if axis in "SC" else "1" for axis in series.axes)
    planar = [i for wanted in "c1YX" for i, axis in enumerate(axes) if axis == wanted]
    samples = pixels.transpose(planar).reshape(-1, height, width)
    return colour_of(series.keyframe, samples.reshape(len(samples), -1), path.name, order)(samples)
