"""One slide on several workers of a dask cluster: each reads and encodes its share of the blocks."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..image import PatchReader
from ._cache import Block, Encoder, Part, Progress, batch_ranges, encode_blocks, explained, is_whole
from ._device import allocator, resolve_device
from ._pixels import Pixels

if TYPE_CHECKING:
    from distributed import Client, Future

#: Pixels in memory that are sent to every worker; a larger image has to lie on a disk that they read.
SENT_BYTES = 2**26
#: One task at a time in a process, however many threads its worker has.
_ONE = threading.Lock()
#: Readers whose pixels this process has been seen to read as the caller does.
_CHECKED: set[str] = set()


@dataclass(frozen=True)
class Workers:
    """Workers that share the blocks of a slide."""

    client: Client  # of their cluster
    device: str | torch.device  # where each of them encodes; "auto" is what it has

    def check(self, reader: PatchReader) -> None:
        """Refuse an image in the memory of this process that is larger than :data:`SENT_BYTES`."""
        import cloudpickle

        try:
            cloudpickle.dump(reader.source, _Counted())
        except BufferError as error:
            raise ValueError(
                f"`client`: the image is in memory, where workers cannot read it (more than {SENT_BYTES >> 20} MiB); save it "
                "and open the store: hg.io.save(sdata, 'slide.zarr'), then spatialdata.read_zarr('slide.zarr')"
            ) from error

    @contextlib.contextmanager
    def share(self, part: Part, how: Encoder, folder: Path) -> Iterator[_Shared | None]:
        """Send a part to the workers, which write to ``folder``; one of a single block is not shared: ``None``."""
        ranges = batch_ranges(part.reader)
        if len(ranges) < 2:
            yield None
            return
        with contextlib.ExitStack() as stack:
            with explained(folder, 0):
                folder.mkdir(parents=True, exist_ok=True)
                seen_by_all = stack.enter_context(
                    tempfile.NamedTemporaryFile(prefix=".he2gene-features-", suffix=".part", dir=folder)
                )
            # Batches in the middle show tissue; a file that is not there reads as black.
            probe = ranges[len(ranges) // 2].start
            part.extractor.cpu()
            task = _Task(part, how, self.device, Path(seen_by_all.name), probe, _digest(part.reader, probe))
            yield _Shared(self.client, send(self.client, task), part.reader, ranges)


class _Shared:
    """A reader whose batches are shared by workers."""

    def __init__(self, client: Client, task: Future, reader: PatchReader, ranges: Sequence[range]):
        self._client, self._task, self._reader, self._ranges = client, task, reader, ranges

    def pixels(self) -> Pixels:
        """Read what the patches show, and their digest."""
        found = Pixels(self._reader)
        for spots, rows in self._each(_look, ((part,) for part in self._ranges)):
            found.put(spots, rows)
        return found

    def fill(self, blocks: Sequence[Block], shape: tuple[int, ...], progress: Progress = None) -> None:
        """Encode blocks, of features of this shape a spot."""
        for n in self._each(_encode, ((block, shape) for block in blocks)):
            if progress is not None:
                progress(n)

    def _each(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """Run a function of the task for each of some arguments; yield results as they come."""
        from distributed import KilledWorker, as_completed

        futures = [self._client.submit(function, self._task, *given, pure=False) for given in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KilledWorker as error:
            raise RuntimeError(
                "`client`: workers died of the same block of features, of too little memory perhaps; blocks that are "
                f"done are kept, so call again with more memory a worker or a smaller `batch_size` ({error})"
            ) from error
        finally:
            self._client.cancel(futures)


def send(client: Client, value: Any) -> Future:
    """Send what several tasks read to a cluster once, as a task, which is done again where it is lost."""
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "16 GiB"}):
        return client.submit(_same, value, pure=False)


def _same(value: Any) -> Any:
    return value


class _Counted(io.RawIOBase):
    """A file that keeps nothing, and takes only so much."""

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
    """What workers need to encode batches of a part as the caller would."""

    part: Part
    how: Encoder
    device: str | torch.device
    seen_by_all: Path  # a file of the caller
    probe: int  # a batch
    digest: str  # of its pixels
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @contextlib.contextmanager
    def running(self) -> Iterator[torch.device]:
        """Run one task at a time, once files are known to be those of the caller."""
        import dask

        # What is read by dask stays in this worker: tasks of its own would wait behind other blocks.
        with _ONE, dask.config.set(scheduler="threads", num_workers=1):
            device = resolve_device(self.device)
            self.part.reader.allocate = allocator(device)
            if self.name not in _CHECKED:
                self._check()
                _CHECKED.add(self.name)
            yield device

    def _check(self) -> None:
        """Refuse files that a worker does not see: zarr reads black where a chunk is not there."""
        if not self.seen_by_all.exists():
            raise ValueError(
                f"`folder` {str(self.seen_by_all.parent)!r} is not seen by all workers of `client`; name a folder on a disk "
                "that they share"
            )
        try:
            same = _digest(self.part.reader, self.probe) == self.digest
        except OSError as error:
            raise ValueError(f"`client`: a worker cannot read the image ({error}); {_MEND}") from error
        if not same:
            raise ValueError(f"`client`: a worker reads other pixels of the image than this process; {_MEND}")


_MEND = "open it by its full path, on a disk that all workers share: spatialdata.read_zarr('/shared/slide.zarr')"


def _digest(reader: PatchReader, batch: int) -> str:
    return Pixels.of(reader, judge=False, batches=[batch]).sha256


def _look(task: _Task, batches: range) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Read some batches: their spots, and what is noted of them."""
    with task.running():
        spots = np.concatenate(task.part.reader.batches[batches.start : batches.stop])
        return spots, Pixels.of(task.part.reader, batches=batches).rows(spots)


def _encode(task: _Task, block: Block, shape: tuple[int, ...]) -> int:
    """Encode one block, and return the number of its spots."""
    with task.running() as device:
        # A worker that died may have written it before.
        if not is_whole(block):
            task.part.extractor.to(device)
            encode_blocks(task.part, replace(task.how, device=device), [block], shape)
    return len(block.spots)
