"""Prediction of values from measured spots by kriging and ridge, and cross-validation folds that match prediction distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse
from scipy.spatial import cKDTree
from scipy.stats import wasserstein_distance
from sklearn.cluster import KMeans

#: Number of nearest known spots for kriging.
_NEAREST = 40
#: Largest number of cross-validation folds.
_FOLDS = 10
#: Fewest known spots outside a fold.
_MIN_TRAINING = 4


def kriging(xy: np.ndarray, known: np.ndarray, length_scale: float, noise: float) -> scipy.sparse.csr_array:
    """Weights ``(n, m)`` of simple kriging with mean 0, covariance ``exp(-d² / 2 length_scale²)`` and noise variance.

    Each row uses at most the 40 nearest known spots, so memory is linear in the number of spots.
    """
    k = min(_NEAREST, len(known))
    columns = cKDTree(known).query(xy, k=[*range(1, k + 1)])[1]
    weights = np.empty((len(xy), k))
    for start in range(0, len(xy), 1000):
        part = slice(start, start + 1000)
        near = known[columns[part]]
        between = np.square(near[:, :, None] - near[:, None]).sum(-1)
        towards = np.square(near - xy[part, None]).sum(-1)
        covariance = np.exp(-between / (2 * length_scale**2)) + noise * np.eye(k)
        weights[part] = np.linalg.solve(covariance, np.exp(-towards / (2 * length_scale**2))[..., None])[..., 0]
    rows = np.repeat(np.arange(len(xy)), k)
    return scipy.sparse.csr_array((weights.ravel(), (rows, columns.ravel())), shape=(len(xy), len(known)))


def ridge(embedding: np.ndarray, known: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression on an embedding, as a function of centred values: ``(m, g)`` at the known spots to ``(n, g)``.

    The mean of ``known`` is subtracted from both embeddings; the penalty is in units of its mean squared length.
    """
    mean = known.mean(0, dtype=float)
    a, b = known - mean, embedding - mean
    alpha = max(penalty * np.square(a).sum() / len(a), 1e-12)
    if len(a) <= a.shape[1]:
        dual = np.linalg.solve(a @ a.T + alpha * np.eye(len(a)), a @ b.T).T
        return lambda values: dual @ values
    primal = np.linalg.solve(a.T @ a + alpha * np.eye(a.shape[1]), a.T)
    return lambda values: b @ (primal @ values)


def matched_folds(xy: np.ndarray, known: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Folds ``(m,)`` of known spots that are as far from other folds as unknown spots are from known spots.

    Candidates are random folds and k-means clusters; the one with the smallest Wasserstein distance between the
    distributions of nearest-spot distances is chosen (kNNDM; Linnenbrink et al., Geosci. Model Dev. 2024).
    """
    rng = np.random.default_rng(seed)
    at, n = xy[known], int(known.sum())
    n_folds = min(_FOLDS, n)
    candidates = [rng.permutation(np.arange(n) % n_folds)]
    if known.all():
        return candidates[0]
    for q in sorted({2, 5, 10, 20, 40, 80} & set(range(n // 2 + 1))):
        cluster = KMeans(q, n_init=1, random_state=seed).fit_predict(at)
        order = rng.permutation(q)
        fold = order[cluster] % min(5, q)
        # Too few training spots cannot show how spots vary.
        if n - np.bincount(fold).max() >= _MIN_TRAINING:
            candidates.append(fold)
    real = cKDTree(at).query(xy[~known])[0]

    def mismatch(fold: np.ndarray) -> float:
        left = [cKDTree(at[fold != f]).query(at[fold == f])[0] for f in np.unique(fold)]
        return float(wasserstein_distance(np.concatenate(left), real))

    return min(candidates, key=mismatch)
