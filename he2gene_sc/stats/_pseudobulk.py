"""T tests of differences paired by sample, with plain or moderated variances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from patsy import build_design_matrices, dmatrix
from scipy import stats
from scipy.optimize import minimize
from scipy.special import betaln, digamma, polygamma

#: Fewest genes to fit a spline, and its number of terms (as in limma).
_MIN_SPLINE, _TERMS = 200, 4
#: Least mean square of an adjustment for depth, over the squared standard error, for which its share is estimated.
_MIN_ADJUSTMENT = 0.1
#: Fewest genes to fit two kinds, and fewest reliable genes to fit them without the others (or half of the genes).
_MIN_GENES, _MIN_RELIABLE = 20, 200
#: Twofold log likelihood ratio that two kinds must gain; below so many genes any gain, since a few hypervariable genes hardly gain more.
_GAIN, _MANY_GENES = 15.0, 1000
#: Bounds of the logarithm of d0, of the factor between both kinds, and of the logit of the share of the second.
_LOG_D0, _LOG_FACTOR, _LOGIT = (-1.0, 8.0), (1.0, 7.0), (-8.0, -0.5)


@dataclass(frozen=True)
class VariancePrior:
    """Prior of variances: ``scale`` F(df, ``d0``), and ``factor`` times as large for hypervariable genes.

    ``scale`` and ``outlier`` are ``(g,)``: the prior variance, and the probability that a gene is hypervariable, given its
    own variance. ``outlier`` is 0 if no gene is hypervariable.
    """

    scale: np.ndarray
    d0: float
    outlier: np.ndarray
    factor: float = 1.0


@dataclass(frozen=True)
class SampleTest:
    """Test of every gene with the sample as the statistical unit; all arrays are ``(g,)`` float64."""

    effect: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    scores: np.ndarray
    pvalues: np.ndarray
    df: np.ndarray


def t_test(effect: np.ndarray, error: np.ndarray, df: float | np.ndarray, level: float = 0.95) -> SampleTest:
    """Two-sided t test of ``effect / error`` with its interval; NaN if the error is 0 or NaN."""
    effect, error = np.asarray(effect, np.float64), np.asarray(error, np.float64)
    df = np.broadcast_to(np.asarray(df, np.float64), effect.shape)
    known = np.isfinite(error) & (error > 0)
    error = np.where(known, error, np.nan)
    scores = effect / error
    # scipy's t takes an infinite df as the normal distribution.
    pvalues = 2 * stats.t.sf(np.abs(scores), df)
    half = stats.t.ppf(0.5 + level / 2, df) * error
    return SampleTest(effect, effect - half, effect + half, scores, pvalues, df.copy())


def squeeze_variance(
    variances: np.ndarray,
    df: float | np.ndarray,
    alike: np.ndarray | None = None,
    reliable: np.ndarray | None = None,
) -> tuple[np.ndarray, float | np.ndarray, float]:
    """Shrink variances ``(g,)`` to those of similar genes by empirical Bayes: posterior, prior variance s0² and its df d0.

    Variances follow s0² F(df, d0), fitted to the mean and variance of their logarithms (Smyth, Stat Appl Genet Mol
    Biol 2004, section 6.2; limma's ``fitFDist``). With ``alike``, the expected variance of each gene, log s0² is a natural
    cubic spline of its logarithm, like limma's ``trend`` (Law et al., Genome Biol 2014). With fewer than 200 genes, where a
    spline would inflate the error rate, s0² is a multiple of ``alike`` or a constant, whichever fits better. d0 is infinite if
    variances differ only by chance, 0 for a single gene. The fit uses ``reliable`` genes (a mask); outside their range, s0² is
    proportional to ``alike``.
    """
    _check_alike(alike, len(variances))
    variances = np.asarray(variances, np.float64)
    if len(variances) < 2:
        return variances.copy(), float(variances.mean()) if len(variances) else 0.0, 0.0
    # As in limma, since zeros would have infinite logarithms.
    middle = np.median(variances)
    logs = np.log(np.maximum(variances, 1e-5 * (middle if middle > 0 else 1.0)))
    df = np.broadcast_to(np.asarray(df, np.float64), variances.shape)
    shifted = logs - digamma(df / 2) + np.log(df / 2)
    used = np.ones(len(logs), bool) if reliable is None or reliable.sum() < 2 else reliable
    expected, n_free = _expected_logs(shifted, alike, used)
    spread = np.square(shifted - expected)[used].sum() / n_free - np.mean(polygamma(1, df[used] / 2))
    if spread <= 0:
        prior = np.exp(expected)
        return np.broadcast_to(prior, variances.shape).copy(), prior, np.inf
    d0 = 2 * trigamma_inverse(spread)
    prior = np.exp(expected + digamma(d0 / 2) - np.log(d0 / 2))
    return (d0 * prior + df * variances) / (d0 + df), prior, d0


def _check_alike(alike: np.ndarray | None, n: int) -> None:
    if alike is not None and not (
        np.shape(alike) == (n,) and np.isfinite(alike).all() and np.all(np.greater(alike, 0))
    ):
        raise ValueError(f"`alike` must be {n} positive numbers, one per gene, found shape {np.shape(alike)}")


def _expected_logs(logs: np.ndarray, alike: np.ndarray | None, used: np.ndarray) -> tuple[float | np.ndarray, int]:
    """Return the expected logarithms of variances, and the residual degrees of freedom of the genes in the fit."""
    n = int(used.sum())
    if alike is None:
        return float(logs[used].mean()), n - 1
    line = np.log(alike)
    if n < _MIN_SPLINE or len(np.unique(line[used])) < _TERMS:
        flat, multiple = np.full(len(logs), logs[used].mean()), line + (logs - line)[used].mean()
        return min(flat, multiple, key=lambda fit: np.square(logs - fit)[used].sum()), n - 1
    design = dmatrix("cr(line, df=terms) - 1", {"line": line[used], "terms": _TERMS})
    terms = np.linalg.lstsq(np.asarray(design), logs[used])[0]
    inside = np.clip(line, line[used].min(), line[used].max())
    (every,) = build_design_matrices([design.design_info], {"line": inside, "terms": _TERMS})
    return np.asarray(every) @ terms + line - inside, n - _TERMS


def trigamma_inverse(x: float) -> float:
    """Solve trigamma(y) = x for y > 0 by Newton's method on 1 / trigamma, which is convex (Smyth 2004, appendix)."""
    if x > 1e7:
        return float(1 / np.sqrt(x))
    if x < 1e-6:
        return float(1 / x)
    y = 0.5 + 1 / x
    for _ in range(50):
        trigamma = polygamma(1, y)
        step = trigamma * (1 - trigamma / x) / polygamma(2, y)
        y += step
        if -step / y < 1e-8:
            break
    return float(y)


def hypervariable_prior(
    variances: np.ndarray, df: np.ndarray, scale: np.ndarray, d0: float, reliable: np.ndarray | None = None
) -> VariancePrior:
    """Fit a prior for two kinds of genes by maximum likelihood, starting from a common prior (:func:`squeeze_variance`).

    A common prior shrinks the variance of a hypervariable gene too much, so chance appears as an effect (Phipson et al., Ann
    Appl Stat 2016). Phipson et al. correct genes with a large observed variance. With three patients, a hypervariable
    gene often has a small observed variance by chance. Here, every gene has a probability of being hypervariable, and its
    p-value is the weighted mean over both kinds. With 1,000 genes or more, two kinds must fit much better than one.
    """
    known = (df > 0) & np.isfinite(variances)
    common = VariancePrior(scale, d0, np.zeros(len(variances)))
    if known.sum() < _MIN_GENES:
        return common
    middle = np.median(variances[known])
    ratio = np.log(np.maximum(variances, 1e-5 * middle if middle > 0 else 1e-300)) - np.log(scale)
    fitted = known if reliable is None else known & reliable
    if fitted.sum() < min(_MIN_RELIABLE, known.sum() / 2):
        fitted = known
    few = known.sum() < _MANY_GENES
    x, n = ratio[fitted], df[fitted]

    def one_kind(theta: np.ndarray) -> float:
        return -_log_f(x - theta[0], n, np.exp(theta[1])).sum()

    def two_kinds(theta: np.ndarray) -> float:
        return -np.logaddexp(*_kinds(x, n, *theta)).sum()

    bounds = [(-3.0, 3.0), _LOG_D0]
    start = np.clip(np.log(min(d0, 1e4)) if d0 > 0 else 0.0, *_LOG_D0)
    if few:
        # The optimum of few genes is flat: it must not depend on rounding errors or the order of the genes.
        x, start = np.round(x, 8), np.round(start, 6)
        order = np.lexsort((n, x))
        x, n = x[order], n[order]
    single = minimize(one_kind, [0.0, start], bounds=bounds, method="L-BFGS-B")
    starts = ([-0.3, level, np.log(8.0), -3.0] for level in (min(start + 1, _LOG_D0[1]), _LOG_D0[1]))
    fits = [minimize(two_kinds, at, bounds=[*bounds, _LOG_FACTOR, _LOGIT], method="L-BFGS-B") for at in starts]
    best = min(fits, key=lambda fit: fit.fun)
    if 2 * (single.fun - best.fun) < (0 if few else _GAIN):
        return common
    shift, log_d0, log_factor, _ = best.x
    first, second = _kinds(ratio[known], df[known], *best.x)
    outlier = np.full(len(variances), 1 / (1 + np.exp(-best.x[3])))
    outlier[known] = np.exp(second - np.logaddexp(first, second))
    # At the upper bound, variances of one kind differ only by chance.
    d0 = np.inf if log_d0 > _LOG_D0[1] - 0.01 else float(np.exp(log_d0))
    return VariancePrior(scale * np.exp(shift), d0, outlier, float(np.exp(log_factor)))


def _kinds(
    ratio: np.ndarray, df: np.ndarray, shift: float, log_d0: float, log_factor: float, logit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log densities of a log variance ratio under both kinds of genes, weighted by their shares."""
    d0 = np.exp(log_d0)
    first = _log_f(ratio - shift, df, d0) - np.logaddexp(0, logit)
    return first, _log_f(ratio - shift - log_factor, df, d0) - np.logaddexp(0, -logit)


def _log_f(x: np.ndarray, df: np.ndarray, d0: float) -> np.ndarray:
    """Log density of the logarithm of F(df, d0)."""
    half = df / 2
    return half * (x + np.log(df / d0)) - betaln(half, d0 / 2) - (half + d0 / 2) * np.log1p(df / d0 * np.exp(x))


def paired_moderated_t(
    differences: np.ndarray,
    *,
    moderate: bool = True,
    alike: np.ndarray | None = None,
    level: float = 0.95,
    design: np.ndarray | None = None,
    column: int = 0,
    weights: np.ndarray | None = None,
    robust: bool = False,
    minimum: float = 0.0,
    reliable: np.ndarray | None = None,
    least: np.ndarray | None = None,
) -> SampleTest:
    """Moderated t test of differences ``(n, g)`` between two groups, paired by sample.

    The effect is the coefficient of ``column`` of ``design`` ``(n, p)``, by default the (weighted) mean. Degrees of
    freedom are d0 plus those of the residuals, at most those of all genes together (limma's ``eBayes``). ``moderate=False``
    is the plain paired t test; ``alike`` is as in :func:`squeeze_variance`; ``weights`` are inverse variances;
    ``robust`` uses :func:`hypervariable_prior`; effects up to ``minimum`` belong to the
    null (McCarthy and Smyth, Bioinformatics 2009). Priors are fitted to ``reliable`` genes. ``least`` ``(n, g)`` are lower bounds
    of the variances of the differences, such as those of counting.
    """
    differences = np.asarray(differences, np.float64)
    n = len(differences)
    if n < 2:
        raise ValueError(f"`differences` holds {n} samples; at least 2 are needed")
    effect, unscaled, variances, df = weighted_fit(differences, design, column, weights)
    g, tested = len(effect), df > 0
    _check_alike(alike, g)
    prior = VariancePrior(variances, 0.0, np.zeros(g))
    if moderate and tested.any():
        scale = np.full(g, np.nan)
        own = (None if a is None else np.asarray(a)[tested] for a in (alike, reliable))
        _, scale[tested], d0 = squeeze_variance(variances[tested], df[tested], *own)
        prior = VariancePrior(scale, d0, np.zeros(g))
        if robust and d0 > 0:
            prior = hypervariable_prior(variances, df, scale, d0, reliable)
    floor = np.zeros(g)
    if least is not None:
        shares = np.ones((n, 1)) if weights is None else weights / np.maximum(weights.max(0), 1e-300)
        floor = (shares * np.where(shares > 0, least, 0)).sum(0) / np.maximum((shares > 0).sum(0), 1)
    # As in limma: at most the degrees of freedom of all genes together.
    total = np.minimum(prior.d0 + df, df.sum())
    two_kinds = prior.outlier.any()
    shares = np.stack([1 - prior.outlier, prior.outlier] if two_kinds else [1 - prior.outlier])  # (kinds, g)
    scales = np.stack([prior.scale, prior.factor * prior.scale] if two_kinds else [prior.scale])
    if prior.d0 == 0:
        squeezed = variances[None]
    else:
        squeezed = scales if np.isinf(prior.d0) else (prior.d0 * scales + df * variances) / (prior.d0 + df)
    squeezed = np.maximum(squeezed, floor)
    errors = np.where(squeezed > 0, unscaled * np.sqrt(np.maximum(squeezed, 0)), np.nan)
    error = np.sqrt((shares * np.square(errors)).sum(0))
    size = np.abs(effect)

    def tail(distance: np.ndarray) -> np.ndarray:
        return (shares * stats.t.sf(distance / errors, total)).sum(0)

    pvalues = np.minimum(tail(size - minimum) + tail(size + minimum), 1.0)
    low, high = np.zeros(g), stats.t.ppf(0.5 + level / 2, total) * np.fmax.reduce(errors)
    for _ in range(60 if two_kinds else 0):
        middle = (low + high) / 2
        inside = tail(middle) > 0.5 - level / 2
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    scores = np.sign(effect) * np.maximum(size - minimum, 0) / error
    return SampleTest(effect, effect - high, effect + high, scores, pvalues, np.asarray(total, np.float64))


def weighted_fit(
    values: np.ndarray, design: np.ndarray | None = None, column: int = 0, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weighted least squares for every gene: coefficient of the column, its error at unit variance, residual variance and its df.

    NaN, and df 0, if too few samples have a weight.
    """
    n, g = values.shape
    columns = np.ones((n, 1)) if design is None else np.asarray(design, np.float64)
    p = columns.shape[1]
    # Scale the columns, so that their units do not affect the rank.
    scale = np.abs(columns).max(0, initial=0)
    scale[scale == 0] = 1
    columns = columns / scale
    if n <= p or np.linalg.matrix_rank(columns) < p:
        raise ValueError(
            f"`design`: {p} coefficients cannot be estimated from {n} samples; at least {p + 1} different samples are needed"
        )
    weights = np.ones((n, 1)) if weights is None else np.asarray(weights, np.float64).reshape(n, -1)
    weights = np.broadcast_to(weights / np.maximum(weights.max(0), 1e-300), (n, g))
    df = np.maximum((weights > 0).sum(0) - p, 0).astype(np.float64)
    information = np.einsum("ni,ng,nj->gij", columns, weights, columns, optimize=True)
    # Without the samples of weight 0, columns can become linearly dependent.
    df[np.linalg.cond(information) > 1e12] = 0
    information[df == 0] = np.eye(p)
    inverse = np.linalg.inv(information)
    fit = np.einsum("gij,nj,ng->gi", inverse, columns, weights * values, optimize=True)
    rest = values - columns @ fit.T
    known = df > 0
    variances = np.where(known, (weights * np.square(rest)).sum(0) / np.maximum(df, 1), np.nan)
    unscaled = np.where(known, np.sqrt(inverse[:, column, column]), np.nan) / scale[column]
    return np.where(known, fit[:, column], np.nan) / scale[column], unscaled, variances, df


def depth_followed(
    raw: np.ndarray, adjustment: np.ndarray, spot_variance: np.ndarray, error: np.ndarray | None = None
) -> tuple[float, float]:
    """Share of an adjustment for depth that the differences of samples confirm, and the size of the wrong part of the adjustment.

    ``raw`` and ``adjustment`` are ``(n, g)``: differences of means, and their part that the slopes within groups predict from depth.
    The share is the least-squares factor over all genes. The difference of a sample is only multiplied by adjustments of other
    samples, so errors of slopes do not lower the share. The size is the mean square of the wrong part of the adjustment, divided
    by the squared standard error: that of the mean over samples, or ``error`` ``(g,)``. NaN with fewer than three samples, or if the
    adjustment is small relative to the standard error: a share of almost nothing is noise.
    """
    n = len(raw)
    if n < 3:
        return np.nan, np.nan
    varies = spot_variance > 1e-5 * np.median(spot_variance) if spot_variance.size else np.zeros(0, bool)
    unit = np.sqrt(spot_variance[varies])
    raw, adjustment = raw[:, varies] / unit, adjustment[:, varies] / unit
    others = ~np.eye(n, dtype=bool)
    size = float((adjustment @ adjustment.T)[others].mean()) / max(len(unit), 1)
    shown = float((raw @ adjustment.T)[others].mean()) / max(len(unit), 1)
    squared = (raw - adjustment).var(0, ddof=1) / n if error is None else np.square(error[varies] / unit)
    mean_square = float(squared.mean()) if len(squared) else 0.0
    if mean_square <= 0 or size < _MIN_ADJUSTMENT * mean_square:
        return np.nan, np.nan
    return shown / size, size * (1 - shown / size) ** 2 / mean_square
