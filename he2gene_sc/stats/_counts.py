"""Counts summed over the spots of a group in each sample: library sizes, log differences and their variances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, expit, polygamma
from scipy.stats import chi2

#: Number of steps of the fit, and the largest difference (natural log).
_STEPS, _MAX_DIFFERENCE = 6, 12.0
#: Fewest expected counts of a pair for estimates of library sizes and variance components.
_MIN_EXPECTED = 5.0
#: Share of the genes (those with smaller residuals) that the variance components are fitted to.
_KEPT = 0.95
#: Fewest well-counted genes for trimming M values, and fewest for any library factor.
MIN_LIBRARY, _FEWEST = 50, 10
#: Ratios of the SD of the densest half of the genes: to the SD of the densest third above which the half contains two kinds of
#: genes, and to the SD of the narrower side above which it is too large (larger with few genes). Then the number of genes
#: from which only the better counted half is used.
_TWO_KINDS, _TOO_WIDE, _MANY = 1.5, 1.3, 200


@dataclass(frozen=True)
class CountSums:
    """Sums over the spots of two groups in each of ``n`` samples; the tested group is first.

    ``counts``, ``squares`` and ``by_depth`` ``(2, n, g)`` are sums of the counts, of their squares and of counts times the total
    counts of the spot; ``spots``, ``depth`` and ``depth_squares`` ``(2, n)`` are the number of spots, and sums of total counts
    and of their squares.
    """

    counts: np.ndarray
    squares: np.ndarray
    by_depth: np.ndarray
    spots: np.ndarray
    depth: np.ndarray
    depth_squares: np.ndarray


@dataclass(frozen=True)
class CountDifferences:
    """Natural-log differences of composition ``(n, g)``, and their variances ``(n, g)``, infinite without counts.

    ``reliable`` ``(g,)`` marks genes with at least five fitted counts in the rarer group. The observed variance of other genes is
    too small, so ``least`` ``(n, g)`` is a lower bound, the variance of counting; 0 for reliable genes.
    """

    differences: np.ndarray
    variances: np.ndarray
    least: np.ndarray
    reliable: np.ndarray


def count_differences(sums: CountSums, *, normalise: bool = True) -> CountDifferences:
    """Differences of log composition between two groups in each sample, with their expected variances.

    Given the counts N of a gene in both groups, the expected counts in the group are N π, with logit π = log(library of
    the group / library of the reference) + β + δ. β is the mean difference, δ the deviation of a sample, with variance τ².
    The sampling variance is 1 / μ + α / m, summed over both groups: expected counts μ, overdispersion α, effective number of
    spots m (weighted by depth). Correlation of spots increases it by a factor c; τ² and c are fitted to all genes.
    ``normalise=False`` uses total counts as library sizes.
    """
    library = sums.depth * (library_factors(sums.counts, sums.depth) if normalise else 1)
    inside = (np.all(library > 0, axis=0) & np.all(sums.spots > 0, axis=0))[:, None]
    total = np.where(inside, sums.counts.sum(0), 0)
    y = np.where(inside, sums.counts[0], 0)
    effective = np.square(sums.depth) / np.maximum(sums.depth_squares, 1e-300)
    spread = overdispersion(sums) * (1 / np.maximum(effective, 1)).sum(0)[:, None]
    offset = np.log(np.maximum(library[0], 1e-300) / np.maximum(library[1], 1e-300))[:, None]
    # Add one count to each pair, split like the libraries: with counts in one group only, β would be infinite.
    y, total = y + np.where(total > 0, expit(offset), 0), total + (total > 0)
    # The added count has no variance.
    varying = 1 - 1 / np.maximum(total, 2)
    expected = (total * expit(offset)).sum(0)
    beta = np.log(np.maximum(y.sum(0), 1e-300) / np.maximum(expected, 1e-300))
    beta -= np.log(np.maximum((total - y).sum(0), 1e-300) / np.maximum(total.sum(0) - expected, 1e-300))
    between, factor = 0.0, 1.0
    for i in range(_STEPS + 1):
        logits = np.clip(offset + beta, -30, 30)
        pi = expit(logits)
        with np.errstate(divide="ignore"):
            counting = varying / (total * pi * (1 - pi))
        sampling = counting + varying**2 * spread
        differences = beta + _deviations(y, total, logits, factor * sampling, between)
        if i % 2 == 0:
            trusted = total * np.minimum(pi, 1 - pi) >= _MIN_EXPECTED
            between, factor = variance_components(differences, sampling, trusted)
        variances = between + factor * sampling
        weights = 1 / variances
        mean = (weights * differences).sum(0) / np.maximum(weights.sum(0), 1e-300)
        beta = np.clip(np.clip(mean, beta - 1, beta + 1), -_MAX_DIFFERENCE, _MAX_DIFFERENCE)
    reliable = (total * np.minimum(pi, 1 - pi)).sum(0) >= _MIN_EXPECTED
    least = np.where(reliable | (total == 0), 0, counting)
    return CountDifferences(differences, variances, least, reliable)


def _deviations(
    y: np.ndarray, total: np.ndarray, logits: np.ndarray, sampling: np.ndarray, between: float
) -> np.ndarray:
    """Deviations ``(n, g)`` of samples from the mean difference; their expectation is 0 at every depth.

    The odds of the samples have a beta distribution whose logit has the mean ``logits`` and approximately the variance ``between``.
    The posterior means of the logit, given the counts, have the same mean over samples as the logit. They are divided by their
    share of the variance. For small counts this is (y - N π) / (N π (1 - π)), for large counts the log odds.
    """
    between = max(between, 1e-4)
    a, b = ((1 + np.exp(sign * logits)) / between for sign in (1, -1))
    for shape in (a, b):
        # Solve log(shape) = digamma(x) by one Newton step from x = shape + 1/2.
        start = shape + 0.5
        shape[:] = start - (digamma(start) - np.log(shape)) / polygamma(1, start)
    pi = expit(logits)
    # Rescale the counts to the effective number that the sampling variance implies.
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(total > 0, 1 / (sampling * pi * (1 - pi)) / total, 0)
    y, total = scale * y, scale * total
    deviation = digamma(y + a) - digamma(total - y + b) - (digamma(a) - digamma(b))
    with np.errstate(invalid="ignore"):
        deviation = deviation * (1 + sampling / between)
        # Correct a bias: weights increase with N, and N is larger in samples where the larger group is high.
        deviation += (0.5 - pi) * between / (1 + between / sampling)
        return np.where(total > 0, deviation, 0)


def library_factors(counts: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Trimmed mean of M values between the groups of each sample (TMM; Robinson and Oshlack, Genome Biol 2010).

    Factors ``(2, n)`` with product 1. Genes that change together in one direction are left out. With fewer than 50 well-counted
    genes the weighted median is used; with fewer than 10, the factors are 1.
    """
    factors = np.ones(depth.shape)
    overall = counts.sum((0, 1)) / max(depth.sum(), 1e-300)
    values, expected = _m_values(counts, depth)
    _, unchanged = _unchanged_genes(values, expected)
    for i, m in enumerate(values):
        if np.isfinite(m).sum() < _FEWEST or not (kept := np.isfinite(m) & unchanged).any():
            continue
        m = m[kept]
        # Include the spread between genes: otherwise the weights favour genes that are high in the larger group.
        spread = np.square(np.subtract(*np.quantile(m, [0.75, 0.25])) / 1.35)
        weights = 1 / (spread + (1 / expected[:, i, kept]).sum(0))
        if kept.sum() < MIN_LIBRARY:
            order = np.argsort(m)
            gap = m[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]
        else:
            inside = _untrimmed(m, 0.3) & _untrimmed(np.log(overall[kept]), 0.05)
            gap = np.average(m[inside], weights=weights[inside])
        factors[:, i] = np.exp(gap / 2), np.exp(-gap / 2)
    return factors


