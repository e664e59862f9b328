"""Encode one slide on several workers of a dask cluster, each of which reads and encodes some of the blocks."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask
import numpy as np
import torch

from .._settings import settings
from ..image import PatchReader
from ._cache import Block, Encoder, Part, Progress, batch_ranges, encode_blocks, explain_write_errors
from ._device import allocator, n_readers, resolve_device
from ._pixels import Pixels

if TYPE_CHECKING:
    from distributed import Client, Future

#: Most bytes of an image in memory that are sent to workers; a larger image must be on a disk that they can read.
SENT_BYTES = 2**26
#: Limits a process to one task at a time, even if its worker has several threads.
_TASK_LOCK = threading.Lock()
#: Marker files of tasks whose pixels this process reads correctly.
_CHECKED: set[Path] = set()


@dataclass(frozen=True)
class Workers:
    """Workers of a cluster that share the blocks of a slide."""

    client: Client  # client of the cluster
    device: str | torch.device  # on which each worker encodes; "auto" is chosen by the worker

    def check(self, reader: PatchReader) -> None:
        """Raise if the image is in the memory of this process and larger than :data:`SENT_BYTES`."""
        try:
            cloudpickle.dump(reader.source, _SizeLimit())
        except BufferError as error:
            raise ValueError(
                f"`client`: the image is in memory, where workers cannot read it (more than {SENT_BYTES >> 20} MiB); save it "
                "and open the store: hg.io.save(sdata, 'slide.zarr'), then spatialdata.read_zarr('slide.zarr')"
            ) from error

    @contextlib.contextmanager
    def share(self, part: Part, how: Encoder, folder: Path) -> Iterator[_SharedReader | None]:
        """Send a part to the workers, which write to ``folder``; yield ``None`` for a part of one block, which is not shared."""
        ranges = batch_ranges(part.reader)
        if len(ranges) < 2:
            yield None
            return
        with contextlib.ExitStack() as stack:
            with explain_write_errors(folder, 0):
                folder.mkdir(parents=True, exist_ok=True)
                marker_file = stack.enter_context(
                    tempfile.NamedTemporaryFile(prefix=".he2gene-features-", suffix=".part", dir=folder)
                )
            # Batches in the middle show tissue, whereas missing chunks are read as black.
            probe = ranges[len(ranges) // 2].start
            part.extractor.cpu()
            digest = _digest(part.reader, probe)
            task = _Task(part, how, self.device, Path(marker_file.name), probe, digest, settings.n_readers)
            yield _SharedReader(self.client, send(self.client, task), part.reader, ranges)


class _SharedReader:
    """A reader whose batches are distributed to workers."""

    def __init__(self, client: Client, task: Future, reader: PatchReader, ranges: Sequence[range]):
        self._client, self._task, self._reader, self._ranges = client, task, reader, ranges

    def pixels(self) -> Pixels:
        """Read digest, tissue and faults of all patches."""
        found = Pixels(self._reader)
        for spots, rows in self._map(_read_rows, ((part,) for part in self._ranges)):
            found.put(spots, rows)
        return found

    def fill(self, blocks: Sequence[Block], shape: tuple[int, ...], progress: Progress = None) -> None:
        """Encode blocks; ``shape`` is that of the features of one spot."""
        for n in self._map(_encode_block, ((block, shape) for block in blocks)):
            if progress is not None:
                progress(n)

    def _map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """Call a function with the task and each tuple of arguments; yield results as they are completed."""
        from distributed import KilledWorker, as_completed

        futures = [self._client.submit(function, self._task, *given, pure=False) for given in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KilledWorker as error:
            raise RuntimeError(
                "`client`: several workers died on the same block of features, perhaps from lack of memory. Complete blocks "
                f"are kept: call again with more memory per worker or a smaller `batch_size` ({error})"
            ) from error
        finally:
            self._client.cancel(futures)


def send(client: Client, value: Any) -> Future:
    """Send a value that several tasks use to a cluster once, as the result of a task, which can be recomputed if it is lost."""
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "16 GiB"}):
        return client.submit(_identity, value, pure=False)


def _identity(value: Any) -> Any:
    return value


class _SizeLimit(io.RawIOBase):
    """A file that discards its content, and raises above :data:`SENT_BYTES`."""

    def __init__(self) -> None:
        self._left = SENT_BYTES

    def write(self, data: Any, /) -> int:
        n = memoryview(data).nbytes
        self._left -= n
        if self._left < 0:
            raise BufferError
        return n


# --- In a worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Everything that workers need to encode batches of a part as the caller would."""

    part: Part
    how: Encoder
    device: str | torch.device
    marker_file: Path  # created by the caller for this task
    probe: int  # number of a batch
    digest: str  # of the pixels of that batch
    n_readers: int | None  # `settings.n_readers` of the caller

    @contextlib.contextmanager
    def running(self) -> Iterator[torch.device]:
        """Run one task at a time, after a check that this worker reads the same files as the caller."""
        # dask reads in this worker: tasks sent to the cluster would wait behind other blocks.
        with _TASK_LOCK, dask.config.set(scheduler="threads", num_workers=1):
            device = resolve_device(self.device)
            self.part.reader.allocate = allocator(device)
            self.part.reader.n_readers = n_readers(device, self.n_readers)
            if self.marker_file not in _CHECKED:
                self._check()
                _CHECKED.add(self.marker_file)
            yield device

    def _check(self) -> None:
        """Raise if a worker cannot read the files of the caller: zarr reads missing chunks as black."""
        if not self.marker_file.exists():
            raise ValueError(
                f"`folder` {str(self.marker_file.parent)!r} is not visible to all workers of `client`; choose a folder on a disk "
                "that they share"
            )
        try:
            same = _digest(self.part.reader, self.probe) == self.digest
        except OSError as error:
            raise ValueError(f"`client`: a worker cannot read the image ({error}); {_ADVICE}") from error
        if not same:
            raise ValueError(f"`client`: a worker reads other pixels of the image than this process; {_ADVICE}")


_ADVICE = "open it by its full path, on a disk that all workers share: spatialdata.read_zarr('/shared/slide.zarr')"


def _digest(reader: PatchReader, batch: int) -> str:
    return Pixels.read(reader, quality=False, batches=[batch]).sha256


def _read_rows(task: _Task, batches: range) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Read some batches; return their spots, and digests, tissue and faults."""
    with task.running():
        spots = np.concatenate(task.part.reader.batches[batches.start : batches.stop])
        return spots, Pixels.read(task.part.reader, batches=batches).rows(spots)


def _encode_block(task: _Task, block: Block, shape: tuple[int, ...]) -> int:
    """Encode one block, and return the number of its spots."""
    with task.running() as device:
        # A worker that died may already have written the block.
        if block.read() is None:
            task.part.extractor.to(device)
            encode_blocks(task.part, replace(task.how, device=device), [block], shape)
    return len(block.spots)
