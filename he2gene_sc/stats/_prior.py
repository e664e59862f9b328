"""Prior of variances with a second kind of genes, the hypervariable genes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Fewest genes to fit two kinds, and the twofold log likelihood ratio that two kinds must gain.
_MIN_GENES, _GAIN = 200, 15.0
#: Bounds of the logarithm of d0, of the factor between both kinds, and of the logit of the share of the second.
_LOG_D0, _LOG_FACTOR, _LOGIT = (-1.0, 8.0), (1.0, 7.0), (-8.0, -0.5)


@dataclass(frozen=True)
class VariancePrior:
    """Prior of variances: ``scale`` F(df, ``d0``), and ``factor`` times as large for hypervariable genes.

    ``scale`` and ``outlier`` are ``(g,)``: the prior variance, and the probability that a gene is hypervariable, given its
    own variance. ``outlier`` is 0 if there are no such genes.
    """

    scale: np.ndarray
    d0: float
    outlier: np.ndarray
    factor: float = 1.0


def hypervariable_prior(
    variances: np.ndarray, df: np.ndarray, scale: np.ndarray, d0: float, reliable: np.ndarray | None = None
) -> VariancePrior:
    """Fit a prior for two kinds of genes by maximum likelihood, starting from a common prior (:func:`squeeze_variance`).

    A common prior shrinks the variance of a hypervariable gene too much, so chance appears as an effect (Phipson et al., Ann
    Appl Stat 2016). Phipson et al. correct genes with a large observed variance. With three patients, a hypervariable
    gene often has a small observed variance by chance. Here, every gene has a probability of being hypervariable, and its
    p-value is the weighted mean over both kinds.
    """
    from scipy.optimize import minimize

    known = (df > 0) & np.isfinite(variances)
    common = VariancePrior(scale, d0, np.zeros(len(variances)))
    if known.sum() < _MIN_GENES:
        return common
    middle = np.median(variances[known])
    ratio = np.log(np.maximum(variances, 1e-5 * middle if middle > 0 else 1e-300)) - np.log(scale)
    fitted = known if reliable is None or (known & reliable).sum() < _MIN_GENES else known & reliable
    x, n = ratio[fitted], df[fitted]

    def one_kind(theta: np.ndarray) -> float:
        return -_log_f(x - theta[0], n, np.exp(theta[1])).sum()

    def two_kinds(theta: np.ndarray) -> float:
        return -np.logaddexp(*_kinds(x, n, *theta)).sum()

    bounds = [(-3.0, 3.0), _LOG_D0]
    start = np.clip(np.log(min(d0, 1e4)) if d0 > 0 else 0.0, *_LOG_D0)
    single = minimize(one_kind, [0.0, start], bounds=bounds, method="L-BFGS-B")
    starts = ([-0.3, level, np.log(8.0), -3.0] for level in (min(start + 1, _LOG_D0[1]), _LOG_D0[1]))
    fits = [minimize(two_kinds, at, bounds=[*bounds, _LOG_FACTOR, _LOGIT], method="L-BFGS-B") for at in starts]
    best = min(fits, key=lambda fit: fit.fun)
    if 2 * (single.fun - best.fun) < _GAIN:
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
    from scipy.special import betaln

    half = df / 2
    return half * (x + np.log(df / d0)) - betaln(half, d0 / 2) - (half + d0 / 2) * np.log1p(df / d0 * np.exp(x))
