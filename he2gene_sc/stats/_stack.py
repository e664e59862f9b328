"""Convex weights of several predictions for many genes, with shrinkage to common weights."""

from __future__ import annotations

import numpy as np

#: Candidate weights of the mean over genes, in spots, for the weights of one gene; infinity: all genes have the same weights.
_PRIORS = (30.0, 150.0, np.inf)
#: Number of parts of the spots to test weights.
_PARTS = 5
#: With fewer spots than this, a gain must exceed this share of the squared error: smaller gains were often chance.
_SMALL_N, _MIN_GAIN = 30, 0.1


def simplex_weights(moments: np.ndarray, n_steps: int = 80) -> np.ndarray:
    """Non-negative weights ``(…, c)`` with sum 1 and least squared error, by accelerated projected gradient (FISTA).

    ``moments`` ``(…, c, c)`` are mean products of the errors of ``c`` predictions.
    """
    c = moments.shape[-1]
    size = np.trace(moments, axis1=-2, axis2=-1)[..., None, None]
    scaled = moments / np.where(size > 0, size, 1)
    w = np.full(moments.shape[:-1], 1 / c)
    ahead, momentum = w, 1.0
    for _ in range(n_steps):
        new = _to_simplex(ahead - (scaled @ ahead[..., None])[..., 0])
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - w)
        w, momentum = new, following
    return w


def _to_simplex(v: np.ndarray) -> np.ndarray:
    """Project to the nearest non-negative vector with sum 1 (Duchi et al., ICML 2008)."""
    u = -np.sort(-v, axis=-1)
    excess = np.cumsum(u, axis=-1) - 1
    rank = np.arange(1, v.shape[-1] + 1)
    last = (u * rank > excess).sum(-1, keepdims=True)
    return np.maximum(v - np.take_along_axis(excess, last - 1, -1) / last, 0)


def stack(errors: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weigh predictions by held-out errors ``(c, m, g)``: weights ``(g, c)`` and errors of the combination ``(m, g)``.

    Weights of a gene depend on its errors and on a prior: the mean over genes, scaled by the error of the first prediction. The
    weight of the prior is chosen by cross-validation. The gain over the first prediction is shrunk by ``1 - (c - 3) / t²``,
    at least 0 (James-Stein).
    """
    c, m, g = errors.shape
    scale = np.square(errors[0]).mean(0)
    scale = np.where(scale > 0, scale, 1)
    part_of = np.unique(folds, return_inverse=True)[1] % _PARTS
    masks = [part_of == part for part in range(part_of.max() + 1)]
    # Genes first, so that the products are matrix products.
    scaled = np.ascontiguousarray((errors / np.sqrt(scale)).transpose(2, 0, 1))
    parts = np.stack([e @ e.transpose(0, 2, 1) for e in (scaled[:, :, inside] for inside in masks)])
    total, sizes = parts.sum(0), np.array([inside.sum() for inside in masks])
    trials = {}
    for prior in _PRIORS:
        weights = _weights(total - parts, m - sizes, prior)
        trials[prior] = np.empty((m, g), errors.dtype)
        for inside, w in zip(masks, weights, strict=True):
            trials[prior][inside] = np.einsum("gc,cmg->mg", w, errors[:, inside])
    prior = min(trials, key=lambda prior: (np.square(trials[prior]) / scale).mean())
    gain = ((np.square(errors[0]) - np.square(trials[prior])) / scale).mean(1)
    t = (gain.mean() - _MIN_GAIN * (m < _SMALL_N)) / max(gain.std(ddof=1) / np.sqrt(m), 1e-12)
    kept = max(0.0, 1 - (c - 3) / t**2) if t > 0 else 0.0
    w = kept * _weights(total[None], np.array([m]), prior)[0]
    w[:, 0] += 1 - kept
    return w, kept * trials[prior] + (1 - kept) * errors[0]


def _weights(moments: np.ndarray, n: np.ndarray, prior: float) -> np.ndarray:
    """Weights ``(…, g, c)`` from sums of products ``(…, g, c, c)`` over ``n`` ``(…,)`` spots."""
    n = n[:, None, None, None]
    shared = moments.mean(1, keepdims=True) / n
    if np.isinf(prior):
        return np.broadcast_to(simplex_weights(shared), moments.shape[:-1]).copy()
    return simplex_weights((moments + prior * shared) / (n + prior))
