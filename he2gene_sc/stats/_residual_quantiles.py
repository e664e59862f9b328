"""Quantiles of held-out residuals that intervals can be made of."""

from __future__ import annotations

import numpy as np

#: Levels that are kept: half of a level of 0.1 on either side makes an interval of 90 %.
RESIDUAL_LEVELS = np.array(
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4]
    + [0.5]
    + [0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995]
)


def residual_quantiles(residuals: np.ndarray, levels: np.ndarray = RESIDUAL_LEVELS) -> np.ndarray:
    """Quantiles ``(q, g)`` of each column without NaN, outwards by what a finite sample needs, else infinite.

    Of n residuals, an upper level q is the ``⌈(n + 1) q⌉``-th smallest, a lower one the ``⌊(n + 1) q⌋``-th (split
    conformal prediction; Lei et al., JASA 2018).
    """
    levels = np.asarray(levels, float)
    ordered = np.sort(residuals, axis=0)
    n = np.isfinite(residuals).sum(0)
    ordered = np.where(np.isnan(ordered), np.inf, ordered)
    bounded = np.concatenate([np.full((1, ordered.shape[1]), -np.inf), ordered, np.full((1, ordered.shape[1]), np.inf)])
    at = (n + 1) * levels[:, None]
    # Rounding dust must not move a rank.
    rank = np.where(levels[:, None] > 0.5, np.ceil(at - 1e-9), np.floor(at + 1e-9)).astype(int)
    found = np.take_along_axis(bounded, np.clip(rank, 0, n + 1), axis=0)
    middle = np.take_along_axis(bounded, np.clip(np.ceil(at - 1e-9).astype(int), 0, n + 1), axis=0)
    half = levels == 0.5
    with np.errstate(invalid="ignore"):
        found[half] = (found[half] + middle[half]) / 2
    return np.where(n > 0, found, np.nan).astype(np.float32)
