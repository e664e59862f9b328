"""Features kept on disk, so that trying ten heads costs one pass of the encoder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch

from .._core.logs import logger
from ..image import PatchBatch, PatchReader
from ..models._network import FeatureExtractor
from ._engine import Batches, encode
from ._pixels import DIGEST_BYTES, Pixels

#: Raised whenever the same key would stand for other numbers, or a file is laid out differently.
_VERSION = 3
_PREFIX = "he2gene-features-"
_BLOCK_BYTES = 2**22
#: Spots that an interrupted run loses at most.
_BLOCK_SPOTS = 1024
#: Left free on the disk beside what the features take.
_SPARE_BYTES = 2**24
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


Progress = Callable[[int], object] | None


@dataclass(frozen=True)
class Part:
    """What is encoded together: all windows of every spot, or one window at the nodes of its lattice."""

    extractor: FeatureExtractor
    reader: PatchReader
    weights: scipy.sparse.csr_array | None = None  # from nodes to spots; None where the spots themselves are read


@dataclass(frozen=True)
class Encoder:
    """How parts are encoded."""

    sha256: str  # of its weights
    symmetries: tuple[tuple[int, bool], ...]
    device: torch.device
    dtype: torch.dtype


def cached_features(
    part: Part,
    how: Encoder,
    folder: str | Path,
    progress: Progress = None,
    *,
    pixels: str | None = None,
    fill: Callable[[Sequence[Block], tuple[int, ...]], None] | None = None,
) -> np.ndarray:
    """Features ``(n_spots, r, f)`` float32 of all spots of a part, mapped read-only from a file in ``folder``.

    If it is not there, they are computed. The pixels are read in any case: their digest is part of the key.

    *Layout.* One npy file a section, encoder and choice of symmetries, ``he2gene-features-<key>.npy``, with the SHA-256
    of its bytes behind it. A file that is cut short or altered is noticed, with a warning, and computed again.

    ``fill`` writes the blocks that are missing, of features of this shape a spot; by default this process does it.

    *Key.* SHA-256 of the pixels of all patches in the order of the spots, the windows in µm and in pixels, the tiles that
    they are cut into, the encoder (weights, architecture, input size, interpolation, normalisation, and what it makes of
    one patch of noise, since networks of the same weights may still differ), the symmetries, the precision and the
    version of this format. Batch size and device are not part of it: they change a feature by rounding error.

    *Whole or not at all.* Batches are written to a temporary file (``.part``), which is renamed when it is complete.
    Above 1,024 spots, features are first written in blocks of 1,024 (``.block``): an interrupted run reads the complete
    ones and encodes the others. With the same batch size it gives the same numbers bit for bit. Meanwhile the disk holds
    the features twice.

    *Single precision* is what the encoder hands out, so a head fitted to cached features is the same bit for bit. Half
    precision would change every fit, and overflow above 65,504.
    """
    folder, reader = Path(folder).expanduser(), part.reader
    part.extractor.to(how.device)
    key = _key(part, how, Pixels.of(reader, judge=False).sha256 if pixels is None else pixels)
    path = folder / f"{_PREFIX}{key}.npy"
    found = _open(path, reader.n_spots)
    if found is not None:
        if progress is not None:
            progress(reader.n_spots)
        return found
    shape = (reader.n_spots, *_shape(part, how))
    if 0 in shape:
        empty = np.empty(shape, np.float32)
        empty.flags.writeable = False
        return empty

    blocks = _blocks(reader, folder / f"{_PREFIX}{key}")
    n_bytes = 4 * int(np.prod(shape, dtype=np.int64)) + DIGEST_BYTES
    there = sum(block.path.stat().st_size for block in blocks if block.path.exists())
    room = n_bytes * (1 if len(blocks) == 1 else 2) - there
    with explained(folder, room):
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < room + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if len(blocks) == 1:
        with torch.inference_mode():
            _store(path, shape, _encoded(part, how, reader, progress))
    else:
        missing = _missing(blocks, progress)
        if fill is None:
            encode_blocks(part, how, missing, shape[1:], progress)
        else:
            fill(missing, shape[1:])
        _store(path, shape, _joined(blocks, path, reader.n_spots))
    for block in blocks if len(blocks) > 1 else ():
        block.path.unlink(missing_ok=True)
    found = _open(path, reader.n_spots)
    if found is None:
        raise OSError(errno.EIO, "the features that were written read back otherwise; is the disk failing?", str(path))
    return found


@dataclass(frozen=True)
class Block:
    """Batches of a reader that stand in one file until all are there."""

    path: Path
    batches: range
    spots: np.ndarray


class _Some:
    """Some batches of a reader."""

    def __init__(self, reader: PatchReader, wanted: Collection[int]):
        self.batch_size, self._reader, self._wanted = reader.batch_size, reader, wanted

    def __iter__(self) -> Iterator[PatchBatch]:
        return self._reader.read_batches(self._wanted)


def _encoded(
    part: Part, how: Encoder, batches: Batches, progress: Progress
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Yield the spots of each batch and their features."""
    options: dict[str, Any] = {"device": how.device, "dtype": how.dtype, "symmetries": how.symmetries}
    for batch, views in encode(part.extractor, batches, **options):
        yield batch.index, views.float().cpu().numpy()
        if progress is not None:
            progress(len(batch.index))


