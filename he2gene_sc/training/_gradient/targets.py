"""Targets of training by gradient: sparse, and dense a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse

#: Spots that are dense at once where all are gone through.
_AT_ONCE = 1024


class Targets:
    """Log-normalised expression of several sections, sparse, maybe on disk; rows are taken as a dense array."""

    def __init__(self, sections: Sequence[scipy.sparse.csr_array], measured: np.ndarray):
        self.sections, self.measured = tuple(sections), np.asarray(measured, bool)
        sizes = [part.shape[0] for part in self.sections]
        self._starts = np.cumsum([0, *sizes])
        self._section = np.repeat(np.arange(len(sizes)), sizes)
        self.shape = (int(self._starts[-1]), self.measured.shape[1])

    def __len__(self) -> int:
        """Return the number of spots."""
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return the targets of some spots, ``(len(rows), g)`` float32; NaN where they were not measured."""
        rows = np.arange(len(self))[rows]
        out = np.empty((len(rows), self.shape[1]), np.float32)
        sections = self._section[rows]
        for i in np.unique(sections):
            here = np.flatnonzero(sections == i)
            part = self.sections[i][rows[here] - self._starts[i]].toarray()
            part[:, ~self.measured[i]] = np.nan
            out[here] = part
        return out


def blocks(targets: np.ndarray | Targets, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions and dense targets of some spots, a thousand at a time."""
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        yield part, targets[part]


def column_means(targets: np.ndarray | Targets, rows: np.ndarray) -> np.ndarray:
    """Return the mean of each gene over the spots that list it, NaN where none does."""
    total, count = np.zeros(targets.shape[1]), np.zeros(targets.shape[1], np.int64)
    for _, values in blocks(targets, rows):
        total += np.nansum(values, axis=0, dtype=np.float64)
        count += (~np.isnan(values)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.where(count > 0, count, np.nan)
