"""Prediction-powered inference of a mean: few samples measured, many predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._pseudobulk import SampleTest, t_test

#: Measured samples from which p-values hold: with fewer, small ones come up to 20 times as often as they should.
MIN_PVALUES = 8


@dataclass(frozen=True)
class PredictionPowered(SampleTest):
    """A :class:`SampleTest` and the weight ``(g,)`` that the predictions got, from 0."""

    weight: np.ndarray


def prediction_powered_mean(
    measured: np.ndarray, predicted: np.ndarray, predicted_only: np.ndarray, *, level: float = 0.95
) -> PredictionPowered:
    """Estimate the mean of a measurement Y ``(n, g)``, helped by predictions F ``(N, g)`` of samples not measured.

    θ = λ mean(F) + mean(Y - λ f), with predictions f of the measured samples (Angelopoulos et al., Science 2023). λ
    = cov(Y, f) / ((1 + n / N) var(f)), at least 0, minimises the variance (PPI++, Angelopoulos, Duchi and Zrnic
    2023, example 6.1). So a useless predictor is left out, a constant bias cancels, and shrunken predictions weigh
    above 1.

    Variance λ² var(F) / N + var(Y - λ f) / n, with n - 2 degrees of freedom of the second part (Welch and
    Satterthwaite). P-values are NaN below eight measured samples; intervals hold from three on. Valid if measured
    samples are drawn as the others are, and the predictor saw none of them in training.
    """
    y, f, more = (np.asarray(values, np.float64) for values in (measured, predicted, predicted_only))
    if y.shape != f.shape or y.shape[1:] != more.shape[1:]:
        raise ValueError(f"`measured` {y.shape}, `predicted` {f.shape}, `predicted_only` {more.shape} do not fit")
    n, n_more = len(y), len(more)
    if n < 3 or n_more < 2:
        raise ValueError(f"{n} measured and {n_more} predicted samples; at least 3 and 2 are needed")
    yc, fc, mc = y - y.mean(0), f - f.mean(0), more - more.mean(0)
    # Both sets are drawn alike, so the variance of the predictions is taken from all of them.
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
