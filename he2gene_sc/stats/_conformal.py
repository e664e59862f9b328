"""Split conformal intervals from grouped held-out residuals."""

from __future__ import annotations

import numpy as np

#: Levels of the stored quantiles of the scores.
LEVELS = np.array(
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87]
    + [0.9, 0.91, 0.925, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0]
)
#: Largest coverage of intervals: higher quantiles would depend on a handful of spots.
MAX_COVERAGE = 0.98
#: Fewest groups for a guarantee at any coverage: fewer groups represent a new group poorly.
MIN_GROUPS = 9
#: Levels of the stored quantiles on either side, by predicted level: 0.95 on both sides makes an interval of 90 %.
TAILS = np.array([0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.96, 0.975, 0.99, 1.0])
#: Levels of stored quantiles of residuals: 0.05 and 0.95 are the ends of an interval of 90 %.
RESIDUAL_LEVELS = np.array(
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4]
    + [0.5]
    + [0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995]
)
#: Number of predicted levels (tenths of the spots), and fewest spots of a level; with fewer spots there are fewer levels.
_PREDICTED_LEVELS, _LEVEL_SPOTS = 10, 50
#: Fewest groups and effective spots for separate quantiles of a gene at a predicted level.
_LEVEL_LEAST = (2, 20)
#: Spread at a prediction of 0, as a share of the mean squared residual of the gene: the least value.
_FLOOR = 0.1
_ROUNDING = 1e-9


