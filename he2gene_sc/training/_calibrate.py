"""What intervals need of held-out predictions: spread and quantiles of the residuals, gene by gene and class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

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

#: Spots of a predicted class, and groups that show it, without which it is not told apart.
MIN_CLASS_SPOTS, MIN_CLASS_GROUPS = 50, 2
#: Logit of a class that the training spots of a fold do not show.
UNSEEN = -30.0


@dataclass(frozen=True)
class Calibration:
    """Summary of held-out residuals."""

    quantiles: np.ndarray  # (1 + c, q, g) float16, |residual| / spread: all spots, then each class; NaN: class left out
    groups: np.ndarray  # (1 + c, g) int16: groups they rest on
    spread: np.ndarray  # (2, g) float32, see stats.fit_spread
    spots: np.ndarray  # (1 + c,) int
    detected: np.ndarray  # (q, g) float16, of spots that showed the gene
    detected_groups: np.ndarray  # (g,) int16
    #: By predicted level, see stats.level_quantiles; ``None`` in files of versions that did not keep them.
    level_quantiles: np.ndarray | None = None
    level_groups: np.ndarray | None = None
    level_edges: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays of a model folder."""
        arrays = {f"intervals.{part.name}": getattr(self, part.name) for part in fields(self) if part.name != "spots"}
        return {name: array for name, array in arrays.items() if array is not None}


def calibration_unit(sections: Sequence[Section], unit: str) -> str | None:
    """Say what is exchangeable in calibration: patients where there are enough, else sections; of less, nothing."""
    if unit not in ("patient", "section") or len(sections) < 2:
        return None
    n_patients = len({section.patient for section in sections})
    return "patient" if unit == "patient" and n_patients >= MIN_GROUPS else "section"


def groups_of(sections: Sequence[Section], unit: str) -> np.ndarray:
    """Code of the group of every spot, ``(n,)``."""
    names = [section.patient if unit == "patient" else section.name for section in sections]
    codes = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.repeat([codes[name] for name in names], [len(section) for section in sections])


def calibrate(
    predicted: np.ndarray,
    measured: np.ndarray,
    groups: np.ndarray,
    classes: np.ndarray,
    n_classes: int,
    *,
    by_level: bool = True,
) -> Calibration:
    """Summarise residuals of ``(n, g)``; codes of groups and of predicted classes (-1: unknown) are ``(n,)``."""
    residual = measured - predicted
    spread = fit_spread(predicted, residual, groups)
    signed = residual / spread_of(predicted, spread)
    scores = np.abs(signed)
    g = scores.shape[1]
    quantiles = np.full((1 + n_classes, len(LEVELS), g), np.nan, np.float16)
    counted = np.zeros((1 + n_classes, g), np.int16)
    spots = np.zeros(1 + n_classes, int)
    for c in range(-1, n_classes):
        rows = np.ones(len(classes), bool) if c < 0 else classes == c
        if c >= 0 and (rows.sum() < MIN_CLASS_SPOTS or len(np.unique(groups[rows])) < MIN_CLASS_GROUPS):
            continue
        found, counted[c + 1] = grouped_quantiles(scores[rows], groups[rows])
        quantiles[c + 1] = rounded_up(found)
        spots[c + 1] = rows.sum()
    detected, detected_groups = grouped_quantiles(np.where(measured > 0, scores, np.nan), groups)
    levels = level_quantiles(predicted, signed, groups) if by_level else ()
    return Calibration(quantiles, counted, spread, spots, rounded_up(detected), detected_groups, *levels)


def joined(parts: Sequence[Calibration]) -> Calibration:
    """Put the genes of several calibrations side by side."""
    names = [
        part.name for part in fields(Calibration) if part.name != "spots" and getattr(parts[0], part.name) is not None
    ]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names}
    return Calibration(spots=parts[0].spots, **arrays)


def described(calibration: Calibration, unit: str, classes: Sequence[str]) -> dict[str, object]:
    """Entry of the card: what the intervals rest on."""
    names = ("all", *classes)
    return {
        "unit": unit,
        "n_groups": int(calibration.groups[0].max(initial=0)),
        "levels": [float(level) for level in LEVELS],
        "max_coverage": MAX_COVERAGE,
        "spots": {name: int(n) for name, n in zip(names, calibration.spots, strict=True) if n},
    }


def temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """Temperature that makes held-out labels most likely (Guo et al., ICML 2017), within 0.2 to 20.

    Logits are ``(n, c)``, or ``(n, views, c)`` where probabilities are averaged over views.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, logsumexp

    rows = np.arange(len(codes))

    def loss(log_t: float) -> float:
        likely = log_softmax(logits / np.exp(log_t), axis=-1)[rows, ..., codes]
        return -(likely if logits.ndim == 2 else logsumexp(likely, axis=1) - np.log(logits.shape[1])).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.2), np.log(20)), method="bounded").x))
