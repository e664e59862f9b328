"""Spread and quantiles of held-out residuals, for intervals, per gene and per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..stats import (
    LEVELS,
    MAX_COVERAGE,
    MIN_GROUPS,
    fit_spread,
    grouped_quantiles,
    level_quantiles,
    rounded_up,
    spread_of,
)
from ._sections import Section

#: Fewest spots and groups of a predicted class that has its own quantiles.
MIN_CLASS_SPOTS, MIN_CLASS_GROUPS = 50, 2
#: Logit of a class that does not occur in the training spots of a fold.
UNSEEN_LOGIT = -30.0


@dataclass(frozen=True)
class Calibration:
    """Summary of held-out residuals."""

    #: (1 + c, q, g) float16, |residual| / spread: all spots, then each class; NaN without enough spots
    quantiles: np.ndarray
    groups: np.ndarray  # (1 + c, g) int16: number of groups
    spread: np.ndarray  # (2, g) float32, see stats.fit_spread
    spots: np.ndarray  # (1 + c,) int, number of spots
    detected: np.ndarray  # (q, g) float16, of spots in which the gene was detected
    detected_groups: np.ndarray  # (g,) int16
    #: By predicted level, see stats.level_quantiles; ``None`` in files of older versions.
    level_quantiles: np.ndarray | None = None
    level_groups: np.ndarray | None = None
    level_edges: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        return {f"intervals.{name}": x for name, x in vars(self).items() if name != "spots" and x is not None}


def calibration_unit(sections: Sequence[Section], unit: str) -> str | None:
    """Return the exchangeable unit of calibration: patients if there are enough, else sections; ``None`` for smaller units."""
    if unit not in ("patient", "section") or len(sections) < 2:
        return None
    n_patients = len({section.patient for section in sections})
    return "patient" if unit == "patient" and n_patients >= MIN_GROUPS else "section"


def calibrate(
    predicted: np.ndarray,
    measured: np.ndarray,
    groups: np.ndarray,
    classes: np.ndarray,
    n_classes: int,
    *,
    by_level: bool = True,
) -> Calibration:
    """Summarise residuals ``(n, g)``; ``groups`` and predicted ``classes`` (-1: unknown) are codes ``(n,)``."""
    residual = measured - predicted
    spread = fit_spread(predicted, residual, groups)
    signed = residual / spread_of(predicted, spread)
    scores = np.abs(signed)
    g = scores.shape[1]
    quantiles = np.full((1 + n_classes, len(LEVELS), g), np.nan, np.float16)
    counted = np.zeros((1 + n_classes, g), np.int16)
    spots = np.zeros(1 + n_classes, int)
    for i in range(1 + n_classes):
        rows = classes == i - 1 if i else np.ones(len(classes), bool)
        if i and (rows.sum() < MIN_CLASS_SPOTS or len(np.unique(groups[rows])) < MIN_CLASS_GROUPS):
            continue
        found, counted[i] = grouped_quantiles(scores[rows], groups[rows])
        quantiles[i], spots[i] = rounded_up(found), rows.sum()
    detected, detected_groups = grouped_quantiles(np.where(measured > 0, scores, np.nan), groups)
    levels = level_quantiles(predicted, signed, groups) if by_level else ()
    return Calibration(quantiles, counted, spread, spots, rounded_up(detected), detected_groups, *levels)


def join_calibrations(parts: Sequence[Calibration]) -> Calibration:
    """Concatenate calibrations of different genes."""
    names = [name for name, array in vars(parts[0]).items() if name != "spots" and array is not None]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names}
    return Calibration(spots=parts[0].spots, **arrays)


def card_entry(calibration: Calibration, unit: str, classes: Sequence[str]) -> dict[str, object]:
    """Return the entry of the card on the basis of the intervals."""
    names = ("all", *classes)
    return {
        "unit": unit,
        "n_groups": int(calibration.groups[0].max(initial=0)),
        "levels": [float(level) for level in LEVELS],
        "max_coverage": MAX_COVERAGE,
        "spots": {name: int(n) for name, n in zip(names, calibration.spots, strict=True) if n},
    }


def temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """Return the temperature, from 0.2 to 20, that maximises the likelihood of held-out labels (Guo et al., ICML 2017).

    Logits are ``(n, c)``, or ``(n, views, c)`` if probabilities are averaged over views.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, logsumexp

    rows = np.arange(len(codes))

    def loss(log_t: float) -> float:
        likelihood = log_softmax(logits / np.exp(log_t), axis=-1)[rows, ..., codes]
        return -(likelihood if logits.ndim == 2 else logsumexp(likelihood, axis=1) - np.log(logits.shape[1])).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.2), np.log(20)), method="bounded").x))
