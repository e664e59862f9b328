"""Scores of one section for ``hg.tl.domain_preservation``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import spearmanr

from ..._core import logs
from ...stats import (
    agreement,
    chaos,
    enrichment_agreement,
    match,
    moran,
    neighbour_weights,
    pas,
    pitch_of,
    shift_test,
    silhouette,
)

#: Permutations of squidpy's neighbourhood enrichment, its default.
_ENRICHMENT_PERMS = 1000
#: Radius of neighbours in pitches: eight on a square lattice, six on a hexagonal one.
_RADIUS = 1.5
#: References that do not depend on genes; a prediction should be better than these.
GENE_INDEPENDENT = ("depth", "mean colour", "coordinates")


@dataclass(frozen=True)
class Labels:
    """Labels of the spots of a section from one source."""

    name: str  # "predicted", "measured" or a reference
    labelings: list[np.ndarray]  # (n,) codes, one array per seed
    features: np.ndarray | None = None  # (n, k) clustered features
    trained_on_labels: bool = False  # the model was trained on such labels
    parts: list[np.ndarray] | None = None  # clusters of the part of the prediction that a reference explains


def score(
    xy: np.ndarray, domains: np.ndarray, shifts: np.ndarray, seed: int, kinds: list[Labels]
) -> Iterator[dict[str, Any]]:
    """Yield rows of the table: scores of all labels against the domains, and of predicted against measured clusters.

    ``domains`` ``(n,)`` are codes, -1 for spots without a domain; ``shifts`` are of the labelled spots.
    """
    labelled = domains >= 0
    xy, domains = xy[labelled], codes_of(domains[labelled])
    enrichment = Enrichment(xy, seed)
    yield from _coherence(xy, Labels("domains", [domains]))
    labelings = {kind.name: [codes_of(labels[labelled]) for labels in kind.labelings] for kind in kinds}
    parts = {kind.name: [codes_of(labels[labelled]) for labels in kind.parts] for kind in kinds if kind.parts}
    better = _compare_with_references(domains, labelings, parts, shifts)
    for kind in kinds:
        kept = labelings[kind.name]
        for row in _compare(kind, "domains", [domains] * len(kept), kept, shifts, enrichment):
            yield row | better.get(kind.name, {}) if row["score"] == "ari" else row
        if kind.features is not None:
            yield _row(kind, "domains", "silhouette", [silhouette(kind.features[labelled], domains)])
        yield from _coherence(xy, Labels(kind.name, kept, trained_on_labels=kind.trained_on_labels))
    if {"predicted", "measured"} <= labelings.keys():
        pair = labelings["measured"], labelings["predicted"]
        yield from _compare(Labels("predicted", []), "measured", *pair, shifts, enrichment)


def _compare_with_references(
    domains: np.ndarray, labelings: dict[str, list[np.ndarray]], parts: dict[str, list[np.ndarray]], shifts: np.ndarray
) -> dict[str, dict[str, float]]:
    """Test whether the prediction preserves domains better than each gene-independent reference.

    ``difference`` is of adjusted Rand indices; ``pval_better`` is the share of shifts (with 1 added) in which it is as large. It is
    the larger of two p-values: against clusters of the reference, and against clusters of the part of the prediction that the
    reference explains. The p-value of the prediction is the largest over references. Without a prediction, measured is tested.
    """
    name = next((kind for kind in ("predicted", "measured") if kind in labelings), None)
    references = [kind for kind in GENE_INDEPENDENT if kind in labelings]
    if name is None or not references:
        return {}
    own = shift_test([domains] * len(labelings[name]), labelings[name], shifts)
    rows: dict[str, dict[str, float]] = {}
    for kind in references:
        opponents = [labelings[kind], *([parts[kind]] if kind in parts else [])]
        tests = [shift_test([domains] * len(opponent), opponent, shifts) for opponent in opponents]
        gaps = [own.observed - test.observed for test in tests]
        beyond = [(own.null - test.null >= gap - 1e-12).sum() for test, gap in zip(tests, gaps, strict=True)]
        p = float((max(beyond) + 1) / (len(shifts) + 1)) if len(shifts) else np.nan
        rows[kind] = {"difference": gaps[0], "pval_better": p}
    rows[name] = {"pval_better": max(row["pval_better"] for row in rows.values())}
    return rows


def _compare(
    kind: Labels,
    against: str,
    domains: list[np.ndarray],
    clusterings: list[np.ndarray],
    shifts: np.ndarray,
    enrichment: Enrichment,
) -> Iterator[dict[str, Any]]:
    """Agreement of pairs of labels for every seed, and the test of the adjusted Rand index."""
    values = [agreement(a, b) for a, b in zip(domains, clusterings, strict=True)]
    test = shift_test(domains, clusterings, shifts)
    null_mean = float(test.null.mean()) if len(shifts) else np.nan
    tested = {"pval": test.p_value, "n_shifts": len(shifts), "null_mean": null_mean}
    for name in values[0]:
        yield _row(kind, against, name, [value[name] for value in values], **(tested if name == "ari" else {}))
    scores = []
    for a, b in zip(domains, clusterings, strict=True):
        matched = match(a, b)
        kept = np.flatnonzero(matched >= 0)
        # squidpy's time grows with the square of the number of labels, and only matched clusters are compared.
        merged = np.where(matched[b] >= 0, np.searchsorted(kept, b), len(kept))
        scores.append(enrichment_agreement(enrichment.scores(a), enrichment.scores(merged), matched[kept]))
    yield _row(kind, against, "nhood_enrichment", scores)


def _coherence(xy: np.ndarray, kind: Labels) -> Iterator[dict[str, Any]]:
    """Spatial coherence of labels, and their number."""
    yield _row(kind, "", "n_labels", [float(len(np.unique(labels))) for labels in kind.labelings])
    yield _row(kind, "", "chaos", [chaos(xy, labels) for labels in kind.labelings])
    yield _row(kind, "", "pas", [pas(xy, labels) for labels in kind.labelings])


def moran_agreement(xy: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Spearman correlation over genes of Moran's I of predicted and measured expression."""
    weights = neighbour_weights(xy, pitch_of(xy), _RADIUS)
    a, b = moran(predicted, weights), moran(measured, weights)
    finite = np.isfinite(a) & np.isfinite(b)
    value = spearmanr(a[finite], b[finite]).statistic if finite.sum() > 2 else np.nan
    return _row(Labels("predicted", []), "measured", "moran", [float(value)])


