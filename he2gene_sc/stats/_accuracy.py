"""How well predicted expression agrees with measured, gene by gene."""

from __future__ import annotations

import numpy as np
import scipy.sparse

TARGET_SUM = 1e4


def log_normalise(counts: np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix) -> np.ndarray:
    """Natural log of (1 + counts per 10,000) of each spot.

    Parameters
    ----------
    counts
        ``(n, g)`` raw counts, dense or sparse.

    Returns
    -------
    numpy.ndarray
        ``(n, g)`` float32; a spot without counts is 0 everywhere.
    """
    dense = counts.toarray() if scipy.sparse.issparse(counts) else np.asarray(counts)
    total = dense.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(TARGET_SUM * dense / np.where(total > 0, total, 1)).astype(np.float32)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column of two ``(n, g)`` arrays; NaN where one of them is constant.

    Returns
    -------
    numpy.ndarray
        ``(g,)`` float64.
    """
    a, a_varies = _centred(a)
    b, b_varies = _centred(b)
    size = np.sqrt(np.einsum("ij,ij->j", a, a) * np.einsum("ij,ij->j", b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(a_varies & b_varies, np.einsum("ij,ij->j", a, b) / size, np.nan)


def _centred(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take the mean off each column; say which columns leave more than rounding dust."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    return centred, np.abs(centred).max(axis=0, initial=0) > 1e-12 * np.abs(x).max(axis=0, initial=0)


def skill(predicted: np.ndarray, measured: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Share of the squared error that a prediction takes off a constant reference, by column.

    Parameters
    ----------
    predicted, measured
        ``(n, g)``.
    reference
        ``(g,)``: the mean of each gene in training.

    Returns
    -------
    numpy.ndarray
        ``(g,)``: 1 is perfect, 0 as good as the training mean, negative worse; NaN where the reference is perfect.
    """
    error = np.square(np.asarray(predicted, np.float64) - measured).sum(0)
    base = np.square(np.asarray(reference, np.float64) - measured).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, 1 - error / base, np.nan)


def noise_ceiling(
    counts: np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix,
    *,
    genes: np.ndarray | None = None,
    n_splits: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Best correlation that any prediction of the true expression could reach with these counts.

    Each count is split binomially into halves; the correlation r of the log-normalised halves gives the reliability
    R = 2r / (1 + r) of the whole (Spearman–Brown), whose root is the ceiling.

    Parameters
    ----------
    counts
        ``(n, g)`` raw counts.
    genes
        Columns to report; all counts are normalised by the totals of all genes in any case. Default: all.
    n_splits
        Splits that r is averaged over.
    seed
        Of the splits.

    Returns
    -------
    numpy.ndarray
        Of the chosen genes: 0 where the halves do not agree, NaN where a gene is constant in every split.
    """
    rng = np.random.default_rng(seed)
    whole = scipy.sparse.csc_array(counts)
    values = np.rint(whole.data).astype(np.int64)
    chosen = np.arange(whole.shape[1]) if genes is None else np.asarray(genes)
    total, valid = np.zeros(len(chosen)), np.zeros(len(chosen))
    for _ in range(n_splits):
        half = rng.binomial(values, 0.5)
        r = pearson(*(_log_part(whole, part, chosen) for part in (half, values - half)))
        total += np.nan_to_num(r)
        valid += np.isfinite(r)
    r = np.divide(total, valid, out=np.full(len(total), np.nan), where=valid > 0)
    r = np.clip(r, 0, 1)
    return np.sqrt(2 * r / (1 + r))


def _log_part(pattern: scipy.sparse.csc_array, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Log-normalise counts that lie where those of ``pattern`` do, and return some columns."""
    part = scipy.sparse.csc_array((values, pattern.indices, pattern.indptr), pattern.shape)
    totals = np.asarray(part.sum(axis=1)).ravel()[:, None]
    return np.log1p(TARGET_SUM * part[:, columns].toarray() / np.where(totals > 0, totals, 1)).astype(np.float32)
