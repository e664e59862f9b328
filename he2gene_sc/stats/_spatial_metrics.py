"""Similarity of predicted and measured expression as maps: autocorrelation and structure."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from ._accuracy import centre_columns, column_blocks

#: Largest distance of neighbours in pitches: 8 neighbours on a square lattice, 6 on a hexagonal one (next ring at 1.73), with
#: tolerance for irregular positions.
NEIGHBOUR_PITCHES = 1.6
#: Constants and largest window, as in :func:`skimage.metrics.structural_similarity`.
_K1, _K2, _WINDOW = 0.01, 0.03, 7


def pitch_of(xy: np.ndarray) -> float:
    """Return the median distance to the nearest spot, in the unit of ``xy`` ``(n, 2)``."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        raise ValueError(f"{len(xy)} spots do not have a distance; at least 2 spots are needed")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def neighbour_weights(xy: np.ndarray, pitch: float, radius: float = NEIGHBOUR_PITCHES) -> scipy.sparse.csr_array:
    """Weights ``(n, n)`` of neighbours up to ``radius`` pitches away: equal, with row sums of 1, or 0 without neighbours."""
    from scipy.spatial import cKDTree

    pairs = cKDTree(xy).query_pairs(radius * pitch, output_type="ndarray")
    i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
    n_neighbours = np.bincount(i, minlength=len(xy))
    return scipy.sparse.csr_array((1.0 / n_neighbours[i], (i, j)), shape=(len(xy), len(xy)))


def moran(values: np.ndarray, weights: scipy.sparse.sparray | scipy.sparse.spmatrix) -> np.ndarray:
    """Moran's I ``(g,)`` of each column (Moran, Biometrika 1950) with the given weights; NaN for a constant column."""
    values = np.asarray(values)
    weights = scipy.sparse.csr_array(weights)
    result = np.empty(values.shape[1])
    for block in column_blocks(values.shape):
        z, varies = centre_columns(values[:, block])
        with np.errstate(invalid="ignore", divide="ignore"):
            found = len(z) / weights.sum() * np.einsum("ij,ij->j", z, weights @ z) / np.einsum("ij,ij->j", z, z)
        result[block] = np.where(varies, found, np.nan)
    return result


def ceiling_of_neighbours(
    values: np.ndarray, weights: scipy.sparse.sparray | scipy.sparse.spmatrix, depth: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Lower bound of the noise ceiling ``(g,)``, and its value for a gene without spatial pattern (two standard errors).

    Moran's I, minus its expectation without a pattern, is approximately the share of variance that neighbours have in common;
    its root is the correlation that a prediction of this part reaches. The mean of log-normalised counts depends on the log
    ``depth`` ``(n,)``, which has a spatial pattern too: a cubic polynomial of it is subtracted from ``values`` ``(n, g)``. The upper
    bound is :func:`noise_ceiling`, which treats all variance beyond counting as signal. NaN for a constant gene.
    """
    values, w = np.asarray(values), scipy.sparse.csr_array(weights)
    n, total = w.shape[0], w.sum()
    basis = np.ones((n, 1))
    if depth is not None and np.ptp(depth) > 0:
        basis = np.vander((depth - depth.mean()) / np.std(depth), 4)
    left, sizes, _ = np.linalg.svd(basis, full_matrices=False)
    basis = left[:, sizes > 1e-6 * sizes[0]]
    # Expectation of Moran's I for residuals of independent values (Cliff and Ord, Spatial Processes, 1981).
    expected = -n / max(total * (n - basis.shape[1]), 1e-300) * np.einsum("ij,ij->", basis, w @ basis)
    observed = np.empty(values.shape[1])
    for block in column_blocks(values.shape):
        part = np.asarray(values[:, block], np.float64)
        varies = centre_columns(part)[1]
        observed[block] = np.where(varies, moran(part - basis @ (basis.T @ part), w), np.nan)
    both = w + w.T
    error = np.sqrt(0.5 * both.multiply(both).sum()) / total if total > 0 else np.inf
    return np.sqrt(np.clip(observed - expected, 0, 1)), float(np.sqrt(min(2 * error, 1.0)))


def ssim_on_grid(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Structural similarity ``(g,)`` of two maps of each gene, with spots as pixels; NaN if either is constant.

    Wang et al., IEEE Trans Image Process 2004, as in scikit-image, over the spots in windows of 7 × 7 cells (or the
    largest odd size that fits), averaged over windows with at least as many spots as their width. The range is that of
    both maps. ``rows`` and ``columns`` are whole numbers; hexagonal rows are compressed to a square grid, and spots in the
    same cell are averaged.
    """
    a, b = np.asarray(a), np.asarray(b)
    rows, columns = np.asarray(rows) - np.min(rows), np.asarray(columns) - np.min(columns)
    if len(rows) > 1 and len(np.unique((rows + columns) % 2)) == 1 and columns.max() > 1:
        columns = columns // 2
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    cell = rows * shape[1] + columns
    side = min(_WINDOW, *shape)
    side -= 1 - side % 2
    result = np.full(a.shape[1], np.nan)
    if side < 3:
        return result
    n_cells = shape[0] * shape[1]
    filled = np.bincount(cell, minlength=n_cells)
    spread = scipy.sparse.csr_array((1.0 / filled[cell], (cell, np.arange(len(cell)))), shape=(n_cells, len(cell)))
    mask = (filled > 0).reshape(shape).astype(float)
    n_in_window = np.rint(_box_sum(mask[None], side))[0]
    scored = (mask > 0) & (n_in_window >= side)
    if not scored.any():
        return result
    for block in column_blocks((n_cells, a.shape[1])):
        x, y = (np.asarray(v[:, block], np.float64) for v in (a, b))
        varies = centre_columns(x)[1] & centre_columns(y)[1]
        spread_x, spread_y = ((spread @ v).T.reshape(-1, *shape) for v in (x, y))
        span = np.maximum(x.max(0), y.max(0)) - np.minimum(x.min(0), y.min(0))
        found = _similarity(spread_x, spread_y, span[:, None, None], np.maximum(n_in_window, 2), side)
        result[block] = np.where(varies, found[:, scored].mean(1), np.nan)
    return result


def _similarity(x: np.ndarray, y: np.ndarray, span: np.ndarray, n: np.ndarray, side: int) -> np.ndarray:
    """SSIM of each cell, ``(g, h, w)``, from maps that are 0 in cells without spots."""
    mean_x, mean_y = _box_sum(x, side) / n, _box_sum(y, side) / n
    rest = n / (n - 1)
    var_x = rest * (_box_sum(x * x, side) / n - mean_x * mean_x)
    var_y = rest * (_box_sum(y * y, side) / n - mean_y * mean_y)
    cov = rest * (_box_sum(x * y, side) / n - mean_x * mean_y)
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
        return likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def _box_sum(maps: np.ndarray, side: int) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return uniform_filter(maps, size=(0, side, side)) * side**2
