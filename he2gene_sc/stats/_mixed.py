"""Linear mixed model of sample × group means with a random intercept per sample."""

from __future__ import annotations

import warnings

import numpy as np
from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

from ._pseudobulk import SampleTest, t_test


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
