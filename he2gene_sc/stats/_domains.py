"""Spatial domains: agreement of two label maps and its test by shifts, coherence of one map, matching of clusters to domains."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from sklearn import metrics

from ._spatial_metrics import pitch_of

#: Largest number of spots in :func:`silhouette`.
MAX_SILHOUETTE = 10_000
#: Largest distance, in pitches, between a shifted spot and the spot that it is matched to: tolerates a lattice that is skewed by
#: 10 %, but not a shift by half a step.
_MAX_DISTANCE = 0.6
#: Least share of the spots that a shift must move onto other spots. With 0.5 and 0.6, the test rejected too often for independent
#: layers and large compact domains.
MIN_OVERLAP = 0.7
#: Number of spots to test a shift first, and tolerance of the overlap: an admissible shift is rejected with probability 10⁻¹¹.
_PROBES, _SLACK = 250, 0.2
#: Spots times shifts of a block in the test.
_BLOCK = 4_000_000


def agreement(domains: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Agreement of clusters with domains (scikit-learn): ``ari, nmi, ami, homogeneity, completeness``."""
    homogeneity, completeness, _ = metrics.homogeneity_completeness_v_measure(domains, clusters)
    return {
        "ari": float(metrics.adjusted_rand_score(domains, clusters)),
        "nmi": float(metrics.normalized_mutual_info_score(domains, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(domains, clusters)),
        "homogeneity": float(homogeneity),
        "completeness": float(completeness),
    }


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


@dataclass(frozen=True)
class ShiftTest:
    """Result of :func:`shift_test`."""

    observed: float  # adjusted Rand index, mean over clusterings
    null: np.ndarray  # (m,) index of each shift, over the matched spots
    p_value: float  # (b + 1) / (m + 1), with b shifts not below observed


def admissible_shifts(
    xy: np.ndarray, *, min_overlap: float = MIN_OVERLAP, n_max: int | None = None, seed: int = 0
) -> np.ndarray:
    """Shifts ``(m, n)`` of the spots onto each other, with and without a half turn, that match most spots.

    Each row holds the spot that each spot is moved to, -1 without a match. Shifts are the differences between the most
    central spot and all others, and their negatives, with and without a half turn about this spot. Duplicates and the
    identity are left out.

    Examples
    --------
    >>> import numpy as np
    >>> from he2gene_sc.stats import admissible_shifts
    >>> admissible_shifts(np.array([[0.0, 0], [1, 0], [2, 0]]), min_overlap=0.6).tolist()
    [[-1, 0, 1], [1, 2, -1], [2, 1, 0], [1, 0, -1], [-1, 2, 1]]
    """
    xy = np.asarray(xy, float)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) < 2:
        raise ValueError(f"`xy` is {xy.shape}, (n, 2) with at least 2 spots is needed")
    if not 0 < min_overlap <= 1:
        raise ValueError(f"`min_overlap` is {min_overlap}, it must be above 0 and at most 1")
    xy = xy / pitch_of(xy)
    tree = cKDTree(xy)
    centre = xy[tree.query(xy.mean(0))[1]]
    vectors = _drop_close(np.vstack([xy - centre, centre - xy]))
    moves = [(turned, vector) for turned in (False, True) for vector in vectors]
    if n_max is not None:
        moves = [moves[i] for i in np.random.default_rng(seed).permutation(len(moves))]
    n_most = len(moves) if n_max is None else min(n_max, len(moves))
    # On a large slide without a lattice, testing every shift on all spots would be slow.
    probes = xy if len(xy) <= 4 * _PROBES else np.random.default_rng(0).choice(xy, _PROBES, replace=False)
    found = np.empty((n_most, len(xy)), np.int32)

    def matched(points: np.ndarray, turned: bool, vector: np.ndarray) -> np.ndarray:
        moved = (2 * centre - points if turned else points) + vector
        distance, target = tree.query(moved, distance_upper_bound=_MAX_DISTANCE)
        return np.where(np.isfinite(distance), target, -1).astype(np.int32)

    seen: set[bytes] = set()
    still = np.arange(len(xy), dtype=np.int32)
    for turned, vector in moves:
        if len(probes) < len(xy) and (matched(probes, turned, vector) >= 0).mean() < min_overlap - _SLACK:
            continue
        target = matched(xy, turned, vector)
        # Tolerance for rounding: a share of exactly `min_overlap` is enough.
        if np.count_nonzero(target >= 0) >= min_overlap * len(xy) - 1e-9 and not np.array_equal(target, still):
            key = hashlib.blake2b(target.tobytes(), digest_size=16).digest()
            if key not in seen:
                found[len(seen)] = target
                seen.add(key)
        if len(seen) == n_most:
            break
    return found[: len(seen)]


