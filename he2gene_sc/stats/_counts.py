"""Counts summed over the spots of a group in each sample: library sizes, logarithms and how precise they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Steps of the fit, and the largest difference (natural log).
_STEPS, _MOST = 6, 12.0
#: Pairs with fewer expected counts do not enter the estimates of library sizes and of components of variance.
_MIN_EXPECTED = 5.0
#: Share of the genes, the quieter ones, that the components of variance are fitted to.
_KEPT = 0.95


@dataclass(frozen=True)
class CountSums:
    """Sums over the spots of two groups in each of ``n`` samples, the group first.

    ``counts``, ``squares`` and ``by_depth`` ``(2, n, g)`` are sums of the counts, of their squares and of counts times the total
    of the spot; ``spots``, ``depth`` and ``depth_squares`` ``(2, n)`` are spots, and sums of totals and of their squares.
    """

    counts: np.ndarray
    squares: np.ndarray
    by_depth: np.ndarray
    spots: np.ndarray
    depth: np.ndarray
    depth_squares: np.ndarray


@dataclass(frozen=True)
class CountDifferences:
    """Natural-log differences of composition ``(n, g)``, and their variances ``(n, g)``, infinite where nothing was counted."""

    differences: np.ndarray
    variances: np.ndarray


def count_differences(sums: CountSums) -> CountDifferences:
    """Differences of log composition between two groups in each sample, with the variance that each must have.

    Given the counts N of a gene in both groups, those of the group are expected to be N π, logit π = log(library of
    the group / library of the reference) + β, β being the mean difference over samples. Differences are the working
    responses β + (y - N π) / (N π (1 - π)), whose mean is 0 at every depth if nothing differs, unlike logarithms of
    few counts. Their variance is 1 / μ + α / m of both groups: expected counts μ, overdispersion α, spots m as
    their depths weigh. Samples differ beyond that by τ², and correlated spots tell less, by a factor c; both are
    fitted to all genes.
    """
    library = sums.depth * library_factors(sums.counts, sums.depth)
    inside = (np.all(library > 0, axis=0) & np.all(sums.spots > 0, axis=0))[:, None]
    total = np.where(inside, sums.counts.sum(0), 0)
    y = np.where(inside, sums.counts[0], 0)
    effective = np.square(sums.depth) / np.maximum(sums.depth_squares, 1)
    spread = overdispersion(sums) * (1 / np.maximum(effective, 1)).sum(0)[:, None]
    offset = np.log(np.maximum(library[0], 1e-300) / np.maximum(library[1], 1e-300))[:, None]
    beta, between, factor = np.zeros(y.shape[1]), 0.0, 1.0
    for i in range(_STEPS + 1):
        odds = np.exp(np.clip(offset + beta, -30, 30))
        pi = odds / (1 + odds)
        information = np.maximum(total, 1) * pi * (1 - pi)
        differences = beta + (y - total * pi) / information
        with np.errstate(divide="ignore"):
            sampling = 1 / (total * pi * (1 - pi)) + spread
        if i % 2 == 0:
            trusted = total * np.minimum(pi, 1 - pi) >= _MIN_EXPECTED
            between, factor = variance_components(differences, sampling, trusted)
        variances = between + factor * sampling
        if i == _STEPS:
            return CountDifferences(differences, variances)
        weights = 1 / variances
        mean = (weights * differences).sum(0) / np.maximum(weights.sum(0), 1e-300)
        beta = np.clip(np.clip(mean, beta - 1, beta + 1), -_MOST, _MOST)
    raise AssertionError


def library_factors(counts: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Trimmed mean of M values between the groups of each sample (TMM; Robinson and Oshlack, Genome Biol 2010).

    ``(2, n)`` of product 1. 1 where fewer than 50 genes are counted well: rare genes are seen where they are high.
    """
    factors = np.ones(depth.shape)
    for i in range(depth.shape[1]):
        y, total = counts[:, i], depth[:, i]
        if not (total > 0).all():
            continue
        share = y.sum(0) / total.sum()
        kept = (share * total.min() >= _MIN_EXPECTED) & (y > 0).all(0)
        if kept.sum() < 50:
            continue
        rates = y[:, kept] / total[:, None]
        m, a = np.log2(rates[0] / rates[1]), np.log2(share[kept])
        variance = ((1 - rates) / y[:, kept]).sum(0)
        inside = _inside(m, 0.3) & _inside(a, 0.05)
        gap = np.average(m[inside], weights=1 / variance[inside])
        factors[:, i] = 2 ** (gap / 2), 2 ** (-gap / 2)
    return factors


def _inside(values: np.ndarray, trim: float) -> np.ndarray:
    low, high = np.quantile(values, [trim, 1 - trim])
    return (values >= low) & (values <= high)


def overdispersion(sums: CountSums) -> np.ndarray:
    """Variance of a gene over spots beyond counting, in units of its squared mean, ``(g,)``: moments, over all groups."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(sums.depth[..., None] > 0, sums.counts / sums.depth[..., None], 0)
    about = sums.squares - 2 * rate * sums.by_depth + rate**2 * sums.depth_squares[..., None]
    about = about * (sums.spots / np.maximum(sums.spots - 1, 1))[..., None]
    mean = (rate**2 * sums.depth_squares[..., None]).sum((0, 1))
    excess = (about - sums.counts).sum((0, 1))
    return np.where(mean > 0, np.maximum(excess, 0) / np.maximum(mean, 1e-300), 0)


def variance_components(
    differences: np.ndarray, sampling: np.ndarray, used: np.ndarray | None = None
) -> tuple[float, float]:
    """Fit var(difference) = τ² + c sampling to all genes, c at least 1, without the noisiest twentieth of the genes."""
    trusted = np.isfinite(sampling) if used is None else used & np.isfinite(sampling)
    trusted = trusted & (trusted.sum(0) >= 2)
    if not trusted.any():
        return 0.0, 1.0
    between, factor = 0.0, 1.0
    remaining = _trimmed_mean(np.maximum(trusted.sum(0) - 1, 1))
    for _ in range(20):
        variance = np.where(trusted, between + factor * sampling, 1.0)
        weight = trusted / variance
        total = np.where(trusted.any(0), weight.sum(0), 1.0)
        square = np.square(differences - (weight * differences).sum(0) / total)
        mean = (weight * square).sum(0) / np.maximum(trusted.sum(0) - 1, 1)
        kept = trusted & (mean <= np.quantile(mean[trusted.any(0)], _KEPT))
        # A residual has lost what the mean has taken, and the genes that are kept are the quieter ones.
        target, w = square / remaining + 1 / total, kept / np.square(variance)
        s = np.where(kept, sampling, 0)
        a, b, c = w.sum(), (w * s).sum(), (w * s * s).sum()
        y, ys = (w * target).sum(), (w * s * target).sum()
        before = between, factor
        gap = a * c - b * b
        between, factor = (
            ((c * y - b * ys) / gap, (a * ys - b * y) / gap) if gap > 1e-12 * a * c else (y / a - b / a, 1.0)
        )
        if factor < 1:
            between, factor = (y - b) / a, 1.0
        if between < 0:
            between, factor = 0.0, max(ys / c, 1.0) if c > 0 else 1.0
        if np.allclose(before, (between, factor), rtol=1e-3, atol=1e-9):
            break
    return float(between), float(factor)


def _trimmed_mean(df: np.ndarray) -> np.ndarray:
    """Mean of χ² / df below its quantile ``_KEPT``."""
    from scipy import stats

    return stats.chi2.cdf(stats.chi2.ppf(_KEPT, df), df + 2) / _KEPT
