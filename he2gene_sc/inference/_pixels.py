"""What the patches of a reader show without a model, and the digest that they are found again by."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from ..image import FAULTS, PatchBatch, PatchReader, faults, tissue_share
from ..image._geometry import WindowPlan
from ..models._ood import SlideFacts

DIGEST_BYTES = hashlib.sha256().digest_size


def judged_windows(windows: Sequence[WindowPlan]) -> tuple[int, int]:
    """Return which window tells the tissue of a spot, and which its faults."""
    smallest = min(range(len(windows)), key=lambda i: windows[i].um)
    # Averaging hides faults: they are looked for in the widest window that was not averaged.
    whole = [i for i, window in enumerate(windows) if window.factor == 1]
    return smallest, max(whole or [smallest], key=lambda i: windows[i].um)


class Pixels:
    """Digest, tissue and faults of the patches of a reader, gathered batch by batch; faults only to ``judge``."""

    def __init__(self, reader: PatchReader, *, judge: bool = True):
        n, windows = reader.n_spots, reader.plan.windows
        self.facts = SlideFacts(reader.mpp, np.zeros(n, np.float32), np.zeros((n, len(FAULTS)), np.float32))
        self._judge, self._windows = judge, windows
        self._smallest, self._widest = judged_windows(windows)
        self._digests = np.zeros((n, DIGEST_BYTES), np.uint8)

    @classmethod
    def of(cls, reader: PatchReader, *, judge: bool = True, batches: Collection[int] | None = None) -> Pixels:
        """Read all patches of a reader, or those of some batches."""
        found = cls(reader, judge=judge)
        for batch in reader.read_batches(batches):
            found.add(batch)
        return found

    def rows(self, spots: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what is noted of some spots."""
        return self._digests[spots], self.facts.tissue[spots], self.facts.faults[spots]

    def put(self, spots: np.ndarray, rows: tuple[np.ndarray, ...]) -> None:
        """Note what another process has read of some spots, as :meth:`rows` gives it."""
        self._digests[spots], self.facts.tissue[spots], self.facts.faults[spots] = rows

    def add(self, batch: PatchBatch, *, digest: bool = True) -> None:
        """Note what a batch shows."""
        if digest:
            for row, spot in enumerate(batch.index):
                found = hashlib.sha256()
                for window in batch.patches:
                    found.update(np.ascontiguousarray(window[row]).data)
                self._digests[spot] = np.frombuffer(found.digest(), np.uint8)
        if self._judge:
            um = self._windows[self._smallest].um
            self.facts.tissue[batch.index] = tissue_share(batch.patches[self._smallest], um)
            widest = batch.patches[self._widest]
            mpp = self._windows[self._widest].um / widest.shape[-1]
            self.facts.faults[batch.index] = faults(widest, mpp)

    @property
    def sha256(self) -> str:
        """Digest of the patches of all spots in the order of the spots; batches come in that of the stored chunks."""
        return hashlib.sha256(self._digests.tobytes()).hexdigest()
