"""Tests of samples by a linear mixed model, and by prediction-powered inference."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

from ._pseudobulk import SampleTest, t_test

#: Fewest measured samples for p-values of predictions: with fewer, small p-values are up to 20 times too frequent.
MIN_PVALUES = 8


def mixed_model(
    values: np.ndarray,
    group: np.ndarray,
    sample: np.ndarray,
    covariates: np.ndarray | None = None,
    *,
    level: float = 0.95,
) -> SampleTest:
    """Fit statsmodels' ``MixedLM`` by REML to the means ``(m, g)`` of two groups in each sample, for every gene.

    y = b0 + b1 group + b2 covariates + u(sample) + e. The test is of b1, with the standard error of generalised
    least squares and ``m - samples - 1 - c`` degrees of freedom, since a normal test rejects too often with few
    samples. Without covariates and with both groups in all samples it equals the paired t test, unless samples differ
    less than by chance.
    """
    values, group = np.asarray(values, np.float64), np.asarray(group, bool)
    codes = np.unique(sample, return_inverse=True)[1]
    more = np.empty((len(group), 0)) if covariates is None else np.asarray(covariates, np.float64)
    more = (more - more.mean(0)) / np.where(more.std(0) > 0, more.std(0), 1)
    design = np.column_stack([np.ones(len(group)), group, more])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("`covariates`: one is constant or a combination of the others and the group; leave it out")
    df = len(group) - (codes.max() + 1) - 1 - more.shape[1]
    if df < 1:
        raise ValueError(
            f"`covariates`: {len(group)} means of {codes.max() + 1} samples leave {df} degrees of freedom for the group; leave "
            "covariates out, or pass more samples"
        )
    fits = np.array([_fit(column, design, codes, group) for column in values.T]).reshape(-1, 2)
    return t_test(fits[:, 0], fits[:, 1], df, level)


def _fit(y: np.ndarray, design: np.ndarray, codes: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Effect of the group and its standard error by generalised least squares; both are 0 for a constant gene.

    The error from the Hessian of statsmodels is NaN or wrong by a factor of two if samples hardly vary in an unbalanced design.
    """
    scale = y.std()
    if not scale > 1e-12 * max(np.abs(y).max(), 1e-300):
        return 0.0, 0.0
    y = (y - y.mean()) / scale
    model = MixedLM(y, design, groups=codes)
    rest = y - design @ np.linalg.lstsq(design, y)[0]
    start = MixedLMParams.from_components(
        fe_params=np.zeros(design.shape[1]), cov_re=np.array([[_ratio(rest, codes, group)]])
    )
    with warnings.catch_warnings(action="ignore"):
        # statsmodels warns of a variance of 0 between samples, but it is a valid estimate.
        try:
            fit = model.fit(reml=True, method="lbfgs", start_params=start)
        except np.linalg.LinAlgError:
            # If samples do not differ, lbfgs diverges; Powell's method does not use the gradient.
            fit = model.fit(reml=True, method="powell")
    indicators = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    covariance = np.eye(len(y)) + fit.cov_re[0, 0] / fit.scale * indicators @ indicators.T
    error = np.sqrt(fit.scale * np.linalg.inv(design.T @ np.linalg.solve(covariance, design))[1, 1])
    return float(fit.fe_params[1] * scale), float(error * scale)


def _ratio(y: np.ndarray, codes: np.ndarray, group: np.ndarray) -> float:
    """Ratio of the variance between samples to that within, by moments; start value of the fit."""
    pairs = np.full((codes.max() + 1, 2), np.nan)
    pairs[codes, group.astype(int)] = y
    pairs = pairs[np.isfinite(pairs).all(1)]
    if len(pairs) < 2:
        return 1.0
    within = np.var(pairs[:, 1] - pairs[:, 0], ddof=1) / 2
    between = np.var(pairs.mean(1), ddof=1) - within / 2
    return float(np.clip(between / within, 0.1, 1e4)) if within > 0 else 1.0


@dataclass(frozen=True)
class PredictionPowered(SampleTest):
    """A :class:`SampleTest` with the weight ``(g,)`` of the predictions, at least 0."""

    weight: np.ndarray


def prediction_powered_mean(
    measured: np.ndarray, predicted: np.ndarray, predicted_only: np.ndarray, *, level: float = 0.95
) -> PredictionPowered:
    """Estimate the mean of a measurement Y ``(n, g)`` with the help of predictions F ``(N, g)`` of other samples.

    θ = λ mean(F) + mean(Y - λ f), with predictions f of the measured samples (Angelopoulos et al., Science 2023). λ
    = cov(Y, f) / ((1 + n / N) var(f)), at least 0, minimises the variance (PPI++, Angelopoulos, Duchi and Zrnic
    2023, example 6.1). A useless predictor gets weight 0, a constant bias cancels, and shrunken predictions get a weight
    above 1.

    The variance is λ² var(F) / N + var(Y - λ f) / n, with n - 2 degrees of freedom of the second part (Welch and
    Satterthwaite). P-values are NaN with fewer than eight measured samples; intervals are valid from three samples on. The
    test assumes that measured samples are drawn like the others and were not in the training data of the predictor.
    """
    y, f, more = (np.asarray(values, np.float64) for values in (measured, predicted, predicted_only))
    if y.shape != f.shape or y.shape[1:] != more.shape[1:]:
        raise ValueError(
            f"`measured` {y.shape}, `predicted` {f.shape} and `predicted_only` {more.shape} have different shapes; (n, g), (n, g) and "
            "(N, g) are needed"
        )
    n, n_more = len(y), len(more)
    if n < 3 or n_more < 2:
        raise ValueError(f"`measured`: {n} measured and {n_more} predicted samples; at least 3 and 2 are needed")
    yc, fc, mc = y - y.mean(0), f - f.mean(0), more - more.mean(0)
    # Both sets are from one population, so the variance of the predictions is estimated from all samples.
    variance = ((fc**2).sum(0) + (mc**2).sum(0)) / (n + n_more - 2)
    covariance = (yc * fc).sum(0) / (n - 1)
    varies = variance > 1e-24
    weight = np.divide(covariance, (1 + n / n_more) * variance, out=np.zeros(len(variance)), where=varies)
    weight = np.maximum(weight, 0)
    rest = ((yc - weight * fc) ** 2).sum(0) / (n - 2) / n
    far = weight**2 * variance / n_more
    total = rest + far
    df = np.divide(
        total**2, rest**2 / (n - 2) + far**2 / (n + n_more - 2), out=np.full(len(total), n - 2.0), where=total > 0
    )
    effect = weight * more.mean(0) + (y - weight * f).mean(0)
    test = t_test(effect, np.sqrt(total), df, level)
    if n < MIN_PVALUES:
        test = replace(test, pvalues=np.full(len(effect), np.nan))
    return PredictionPowered(**test.__dict__, weight=weight)