def fit_spread(predicted: np.ndarray, residual: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Fit the expected squared residual of each gene as a linear function of its prediction: intercept and slope ``(2, g)``.

    Groups have the same weight. The slope is at least 0 and the intercept at least a tenth of the mean, so the spread is only
    0 if all residuals are 0. NaN for genes that were not measured.
    """
    known = np.isfinite(residual)
    _, codes, size = np.unique(groups, return_inverse=True, return_counts=True)
    weight = (1 / size[codes])[:, None] * known
    total = weight.sum(0, dtype=np.float64)
    weight = weight / np.where(total > 0, total, np.nan)
    x, y = np.where(known, predicted, 0).astype(np.float64), np.square(np.where(known, residual, 0), dtype=np.float64)
    mean_x, mean_y = (weight * x).sum(0), (weight * y).sum(0)
    variance = (weight * np.square(x)).sum(0) - np.square(mean_x)
    covariance = (weight * x * y).sum(0) - mean_x * mean_y
    slope = np.clip(np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-12), 0, None)
    return np.stack([np.maximum(mean_y - slope * mean_x, _FLOOR * mean_y), slope]).astype(np.float32)


def spread_of(predicted: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Predicted spread ``(n, g)``: root of the line ``(2, g)`` of :func:`fit_spread`; negative predictions count as 0."""
    return np.sqrt(np.maximum(spread[0] + spread[1] * np.maximum(predicted, 0), np.finfo(np.float32).tiny))


def grouped_quantiles(
    scores: np.ndarray, groups: np.ndarray, levels: np.ndarray = LEVELS
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles ``(q, g)`` of scores with equal weight of groups, and the number of groups ``(g,)`` that measured the gene.

    A quantile is the smallest score whose cumulative weight reaches the level. Groups are patients or sections, ``(n,)``,
    or ``(n, g)`` if each gene has its own spots.
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
    cumulated, last = cumulated[:, columns], known.sum(0)[columns] - 1
    for i, level in enumerate(levels):
        below = np.count_nonzero(cumulated < level * n_groups[columns] - _ROUNDING, axis=0)
        found[i, columns] = ordered[np.minimum(below, last), columns]
    return found, n_groups.astype(np.int16)


def level_quantiles(
    predicted: np.ndarray, scores: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantiles of signed scores on the lower and upper side ``(2, 1 + b, q, g)``, by tenths of the predictions of each gene.

    The first of ``1 + b`` is over all spots, for genes with too few spots in a tenth. Also the number of groups ``(1 + b, g)``
    (0 if there are too few), and the upper ends of all tenths except the last, ``(b - 1, g)``.
    """
    n, g = scores.shape
    # float32 as stored by predict: the upper ends must equal predictions exactly.
    predicted = np.asarray(predicted, np.float32)
    n_levels = int(np.clip(n // _LEVEL_SPOTS, 1, _PREDICTED_LEVELS))
    # Equal predictions, such as 0, are assigned to tenths at random, not in the order of sections.
    shuffled = np.random.default_rng(0).permutation(n)
    order = shuffled[np.argsort(predicted[shuffled], axis=0, kind="stable")]
    cuts = np.linspace(0, n, n_levels + 1).round().astype(int)
    edges = np.take_along_axis(predicted, order[cuts[1:-1] - 1], axis=0)
    quantiles = np.full((2, 1 + n_levels, len(TAILS), g), np.nan, np.float16)
    counted = np.zeros((1 + n_levels, g), np.int16)
    for level in range(1 + n_levels):
        own, own_groups, least = scores, groups[:, None], (1, 0)
        if level:
            rows = order[cuts[level - 1] : cuts[level]]
            own, own_groups, least = np.take_along_axis(scores, rows, axis=0), groups[rows], _LEVEL_LEAST
        effective = _effective_spots(np.isfinite(own), own_groups)
        for side, signed in enumerate((-own, own)):
            found, n_groups = grouped_quantiles(signed, own_groups, TAILS)
            enough = (n_groups >= least[0]) & (effective >= least[1])
            quantiles[side, level] = rounded_up(np.where(enough, found, np.nan))
            counted[level] = np.where(enough, n_groups, 0)
    return quantiles, counted, edges


def _effective_spots(known: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Effective number of measured spots ``(g,)``, with equal weight of groups: one spot in a group counts as much as many.

    It is the number of spots if all groups have the same number.
    """
    size = np.array([(known & (groups == name)).sum(0) for name in np.unique(groups)])
    parts = np.where(size > 0, 1 / np.maximum(size, 1), 0).sum(0)
    return np.divide(np.square((size > 0).sum(0)), parts, out=np.zeros_like(parts), where=parts > 0)


def level_of(predicted: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Predicted level ``(n, g)`` of each value, from 0, given the upper ends from :func:`level_quantiles`."""
    found = np.zeros(predicted.shape, np.int8)
    for edge in edges:
        found += predicted > edge
    return found


def hierarchical_level(coverage: float, n_groups: np.ndarray | int) -> np.ndarray:
    """Level of the pooled quantile that covers a spot of a new group with probability ``coverage``; ``inf`` if there is none.

    The new group counts as an additional one at infinity: ``coverage * (k + 1) / k`` (Lee, Barber and Willett, arXiv
    2306.06342; Dunn, Wasserman and Ramdas, arXiv 1809.07441). At 90 %, the level is above 1 with fewer than nine groups.
    """
    k = np.asarray(n_groups, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.where(k > 0, coverage * (k + 1) / k, np.inf)
    return np.where(level <= 1 + _ROUNDING, np.minimum(level, 1), np.inf)


def half_scores(
    quantiles: np.ndarray, n_groups: np.ndarray, coverage: float, levels: np.ndarray = LEVELS
) -> tuple[np.ndarray, np.ndarray]:
    """Score ``(g,)`` at the end of the interval of each gene, and whether coverage is guaranteed.

    With nine groups or more it is the next stored quantile at or above :func:`hierarchical_level`; with fewer, it is the
    interpolated pooled quantile at ``coverage``, without guarantee.
    """
    level = hierarchical_level(coverage, n_groups)
    guaranteed = np.isfinite(level) & (np.asarray(n_groups) >= MIN_GROUPS)
    at = np.searchsorted(levels, np.where(guaranteed, level, 1) - _ROUNDING)
    upper = np.take_along_axis(quantiles, at[None], axis=0)[0]
    return np.where(guaranteed, upper, interpolated(quantiles, levels, coverage)), guaranteed


def interpolated(quantiles: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray:
    """Quantiles ``(g,)`` at a level, by linear interpolation between stored ones ``(q, g)``; infinite next to infinite ones."""
    levels = np.asarray(levels, np.float64)
    if not levels[0] - _ROUNDING <= level <= levels[-1] + _ROUNDING:
        raise ValueError(f"`level` is {level:.4g}, outside the stored levels {levels[0]:.4g} to {levels[-1]:.4g}")
    quantiles = np.asarray(quantiles, np.float32)
    # At a stored level the neighbouring quantile must not be used: with few residuals it is infinite.
    stored = np.flatnonzero(np.abs(levels - level) <= _ROUNDING)
    if len(stored):
        return quantiles[stored[0]].copy()
    i = int(np.searchsorted(levels, level))
    share = (level - levels[i - 1]) / (levels[i] - levels[i - 1])
    return ((1 - share) * quantiles[i - 1] + share * quantiles[i]).astype(np.float32)


def rounded_up(values: np.ndarray) -> np.ndarray:
    """Round up to half precision."""
    half = np.clip(values, None, np.finfo(np.float16).max).astype(np.float16)
    return np.where(half < values, np.nextafter(half, np.float16(np.inf)), half).astype(np.float16)


def residual_quantiles(residuals: np.ndarray, levels: np.ndarray = RESIDUAL_LEVELS) -> np.ndarray:
    """Quantiles ``(q, g)`` of each column without NaN, with the finite-sample correction; infinite if there are too few values.

    Of n residuals, the quantile of an upper level q is the ``⌈(n + 1) q⌉``-th smallest, that of a lower level the
    ``⌊(n + 1) q⌋``-th (split conformal prediction; Lei et al., JASA 2018).
    """
    levels = np.asarray(levels, float)
    n = np.isfinite(residuals).sum(0)
    ordered = np.sort(np.where(np.isnan(residuals), np.inf, residuals), axis=0)
    bounded = np.pad(ordered, ((1, 1), (0, 0)), constant_values=((-np.inf, np.inf), (0, 0)))
    at = (n + 1) * levels[:, None]
    # Rounding errors must not change a rank.
    ranks = np.floor(at + 1e-9), np.ceil(at - 1e-9)
    low, high = (np.take_along_axis(bounded, np.clip(rank.astype(int), 0, n + 1), axis=0) for rank in ranks)
    with np.errstate(invalid="ignore"):
        found = np.where(levels[:, None] == 0.5, (low + high) / 2, np.where(levels[:, None] > 0.5, high, low))
    return np.where(n > 0, found, np.nan).astype(np.float32)
