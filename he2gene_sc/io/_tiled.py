"""``TiledImage``: a level of a TIFF file as an array that reads only the requested tiles."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._colour import Colour

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
    tables: dict[str, Any]


@dataclass(frozen=True)
class _Opened:
    planes: tuple[_Plane, ...]
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
        self._opened: _Opened | None = None
        self._process = 0

    def __repr__(self) -> str:
        return f"TiledImage {self.shape} of {self.path.name!r}, tiles {self._tile}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

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
        opened = self._open()
        th, tw = self._tile
        tiles = [(iy, ix) for iy in range(top // th, -(-bottom // th)) for ix in range(left // tw, -(-right // tw))]

        def place(part: list[tuple[int, int]]) -> None:
            for iy, ix in part:
                y0, x0 = iy * th, ix * tw
                for channel, tile in self._tiles(opened, iy, ix):
                    a, b = max(top, y0), min(bottom, y0 + tile.shape[-2])
                    c, d = max(left, x0), min(right, x0 + tile.shape[-1])
                    out[channel, a - top : b - top, c - left : d - left] = tile[..., a - y0 : b - y0, c - x0 : d - x0]

        n = min(_MAX_THREADS, _n_processors(), len(tiles) // _TILES_PER_THREAD)
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
        for plane in self._open().planes:
            sizes = np.asarray(plane.sizes, np.int64)[: n * (self._n_samples if self._planar else 1)]
            there = np.zeros(-(-max(len(sizes), 1) // n) * n, bool)
            there[: len(sizes)] = sizes > 0
            lacks &= ~there.reshape(-1, n).any(axis=0)
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

    def _tiles(self, opened: _Opened, iy: int, ix: int) -> Iterator[tuple[int | slice, np.ndarray]]:
        """Decode the tiles at a grid position, each with its channels."""
        index = iy * self._grid[1] + ix
        per_plane = self._grid[0] * self._grid[1]
        wanted: list[tuple[int | slice, _Plane, int]]
        first, *others = opened.planes
        if others:
            wanted = [(i, plane, index) for i, plane in enumerate(opened.planes)]
        elif self._planar:
            wanted = [(i, first, index + i * per_plane) for i in range(self._n_samples)]
        else:
            wanted = [(slice(None), first, index)]
        for channel, plane, position in wanted:
            tile = self._decode(opened, plane, position)
            if tile is not None:
                yield channel, (tile.transpose(2, 0, 1) if isinstance(channel, slice) else tile[..., 0])

    def _decode(self, opened: _Opened, plane: _Plane, index: int) -> np.ndarray | None:
        """Decode one tile, ``(h, w, n)``; ``None`` if the file lacks it."""
        size = plane.sizes[index] if index < len(plane.sizes) else 0
        if not size:
            return None
        data = self._bytes(plane.descriptor, plane.offsets[index], size)
        try:
            return opened.decode(data, index, **plane.tables)[0][0]
        except Exception as error:
            raise OSError(
                f"`path` {str(self.path)!r}: tile {index} is damaged or cannot be decoded ({error_text(error)}); convert the "
                "file again, for example: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
            ) from error

    def _bytes(self, descriptor: int, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(descriptor, size, offset)
        else:
            with self._lock:
                os.lseek(descriptor, offset, os.SEEK_SET)
                data = os.read(descriptor, size)
        if len(data) < size:
            raise OSError(f"`path` {str(self.path)!r} is truncated: {offset + size:,} bytes are needed")
        return data

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None or self._process != os.getpid():
                self._opened = self._open_file()
                self._process = os.getpid()
            elif _stamp(os.fstat(self._opened.planes[0].descriptor)) != self._stamp:
                raise OSError(self._changed())
            return self._opened

    def _open_file(self) -> _Opened:
        import tifffile

        try:
            if _stamp(self.path.stat()) != self._stamp:
                raise OSError(self._changed())
            with tifffile.TiffFile(self.path) as file:
                pages = pages_of(file.series[self._where[0]].levels[self._where[1]])
                descriptors: dict[str, int] = {}
                for page in pages:
                    path = page.parent.filehandle.path
                    if path not in descriptors:
                        descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                keyframe = pages[0].keyframe
                planes = tuple(
                    _Plane(
                        descriptors[page.parent.filehandle.path], page.dataoffsets, page.databytecounts, _tables(page)
                    )
                    for page in pages
                )
                opened = _Opened(planes, keyframe.decode)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"`path` {str(self.path)!r} was moved or removed after it was read; put it back, or read the image again "
                "with hg.io.read_he"
            ) from error
        weakref.finalize(opened, _close, os.getpid(), tuple(descriptors.values()))
        return opened

    def _changed(self) -> str:
        return f"`path` {str(self.path)!r} has changed since it was read; read it again with hg.io.read_he"


def pages_of(level: tifffile.TiffPageSeries) -> list[Any]:
    """Return the pages (or frames, whose ``keyframe`` is a page) of a level; empty if some cannot be read by region."""
    pages = list(level.pages)
    if any(page is None for page in pages) or (len(pages) > 1 and level.dataoffset is not None):
        return []
    return pages


def _tables(page: Any) -> dict[str, Any]:
    found = {"jpegtables": page.jpegtables, "jpegheader": page.keyframe.jpegheader}
    return {name: value for name, value in found.items() if value is not None}


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _close(process: int, descriptors: tuple[int, ...]) -> None:
    if process == os.getpid():
        for descriptor in descriptors:
            os.close(descriptor)


def error_text(error: BaseException) -> str:
    """Return the type and the message of an error."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _n_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _full_index(key: Any) -> tuple[Any, Any, Any]:
    """Expand an index to three axes."""
    key = key if isinstance(key, tuple) else (key,)
    if any(part is Ellipsis for part in key):
        at = next(i for i, part in enumerate(key) if part is Ellipsis)
        key = (*key[:at], *[slice(None)] * (4 - len(key)), *key[at + 1 :])
    if len(key) > 3:
        raise IndexError(f"an image has 3 axes, {len(key)} were indexed")
    key = (*key, *[slice(None)] * (3 - len(key)))
    return key[0], key[1], key[2]


def _bounds(key: Any, size: int) -> tuple[int, int, Any]:
    """Return the first and last row (exclusive) that an index needs, and the index relative to them."""
    if isinstance(key, slice):
        chosen = range(*key.indices(size))
        if not chosen:
            return 0, 0, slice(0, 0)
        return min(chosen), max(chosen) + 1, slice(None, None, chosen.step)
    index = np.arange(size)[key]
    if index.size == 0:
        return 0, 0, index
    return int(index.min()), int(index.max()) + 1, index - index.min()
