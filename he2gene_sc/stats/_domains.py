"""Scores of spatial domains: agreement of two label maps, coherence of one map, and matching of clusters to domains."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from sklearn import metrics

from ._spatial_metrics import pitch_of

#: Largest number of spots in :func:`silhouette`.
MAX_SILHOUETTE = 10_000


def agreement(domains: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Agreement of clusters with domains (scikit-learn): ``ari, nmi, ami, homogeneity, completeness``."""
    scores = {
        "ari": metrics.adjusted_rand_score,
        "nmi": metrics.normalized_mutual_info_score,
        "ami": metrics.adjusted_mutual_info_score,
        "homogeneity": metrics.homogeneity_score,
        "completeness": metrics.completeness_score,
    }
    return {name: float(score(domains, clusters)) for name, score in scores.items()}


def silhouette(features: np.ndarray, domains: np.ndarray) -> float:
    """Mean silhouette (scikit-learn) of domains in a feature space ``(n, k)``; NaN if it is not defined.

    With more than 10,000 spots, 10,000 random spots are used: the cost is quadratic.
    """
    if len(domains) > MAX_SILHOUETTE:
        some = np.random.default_rng(0).choice(len(domains), MAX_SILHOUETTE, replace=False)
        features, domains = features[some], np.asarray(domains)[some]
    defined = 2 <= len(np.unique(domains)) < len(domains)
    return float(metrics.silhouette_score(features, domains)) if defined else float("nan")


def chaos(xy: np.ndarray, labels: np.ndarray) -> float:
    """Spatial chaos score: mean distance of a spot to the nearest spot with the same label, in pitches; lower is more coherent.

    As in SpatialPCA (Shang & Zhou, Nat Commun 13, 2022, 7203), but coordinates are divided by the pitch instead of
    standardised by axis, so sections are comparable and the minimum on a lattice is 1. Labels with a single spot are left
    out.
    """
    xy, labels = np.asarray(xy, float), np.asarray(labels)
    parts = [xy[labels == label] for label in np.unique(labels)]
    lengths = [cKDTree(part).query(part, k=2)[0][:, 1] for part in parts if len(part) > 1]
    return float(np.concatenate(lengths).mean() / pitch_of(xy)) if lengths else float("nan")


def pas(xy: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Share of abnormal spots, for which more than half of the ``k`` nearest spots have another label; lower is more coherent.

    As in SpatialPCA (Shang & Zhou, Nat Commun 13, 2022, 7203): at least six of ten.
    """
    xy, labels = np.asarray(xy, float), np.asarray(labels)
    k = min(k, len(xy) - 1)
    near = cKDTree(xy).query(xy, k=k + 1)[1][:, 1:]
    return float(((labels[near] != labels[:, None]).sum(1) > k / 2).mean())


def match(domains: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Match clusters to domains one to one so that the largest number of spots agree (Hungarian method).

    Clusters without a domain get -1.
    """
    domains, clusters = np.asarray(domains), np.asarray(clusters)
    table = np.zeros((clusters.max() + 1, domains.max() + 1), int)
    np.add.at(table, (clusters, domains), 1)
    matched = np.full(len(table), -1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched[rows] = np.where(table[rows, columns] > 0, columns, -1)
    return matched


def enrichment_agreement(of_domains: np.ndarray, of_clusters: np.ndarray, matched: np.ndarray) -> float:
    """Pearson correlation of squidpy's neighbourhood z-scores of domains and matched clusters; NaN with fewer than two matches.

    Over the finite entries of the upper triangle, with the diagonal.
    """
    clusters = np.flatnonzero(matched >= 0)
    domains = matched[clusters]
    upper = np.triu_indices(len(clusters))
    a, b = of_domains[np.ix_(domains, domains)][upper], of_clusters[np.ix_(clusters, clusters)][upper]
    finite = np.isfinite(a) & np.isfinite(b)
    if finite.sum() < 3 or np.ptp(a[finite]) == 0 or np.ptp(b[finite]) == 0:
        return float("nan")
    return float(np.corrcoef(a[finite], b[finite])[0, 1])