class Enrichment:
    """Neighbourhood enrichment of label maps on the same spots, by squidpy; results are cached."""

    def __init__(self, xy: np.ndarray, seed: int) -> None:
        self._table = _spatial_table(xy)
        self._seed = seed
        self._cache: dict[bytes, np.ndarray] = {}

    def scores(self, labels: np.ndarray) -> np.ndarray:
        """z-scores ``(k, k)`` between labels (codes from 0)."""
        sq = logs.import_squidpy()
        key = labels.tobytes()
        if key not in self._cache:
            if labels.max() == 0:
                return np.full((1, 1), np.nan)
            self._table.obs["label"] = pd.Categorical(labels)
            with warnings.catch_warnings(action="ignore"):
                # squidpy divides by the variance, which is 0 for labels that are never neighbours.
                found = sq.gr.nhood_enrichment(
                    self._table,
                    "label",
                    n_perms=_ENRICHMENT_PERMS,
                    seed=self._seed,
                    copy=True,
                    n_jobs=1,
                    show_progress_bar=False,
                )
            self._cache[key] = np.asarray(found[0])
        return self._cache[key]


def _spatial_table(xy: np.ndarray) -> AnnData:
    """Table with squidpy's graph of neighbours within 1.5 pitches."""
    sq = logs.import_squidpy()
    table = AnnData(np.zeros((len(xy), 1), np.float32), obsm={"spatial": xy})
    # squidpy logs every graph through this logger.
    with logs.silence("spatialdata._logging"):
        sq.gr.spatial_neighbors_radius(table, radius=_RADIUS * pitch_of(xy))
    return table


def codes_of(labels: np.ndarray) -> np.ndarray:
    """Consecutive codes from 0."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _row(kind: Labels, against: str, name: str, values: list[float], **tested: float) -> dict[str, Any]:
    """One row of the table; the SD needs two seeds."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    return {
        "labels": kind.name,
        "against": against,
        "score": name,
        "mean": float(finite.mean()) if len(finite) else np.nan,
        "sd": float(finite.std(ddof=1)) if len(finite) > 1 else np.nan,
        "n_seeds": len(values),
        "pval": np.nan,
        "n_shifts": 0,
        "null_mean": np.nan,
        "difference": np.nan,
        "pval_better": np.nan,
        "trained_on_labels": kind.trained_on_labels,
        **tested,
    }
