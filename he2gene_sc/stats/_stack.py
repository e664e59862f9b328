"""Convex weights of several predictions of many genes, shared between them as far as they help."""

from __future__ import annotations

import numpy as np

#: Spots that the mean over the genes counts for in the weights of one gene; infinity: all genes have the same.
_PRIORS = (30.0, 150.0, np.inf)
#: Parts of the spots that weights are tried on.
_PARTS = 5
#: Below this many spots a gain is believed only beyond this share of the squared error: less was often chance.
_FEW, _LEAST = 30, 0.1


def simplex_weights(moments: np.ndarray, n_steps: int = 80) -> np.ndarray:
    """Weights ``(…, c)`` of least squared error, not negative and of sum 1, by accelerated projected gradient (FISTA).

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
    """Nearest point of not negative numbers of sum 1 (Duchi et al., ICML 2008)."""
    u = -np.sort(-v, axis=-1)
    excess = np.cumsum(u, axis=-1) - 1
    rank = np.arange(1, v.shape[-1] + 1)
    last = (u * rank > excess).sum(-1, keepdims=True)
    return np.maximum(v - np.take_along_axis(excess, last - 1, -1) / last, 0)


def stack(errors: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weigh predictions by errors ``(c, m, g)`` made without the fold of a spot: weights ``(g, c)``, errors ``(m, g)``.

    Each gene counts by its errors and a prior, the mean over genes scaled by the first prediction, whose
    size is chosen by folds. The gain over the first is shrunk by ``1 - (c - 3) / t²``, not below 0 (James-Stein).
    """
    c, m, g = errors.shape
    scale = np.square(errors[0]).mean(0)
    scale = np.where(scale > 0, scale, 1)
    part_of = np.unique(folds, return_inverse=True)[1] % _PARTS
    masks = [part_of == part for part in range(part_of.max() + 1)]
    # By gene, so that the products are matrix products.
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
    t = (gain.mean() - _LEAST * (m < _FEW)) / max(gain.std(ddof=1) / np.sqrt(m), 1e-12)
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
