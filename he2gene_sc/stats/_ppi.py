"""Prediction-powered inference of a mean from few measured and many predicted samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._pseudobulk import SampleTest, t_test

#: Fewest measured samples for p-values: with fewer, small p-values are up to 20 times too frequent.
MIN_PVALUES = 8


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
