"""Whether a slide looks like what a model was trained on, and if not, why: spot by spot. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..image import FAULTS, MIN_TISSUE
from ._embedding import Rows, row_blocks
from ._stain import green_excess, stain_of

#: Arrays of an :class:`OODDetector` among the tensors of a model.
MEAN, SCALE, WEIGHTS = "guard.mean", "guard.scale", "guard.weights"
PROJECTION, BANK, SIZE = "guard.projection", "guard.bank", "guard.size"
#: Neighbours in the bank over whose distance a spot is judged.
N_NEAREST = 5
#: What may be unlike training.
CAUSES = ("stain", "focus", "resolution", "tissue")
#: What a slide may be called, from the best on.
VERDICTS = ("like training", "new", "out of distribution", "no tissue")
#: Share of the spots on tissue above which a slide as a whole is out of distribution.
MOST = 0.5


@dataclass(frozen=True)
class SlideFacts:
    """What is known of the spots beside their features."""

    mpp: float
    tissue: np.ndarray  # (n,) share of tissue
    faults: np.ndarray  # (n, 3), see image.faults

    @classmethod
    def unknown(cls, n: int) -> SlideFacts:
        """Nothing is known: every spot is on tissue, and sharp."""
        return cls(float("nan"), np.ones(n, np.float32), np.zeros((n, len(FAULTS)), np.float32))


@dataclass(frozen=True)
class OODResult:
    """How a slide looks beside training."""

    score: np.ndarray  # (n,) float32; above 1 out of distribution
    causes: Mapping[str, float]  # share of the spots on tissue by cause
    octaves: float  # log2 of how many times too large windows seem; NaN with one window
    verdict: str  # one of VERDICTS
    reasons: tuple[str, ...]  # what is wrong with the whole slide


@dataclass(frozen=True)
class OODDetector:
    """What is kept of the training spots to compare with.

    Features are standardised by training alone: stain and resolution, which Context removes, matter here.
    """

    mean: np.ndarray  # (f,)
    scale: np.ndarray  # (f,)
    weights: np.ndarray  # (f,) of standardised features; empty in models of 0.6
    projection: np.ndarray  # (f, d) standardised features to components
    bank: np.ndarray  # (b, d) or more columns, which are not read
    size: np.ndarray  # (k + 1,) features of a window to log2 of its side, then intercept; empty with one window
    limits: Mapping[str, Any]  # distance, octaves; from 0.7 on rest, known, mpp, stain
    windows_um: tuple[float, ...]

    def judge(self, features: Rows, facts: SlideFacts | None = None) -> OODResult:
        """Compare the spots of one slide, ``(n, f)``, with training."""
        n = len(features)
        facts = SlideFacts.unknown(n) if facts is None else facts
        on_tissue = facts.tissue >= MIN_TISSUE
        octaves, stain, order, distance, rest = self._compare(features, on_tissue)
        scores = {
            "stain": stain,
            "focus": facts.faults.max(1, initial=0),
            "resolution": np.full(n, self._resolution(octaves, facts.mpp)),
            "tissue": np.maximum(distance / self._distance, rest / self.limits.get("rest", np.inf)),
        }
        # A stain is that of a slide: a spot is not better than most of them.
        for cause in ("stain", "focus"):
            if on_tissue.any():
                scores[cause] = np.maximum(scores[cause], np.median(scores[cause][on_tissue]))
        excess = float(np.median(order[on_tissue])) if on_tissue.any() else 1.0
        scores["stain"] = np.maximum(scores["stain"], 1 - excess)
        score = np.max(list(scores.values()), axis=0).astype(np.float32) if n else np.zeros(0, np.float32)
        causes = {name: float((x[on_tissue] > 1).mean()) if on_tissue.any() else 0.0 for name, x in scores.items()}
        verdict = self._verdict(score[on_tissue], distance[on_tissue])
        found = _main_causes(causes) if verdict == "out of distribution" else []
        reasons = tuple(self._words(cause, octaves, excess, facts, on_tissue) for cause in found)
        if verdict == "no tissue" and n:
            reasons = ("no spot lies on tissue",)
        return OODResult(score, causes, octaves, verdict, reasons)

    def _compare(
        self, features: Rows, on_tissue: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Seeming size of the slide; of each spot score and order of the stain, distance to the bank and rest; by blocks."""
        found: list[tuple[np.ndarray, ...]] = []
        sizes: list[tuple[int, float]] = []
        for rows in row_blocks(len(features)) or [slice(0, 0)]:
            x = features[rows]
            own, rest = components(x, self.mean, self.scale, self.weights, self.projection)
            found.append((*self._stain(x), nearest(own, self.bank[:, : own.shape[1]]), rest))
            if n := int(on_tissue[rows].sum()):
                sizes.append((n, seeming_size(x[on_tissue[rows]], self.size, self.windows_um)))
        stain, order, distance, rest = (np.concatenate(values) for values in zip(*found, strict=True))
        if len(sizes) == 1:
            return sizes[0][1], stain, order, distance, rest
        octaves = float(np.average([size for _, size in sizes], weights=[n for n, _ in sizes])) if sizes else np.nan
        return octaves, stain, order, distance, rest

    @property
    def _distance(self) -> float:
        limit = self.limits["distance"]
        return limit[0] if isinstance(limit, list | tuple) else limit

    def _stain(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limits = self.limits.get("stain")
        if limits is None:
            return np.zeros(len(features)), np.ones(len(features))
        found = stain_of(features, len(self.windows_um))
        middle = np.array(limits["middle"])
        score = np.abs((found - middle) / np.array(limits["half"])).max(1, initial=0)
        # A model may have been trained on another stain.
        he = green_excess(middle[None])[0] > 0
        return score, green_excess(found) if he else np.ones(len(features))

    def _resolution(self, octaves: float, mpp: float) -> float:
        seeming = abs(octaves) / self.limits["octaves"] if np.isfinite(octaves) else 0.0
        coarse = mpp / self.limits["mpp"] if "mpp" in self.limits and np.isfinite(mpp) else 0.0
        return float(max(seeming, coarse))

    def _verdict(self, score: np.ndarray, distance: np.ndarray) -> str:
        if not len(score):
            return "no tissue"
        if (score > 1).mean() > MOST:
            return "out of distribution"
        known = self.limits.get("known")
        return "like training" if known is not None and np.median(distance) <= known else "new"

    def _words(self, cause: str, octaves: float, excess: float, facts: SlideFacts, on_tissue: np.ndarray) -> str:
        if cause == "focus":
            shares = (facts.faults[on_tissue] > 1).mean(0)
            return f"focus: the image is {FAULTS[int(shares.argmax())]}"
        if cause == "resolution":
            if "mpp" in self.limits and facts.mpp > self.limits["mpp"]:
                return f"resolution: {facts.mpp:.3g} µm/px is coarser than the images that it was trained on"
            return (
                f"resolution: what its windows show seems {2 ** min(abs(octaves), 10):.1f} times {'larger' if octaves > 0 else 'smaller'} "
                "than it should be: the µm/px may be wrong, or the image far less sharp or sharper"
            )
        if cause == "stain" and excess < 0:
            return (
                "stain: it absorbs more red than green, which H&E does not: it is another stain, or its channels are not in the order "
                "red, green, blue"
            )
        if cause == "stain":
            return "stain: its colours are not those of the H&E stains that it was trained on"
        return "tissue: its spots look like no training spot"


def _main_causes(causes: Mapping[str, float]) -> list[str]:
    """Causes that hold for most spots, else the most frequent one."""
    found = [name for name in CAUSES if causes[name] > MOST]
    return found or [max(causes, key=lambda name: causes[name])]


def components(
    features: np.ndarray, mean: np.ndarray, scale: np.ndarray, weights: np.ndarray, projection: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features standardised by training: their components ``(n, d)``, and the length of what is left of them ``(n,)``."""
    usable = scale > 0
    z = (features.astype(np.float64) - mean) * np.where(usable, 1 / np.where(usable, scale, 1), 0)
    if not len(weights):
        return z @ projection, np.zeros(len(z))
    z = z * weights
    own = z @ projection
    return own, np.sqrt(np.maximum(np.square(z).sum(1) - np.square(own).sum(1), 0))


def nearest(own: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Distance of each spot ``(n, d)`` to the fifth nearest of the bank ``(b, d)``."""
    from scipy.spatial.distance import cdist

    if not len(own):
        return np.zeros(0)
    distance = cdist(own, bank)
    k = min(N_NEAREST, len(bank)) - 1
    # A copy: the column alone would keep all distances in memory.
    return np.partition(distance, k, axis=1)[:, k].copy()


def seeming_size(features: np.ndarray, size: np.ndarray, windows_um: tuple[float, ...]) -> float:
    """Mean over spots and windows of the log2 of the side that a window seems to have over the side that it has."""
    if not len(size) or not len(features):
        return float("nan")
    k, w = len(size) - 1, len(windows_um)
    windows = features[:, : k * w].reshape(-1, w, k).mean(0, dtype=np.float64)
    return float((windows @ size[:-1] + size[-1] - np.log2(windows_um)).mean())
