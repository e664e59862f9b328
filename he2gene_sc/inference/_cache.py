"""Cache of features on disk, so that several heads can be fitted after one pass of the encoder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse
import torch

from .._core.logs import logger
from ..image import PatchBatch, PatchReader
from ..models._network import FeatureExtractor
from ._engine import encode
from ._pixels import DIGEST_BYTES, Pixels

#: Increased when the features of a key, or the layout of a file, change.
_VERSION = 3
_PREFIX = "he2gene-features-"
_BLOCK_BYTES = 2**22
#: Most spots whose features are lost if a run is interrupted.
_BLOCK_SPOTS = 1024
#: Free space that must remain on the disk beside the features.
_SPARE_BYTES = 2**24
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

Progress = Callable[[int], object] | None


@dataclass(frozen=True)
class Part:
    """A unit of encoding: all windows of every spot, or one window at the nodes of its lattice."""

    extractor: FeatureExtractor
    reader: PatchReader
    weights: scipy.sparse.csr_array | None = None  # from nodes to spots; None if the spots themselves are encoded


@dataclass(frozen=True)
class Encoder:
    """Encoder settings of all parts of a slide."""

    sha256: str  # of the weights
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
    """Return the features ``(n_spots, r, f)`` float32 of all spots of a part, mapped read-only from a file in ``folder``.

    They are computed if the file does not exist. The pixels are always read, since their digest is part of the key.

    *Layout.* There is one npy file per section (in training also per recoloured copy), encoder and choice of symmetries,
    ``he2gene-features-<key>.npy``. The SHA-256 of its bytes is appended. A truncated or changed file is computed again, with a
    warning.

    ``fill`` writes missing blocks, given the shape of the features of one spot. By default this process does.

    *Key.* SHA-256 of :func:`feature_facts`. Batch size and device are not part of it: they change a feature only by rounding
    errors.

    *Atomic writes.* Batches are written to a temporary file (``.part``), which is renamed when it is complete. Above 1,024
    spots, features are first written in blocks of 1,024 (``.block``): a run after an interruption reads the complete blocks
    and encodes the others. With the same batch size the features are equal bit for bit. Until the end, the disk holds the
    features twice.

    *Single precision* is the output of the encoder, so a head fitted to cached features is equal bit for bit. Half precision
    would change every fit, and overflow above 65,504.
    """
    folder, reader = Path(folder).expanduser(), part.reader
    part.extractor.to(how.device)
    key = _key(part, how, Pixels.read(reader, quality=False).sha256 if pixels is None else pixels)
    path = folder / f"{_PREFIX}{key}.npy"
    found = _open(path, reader.n_spots)
    if found is not None:
        if progress is not None:
            progress(reader.n_spots)
        return found
    shape = (reader.n_spots, *_shape(part, how))
    if 0 in shape:
        return np.broadcast_to(np.float32(0), shape)

    blocks = _blocks(reader, folder / f"{_PREFIX}{key}") if len(batch_ranges(reader)) > 1 else []
    n_bytes = 4 * int(np.prod(shape, dtype=np.int64)) + DIGEST_BYTES
    existing = sum(block.path.stat().st_size for block in blocks if block.path.exists())
    room = n_bytes * (2 if blocks else 1) - existing
    with explain_write_errors(folder, room):
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < room + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not blocks:
        with torch.inference_mode():
            _store(path, shape, ((batch.index, rows) for batch, rows in encode_part(part, how, reader, progress)))
    else:
        missing = []
        for block in blocks:
            if block.read() is None:
                missing.append(block)
            elif progress is not None:
                progress(len(block.spots))
        if len(missing) < len(blocks):
            n = reader.n_spots - sum(len(block.spots) for block in missing)
            logger.info("found features of %d spots from an interrupted run; encoding the others", n)
        (fill or partial(encode_blocks, part, how, progress=progress))(missing, shape[1:])
        _store(path, shape, _join_blocks(blocks, path, reader.n_spots))
    for block in blocks:
        block.path.unlink(missing_ok=True)
    found = _open(path, reader.n_spots)
    if found is None:
        reason = "the features that were read back differ from those written; check the disk"
        raise OSError(errno.EIO, reason, str(path))
    return found


@dataclass(frozen=True)
class Block:
    """Batches of a reader that are kept in a file of their own until all blocks are complete."""

    path: Path
    batches: range
    spots: np.ndarray

    def read(self) -> np.ndarray | None:
        """Return the features of the spots; ``None`` if the file does not exist or is damaged."""
        return _open(self.path, len(self.spots))


def encode_part(
    part: Part, how: Encoder, batches: Iterable[PatchBatch], progress: Progress
) -> Generator[tuple[PatchBatch, np.ndarray], None, None]:
    """Yield each batch and the features of its spots."""
    found = encode(part.extractor, batches, device=how.device, dtype=how.dtype, symmetries=how.symmetries)
    for batch, views in found:
        yield batch, views.float().cpu().numpy()
        if progress is not None:
            progress(len(batch.index))


def batch_ranges(reader: PatchReader) -> list[range]:
    """Return the range of batches of each block."""
    batches = range(len(reader.batches))
    at_once = max(1, _BLOCK_SPOTS // max(1, reader.batch_size))
    return [batches[first : first + at_once] for first in batches[::at_once]]


def _blocks(reader: PatchReader, stem: Path) -> list[Block]:
    start, found = 0, []
    for part in batch_ranges(reader):
        spots = np.concatenate(reader.batches[part.start : part.stop])
        # The order of the spots depends on the chunks of the image, which are not part of the key.
        order = hashlib.sha256(np.ascontiguousarray(spots, np.int64).tobytes()).hexdigest()[:16]
        name = f"{stem.name}-{start}-{start + len(spots)}-{reader.batch_size}-{order}.block"
        found.append(Block(stem.with_name(name), part, spots))
        start += len(spots)
    return found


def encode_blocks(
    part: Part, how: Encoder, blocks: Sequence[Block], shape: tuple[int, ...], progress: Progress = None
) -> None:
    """Encode blocks and write one file for each; ``shape`` is that of the features of one spot."""
    wanted = [i for block in blocks for i in block.batches]
    batches = encode_part(part, how, part.reader.read_batches(wanted), progress)
    with torch.inference_mode(), contextlib.closing(batches):
        for block in blocks:
            row_of_spot = {int(spot): row for row, spot in enumerate(block.spots)}
            rows = (
                (np.array([row_of_spot[int(spot)] for spot in batch.index]), views)
                for _, (batch, views) in zip(block.batches, batches, strict=False)
            )
            _store(block.path, (len(block.spots), *shape), rows)


def _join_blocks(blocks: Sequence[Block], path: Path, n_spots: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for block in blocks:
        rows = block.read()
        if rows is None:
            # Another run of the same key may have joined the blocks in the meantime.
            joined = _open(path, n_spots)
            if joined is None:
                reason = "a block of features is missing or damaged after it was written; run again"
                raise OSError(errno.EIO, reason, str(block.path))
            rows = joined[block.spots]
        yield block.spots, rows


def _store(path: Path, shape: tuple[int, ...], parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a file of the cache atomically, from pairs of row indices and rows."""
    n_bytes = 4 * int(np.prod(shape, dtype=np.int64)) + DIGEST_BYTES
    # Errors of the image, from which the parts are computed, are not errors of writing.
    explained = partial(explain_write_errors, path.parent, n_bytes)
    with explained():
        handle, temporary = tempfile.mkstemp(prefix=f".{_PREFIX}", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b", buffering=0) as stream:
            with explained():
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
            offset = stream.tell()
            for index, rows in parts:
                with explained():
                    for row in np.argsort(index):
                        stream.seek(offset + int(index[row]) * rows[0].nbytes)
                        _write(stream, rows[row].tobytes())
            with explained():
                _write(stream, _digest(stream, offset + n_bytes - DIGEST_BYTES))
                os.fsync(stream.fileno())
        with explained():
            # mkstemp makes private files, but a cache is shared like its folder.
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(part: Part, how: Encoder, pixels: str) -> str:
    return hashlib.sha256(json.dumps(feature_facts(part, how, pixels), sort_keys=True).encode()).hexdigest()


def feature_facts(part: Part, how: Encoder, pixels: str) -> dict[str, Any]:
    """Return everything that determines the features of a part, as JSON values."""
    extractor, preprocess = part.extractor, part.extractor.preprocess
    return {
        "version": _VERSION,
        "pixels": pixels,
        "windows": [[float(window.um), window.factor, window.size] for window in part.reader.plan.windows],
        "encoder": how.sha256,
        "architecture": hashlib.sha256(repr(extractor.encoder).encode()).hexdigest(),
        # Networks with the same weights may differ.
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
    """Return the shape of the features of one spot, so that the disk space is known before encoding."""
    sides = [window.size for window in part.reader.plan.windows]
    blank = tuple(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=how.device) for side in sides)
    with torch.inference_mode(), torch.autocast(how.device.type, dtype=how.dtype, enabled=how.dtype != torch.float32):
        return tuple(part.extractor(blank, how.symmetries).shape[1:])


def _write(stream: BinaryIO, data: bytes) -> None:
    """Write all bytes; an unbuffered file may accept only a part at a time."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _digest(stream: BinaryIO, n_bytes: int) -> bytes:
    """Return the SHA-256 of the first ``n_bytes`` bytes of a file; the position is then behind them."""
    digest = hashlib.sha256()
    stream.seek(0)
    left = n_bytes
    while left and (block := stream.read(min(left, _BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    return digest.digest()


def _open(path: Path, n_spots: int) -> np.ndarray | None:
    """Map a file of the cache if it exists and is intact; otherwise return ``None``."""
    try:
        with path.open("rb") as stream:
            n_bytes = path.stat().st_size - DIGEST_BYTES
            intact = n_bytes > 0 and _digest(stream, n_bytes) == stream.read(DIGEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if intact:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype == np.float32 and len(found) == n_spots:
            return found
    logger.warning("%s is damaged: its features are computed again", path)
    return None


@contextlib.contextmanager
def explain_write_errors(folder: Path, n_bytes: int) -> Iterator[None]:
    """Raise errors of a full disk or a read-only folder again, with the folder and the bytes that are needed."""
    try:
        yield
    except OSError as error:
        reason = f"the folder of the cache cannot be written ({error.strerror})"
        if error.errno in _DISK_FULL:
            reason = f"the disk is full: the features take {n_bytes:,} bytes; free space or choose another folder for the cache"
        raise OSError(error.errno, reason, str(folder)) from error
