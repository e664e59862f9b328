"""Rank correlation and the scale of a prediction, gene by gene."""

from __future__ import annotations

import numpy as np

from ._accuracy import centred, pearson
from ._blocks import column_blocks


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman correlation ``(g,)`` of columns, ties sharing their mean rank; NaN where constant or with NaN."""
    a, b = np.asarray(a), np.asarray(b)
    result = np.empty(a.shape[1])
    for block in column_blocks(a.shape):
        result[block] = pearson(_ranks(a[:, block]), _ranks(b[:, block]))
    return result


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of each column, ties shared, NaN throughout where one value is NaN, ``(n, g)`` float64."""
    from scipy.stats import rankdata

    # Rows lie side by side in memory: sorting those is several times as fast as sorting columns.
    return rankdata(np.ascontiguousarray(x.T), axis=1, nan_policy="propagate").T


def sd_ratio(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the prediction over that of the measurement; NaN where either is constant."""
    (p, p_varies), (m, m_varies) = centred(predicted), centred(measured)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(np.einsum("ij,ij->j", p, p) / np.einsum("ij,ij->j", m, m))
    return np.where(p_varies & m_varies, ratio, np.nan)


def slope(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Slope ``(g,)`` of measured on predicted: below 1 if the prediction exaggerates; NaN if either is constant."""
    (p, p_varies), (m, m_varies) = centred(predicted), centred(measured)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.einsum("ij,ij->j", p, m) / np.einsum("ij,ij->j", p, p)
    return np.where(p_varies & m_varies, found, np.nan)
