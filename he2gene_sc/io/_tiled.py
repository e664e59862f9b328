"""``TiledImage``: a level of a TIFF file as an array that reads only the requested tiles."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._colour import Colour
from ._files import described

if TYPE_CHECKING:
    import tifffile

#: Least number of tiles per thread.
_TILES_PER_THREAD = 16
_MAX_THREADS = 8
#: Kinds of colour in which samples of 0 (tiles that the file lacks) are not black.
_ZERO_NOT_BLACK = ("ink", "palette", "ycbcr")


@dataclass(frozen=True)
class _Plane:
    """Locations of the tiles of a page: one plane, or one per channel."""

    descriptor: int
    offsets: Sequence[int]
    sizes: Sequence[int]
    decode: Callable


class TiledImage:
    """A level of a TIFF file, ``(3, h, w)`` uint8, read by region; ``pages`` are one, or one per channel.

    The file is opened at the first read in each process, so the image can be pickled, and read by several threads.
    """

    ndim = 3
    dtype = np.dtype(np.uint8)
    #: For :func:`he2gene_sc.image.direct`: reading a region costs no more than its tiles.
    reads_regions = True

    def __init__(self, path: Path, series: int, level: int, pages: Sequence[Any]):
        page = pages[0].keyframe
        self.path = path.resolve()
        self._where = series, level
        self._stamp = _stamp(self.path.stat())
        self._tile = (int(page.chunks[0]), int(page.chunks[1]))
        self._planar = len(pages) == 1 and page.planarconfig == 2 and page.samplesperpixel > 1
        self._n_samples = len(pages) if len(pages) > 1 else page.samplesperpixel
        self._stored = np.dtype(page.dtype)
        self.colour = Colour()
        height, width = int(page.imagelength), int(page.imagewidth)
        self.shape = (3, height, width)
        self.chunks = (3, *self._tile)
        self._grid = (-(-height // self._tile[0]), -(-width // self._tile[1]))
        self._lock = threading.Lock()
        self._planes: list[_Plane] = []
        self._process = 0

    def __repr__(self) -> str:
        return f"TiledImage {self.shape} of {self.path.name!r}, tiles {self._tile}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planes": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __dask_tokenize__(self) -> tuple:
        return str(self.path), self._stamp, self._where

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:, :, :], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        channels, rows, columns = _full_index(key)
        top, bottom, rows = _bounds(rows, self.shape[1])
        left, right, columns = _bounds(columns, self.shape[2])
        pixels = self.colour(self.samples(top, bottom, left, right))
        if self.colour.kind in _ZERO_NOT_BLACK and pixels.size:
            self._blacken(pixels, top, left)
        return pixels[channels][..., rows, :][..., columns]

    def samples(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Read the stored samples of a rectangle, ``(n, rows, columns)``."""
        out = np.zeros((self._n_samples, max(0, bottom - top), max(0, right - left)), self._stored)
        if not out.size:
            return out
        planes = self._open()
        th, tw = self._tile
        tiles = [(iy, ix) for iy in range(top // th, -(-bottom // th)) for ix in range(left // tw, -(-right // tw))]

        def place(part: list[tuple[int, int]]) -> None:
            for iy, ix in part:
                y0, x0 = iy * th, ix * tw
                for channel, tile in self._tiles(planes, iy, ix):
                    a, b = max(top, y0), min(bottom, y0 + tile.shape[-2])
                    c, d = max(left, x0), min(right, x0 + tile.shape[-1])
                    out[channel, a - top : b - top, c - left : d - left] = tile[..., a - y0 : b - y0, c - x0 : d - x0]

        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        n = min(_MAX_THREADS, n_cores, len(tiles) // _TILES_PER_THREAD)
        if n < 2:
            place(tiles)
        else:
            with ThreadPoolExecutor(n, thread_name_prefix="he2gene-tiles") as pool:
                list(pool.map(place, [tiles[i * len(tiles) // n : (i + 1) * len(tiles) // n] for i in range(n)]))
        return out

    @cached_property
    def lacks(self) -> np.ndarray:
        """Mask of the tiles that the file lacks, ``(rows, columns)`` of tiles."""
        n = self._grid[0] * self._grid[1]
        lacks = np.ones(n, bool)
        for plane in self._open():
            sizes = np.zeros((self._n_samples if self._planar else 1, n), np.int64)
            given = plane.sizes[: sizes.size]
            sizes.flat[: len(given)] = given
            lacks &= ~sizes.any(axis=0)
        return lacks.reshape(self._grid)

    def _blacken(self, pixels: np.ndarray, top: int, left: int) -> None:
        """Paint missing tiles black, as they are for other kinds of colour."""
        th, tw = self._tile
        bottom, right = top + pixels.shape[1], left + pixels.shape[2]
        # Only tiles of the rectangle: a sparse slide lacks most of its tiles.
        lacks = self.lacks[top // th : -(-bottom // th), left // tw : -(-right // tw)]
        for iy, ix in np.argwhere(lacks):
            y, x = iy * th - top % th, ix * tw - left % tw
            pixels[:, max(0, y) : max(0, y + th), max(0, x) : max(0, x + tw)] = 0

    def probe(self, max_tiles: int = 16) -> np.ndarray:
        """Decode tiles spread over the level (all of a small one); return their samples ``(n, k)``."""
        n = self._grid[0] * self._grid[1]
        chosen = np.unique(np.linspace(0, n - 1, min(n, max_tiles)).astype(int))
        th, tw = self._tile
        parts = []
        for i in chosen:
            y, x = (i // self._grid[1]) * th, (i % self._grid[1]) * tw
            tile = self.samples(y, min(self.shape[1], y + th), x, min(self.shape[2], x + tw))
            parts.append(tile.reshape(self._n_samples, -1))
        return np.concatenate(parts, axis=1)

    def _tiles(self, planes: list[_Plane], iy: int, ix: int) -> Iterator[tuple[int | slice, np.ndarray]]:
        """Decode the tiles at a grid position, each with its channels."""
        index = iy * self._grid[1] + ix
        if len(planes) == 1 and not self._planar:
            if (tile := self._decode(planes[0], index)) is not None:
                yield slice(None), tile.transpose(2, 0, 1)
            return
        # The tiles of all channels of a planar page follow each other.
        step = self._grid[0] * self._grid[1] if self._planar else 0
        for channel in range(self._n_samples):
            tile = self._decode(planes[0 if self._planar else channel], index + channel * step)
            if tile is not None:
                yield channel, tile[..., 0]

    def _decode(self, plane: _Plane, index: int) -> np.ndarray | None:
        """Decode one tile, ``(h, w, n)``; ``None`` if the file lacks it."""
        size = plane.sizes[index] if index < len(plane.sizes) else 0
        if not size:
            return None
        offset = plane.offsets[index]
        if hasattr(os, "pread"):
            data = os.pread(plane.descriptor, size, offset)
        else:
            with self._lock:
                os.lseek(plane.descriptor, offset, os.SEEK_SET)
                data = os.read(plane.descriptor, size)
        if len(data) < size:
            raise OSError(f"`path` {str(self.path)!r} is truncated: {offset + size:,} bytes are needed")
        problem = f"`path` {str(self.path)!r}: tile {index} is damaged or cannot be decoded"
        advice = "; convert the file again, for example: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
        with described(OSError, problem, advice):
            return plane.decode(data, index)[0][0]

    def _open(self) -> list[_Plane]:
        """Open the file if this process has not, and return its planes."""
        import tifffile

        with self._lock:
            is_open = self._process == os.getpid() and bool(self._planes)
            try:
                status = os.fstat(self._planes[0].descriptor) if is_open else self.path.stat()
                if _stamp(status) != self._stamp:
                    raise OSError(
                        f"`path` {str(self.path)!r} has changed since it was read; read it again with hg.io.read_he"
                    )
                if is_open:
                    return self._planes
                descriptors: dict[str, int] = {}
                planes = []
                with tifffile.TiffFile(self.path) as file:
                    for page in pages_of(file.series[self._where[0]].levels[self._where[1]]):
                        path = page.parent.filehandle.path
                        if path not in descriptors:
                            descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                        tables = {"jpegtables": page.jpegtables, "jpegheader": page.keyframe.jpegheader}
                        given = {name: value for name, value in tables.items() if value is not None}
                        decode = partial(page.keyframe.decode, **given)
                        planes.append(_Plane(descriptors[path], page.dataoffsets, page.databytecounts, decode))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"`path` {str(self.path)!r} was moved or removed after it was read; put it back, or read the image "
                    "again with hg.io.read_he"
                ) from error
            weakref.finalize(planes[0], _close, os.getpid(), tuple(descriptors.values()))
            self._planes, self._process = planes, os.getpid()
            return planes


def pages_of(level: tifffile.TiffPageSeries) -> list[Any]:
    """Return the pages (or frames, whose ``keyframe`` is a page) of a level; empty if some cannot be read by region."""
    pages = list(level.pages)
    if any(page is None for page in pages) or (len(pages) > 1 and level.dataoffset is not None):
        return []
    return pages


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _close(process: int, descriptors: tuple[int, ...]) -> None:
    if process == os.getpid():
        for descriptor in descriptors:
            os.close(descriptor)


def _full_index(key: Any) -> tuple[Any, Any, Any]:
    """Expand an index to three axes."""
    parts = [*(key if isinstance(key, tuple) else (key,)), Ellipsis]
    # Not `index`, which compares arrays elementwise.
    at = next(i for i, part in enumerate(parts) if part is Ellipsis)
    after = [part for part in parts[at + 1 :] if part is not Ellipsis]
    if at + len(after) > 3:
        raise IndexError(f"an image has 3 axes, {at + len(after)} were indexed")
    whole: list[Any] = [slice(None)] * (3 - at - len(after))
    channels, rows, columns = [*parts[:at], *whole, *after]
    return channels, rows, columns


def _bounds(key: Any, size: int) -> tuple[int, int, Any]:
    """Return the first and last row (exclusive) that an index needs, and the index relative to them."""
    chosen = np.arange(size)[key]
    if chosen.size == 0:
        return 0, 0, chosen
    first = int(chosen.min())
    return first, int(chosen.max()) + 1, slice(None, None, key.step) if isinstance(key, slice) else chosen - first
