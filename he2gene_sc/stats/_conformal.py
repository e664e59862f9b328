"""Split conformal intervals from grouped held-out residuals. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np

#: Levels at which the quantiles of the scores are kept.
LEVELS = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87]
    + [0.9, 0.91, 0.925, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0]
)
#: Coverage up to which intervals can be asked for: above it the kept quantiles are those of a handful of spots.
MAX_COVERAGE = 0.98
#: Groups without which no guarantee is stated at any coverage: the fewer, the less they say of what a new one is like.
MIN_GROUPS = 9
#: Levels at which quantiles on either side are kept by predicted level: 0.95 on both makes an interval of 90 %.
TAILS = np.array([0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.96, 0.975, 0.99, 1.0])
#: Predicted levels are tenths of the spots, fewer where a tenth has fewer spots than that.
_PREDICTED_LEVELS, _LEVEL_SPOTS = 10, 50
#: Measured spots and groups without which a gene has no quantiles of its own at a predicted level.
_LEVEL_MEASURED, _LEVEL_GROUPS = 20, 2
#: Least part of a gene's mean squared residual that its spread keeps where 0 is predicted.
_FLOOR = 0.1
_ROUNDING = 1e-9


def group_weights(groups: np.ndarray) -> np.ndarray:
    """Weight of each spot such that every group counts the same: one over the size of its group, ``(n,)``."""
    _, which, size = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / size[which]


def fit_spread(predicted: np.ndarray, residual: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Fit the expected squared residual of each gene as a line in its prediction: ``(2, g)``, intercept and slope.

    Groups weigh the same. Both are at least 0, the intercept a tenth of the mean, so that no spread is 0 where
    residuals are not. NaN for genes that were measured nowhere.
    """
    known = np.isfinite(residual)
    weight = group_weights(groups)[:, None] * known
    total = weight.sum(0, dtype=np.float64)
    weight = weight / np.where(total > 0, total, np.nan)
    x, y = np.where(known, predicted, 0).astype(np.float64), np.square(np.where(known, residual, 0), dtype=np.float64)
    mean_x, mean_y = (weight * x).sum(0), (weight * y).sum(0)
    variance = (weight * np.square(x)).sum(0) - np.square(mean_x)
    covariance = (weight * x * y).sum(0) - mean_x * mean_y
    slope = np.clip(np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-12), 0, None)
    return np.stack([np.maximum(mean_y - slope * mean_x, _FLOOR * mean_y), slope]).astype(np.float32)


