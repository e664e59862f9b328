"""How alike predicted and measured expression are as maps: autocorrelation and structure."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from ._accuracy import centred
from ._blocks import column_blocks

#: Spots up to this many pitches away are neighbours: the 8 around a spot on a square lattice, the 6 on a hexagonal one
#: (whose next ring is at 1.73), with room for spots that lie a little off.
NEIGHBOUR_PITCHES = 1.6
#: Constants and largest window of :func:`skimage.metrics.structural_similarity`.
_K1, _K2, _WINDOW = 0.01, 0.03, 7


def neighbour_weights(xy: np.ndarray, pitch: float) -> scipy.sparse.csr_array:
    """Neighbours of each spot, in equal parts.

    Parameters
    ----------
    xy
        ``(n, 2)`` spot centres.
    pitch
        Distance between neighbouring spots, in the unit of ``xy``; those up to 1.6 of it away are neighbours.

    Returns
    -------
    scipy.sparse.csr_array
        ``(n, n)``; each row sums to 1, or is empty for a spot without neighbours.
    """
    from scipy.spatial import cKDTree

    pairs = cKDTree(xy).query_pairs(NEIGHBOUR_PITCHES * pitch, output_type="ndarray")
    i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
    n_neighbours = np.bincount(i, minlength=len(xy))
    return scipy.sparse.csr_array((1.0 / n_neighbours[i], (i, j)), shape=(len(xy), len(xy)))


def moran(values: np.ndarray, weights: scipy.sparse.sparray | scipy.sparse.spmatrix) -> np.ndarray:
    """Moran's I of each column (Moran, Biometrika 1950).

    Parameters
    ----------
    values
        ``(n, g)``.
    weights
        ``(n, n)``, used as they are; squidpy makes rows sum to 1 first.

    Returns
    -------
    numpy.ndarray
        ``(g,)``: near 0 without spatial pattern; NaN where a column is constant or no spot has a neighbour.
    """
    values = np.asarray(values)
    weights = scipy.sparse.csr_array(weights)
    result = np.empty(values.shape[1])
    for block in column_blocks(values.shape):
        z, varies = centred(values[:, block])
        with np.errstate(invalid="ignore", divide="ignore"):
            found = len(z) / weights.sum() * np.einsum("ij,ij->j", z, weights @ z) / np.einsum("ij,ij->j", z, z)
        result[block] = np.where(varies, found, np.nan)
    return result


def ceiling_of_neighbours(
    autocorrelation: np.ndarray, weights: scipy.sparse.sparray | scipy.sparse.spmatrix
) -> tuple[np.ndarray, float]:
    """Lower end of the noise ceiling: what neighbouring spots share is signal, all else may be overdispersion.

    Counts vary between spots beyond counting, at random or not; of one section alone nothing tells which. Moran's I is about
    the share of the variance that neighbours have in common, its root the correlation that a prediction of this part
    reaches. :func:`noise_ceiling` takes all variance beyond counting for signal and is the upper end.

    Parameters
    ----------
    autocorrelation
        ``(g,)`` of :func:`moran`.
    weights
        ``(n, n)`` that it was computed with.

    Returns
    -------
    numpy.ndarray
        ``(g,)``: 0 where neighbours share nothing, NaN where the autocorrelation is.
    float
        What a gene without any pattern seldom passes: two standard errors of Moran's I.
    """
    w = scipy.sparse.csr_array(weights)
    n, total = w.shape[0], w.sum()
    low = np.sqrt(np.clip(np.asarray(autocorrelation) + 1 / max(n - 1, 1), 0, 1))
    both = w + w.T
    error = np.sqrt(0.5 * both.multiply(both).sum()) / total if total > 0 else np.inf
    return low, float(np.sqrt(min(2 * error, 1.0)))


def ssim_on_grid(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Structural similarity of two maps of each gene, with spots as the pixels.

    Local means, variances and covariances are those of the spots in a square of 7 × 7 cells (of the largest odd side
    that the grid has room for, where it is smaller). Cells without a spot have no part in them; without such cells the
    map is that of :func:`skimage.metrics.structural_similarity`. It is averaged over the spots in whose square at least
    as many spots lie as it is wide. The range of a gene is that of both maps together.

    Parameters
    ----------
    a, b
        ``(n, g)`` values of the spots.
    rows, columns
        ``(n,)`` whole numbers: cell of each spot. Where only every second column of a row is used, as on a hexagonal
        lattice, the rows are pushed together. Spots that share a cell are averaged.

    Returns
    -------
    numpy.ndarray
        ``(g,)``: 1 for equal maps; NaN where either is constant, and throughout for a grid under 3 × 3 cells.

    Notes
    -----
    Wang et al., IEEE Trans Image Process 2004; unweighted squares and sample covariances, as in scikit-image.
    """
    a, b = np.asarray(a), np.asarray(b)
    cell, shape = _cells(np.asarray(rows), np.asarray(columns))
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
    judged = (mask > 0) & (n_in_window >= side)
    if not judged.any():
        return result
    for block in column_blocks((n_cells, a.shape[1])):
        x, y = (np.asarray(v[:, block], np.float64) for v in (a, b))
        varies = centred(x)[1] & centred(y)[1]
        spread_x, spread_y = ((spread @ v).T.reshape(-1, *shape) for v in (x, y))
        span = np.maximum(x.max(0), y.max(0)) - np.minimum(x.min(0), y.min(0))
        found = _similarity(spread_x, spread_y, span[:, None, None], np.maximum(n_in_window, 2), side)
        result[block] = np.where(varies, found[:, judged].mean(1), np.nan)
    return result


def _similarity(x: np.ndarray, y: np.ndarray, span: np.ndarray, n: np.ndarray, side: int) -> np.ndarray:
    """SSIM of each cell, ``(g, h, w)``, from maps that are 0 where there is no spot."""
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


def _cells(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Flat cell of each spot and the shape of the grid."""
    rows, columns = rows - rows.min(), columns - columns.min()
    if len(rows) > 1 and len(np.unique((rows + columns) % 2)) == 1 and columns.max() > 1:
        columns = columns // 2
    shape = (int(rows.max()) + 1, int(columns.max()) + 1)
    return rows * shape[1] + columns, shape
