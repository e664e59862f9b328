"""Scores of spatial domains: agreement of two label maps, coherence of one, clusters matched to domains."""

from __future__ import annotations

import numpy as np

#: Scores of :func:`agreement`, by scikit-learn's names.
AGREEMENT = ("ari", "nmi", "ami", "homogeneity", "completeness")


def agreement(domains: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Agreement of clusters with domains, by scikit-learn.

    Parameters
    ----------
    domains, clusters
        ``(n,)`` labels of the same spots.

    Returns
    -------
    dict
        ``ari`` (adjusted Rand index), ``nmi`` and ``ami`` (normalised and adjusted mutual information, arithmetic
        mean), ``homogeneity`` (each cluster holds one domain) and ``completeness`` (each domain lies in one cluster).

    Examples
    --------
    >>> from he2gene_sc.stats import agreement
    >>> agreement([0, 0, 1, 1], [1, 1, 0, 0])["ari"]
    1.0
    """
    from sklearn import metrics

    homogeneity, completeness, _ = metrics.homogeneity_completeness_v_measure(domains, clusters)
    return {
        "ari": float(metrics.adjusted_rand_score(domains, clusters)),
        "nmi": float(metrics.normalized_mutual_info_score(domains, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(domains, clusters)),
        "homogeneity": float(homogeneity),
        "completeness": float(completeness),
    }


def silhouette(features: np.ndarray, domains: np.ndarray) -> float:
    """Mean silhouette of given domains in a space, by scikit-learn; NaN where it is not defined.

    Parameters
    ----------
    features
        ``(n, k)``.
    domains
        ``(n,)`` labels.
    """
    from sklearn.metrics import silhouette_score

    n_labels = len(np.unique(domains))
    if not 2 <= n_labels < len(domains):
        return float("nan")
    return float(silhouette_score(features, domains))


def chaos(xy: np.ndarray, labels: np.ndarray) -> float:
    """Spatial chaos score: mean distance of a spot to the nearest spot of its own label, in pitches.

    As in SpatialPCA (Shang & Zhou, Nat Commun 13, 2022, 7203), which sums the lengths of the one-nearest-neighbour graphs
    of all clusters and divides by the number of spots; there coordinates are standardised by axis, here they are divided
    by the pitch, so that sections of any size compare and 1 is the least on a lattice. A label of a single spot has no
    neighbour and is left out.

    Parameters
    ----------
    xy
        ``(n, 2)`` spot centres, in any unit.
    labels
        ``(n,)``.

    Returns
    -------
    float
        Lower is more coherent; NaN where every label is a single spot.
    """
    from scipy.spatial import cKDTree

    xy, labels = np.asarray(xy, float), np.asarray(labels)
    pitch = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    lengths = [
        cKDTree(own).query(own, k=2)[0][:, 1] for label in np.unique(labels) if len(own := xy[labels == label]) > 1
    ]
    return float(np.concatenate(lengths).mean() / pitch) if lengths else float("nan")


def pas(xy: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Percentage of abnormal spots, as a share: spots of which more than half of the neighbours have another label.

    As in SpatialPCA (Shang & Zhou, Nat Commun 13, 2022, 7203): at least six of the ten nearest spots.

    Parameters
    ----------
    xy
        ``(n, 2)`` spot centres.
    labels
        ``(n,)``.
    k
        Neighbours, at most ``n - 1``.

    Returns
    -------
    float
        0 to 1; lower is more coherent.
    """
    from scipy.spatial import cKDTree

    xy, labels = np.asarray(xy, float), np.asarray(labels)
    k = min(k, len(xy) - 1)
    near = cKDTree(xy).query(xy, k=k + 1)[1][:, 1:]
    return float(((labels[near] != labels[:, None]).sum(1) > k / 2).mean())


def match(domains: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Match each cluster to a domain, one to one, so that as many spots as possible agree (Hungarian method).

    Parameters
    ----------
    domains, clusters
        ``(n,)`` codes from 0.

    Returns
    -------
    numpy.ndarray
        ``(n_clusters,)``: the domain of each cluster, -1 where there are more clusters than domains or they share no spot.

    Examples
    --------
    >>> from he2gene_sc.stats import match
    >>> match([0, 0, 1, 1, 1], [1, 1, 0, 0, 2]).tolist()
    [1, 0, -1]
    """
    from scipy.optimize import linear_sum_assignment

    domains, clusters = np.asarray(domains), np.asarray(clusters)
    table = np.zeros((clusters.max() + 1, domains.max() + 1), int)
    np.add.at(table, (clusters, domains), 1)
    matched = np.full(len(table), -1)
    for cluster, domain in zip(*linear_sum_assignment(table, maximize=True), strict=True):
        if table[cluster, domain]:
            matched[cluster] = domain
    return matched


def enrichment_agreement(of_domains: np.ndarray, of_clusters: np.ndarray, matched: np.ndarray) -> float:
    """Pearson correlation of two matrices of neighbourhood enrichment, over the pairs of matched labels.

    Parameters
    ----------
    of_domains
        ``(d, d)`` z-scores of squidpy between domains.
    of_clusters
        ``(c, c)`` between clusters.
    matched
        As :func:`match` returns it: clusters without a domain are left out.

    Returns
    -------
    float
        Over the upper triangle with the diagonal, finite entries; NaN with fewer than two matched labels.
    """
    clusters = np.flatnonzero(matched >= 0)
    domains = matched[clusters]
    upper = np.triu_indices(len(clusters))
    a, b = of_domains[np.ix_(domains, domains)][upper], of_clusters[np.ix_(clusters, clusters)][upper]
    finite = np.isfinite(a) & np.isfinite(b)
    if finite.sum() < 3 or np.ptp(a[finite]) == 0 or np.ptp(b[finite]) == 0:
        return float("nan")
    return float(np.corrcoef(a[finite], b[finite])[0, 1])
