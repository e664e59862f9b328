"""Scores of gene sets at spots, computed from sums over blocks of genes, and their noise ceiling."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from ._accuracy import log_normalise, pearson

#: Values per block of spots, and number of random splits of the counts for a ceiling (as for genes in training).
_BLOCK, _SPLITS = 2**22, 2
#: Added to 1 - r and 1 + r, so that a correlation of 1 or -1 has a finite score.
_TINY = 1e-16


class SetScores:
    """t-values of the slope of expression on the weights of each set, over all genes, for every spot.

    Equals decoupler's ``ulm`` (Badia-i-Mompel et al., Bioinform Adv 2022), but needs only sums over genes.
    """

    def __init__(self, weights: np.ndarray, used: np.ndarray | None = None):
        self._weights = np.asarray(weights, np.float64)  # (g, sets), 0 outside of a set
        self._used = np.ones(len(weights), bool) if used is None else used  # (g,)
        self._sums: list[np.ndarray] = []

    def add(self, values: np.ndarray, genes: slice = slice(None)) -> SetScores:
        """Add the logarithms of some genes at all spots, ``(n, k)``."""
        used = self._used[genes]
        x = values[:, used].astype(np.float64)
        sums = [x.sum(1), np.square(x).sum(1), x @ self._weights[genes][used]]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        return self

    def t(self) -> np.ndarray:
        """Scores ``(n, sets)``; 0 for a spot whose genes all have the same value."""
        weights = self._weights[self._used]
        n, mean = len(weights), weights.mean(0)
        total, squares, product = self._sums
        varies = squares - np.square(total) / n
        varies = np.where(varies > 1e-12 * squares, varies, np.inf)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (product - total[:, None] * mean) / np.sqrt(varies[:, None] * np.square(weights - mean).sum(0))
            return r * np.sqrt((n - 2) / ((1 - r + _TINY) * (1 + r + _TINY)))


def set_ceiling(
    counts: scipy.sparse.csr_array,
    columns: np.ndarray,
    weights: np.ndarray,
    rng: np.random.Generator,
    used: np.ndarray | None = None,
) -> np.ndarray:
    """Noise ceiling ``(sets,)`` of scores from binomial halves of the counts of one section, as in :func:`noise_ceiling`.

    ``columns`` are the genes of ``weights`` ``(g, sets)``; all other genes only count in the total counts.
    """
    counts = scipy.sparse.csr_array(counts)
    whole = np.rint(counts.data).astype(np.int64)
    step = max(1, _BLOCK // counts.shape[1])
    correlations = []
    for _ in range(_SPLITS):
        half = rng.binomial(whole, 0.5)
        scores = []
        for data in (half, whole - half):
            part = scipy.sparse.csr_array((data, counts.indices, counts.indptr), counts.shape)
            blocks = (log_normalise(part[i : i + step])[:, columns] for i in range(0, counts.shape[0], step))
            scores.append(np.concatenate([SetScores(weights, used).add(block).t() for block in blocks]))
        correlations.append(np.nan_to_num(pearson(*scores)))
    r = np.clip(np.mean(correlations, axis=0), 0, 1)
    return np.sqrt(2 * r / (1 + r))
