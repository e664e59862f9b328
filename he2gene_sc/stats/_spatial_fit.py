"""Variance of a difference of means under a grid of spatial covariances, weighted by likelihood."""

from __future__ import annotations

import numpy as np

from ._covariance import ODDS, Blocks, correlations
from ._spatial_moments import CHUNK, Moments

#: White noise that the fit adds to every gene, as a share of its variance; it is subtracted from the result.
JITTER = 0.03
#: Candidate log ratios of the SD in the group to the SD outside: from 1 : 5.8 to 5.8 : 1, and beyond the gene's observed ratio,
#: which is limited to 400 : 1.
RATIOS = np.arange(-7, 8) / 4
_MAX_RATIO = 6.0
#: Prior weight of a ratio: (1 + (ratio / scale)²)^-tail, a peak at equal SDs with long tails.
_SCALE, _TAIL = 0.25, 2.0


def covariance_of(
    moments: Moments, blocks: Blocks, samples: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average over the grid of covariances and of ratios of the groups' SDs, weighted by restricted likelihood.

    Returns ``(g,)``: variance of the effect, its squared coefficient of variation, and the expected sum of squares
    about the section means (trace of the centred covariance). ``samples`` ``(s,)`` are the samples of the sections.
    """
    n, m = len(blocks.of_spot), len(blocks.size)
    n_inside = n - m
    # Limit the weight of the variation within blocks: with thousands of spots it would dominate, but shows short ranges only.
    weight = min(n_inside, m)
    share = weight / n_inside if n_inside else 0.0
    n_terms = moments.contrasts.shape[0] + weight
    counts = moments.n_contrasts + share * moments.n_inside
    coefficient = moments.label / moments.size * moments.sides
    unseen = moments.unseen / moments.size**2
    means = np.stack([moments.sections.T * side for side in moments.sides])  # (2, s, m)
    side_sizes = np.array([blocks.size[side].sum() for side in moments.sides])
    noise = 1 / (1 + ODDS)
    inside = share * moments.inside
    n_first = moments.n_contrasts[0]
    g = len(moments.effect)

    section = np.abs(moments.sections).argmax(1)
    together = section[:, None] == section
    shared = np.sqrt(np.outer(blocks.size, blocks.size))

    white = np.square(coefficient).sum(1) + unseen
    white_trace = side_sizes - np.square(means).sum((1, 2))
    ratios = _ratios(moments)  # (k, g) logarithms
    shrink: np.ndarray = np.stack([np.exp(-ratios), np.exp(ratios)])  # 1 / s², with s_a s_b = 1
    # A constant side gets white noise with the least variance that the ratios allow. Otherwise the variance of the other side
    # would be divided by the spots of both.
    side_variances = _variances(moments)
    least = np.exp(-2 * _MAX_RATIO) * side_variances[::-1]
    lacking = np.where(side_variances < least, least, 0).astype(np.float32)
    plain = ((moments.energy + inside + counts[:, None] * lacking)[:, None] * shrink).sum(0) / n_terms
    plain = np.where(plain > 0, plain, 1)  # a constant gene has no scale
    jitter = (JITTER * plain).astype(np.float32)
    penalty: np.ndarray = _TAIL * np.log1p(np.square(ratios / _SCALE)) + 0.5 * (counts[0] - counts[1]) * ratios
    white_own = white[0] * shrink[1] + white[1] * shrink[0]
    white_total = white_trace[0] * shrink[1] + white_trace[1] * shrink[0]

    best = np.full(g, -np.inf, np.float32)
    sums = np.zeros((4, g))  # weights, variances, squared variances, traces

    def add(likelihood: np.ndarray, variance: np.ndarray, trace: np.ndarray, part: slice) -> None:
        top = np.maximum(best[part], likelihood.max(0))
        sums[:, part] *= np.exp(best[part] - top)
        best[part] = top
        weights = np.exp(likelihood - top)
        sums[0, part] += weights.sum(0)
        sums[3, part] += (weights * trace).sum(0)
        weights *= variance
        sums[1, part] += weights.sum(0)
        weights *= variance
        sums[2, part] += weights.sum(0)

    level = -0.5 * n_terms * np.log(plain * (1 + JITTER)) - penalty
    add(level, plain * white_own, plain * white_total, slice(0, g))
    in_blocks: np.ndarray = inside + share * moments.n_inside[:, None] * lacking
    shrink, penalty, in_blocks, white_own, white_total = (
        array.astype(np.float32) for array in (shrink, penalty, in_blocks, white_own, white_total)
    )
    for correlation in correlations(blocks):
        eigenvalues, vectors = np.linalg.eigh(moments.complement.T @ correlation @ moments.complement)
        spectrum = np.outer(1 - noise, np.maximum(eigenvalues, 0)) + noise[:, None]
        rest = max(n - np.trace(correlation), 0) / n_inside if n_inside else 1.0
        spectrum_inside = ((1 - noise) * rest + noise)[:, None]
        log_det = 0.5 * (np.log(spectrum).sum(1, keepdims=True) + weight * np.log(spectrum_inside))
        # The correlation of the farthest spots is a common level of the section; it cannot be estimated and cancels.
        floor = (correlation[together] / shared[together]).min()
        local = correlation - floor * np.where(together, shared, 0)
        own = coefficient @ local @ coefficient.T
        if samples is not None:
            # Sections of a sample, such as serial ones, may have the same field. Their true correlation is unknown: take 1.
            label = coefficient.sum(0)
            roots = np.sqrt(np.maximum(np.bincount(section, label * (local @ label), len(samples)), 0))
            own *= np.square(np.bincount(samples, roots)).sum() / max(np.square(roots).sum(), 1e-300)
        own += np.diag(unseen * rest)
        # each spot has variance 1; subtract the part of the section means
        trace = np.diag(side_sizes) * (1 - floor) - np.einsum("asi,ij,bsj->ab", means, local, means, optimize=True)
        # quadratic forms in the two SDs: inside, outside, and between the groups
        own = np.outer(1 - noise, [own[0, 0], own[1, 1], 2 * own[0, 1]]) + np.outer(noise, [*white, 0])
        trace = np.outer(1 - noise, [trace[0, 0], trace[1, 1], 2 * trace[0, 1]]) + np.outer(noise, [*white_trace, 0])
        inverse, vectors, log_det, own, trace, inverse_inside = (
            array.astype(np.float32) for array in (1 / spectrum, vectors.T, log_det, own, trace, 1 / spectrum_inside)
        )
        # share of each component of the spectrum in either group
        shares = [np.square(part).sum(1, keepdims=True) for part in (vectors[:, :n_first], vectors[:, n_first:])]
        equal = own.sum(1, keepdims=True)
        in_all = inverse.sum(1, keepdims=True) + np.float32(weight) * inverse_inside
        for start in range(0, g, CHUNK):
            part = slice(start, start + CHUNK)
            a = vectors[:, :n_first] @ moments.contrasts[:n_first, part]
            b = vectors[:, n_first:] @ moments.contrasts[n_first:, part]
            both = inverse @ (a * b) * np.float32(2)
            a = inverse @ (np.square(a) + shares[0] * lacking[0, part]) + inverse_inside * in_blocks[0, part]
            b = inverse @ (np.square(b) + shares[1] * lacking[1, part]) + inverse_inside * in_blocks[1, part]
            for k in range(len(ratios)):
                up, down = shrink[1][k, part], shrink[0][k, part]
                sigma2 = (a * down + b * up + both + in_all * jitter[k, part]) / np.float32(n_terms)
                likelihood = np.log(sigma2) * np.float32(-0.5 * n_terms) - (log_det + penalty[k, part])
                lost = jitter[k, part] * white_own[k, part]
                # At least the value with equal SDs: in smooth fields, the sums of the two groups would nearly cancel.
                form = np.maximum(own[:, :1] * up + own[:, 1:2] * down + own[:, 2:], equal)
                variance = sigma2 * form - lost
                variance = np.maximum(variance, np.float32(1e-9) * white_own[k, part])
                total = sigma2 * (trace[:, :1] * up + trace[:, 1:2] * down + trace[:, 2:])
                add(likelihood, variance, total - jitter[k, part] * white_total[k, part], part)
    weights, variance, square, total = sums
    variance, square, total = variance / weights, square / weights, total / weights
    spread = np.maximum(square / variance**2 - 1, 0) + 2 / moments.n_free
    return variance * moments.scale, spread, total * moments.scale


def _ratios(moments: Moments) -> np.ndarray:
    """Log ratios of the groups' SDs ``(k, g)``: the grid, stretched so that it contains the observed ratio of the gene."""
    variances = _variances(moments)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.nan_to_num(0.5 * np.log(variances[0] / variances[1]), posinf=_MAX_RATIO, neginf=-_MAX_RATIO)
    own = np.clip(own, -_MAX_RATIO, _MAX_RATIO)
    low, high = RATIOS[0] + np.minimum(own, 0), RATIOS[-1] + np.maximum(own, 0)
    step = (high - low) / (len(RATIOS) - 1)
    grid = low + step * np.arange(len(RATIOS))[:, None]
    # shift the grid by less than half a step
    offset = own - low
    return grid + offset - step * np.round(offset / step)


def _variances(moments: Moments) -> np.ndarray:
    """Residual variances of both sides ``(2, g)``; NaN if a side has no more spots than sections."""
    counts = moments.n_contrasts + moments.n_inside
    return (moments.energy + moments.inside) / np.where(counts > 0, counts, np.nan)[:, None]
