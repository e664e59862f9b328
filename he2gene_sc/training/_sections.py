"""Training data of one section: features on disk, sparse targets, labels. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from ..stats import TARGET_SUM


@dataclass(frozen=True, eq=False)
class Section:
    """Training data of the spots of one section."""

    name: str
    patient: str
    mpp: float
    centres_um: np.ndarray  # (n, 2)
    features: np.ndarray  # (n, r, f), r symmetries with the identity first; may be a memory map
    targets: scipy.sparse.csc_array  # (n, g) ln(1 + counts per 10,000), sparse columns
    totals: np.ndarray  # (n,) total counts
    measured: np.ndarray  # (g,); targets of other genes are empty and ignored
    codes: np.ndarray  # (n,) classes, -1 without a label
    image: dict[str, Any] | None = None  # facts by which a card recognises the image
    recoloured: tuple[np.ndarray, ...] = ()  # of (n, f), features of recoloured copies, for the annotation
    rings: dict[Any, tuple] = field(default_factory=dict, init=False)  # ring matrices by radii, see find_rings

    def __len__(self) -> int:
        return len(self.totals)

    def dense(self, genes: np.ndarray | slice) -> np.ndarray:
        """Return the targets of some genes, ``(n, len(genes))`` float32; NaN for genes that were not measured."""
        values = self.targets[:, genes].toarray()
        values[:, ~self.measured[genes]] = np.nan
        return values

    def sums(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of the targets and of their squares over the chosen spots, ``(g,)`` float64 each."""
        genes, weights = self.targets.T, rows.astype(np.float64)
        squared = scipy.sparse.csr_array((np.square(genes.data), genes.indices, genes.indptr), genes.shape)
        return genes @ weights, squared @ weights

    def counts(self) -> scipy.sparse.csr_array:
        """Return the raw counts ``(n, g)`` of the targets."""
        rows = self.targets.tocsr()
        values = np.expm1(rows.data.astype(np.float64)) * np.repeat(self.totals, np.diff(rows.indptr)) / TARGET_SUM
        return scipy.sparse.csr_array((np.rint(values).astype(np.int64), rows.indices, rows.indptr), rows.shape)


def groups_of(sections: Sequence[Section], unit: str) -> list[str]:
    """Return the patient of each section if the unit is ``"patient"``, else its name."""
    return [section.patient if unit == "patient" else section.name for section in sections]


def group_codes(sections: Sequence[Section], unit: str) -> np.ndarray:
    """Return the code of the patient or section of each spot, ``(n,)``, in the order of the sections."""
    codes, _ = pd.factorize(np.array(groups_of(sections, unit), object))
    return np.repeat(codes, [len(section) for section in sections])


def log_targets(counts: scipy.sparse.csr_array, totals: np.ndarray) -> scipy.sparse.csc_array:
    """Return the natural log of (1 + counts per 10,000), sparse columns float32; ``totals`` ``(n,)`` are over all genes."""
    rows = scipy.sparse.csr_array(counts, copy=True)
    rows.sum_duplicates()
    rows.eliminate_zeros()
    values = np.log1p(TARGET_SUM * rows.data / np.repeat(totals, np.diff(rows.indptr)))
    return scipy.sparse.csr_array((values.astype(np.float32), rows.indices, rows.indptr), rows.shape).tocsc()