def spread_of(predicted: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Predicted spread ``(n, g)``, root of the line that :func:`fit_spread` gave, ``(2, g)``; below 0 that at 0."""
    return np.sqrt(np.maximum(spread[0] + spread[1] * np.maximum(predicted, 0), np.finfo(np.float32).tiny))


def grouped_quantiles(
    scores: np.ndarray, groups: np.ndarray, levels: np.ndarray = LEVELS
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles ``(q, g)`` of scores in which every group weighs the same, and groups ``(g,)`` that measured the gene.

    A quantile is the smallest score whose cumulated weight reaches the level; groups are patients or sections, ``(n,)``
    or, where each gene has its own spots, ``(n, g)``.
    """
    groups = groups[:, None] if groups.ndim == 1 else groups
    order = np.argsort(scores, axis=0)
    ordered = np.take_along_axis(scores, order, axis=0)
    known = np.isfinite(scores)
    names = np.unique(groups)
    size = np.array([(known & (groups == name)).sum(0) for name in names]).reshape(len(names), scores.shape[1])
    n_groups = (size > 0).sum(0)
    weight = (1 / np.maximum(size, 1))[np.searchsorted(names, groups), np.arange(scores.shape[1])] * known
    cumulated = np.cumsum(np.take_along_axis(weight, order, axis=0), axis=0)
    found = np.full((len(levels), scores.shape[1]), np.nan, np.float32)
    columns = np.flatnonzero(n_groups)
    for i, level in enumerate(levels):
        below = (cumulated[:, columns] < level * n_groups[columns] - _ROUNDING).sum(0)
        last = known[:, columns].sum(0) - 1
        found[i, columns] = ordered[np.minimum(below, last), columns]
    return found, n_groups.astype(np.int16)


def level_quantiles(
    predicted: np.ndarray, scores: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantiles of signed scores below and above ``(2, 1 + b, q, g)``, by tenth of the predictions of each gene.

    The first of ``1 + b`` is of all spots, for what a tenth has too few of. Also groups ``(1 + b, g)``, 0 where there are
    too few, and the upper ends of all tenths but the last, ``(b - 1, g)``.
    """
    n, g = scores.shape
    # As intervals reads them: an end is one of the predictions.
    predicted = np.asarray(predicted, np.float32)
    n_levels = int(np.clip(n // _LEVEL_SPOTS, 1, _PREDICTED_LEVELS))
    # Equal predictions, such as 0, are shared out by chance, not by section.
    shuffled = np.random.default_rng(0).permutation(n)
    order = shuffled[np.argsort(predicted[shuffled], axis=0, kind="stable")]
    cuts = np.linspace(0, n, n_levels + 1).round().astype(int)
    edges = np.take_along_axis(predicted, order[cuts[1:-1] - 1], axis=0)
    quantiles = np.full((2, 1 + n_levels, len(TAILS), g), np.nan, np.float16)
    counted = np.zeros((1 + n_levels, g), np.int16)
    for level in range(1 + n_levels):
        rows = order[cuts[level - 1] : cuts[level]]
        own, own_groups = (np.take_along_axis(scores, rows, axis=0), groups[rows]) if level else (scores, groups)
        for side, signed in enumerate((-own, own)):
            found, n_groups = grouped_quantiles(signed, own_groups, TAILS)
            enough = (
                (n_groups >= _LEVEL_GROUPS) & (np.isfinite(own).sum(0) >= _LEVEL_MEASURED) if level else n_groups > 0
            )
            quantiles[side, level] = rounded_up(np.where(enough, found, np.nan))
            counted[level] = np.where(enough, n_groups, 0)
    return quantiles, counted, edges


def level_of(predicted: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Predicted level ``(n, g)`` of each value, from 0, by the ends that :func:`level_quantiles` gave."""
    found = np.zeros(predicted.shape, np.int8)
    for edge in edges:
        found += predicted > edge
    return found


def hierarchical_level(coverage: float, n_groups: np.ndarray | int) -> np.ndarray:
    """Level of the pooled quantile that covers a spot of a new group with probability ``coverage``, else ``inf``.

    The new group counts as one more at infinity: ``coverage * (k + 1) / k`` (Lee, Barber and Willett, arXiv
    2306.06342; Dunn, Wasserman and Ramdas, arXiv 1809.07441). At 90 % it is above 1 below nine groups.
    """
    k = np.asarray(n_groups, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(k > 0, coverage * (k + 1) / k, np.inf)
    return np.where(level <= 1 + _ROUNDING, np.minimum(level, 1), np.inf)


def half_scores(
    quantiles: np.ndarray, n_groups: np.ndarray, coverage: float, levels: np.ndarray = LEVELS
) -> tuple[np.ndarray, np.ndarray]:
    """Score ``(g,)`` up to which an interval reaches, by gene, and whether coverage is guaranteed.

    With nine groups or more it is the next kept quantile at or above :func:`hierarchical_level`; with fewer the
    pooled quantile at ``coverage``, interpolated, without guarantee.
    """
    level = hierarchical_level(coverage, n_groups)
    guaranteed = np.isfinite(level) & (np.asarray(n_groups) >= MIN_GROUPS)
    at = np.searchsorted(levels, np.where(guaranteed, level, 1) - _ROUNDING)
    upper = np.take_along_axis(quantiles, at[None], axis=0)[0]
    return np.where(guaranteed, upper, interpolated(quantiles, levels, coverage)), guaranteed


def interpolated(quantiles: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray:
    """Quantiles ``(g,)`` at a level between the kept ``(q, g)``, on a straight line; infinite beside infinite ones."""
    levels = np.asarray(levels, np.float64)
    if not levels[0] - _ROUNDING <= level <= levels[-1] + _ROUNDING:
        raise ValueError(f"level {level:.4g} lies outside the kept ones, {levels[0]:.4g} to {levels[-1]:.4g}")
    i = int(np.clip(np.searchsorted(levels, level), 1, len(levels) - 1))
    share = np.clip((level - levels[i - 1]) / (levels[i] - levels[i - 1]), 0, 1)
    quantiles = np.asarray(quantiles, np.float32)
    # At a kept level its neighbour does not count: of few residuals that is infinite.
    if min(levels[i] - level, level - levels[i - 1]) <= _ROUNDING:
        return quantiles[i if levels[i] - level <= _ROUNDING else i - 1].copy()
    return ((1 - share) * quantiles[i - 1] + share * quantiles[i]).astype(np.float32)


def rounded_up(values: np.ndarray) -> np.ndarray:
    """Half precision, never below what it stands for."""
    half = np.clip(values, None, np.finfo(np.float16).max).astype(np.float16)
    return np.where(half < values, np.nextafter(half, np.float16(np.inf)), half).astype(np.float16)


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
