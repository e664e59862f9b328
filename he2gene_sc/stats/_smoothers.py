"""What carries values from measured spots to others: kriging and ridge, and folds that are as far as the deployment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse

#: Known spots that one spot is kriged from: the nearest.
_NEAREST = 40
#: Folds of the cross-validation, at most.
_FOLDS = 10
#: Fewest known spots that a fold leaves.
_LEFT = 4


def kriging(xy: np.ndarray, known: np.ndarray, reach: float, noise: float) -> scipy.sparse.csr_array:
    """Weights of simple kriging with a Gaussian covariance, which is the mean of a Gaussian process.

    Parameters
    ----------
    xy
        ``(n, 2)`` where values are wanted.
    known
        ``(m, 2)`` where they are known.
    reach
        Range: the covariance at distance d is ``exp(-d² / 2 reach²)``.
    noise
        Variance of the noise of what is known, where that of the signal is 1.

    Returns
    -------
    scipy.sparse.csr_array
        ``(n, m)``, for values of mean 0; each row weighs the 40 nearest known spots at most, so that memory is linear
        in the number of spots.
    """
    from scipy.spatial import cKDTree

    k = min(_NEAREST, len(known))
    columns = cKDTree(known).query(xy, k=[*range(1, k + 1)])[1]
    weights = np.empty((len(xy), k))
    for start in range(0, len(xy), 1000):
        part = slice(start, start + 1000)
        near = known[columns[part]]
        between = np.square(near[:, :, None] - near[:, None]).sum(-1)
        towards = np.square(near - xy[part, None]).sum(-1)
        covariance = np.exp(-between / (2 * reach**2)) + noise * np.eye(k)
        weights[part] = np.linalg.solve(covariance, np.exp(-towards / (2 * reach**2))[..., None])[..., 0]
    rows = np.repeat(np.arange(len(xy)), k)
    return scipy.sparse.csr_array((weights.ravel(), (rows, columns.ravel())), shape=(len(xy), len(known)))


def ridge(embedding: np.ndarray, known: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge on an embedding, as a map of values of mean 0: ``(m, g)`` at the known spots to ``(n, g)``.

    Parameters
    ----------
    embedding
        ``(n, k)`` where values are wanted.
    known
        ``(m, k)`` where they are known; its mean is taken off both.
    penalty
        In units of the mean squared length of the known embeddings.
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
    """Folds of the known spots whose held-out spots are as far from the others as the wanted spots from the known.

    Random folds, and k-means clusters of known spots put together to folds, are made; those whose distances to the
    nearest spot left come nearest to the real ones, in the Wasserstein distance, are taken (kNNDM; Linnenbrink et al.,
    Geosci. Model Dev. 2024). So scattered spots are left out one here and one there, and a measured half of a slide in
    regions.

    Parameters
    ----------
    xy
        ``(n, 2)`` all spots.
    known
        ``(n,)`` boolean: where values are known.
    seed
        Of the random folds and of k-means.

    Returns
    -------
    numpy.ndarray
        ``(m,)`` fold of each known spot.
    """
    from scipy.spatial import cKDTree
    from scipy.stats import wasserstein_distance
    from sklearn.cluster import KMeans

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
        # One spot left tells nothing of how they vary.
        if n - np.bincount(fold).max() >= _LEFT:
            candidates.append(fold)
    real = cKDTree(at).query(xy[~known])[0]

    def mismatch(fold: np.ndarray) -> float:
        left = [cKDTree(at[fold != f]).query(at[fold == f])[0] for f in np.unique(fold)]
        return float(wasserstein_distance(np.concatenate(left), real))

    return min(candidates, key=mismatch)
