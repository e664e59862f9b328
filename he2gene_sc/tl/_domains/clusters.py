"""Clusters of spots for ``hg.tl.domain_preservation``, by one pipeline for all features."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scanpy as sc
import scipy.sparse
from anndata import AnnData
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ...stats._baselines import position

#: Number of principal components for clustering, and of neighbours in their space (scanpy's default).
N_PCS = 20
N_NEIGHBOURS = 15
CLUSTERINGS = ("leiden", "kmeans")
#: Number of spots from which neighbours are searched approximately. scanpy does so from 8,192 spots, but a search that takes
#: seconds there would wait a minute for its compilation.
_EXACT_SPOTS = 20_000
#: Bounds of the search for the Leiden resolution, and its largest number of steps.
_RESOLUTIONS, _STEPS = (1e-3, 20.0), 25


def embed(expression: np.ndarray) -> np.ndarray:
    """First principal components of log expression ``(n, g)``, by scanpy: ``(n, k)`` float32."""
    n_pcs = min(N_PCS, *(size - 1 for size in expression.shape))
    return np.asarray(sc.pp.pca(np.asarray(expression, np.float32), n_comps=n_pcs, random_state=0), np.float32)


def cluster(features: np.ndarray, n_clusters: int, seeds: list[int], method: str) -> list[np.ndarray]:
    """Cluster spots ``(n, k)`` by ``"leiden"`` (scanpy, igraph) or ``"kmeans"`` (ten starts): one array of codes per seed.

    The resolution of Leiden is bisected until the number of clusters is right or as close as possible.
    """
    if method == "kmeans":
        return [
            KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features).astype(np.int64) for seed in seeds
        ]
    table = AnnData(np.asarray(features, np.float32))
    with warnings.catch_warnings(action="ignore"):
        n_neighbors = min(N_NEIGHBOURS, len(features) - 1)
        search = _approximate_search(n_neighbors) if len(features) >= _EXACT_SPOTS else "sklearn"
        sc.pp.neighbors(table, n_neighbors=n_neighbors, use_rep="X", random_state=0, transformer=search)
        return [_leiden(table, n_clusters, seed) for seed in seeds]


def _approximate_search(n_neighbors: int) -> Any:
    """Return scanpy's search of neighbours for many spots, with a matrix that scanpy can read.

    pynndescent 0.7 returns a sparse array, on which scanpy 1.11 and 1.12 fail. Its own ``fit_transform`` also prepares the
    index for queries, which compiles for half a minute and is not needed here.
    """
    from pynndescent import PyNNDescentTransformer

    class Search(PyNNDescentTransformer):
        def fit_transform(self, X: np.ndarray, y: None = None) -> scipy.sparse.csr_matrix:
            self.fit(X, compress_index=False)
            return scipy.sparse.csr_matrix(self.transform(None))

    return Search(n_neighbors=n_neighbors, metric="euclidean", random_state=0)


def _leiden(table: AnnData, n_clusters: int, seed: int) -> np.ndarray:
    """Leiden clusters with a resolution found by bisection on a logarithmic scale."""
    low, high = np.log(_RESOLUTIONS)
    tried: list[np.ndarray] = []
    for _ in range(_STEPS):
        middle = (low + high) / 2
        sc.tl.leiden(
            table,
            resolution=float(np.exp(middle)),
            random_state=seed,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            key_added="cluster",
        )
        tried.append(table.obs["cluster"].cat.codes.to_numpy(np.int64))
        n = tried[-1].max() + 1
        if n == n_clusters:
            break
        low, high = (middle, high) if n < n_clusters else (low, middle)
    return min(tried, key=lambda labels: abs(labels.max() + 1 - n_clusters))


def medoid(labelings: list[np.ndarray]) -> int:
    """Index of the clustering with the highest mean adjusted Rand index with the others; the first of ties."""
    total = [sum(adjusted_rand_score(a, b) for b in labelings) for a in labelings]
    return int(np.argmax(np.round(total, 12)))


def position_features(xy: np.ndarray) -> np.ndarray:
    """Both coordinates, the distance from the centre of the section, and its square."""
    x = position(xy)
    return np.column_stack([x, np.hypot(x[:, 0], x[:, 1])])


def explained_part(x: np.ndarray, features: np.ndarray | None) -> np.ndarray | None:
    """Part of the features ``(n, k)`` that is linear in ``x``; ``None`` if ``x`` has one column, because its clusters would not change."""
    if features is None or x.shape[1] < 2:
        return None
    centred = x - x.mean(0)
    return centred @ np.linalg.lstsq(centred, features - features.mean(0), rcond=None)[0]
