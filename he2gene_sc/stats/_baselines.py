"""Baselines without a model: expression of a spot predicted from other spots of its slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

#: Number of parts of a slide, and penalty of the ridge on colour (standardised features).
N_PARTS, ALPHA = 5, 1.0
#: Side of the squares of tissue that are kept in one part, in pitches.
BLOCK_PITCHES = 4


@dataclass(frozen=True)
class Baseline:
    """A prediction for every spot from other spots.

    Leave-one-out means correlate negatively with the spot (-1 for a constant prediction); ``comparable`` removes this.
    """

    predicted: np.ndarray  # (n, g)
    comparable: np.ndarray  # (n, g) with the mean of the spots used replaced by the mean of all spots

    @classmethod
    def leave_one_out(cls, predicted: np.ndarray, values: np.ndarray) -> Baseline:
        """Baseline of leave-one-out predictions, each from all other spots."""
        others = others_mean(values)
        return cls(predicted, predicted - others + values.mean(0))


def others_mean(values: np.ndarray) -> np.ndarray:
    """Mean of all other spots, ``(n, g)``."""
    return (values.sum(0) - values) / (len(values) - 1)


def class_mean(values: np.ndarray, codes: np.ndarray) -> Baseline:
    """Mean of the other spots of the same class; of all other spots without a class (-1) or if no other spot has it."""
    predicted = others_mean(values)
    for code in np.unique(codes[codes >= 0]):
        rows = np.flatnonzero(codes == code)
        if len(rows) > 1:
            predicted[rows] = others_mean(values[rows])
    return Baseline.leave_one_out(predicted, values)


def line(values: np.ndarray, x: np.ndarray) -> Baseline:
    """Least-squares line on one number per spot, fitted without the spot (exact, by its leverage)."""
    n = len(values)
    z = x - x.mean()
    square = z @ z
    z = z / np.sqrt(square) if square > 1e-12 * n * max(1.0, np.abs(x).max() ** 2) else np.zeros(n)
    leverage = (1 / n + z * z)[:, None]
    fitted = values.mean(0) + np.outer(z, z @ values)
    # If only one spot has another x, its leverage is 1 and the line is not defined without it.
    residual = (values - fitted) / np.maximum(1 - leverage, 1e-9)
    return Baseline.leave_one_out(values - residual, values)


def neighbours_mean(values: np.ndarray, weights: scipy.sparse.sparray) -> Baseline:
    """Mean of the neighbouring spots (:func:`neighbour_weights`); of all other spots without neighbours."""
    predicted = weights @ values
    alone = np.asarray(weights.sum(axis=1)).ravel() == 0
    if alone.any():
        predicted[alone] = others_mean(values)[alone]
    return Baseline.leave_one_out(predicted, values)


def ridge(values: np.ndarray, features: np.ndarray, parts: np.ndarray) -> Baseline:
    """Ridge regression on features of each spot ``(n, f)``, fitted on the other :func:`tissue_parts`."""
    x = _standardise(features)
    predicted, comparable = np.empty_like(values), np.empty_like(values)
    for part in np.unique(parts):
        out, rest = parts == part, parts != part
        centre, mean = x[rest].mean(0), values[rest].mean(0)
        z = x[rest] - centre
        weights = np.linalg.solve(z.T @ z + ALPHA * np.eye(x.shape[1]), z.T @ (values[rest] - mean))
        predicted[out] = mean + (x[out] - centre) @ weights
        comparable[out] = values.mean(0) + x[out] @ weights
    return Baseline(predicted, comparable)


def position(xy: np.ndarray) -> np.ndarray:
    """Position of each spot in its section ``(n, 3)``: both coordinates and squared distance from the centre, standardised."""
    axes = _standardise(xy)
    return np.column_stack([axes, _standardise(np.square(axes).sum(1))])


def _standardise(values: np.ndarray) -> np.ndarray:
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread > 0, spread, 1)


def tissue_parts(xy: np.ndarray, pitch: float) -> np.ndarray:
    """Assign squares of tissue, four pitches wide, to five parts of similar size: ``(n,)`` codes."""
    _, square = np.unique(np.floor((xy - xy.min(0)) / (BLOCK_PITCHES * pitch)).astype(int), axis=0, return_inverse=True)
    square = square.ravel()
    size = np.bincount(square)
    if len(size) < 2:
        return (np.arange(len(xy)) >= len(xy) // 2).astype(int)
    load = np.zeros(min(N_PARTS, len(size)), int)
    part = np.empty(len(size), int)
    for i in np.argsort(-size, kind="stable"):
        part[i] = load.argmin()
        load[part[i]] += size[i]
    return part[square]