def batch_ranges(reader: PatchReader) -> list[range]:
    """Batches that make a block each."""
    at_once = max(1, _BLOCK_SPOTS // max(1, reader.batch_size))
    n = len(reader.batches)
    return [range(first, min(first + at_once, n)) for first in range(0, n, at_once)]


def _blocks(reader: PatchReader, stem: Path) -> list[Block]:
    batches = reader.batches
    stops = [0, *accumulate(map(len, batches))]
    found = []
    for part in batch_ranges(reader):
        spots = np.concatenate(batches[part.start : part.stop])
        # The order of the spots follows the chunks of the image, which are not part of the key.
        order = hashlib.sha256(np.ascontiguousarray(spots, np.int64).tobytes()).hexdigest()[:16]
        name = f"{stem.name}-{stops[part.start]}-{stops[part.stop]}-{reader.batch_size}-{order}.block"
        found.append(Block(stem.with_name(name), part, spots))
    return found


def is_whole(block: Block) -> bool:
    """Whether the file of a block is there, and what was written."""
    return _open(block.path, len(block.spots)) is not None


def _missing(blocks: Sequence[Block], progress: Progress) -> list[Block]:
    """Blocks that are not there."""
    missing = []
    for block in blocks:
        if not is_whole(block):
            missing.append(block)
        elif progress is not None:
            progress(len(block.spots))
    if len(missing) < len(blocks):
        n = sum(len(block.spots) for block in blocks) - sum(len(block.spots) for block in missing)
        logger.info("features of %d spots are there from a run that was interrupted; going on", n)
    return missing


def encode_blocks(
    part: Part, how: Encoder, blocks: Sequence[Block], shape: tuple[int, ...], progress: Progress = None
) -> None:
    """Encode blocks, of features of this shape a spot, and write a file each."""
    wanted = [i for block in blocks for i in block.batches]
    batches = _encoded(part, how, _Some(part.reader, wanted), progress)
    with torch.inference_mode(), contextlib.closing(batches):
        for block in blocks:
            place = {int(spot): row for row, spot in enumerate(block.spots)}
            rows = (
                (np.array([place[int(spot)] for spot in index]), views)
                for _, (index, views) in zip(block.batches, batches, strict=False)
            )
            _store(block.path, (len(block.spots), *shape), rows)


def _joined(blocks: Sequence[Block], path: Path, n_spots: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for block in blocks:
        found = _open(block.path, len(block.spots))
        if found is not None:
            yield block.spots, found
            continue
        # Another run that computed the same has put them together meanwhile.
        whole = _open(path, n_spots)
        if whole is None:
            raise OSError(
                errno.EIO, "a block of features that was written is gone or damaged; run again", str(block.path)
            )
        yield block.spots, whole[block.spots]


def _store(path: Path, shape: tuple[int, ...], parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a file of the cache whole or not at all, from rows and where they stand."""
    folder, n_bytes = path.parent, 4 * int(np.prod(shape, dtype=np.int64)) + DIGEST_BYTES
    with explained(folder, n_bytes):
        handle, temporary = tempfile.mkstemp(prefix=f".{_PREFIX}", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "w+b", buffering=0) as stream:
            with explained(folder, n_bytes):
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
            offset = stream.tell()
            for index, rows in parts:
                for row in np.argsort(index):
                    stream.seek(offset + int(index[row]) * rows[0].nbytes)
                    _write(stream, rows[row].tobytes(), n_bytes, folder)
            _write(stream, _digest(stream, offset + n_bytes - DIGEST_BYTES), n_bytes, folder)
            with explained(folder, n_bytes):
                os.fsync(stream.fileno())
        with explained(folder, n_bytes):
            # mkstemp keeps others out; a cache is there to be shared as the folder is.
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(part: Part, how: Encoder, pixels: str) -> str:
    return hashlib.sha256(json.dumps(feature_facts(part, how, pixels), sort_keys=True).encode()).hexdigest()


def feature_facts(part: Part, how: Encoder, pixels: str) -> dict[str, Any]:
    """Everything that makes the features of the spots of a part what they are."""
    extractor, preprocess = part.extractor, part.extractor.preprocess
    return {
        "version": _VERSION,
        "pixels": pixels,
        "windows": [[float(window.um), window.factor, window.size] for window in part.reader.plan.windows],
        "encoder": how.sha256,
        "architecture": hashlib.sha256(repr(extractor.encoder).encode()).hexdigest(),
        "output": extractor.fingerprint(),
        "input_px": extractor.input_px,
        "normalisation": [preprocess.shift.flatten().tolist(), preprocess.scale.flatten().tolist()],
        **({} if preprocess.interpolation == "bilinear" else {"interpolation": preprocess.interpolation}),
        **({} if extractor.tiles is None else {"tiles": list(extractor.tiles)}),
        "fusion": extractor.fusion,
        "symmetries": [[int(turns), bool(mirrored)] for turns, mirrored in how.symmetries],
        "dtype": str(how.dtype),
    }


def _shape(part: Part, how: Encoder) -> tuple[int, ...]:
    """Shape of the features of one blank spot, so that the room they take is known before the work."""
    sides = [window.size for window in part.reader.plan.windows]
    blank = tuple(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=how.device) for side in sides)
    with torch.inference_mode(), torch.autocast(how.device.type, dtype=how.dtype, enabled=how.dtype != torch.float32):
        return tuple(part.extractor(blank, how.symmetries).shape[1:])


def _write(stream: BinaryIO, data: bytes, n_bytes: int, folder: Path) -> None:
    """Write all of it; a raw file may take a part at a time."""
    view = memoryview(data)
    with explained(folder, n_bytes):
        while view:
            view = view[stream.write(view) :]


def _digest(stream: BinaryIO, n_bytes: int) -> bytes:
    """SHA-256 of the first bytes of a file, which is left standing behind them."""
    digest = hashlib.sha256()
    stream.seek(0)
    left = n_bytes
    while left and (block := stream.read(min(left, _BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    return digest.digest()


def _open(path: Path, n_spots: int) -> np.ndarray | None:
    """Map a file of the cache if it is there and whole; ``None`` otherwise."""
    try:
        with path.open("rb") as stream:
            n_bytes = path.stat().st_size - DIGEST_BYTES
            whole = n_bytes > 0 and _digest(stream, n_bytes) == stream.read(DIGEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if whole:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype == np.float32 and len(found) == n_spots:
            return found
    logger.warning("%s is damaged: its features are computed again", path)
    return None


@contextlib.contextmanager
def explained(folder: Path, n_bytes: int) -> Iterator[None]:
    """Say of a full disk or a folder that cannot be written which folder it was and what it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                error.errno,
                f"the disk is full: the features take {n_bytes:,} bytes; free them or choose another folder for the cache",
                str(folder),
            ) from error
        raise OSError(
            error.errno, f"the folder of the cache cannot be written ({error.strerror})", str(folder)
        ) from error
