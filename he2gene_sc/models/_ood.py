"""Detect slides and spots out of distribution, with their causes. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..image import FAULTS, MIN_TISSUE
from ._embedding import Rows, reciprocal, row_blocks
from ._stain import green_excess, stain_of

#: Arrays of an :class:`OODDetector` among the tensors of a model.
MEAN, SCALE, WEIGHTS = "guard.mean", "guard.scale", "guard.weights"
PROJECTION, BANK, SIZE = "guard.projection", "guard.bank", "guard.size"
#: Rank of the neighbour in the bank whose distance is the score of a spot.
N_NEAREST = 5
#: Possible causes of a spot out of distribution.
CAUSES = ("stain", "focus", "resolution", "tissue")
#: Verdicts on a slide, from best to worst.
VERDICTS = ("like training", "new", "out of distribution", "no tissue")
#: Share of spots out of distribution, among those on tissue, above which the whole slide is.
OOD_SHARE = 0.5


@dataclass(frozen=True)
class SlideFacts:
    """Properties of spots besides their features."""

    mpp: float
    tissue: np.ndarray  # (n,) share of tissue
    faults: np.ndarray  # (n, 3), see image.faults


@dataclass(frozen=True)
class OODResult:
    """Result of the comparison of a slide with training."""

    score: np.ndarray  # (n,) float32; above 1: out of distribution
    causes: Mapping[str, float]  # share of the spots on tissue, by cause
    octaves: float  # log2 of apparent over stated side of windows; NaN with one window
    verdict: str  # one of VERDICTS
    reasons: tuple[str, ...]  # causes that concern the whole slide


@dataclass(frozen=True)
class OODDetector:
    """Statistics of the training spots, with which the spots of a slide are compared.

    Features are standardised by training only: effects of stain and resolution, which Context removes, must stay.
    """

    mean: np.ndarray  # (f,)
    scale: np.ndarray  # (f,)
    weights: np.ndarray  # (f,) of standardised features; empty in models of 0.6
    projection: np.ndarray  # (f, d) from standardised features to components
    bank: np.ndarray  # (b, d); further columns are ignored
    size: np.ndarray  # (k + 1,) from features of a window to log2 of its side, then intercept; empty with one window
    limits: Mapping[str, Any]  # distance, octaves; since 0.7 also rest, known, mpp, stain
    windows_um: tuple[float, ...]

    def assess(self, features: Rows, facts: SlideFacts) -> OODResult:
        """Compare the spots of one slide, ``(n, f)``, with training."""
        n = len(features)
        on_tissue = facts.tissue >= MIN_TISSUE
        octaves, stain, excess, distance, residual = self._compare(features, on_tissue)
        limits, limit = self.limits, self.limits["distance"]
        limit = limit[0] if isinstance(limit, list | tuple) else limit
        apparent = abs(octaves) / limits["octaves"] if np.isfinite(octaves) else 0.0
        coarseness = facts.mpp / limits["mpp"] if "mpp" in limits and np.isfinite(facts.mpp) else 0.0
        scores = {
            "stain": stain,
            "focus": facts.faults.max(1, initial=0),
            "resolution": np.full(n, max(apparent, coarseness)),
            # The resolution of a coarser slide already changes its features.
            "tissue": np.zeros(n)
            if coarseness > 1
            else np.maximum(distance / limit, residual / limits.get("rest", np.inf)),
        }
        # Stain and focus belong to the slide: no spot scores better than the median.
        for cause in ("stain", "focus"):
            if on_tissue.any():
                scores[cause] = np.maximum(scores[cause], np.median(scores[cause][on_tissue]))
        slide_excess = float(np.median(excess[on_tissue])) if on_tissue.any() else 1.0
        scores["stain"] = np.maximum(scores["stain"], 1 - slide_excess)
        score = np.max(list(scores.values()), axis=0).astype(np.float32) if n else np.zeros(0, np.float32)
        causes = {name: float((x[on_tissue] > 1).mean()) if on_tissue.any() else 0.0 for name, x in scores.items()}
        if not on_tissue.any():
            return OODResult(score, causes, octaves, "no tissue", ("no spot lies on tissue",) if n else ())
        if (score[on_tissue] > 1).mean() <= OOD_SHARE:
            is_known = "known" in limits and np.median(distance[on_tissue]) <= limits["known"]
            return OODResult(score, causes, octaves, "like training" if is_known else "new", ())
        # Causes of most spots, or else the most frequent one.
        main = [cause for cause in CAUSES if causes[cause] > OOD_SHARE] or [
            max(CAUSES, key=lambda cause: causes[cause])
        ]
        reasons = _reasons(octaves, slide_excess, coarseness, facts.mpp, facts.faults[on_tissue])
        return OODResult(
            score, causes, octaves, "out of distribution", tuple(f"{cause}: {reasons[cause]}" for cause in main)
        )

    def _compare(
        self, features: Rows, on_tissue: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the apparent size of the slide, and for each spot score and excess of stain, distance to the bank and residual."""
        found: list[tuple[np.ndarray, ...]] = []
        sides, weights = [], []
        for rows in row_blocks(len(features)) or [slice(0, 0)]:
            x = features[rows]
            projected, residual = components(x, self.mean, self.scale, self.weights, self.projection)
            found.append((*self._stain(x), distance_to_bank(projected, self.bank[:, : projected.shape[1]]), residual))
            if n := int(on_tissue[rows].sum()):
                sides.append(apparent_sides(x[on_tissue[rows]], self.size, self.windows_um))
                weights.append(n)
        stain, excess, distance, residual = (np.concatenate(values) for values in zip(*found, strict=True))
        octaves = size_error(np.average(sides, axis=0, weights=weights)) if sides else np.nan
        return octaves, stain, excess, distance, residual

    def _stain(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limits = self.limits.get("stain")
        if limits is None:
            return np.zeros(len(features)), np.ones(len(features))
        found = stain_of(features, len(self.windows_um))
        middle = np.array(limits["middle"])
        score = np.abs((found - middle) / np.array(limits["half"])).max(1, initial=0)
        # The model may have been trained on another stain than H&E.
        is_he = green_excess(middle[None])[0] > 0
        return score, green_excess(found) if is_he else np.ones(len(features))


def _reasons(octaves: float, slide_excess: float, coarseness: float, mpp: float, faults: np.ndarray) -> dict[str, str]:
    """Return how each cause would be stated, given the faults of the spots on tissue."""
    if coarseness > 1:
        resolution = f"{mpp:.3g} µm/px is coarser than the training images"
    else:
        resolution = (
            f"its windows seem {2 ** min(abs(octaves), 10):.1f} times {'larger' if octaves > 0 else 'smaller'} than stated: the µm/px "
            "may be wrong, or the image much blurrier or sharper than in training"
        )
    stain = "its colours differ from the H&E stains of training"
    if slide_excess < 0:
        stain = "it absorbs more red than green, unlike H&E: this is another stain, or its channels are not in the order red, green, blue"
    return {
        "stain": stain,
        "focus": f"the image is {FAULTS[int((faults > 1).mean(0).argmax())]}",
        "resolution": resolution,
        "tissue": "its spots are unlike all training spots",
    }


def components(
    features: np.ndarray, mean: np.ndarray, scale: np.ndarray, weights: np.ndarray, projection: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Standardise features by training; return their components ``(n, d)``, and the length of the residual ``(n,)``."""
    z = (features.astype(np.float64) - mean) * reciprocal(scale, scale > 0)
    if not len(weights):
        return z @ projection, np.zeros(len(z))
    z = z * weights
    projected = z @ projection
    return projected, np.sqrt(np.maximum(np.square(z).sum(1) - np.square(projected).sum(1), 0))


def distance_to_bank(projected: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Return the distance of each spot ``(n, d)`` to the fifth nearest spot of the bank ``(b, d)``."""
    from scipy.spatial.distance import cdist

    if not len(projected):
        return np.zeros(0)
    distance = cdist(projected, bank)
    k = min(N_NEAREST, len(bank)) - 1
    # A copy: a view of the column would keep all distances in memory.
    return np.partition(distance, k, axis=1)[:, k].copy()


def apparent_sides(features: np.ndarray, size: np.ndarray, windows_um: tuple[float, ...]) -> np.ndarray:
    """Return log2 of the apparent over the stated side of each window, the smallest first, mean over spots ``(w,)``; empty without a fit."""
    if not len(size) or not len(features):
        return np.zeros(0)
    k, w = len(size) - 1, len(windows_um)
    windows = features[:, : k * w].reshape(-1, w, k).mean(0, dtype=np.float64)
    return (windows @ size[:-1] + size[-1] - np.log2(windows_um))[np.argsort(windows_um)]


def size_error(sides: np.ndarray) -> float:
    """Return the error of the stated size in octaves, from the result of :func:`apparent_sides`; NaN if that is empty.

    The fit knows no side outside the range of the windows. The largest or the smallest window is therefore left out: the mean
    farther from 0 is returned.
    """
    return float(max(sides[:-1].mean(), sides[1:].mean(), key=abs)) if len(sides) > 1 else float("nan")
