"""Closed-form heads on frozen features: standardise, principal components, ridge, softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg


@dataclass(frozen=True)
class Heads:
    """What was fitted; the names are those of the model's tensors.

    Attributes
    ----------
    mean, scale
        Standardisation of the features, ``(f,)``.
    projection
        Features to embedding, ``(f, k)``.
    weight, bias
        Embedding to genes, ``(k, g)`` and ``(g,)``.
    """

    mean: np.ndarray
    scale: np.ndarray
    projection: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def embed(self, features: np.ndarray) -> np.ndarray:
        """Map features ``(n, f)`` to the embedding ``(n, k)``."""
        return (features - self.mean) / self.scale @ self.projection

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Map features ``(n, f)`` to expression ``(n, g)``, floored at 0 as the model does."""
        return np.maximum(self.embed(features) @ self.weight + self.bias, 0)


@dataclass(frozen=True)
class Basis:
    """Principal components of standardised features, and what ridge needs of them for any penalty.

    Attributes
    ----------
    variance
        Sum of squares along each component, ``(k,)``.
    cross
        Components times section-centred targets, ``(k, g)``.
    target_mean
        ``(g,)``.
    n
        Rows, the symmetries of a spot counted.
    """

    mean: np.ndarray
    scale: np.ndarray
    projection: np.ndarray
    variance: np.ndarray
    cross: np.ndarray
    target_mean: np.ndarray
    n: int

    def ridge(self, penalty: float) -> Heads:
        """Solve for one penalty, in units of the mean sum of squares of a spot's features."""
        weight = self.cross / (self.variance + penalty * self.projection.shape[0])[:, None]
        return Heads(self.mean, self.scale, self.projection, weight, self.target_mean)


def fit_basis(
    features: np.ndarray,
    targets: np.ndarray,
    sections: np.ndarray,
    *,
    n_latent: int,
    n_colour: int,
    colour_share: float,
) -> Basis:
    """Reduce the features and collect the statistics of the ridge.

    Targets are centred within their section: a section differs from the next by depth and handling in ways that its
    image does not show, and a slope fitted to that would be carried to new slides.

    Parameters
    ----------
    features
        ``(n, r, f)``: ``r`` symmetries of each spot, which count as samples of weight ``1 / r``.
    targets
        ``(n, g)``, log-normalised expression.
    sections
        ``(n,)`` codes.
    n_latent
        Components kept.
    n_colour
        Number of colour features, the last of the ``f``.
    colour_share
        Sum of squares of all colour features, as a share of that of all others.
    """
    n, r, f = features.shape
    flat = features.reshape(n * r, f).astype(np.float32)
    mean = flat.mean(0, dtype=np.float64)
    scale = flat.std(0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * (np.abs(mean) + 1), scale, 1.0)
    if 0 < n_colour < f:
        scale[f - n_colour :] /= np.sqrt(colour_share * (f - n_colour) / n_colour)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    flat = (flat - mean) / scale
    k = min(n_latent, f, n * r)
    variance, projection = scipy.linalg.eigh((flat.T @ flat).astype(np.float64) / r, subset_by_index=(f - k, f - 1))
    variance, projection = np.maximum(variance[::-1], 0), projection[:, ::-1]
    # Components have no sign of their own; the largest entry is made positive so that every run agrees.
    projection = projection * np.sign(projection[np.abs(projection).argmax(0), np.arange(k)])
    projection = np.ascontiguousarray(projection, np.float32)
    averaged = flat.reshape(n, r, f).mean(1) @ projection
    centred = targets - _section_means(targets, sections)
    return Basis(
        mean=mean,
        scale=scale,
        projection=projection,
        variance=variance.astype(np.float32),
        cross=averaged.T @ centred,
        target_mean=targets.mean(0, dtype=np.float64).astype(np.float32),
        n=n,
    )


def _section_means(targets: np.ndarray, sections: np.ndarray) -> np.ndarray:
    means = np.empty_like(targets)
    for section in np.unique(sections):
        rows = sections == section
        means[rows] = targets[rows].mean(0, dtype=np.float64)
    return means


def fit_softmax(
    embedding: np.ndarray, codes: np.ndarray, n_classes: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression on the embedding (scikit-learn, lbfgs).

    Parameters
    ----------
    embedding
        ``(n, k)``.
    codes
        ``(n,)`` class codes.
    n_classes
        Classes of the result; those that do not occur get a bias that no spot overcomes.
    strength
        Inverse of the L2 penalty, on the standardised embedding.

    Returns
    -------
    numpy.ndarray
        Weights ``(k, c)``.
    numpy.ndarray
        Biases ``(c,)``.
    """
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(np.mean(np.square(embedding, dtype=np.float64)))
    present = np.unique(codes)
    weight, bias = np.zeros((embedding.shape[1], n_classes)), np.full(n_classes, -30.0)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    fitted = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(embedding / scale, codes)
    if len(present) == 2:
        # scikit-learn keeps one column for two classes; half of it each way is the same softmax.
        coefficients = np.concatenate([-fitted.coef_, fitted.coef_]) / 2
        intercepts = np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2
    else:
        coefficients, intercepts = fitted.coef_, fitted.intercept_
    weight[:, present] = coefficients.T / scale
    bias[present] = intercepts
    return weight, bias


def temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """Temperature that makes held-out logits ``(n, c)`` most likely (Guo et al., ICML 2017), within 0.2 to 20."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(codes))

    def loss(log_t: float) -> float:
        return -log_softmax(logits / np.exp(log_t), axis=1)[rows, codes].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.2), np.log(20)), method="bounded").x))