def _unchanged_genes(values: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean M values ``(g,)`` over samples, and a mask of genes near their mode; leaves out genes that change in one direction.

    Each sample is centred at its median; the mean is NaN for genes that are counted well in none. The mode is the centre of the
    shortest interval with half of the genes; "near" is within 2.5 SD, estimated from its length. If about half of the genes change
    in one direction, the mode is the centre of the shortest interval with a third of the well-counted genes. If many genes
    change, the SD of the half is too large; then the SD of the narrower side is used.
    """
    known = np.isfinite(values)
    level = [np.median(m[mask]) if mask.any() else 0.0 for m, mask in zip(values, known, strict=True)]
    total = np.where(known, values - np.array(level)[:, None], 0).sum(0)
    means = total / np.where(known.any(0), known.sum(0), np.nan)
    near = np.isfinite(means)
    if near.sum() < _FEWEST:
        return means, near
    mean = means[near]
    middle, sd = _densest(mean, 1 / 2, 1.35)
    counted = np.where(known[:, near], expected[..., near], 0).sum((0, 1))
    well = mean[counted >= np.median(counted)] if len(mean) >= _MANY else mean
    for part in (mean, well):
        chance = 1 + 3 / np.cbrt(len(part))
        if _densest(part, 1 / 2, 1.35)[1] > max(_TWO_KINDS, chance) * _densest(part, 1 / 3, 0.861)[1]:
            middle = _densest(well, 1 / 3, 0.861)[0]
    below, above = (np.append(mean[(mean - middle) * side > 0], middle) for side in (-1, 1))
    side = float(min(np.median(np.abs(part - middle)) for part in (below, above))) / 0.674
    if sd > max(_TOO_WIDE, chance) * side:
        sd = side
    near[near] = np.abs(mean - middle) <= 2.5 * sd
    return means, near


def _densest(values: np.ndarray, share: float, width: float) -> tuple[float, float]:
    """Centre of the shortest interval with this share of the values, and the SD for a normal distribution of this length.

    ``width`` is the length of the interval for a standard normal distribution.
    """
    ordered = np.sort(values)
    n = int(len(ordered) * share) + 1
    lengths = ordered[n - 1 :] - ordered[: len(ordered) - n + 1]
    first = int(lengths.argmin())
    return float(ordered[first] + ordered[first + n - 1]) / 2, float(lengths[first]) / width


def library_evidence(counts: np.ndarray, depth: np.ndarray) -> tuple[int, float]:
    """Smallest number of well-counted genes over samples, and the share of genes left out on one side (positive if higher)."""
    values, expected = _m_values(counts, depth)
    mean, unchanged = _unchanged_genes(values, expected)
    n = int(np.isfinite(values).sum(1).min())
    if not unchanged.any():
        return n, 0.0
    left_out = mean[np.isfinite(mean) & ~unchanged]
    above = int((left_out > np.median(mean[unchanged])).sum())
    below = len(left_out) - above
    return n, (above if above > below else -below) / int(np.isfinite(mean).sum())


def _m_values(counts: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios of the groups ``(n, g)``, NaN for genes with too few counts, and the expected counts ``(2, n, g)``.

    Genes are selected by the counts of all samples: selection by one sample favours genes that are high in its larger group.
    """
    least = depth.min(0)[:, None]
    overall = counts.sum((0, 1)) / max(depth.sum(), 1e-300)
    share = counts.sum(0) / np.maximum(depth.sum(0), 1e-300)[:, None]
    kept = (overall * least >= _MIN_EXPECTED) & (share * least >= 1)
    expected = share * depth[..., None]
    # The median of Poisson counts is about 1/6 below their mean.
    above, below = np.log((counts + 1 / 6) / np.where(kept, expected, 1))
    return np.where(kept, above - below, np.nan), expected


def _untrimmed(values: np.ndarray, trim: float) -> np.ndarray:
    """Mask of the values that remain after trimming a share of them at both ends."""
    low, high = np.quantile(values, [trim, 1 - trim])
    return (values >= low) & (values <= high)


def overdispersion(sums: CountSums) -> np.ndarray:
    """Variance ``(g,)`` over spots beyond counting noise, in units of the squared mean; by moments over all groups."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(sums.depth[..., None] > 0, sums.counts / sums.depth[..., None], 0)
    residual_squares = sums.squares - 2 * rate * sums.by_depth + rate**2 * sums.depth_squares[..., None]
    residual_squares = residual_squares * (sums.spots / np.maximum(sums.spots - 1, 1))[..., None]
    mean = (rate**2 * sums.depth_squares[..., None]).sum((0, 1))
    excess = (residual_squares - sums.counts).sum((0, 1))
    return np.where(mean > 0, np.maximum(excess, 0) / np.maximum(mean, 1e-300), 0)


def variance_components(
    differences: np.ndarray, sampling: np.ndarray, used: np.ndarray | None = None
) -> tuple[float, float]:
    """Fit var(difference) = τ² + c sampling, with c at least 1, to all genes except the 5 % with the largest residuals."""
    trusted = np.isfinite(sampling) if used is None else used & np.isfinite(sampling)
    trusted = trusted & (trusted.sum(0) >= 2)
    if not trusted.any():
        return 0.0, 1.0
    between, factor = 0.0, 1.0
    df = np.maximum(trusted.sum(0) - 1, 1)
    remaining = chi2.cdf(chi2.ppf(_KEPT, df), df + 2) / _KEPT  # mean of χ² / df below its quantile
    for _ in range(20):
        variance = np.where(trusted, between + factor * sampling, 1.0)
        weight = trusted / variance
        total = np.where(trusted.any(0), weight.sum(0), 1.0)
        square = np.square(differences - (weight * differences).sum(0) / total)
        mean = (weight * square).sum(0) / df
        kept = trusted & (mean <= np.quantile(mean[trusted.any(0)], _KEPT))
        # Correct for the fitted mean, and for keeping only the genes with small residuals.
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