def _drop_close(vectors: np.ndarray) -> np.ndarray:
    """Sort vectors by length, and drop those within half a pitch of a shorter one that is kept."""
    vectors = vectors[np.argsort(np.square(vectors).sum(1), kind="stable")]
    pairs = cKDTree(vectors).query_pairs(0.5, output_type="ndarray")
    kept = np.ones(len(vectors), bool)
    for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]:
        if kept[first]:
            kept[second] = False
    return vectors[kept]


def shift_test(domains: Sequence[np.ndarray], clusterings: Sequence[np.ndarray], shifts: np.ndarray) -> ShiftTest:
    """Test whether clusterings agree with domains better than with the same domains shifted over the tissue.

    Under the null, the domains are a realisation of a stationary process independent of the clusterings. Shifts and
    half turns preserve shapes and covariances; other rotations and mirroring assume isotropy, which layered tissue
    does not have. Nothing is wrapped around the border (unlike Lotwick & Silverman 1982): a shifted score uses the matched
    spots. With fewer spots it varies more, so the test is conservative. This is not corrected: the variance correction by the
    number of spots of Mrkvička et al. (Spatial Statistics 42, 2021, 100430) rejected too often for large compact
    domains (``tests/benchmarks/bench_domains.py``). A shift under which either map is constant scores 0.
    """
    domains = [np.asarray(labels, np.int64) for labels in domains]
    clusterings = [np.asarray(labels, np.int64) for labels in clusterings]
    lengths = {len(labels) for labels in [*domains, *clusterings]}
    if len(domains) != len(clusterings) or lengths != {shifts.shape[1]}:
        raise ValueError(
            f"`domains` ({len(domains)}) and `clusterings` ({len(clusterings)}) of {sorted(lengths)} spots do not match `shifts` of "
            f"{shifts.shape[1]} spots; pass pairs of labels of the same spots"
        )
    if min(labels.min() for labels in [*domains, *clusterings]) < 0:
        raise ValueError("`domains` and `clusterings` must be codes from 0; leave spots without a label out")
    own = np.arange(shifts.shape[1], dtype=np.int32)[None]
    pairs = list(zip(domains, clusterings, strict=True))
    observed = float(np.mean([_rand_index(*pair, own)[0] for pair in pairs]))
    null = np.mean([_rand_index(*pair, shifts) for pair in pairs], axis=0)
    m = len(shifts)
    not_below = int((null >= observed - 1e-12).sum())
    return ShiftTest(observed, null, (not_below + 1) / (m + 1) if m else float("nan"))


def _rand_index(domains: np.ndarray, clusters: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Compare clusters and moved domains by the adjusted Rand index (Hubert & Arabie 1985), for every shift."""
    n_domains, n_clusters = domains.max() + 1, clusters.max() + 1
    cells = n_domains * n_clusters
    step = max(1, _BLOCK // len(domains))
    tables = []
    for start in range(0, len(shifts), step):
        part = shifts[start : start + step]
        matches = part >= 0
        code = domains[part] * n_clusters + clusters + np.arange(len(part))[:, None] * cells
        tables.append(np.bincount(code[matches], minlength=len(part) * cells).reshape(-1, n_domains, n_clusters))
    table = np.concatenate(tables).astype(float) if tables else np.zeros((0, n_domains, n_clusters))
    both, of_domains, of_clusters = (
        _pairs(t).sum(axis=tuple(range(1, t.ndim))) for t in (table, table.sum(2), table.sum(1))
    )
    total = _pairs(table.sum((1, 2)))
    expected = of_domains * of_clusters / np.where(total > 0, total, 1)
    room = (of_domains + of_clusters) / 2 - expected
    return np.where(room > 1e-9, (both - expected) / np.where(room > 1e-9, room, 1), 0.0)


def _pairs(n: np.ndarray) -> np.ndarray:
    return n * (n - 1) / 2
