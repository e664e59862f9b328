"""Quality of the patches of a reader, without a model, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from ..image import FAULTS, PatchBatch, PatchReader, faults, tissue_share
from ..image._geometry import WindowPlan
from ..models._ood import SlideFacts

DIGEST_BYTES = hashlib.sha256().digest_size


def windows_for_quality(windows: Sequence[WindowPlan]) -> tuple[int, int]:
    """Return the indices of the window for the share of tissue, and of the window for faults."""
    smallest = min(range(len(windows)), key=lambda i: windows[i].um)
    # Averaging hides faults, so they are measured in the widest window that was not averaged.
    unaveraged = [i for i, window in enumerate(windows) if window.factor == 1]
    return smallest, max(unaveraged or [smallest], key=lambda i: windows[i].um)


class Pixels:
    """Digest, tissue and faults of the patches of a reader, batch by batch; only the digest if not ``quality``."""

    def __init__(self, reader: PatchReader, *, quality: bool = True):
        n, windows = reader.n_spots, reader.plan.windows
        self.facts = SlideFacts(reader.mpp, np.zeros(n, np.float32), np.zeros((n, len(FAULTS)), np.float32))
        self._quality, self._windows = quality, windows
        self._smallest, self._widest = windows_for_quality(windows)
        self._digests = np.zeros((n, DIGEST_BYTES), np.uint8)

    @classmethod
    def read(cls, reader: PatchReader, *, quality: bool = True, batches: Collection[int] | None = None) -> Pixels:
        """Read all patches of a reader, or those of some batches."""
        found = cls(reader, quality=quality)
        for batch in reader.read_batches(batches):
            found.add(batch)
        return found

    def rows(self, spots: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return digests, tissue and faults of some spots."""
        return self._digests[spots], self.facts.tissue[spots], self.facts.faults[spots]

    def put(self, spots: np.ndarray, rows: tuple[np.ndarray, ...]) -> None:
        """Store the result of :meth:`rows` of another process for some spots."""
        self._digests[spots], self.facts.tissue[spots], self.facts.faults[spots] = rows

    def add(self, batch: PatchBatch, *, digest: bool = True) -> None:
        """Add the digests, tissue and faults of a batch."""
        if digest:
            for row, spot in enumerate(batch.index):
                found = hashlib.sha256()
                for window in batch.patches:
                    found.update(np.ascontiguousarray(window[row]).data)
                self._digests[spot] = np.frombuffer(found.digest(), np.uint8)
        if self._quality:
            um = self._windows[self._smallest].um
            self.facts.tissue[batch.index] = tissue_share(batch.patches[self._smallest], um)
            widest = batch.patches[self._widest]
            mpp = self._windows[self._widest].um / widest.shape[-1]
            self.facts.faults[batch.index] = faults(widest, mpp)

    @property
    def sha256(self) -> str:
        """Digest of the patches of all spots, in the order of the spots rather than of the batches."""
        return hashlib.sha256(self._digests.tobytes()).hexdigest()
