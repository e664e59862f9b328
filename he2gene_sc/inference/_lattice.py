"""Features of spots that lie close together: computed on a lattice a window, interpolated where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from ..models._embedding import N_COLOUR
from ..models._ood import SlideFacts
from ..models._rings import bilinear

#: Share of the smallest window below which a pitch is dense; a grid of half of it is not.
DENSE = 0.49
#: Weight, of that of a node within tissue, below which a node is left out; and weight that a bin has to keep.
_IDLE, _OWN = 0.3, 0.1
#: Distances to the nearest spot, a large one over a small one, up to which spots are bins of a grid.
_REGULAR = 1.2


@dataclass(frozen=True)
class Interpolated:
    """Features of the spots of a slide, computed from those of the nodes of lattices when rows are asked for."""

    nodes: tuple[np.ndarray, ...]  # of each window, (m, r, f) float32: features of the nodes of its lattice
    weights: tuple[scipy.sparse.csr_array, ...]  # of each window, (n, m): rows add up to 1
    fusion: str

    def __len__(self) -> int:
        return int(self.weights[0].shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of spots, and of features of one view."""
        widths = [part.shape[2] for part in self.nodes]
        return len(self), widths[0] if self.fusion == "mean" else sum(widths)

    def views(self, rows: slice) -> np.ndarray:
        """Features of some spots as the extractor lays them out, ``(b, views, f)`` float32."""
        parts = []
        for weights, nodes in zip(self.weights, self.nodes, strict=True):
            flat = weights[rows] @ nodes.reshape(len(nodes), -1)
            parts.append(flat.reshape(flat.shape[0], *nodes.shape[1:]).astype(np.float32, copy=False))
        if self.fusion == "mean":
            return np.stack(parts, axis=2).reshape(len(parts[0]), -1, parts[0].shape[2])
        return np.concatenate([*(p[..., :-N_COLOUR] for p in parts), *(p[..., -N_COLOUR:] for p in parts)], axis=2)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Features of some spots, averaged over views, ``(b, f)`` float32."""
        views = self.views(rows)
        return views[:, 0] if views.shape[1] == 1 else views.mean(1)


@dataclass(frozen=True)
class SpotFeatures:
    """Features of the spots of one slide, and what their pixels show."""

    values: np.ndarray | Interpolated  # (n, views, f) float32
    facts: SlideFacts  # tissue and faults of the spots
    centres_um: np.ndarray


def is_dense(centres_um: np.ndarray, windows_um: Sequence[float]) -> bool:
    """Whether spots lie closer, in the median, than half the smallest window."""
    return len(centres_um) > 1 and bool(np.median(_nearest(centres_um)) < DENSE * min(windows_um))


def without_idle(
    nodes: np.ndarray, weights: scipy.sparse.csr_array, centres: np.ndarray
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Leave out nodes at borders that hardly any bin reads; what they had goes to the other nodes of those bins.

    Cells are many here and few there, so that a node that few read may lie within tissue: all nodes stay. Parameters and
    returns are those that :func:`lattice_of` returns, with the spots that it was given. A bin that would keep
    nearly none of its weight keeps its nodes.
    """
    low, high = np.quantile(_nearest(centres), [0.1, 0.9])
    if high > _REGULAR * low:
        return nodes, weights
    read = np.asarray(weights.sum(axis=0)).ravel()
    kept = read >= _IDLE * np.quantile(read, 0.9)
    bereft = np.asarray(weights[:, kept].sum(axis=1)).ravel() < _OWN
    kept |= np.asarray(weights[bereft].sum(axis=0)).ravel() > 0
    some = weights[:, kept]
    total = np.asarray(some.sum(axis=1)).ravel()
    return nodes[kept], scipy.sparse.csr_array(scipy.sparse.diags_array(1 / total).astype(np.float32) @ some)


def _nearest(centres: np.ndarray) -> np.ndarray:
    """Distances of up to 10,000 spots to the nearest other."""
    from scipy.spatial import cKDTree

    some = centres[:: max(1, len(centres) // 10_000)]
    return cKDTree(centres).query(some, k=2)[0][:, 1]


def lattice_of(centres: np.ndarray, step: float) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Nodes ``(m, 2)`` of a lattice around spots ``(n, 2)``, at most ``step`` apart, and bilinear weights ``(n, m)`` float32.

    The lattice spans the spots exactly, so all nodes lie where an image that holds the spots has pixels.
    """
    low, extent = centres.min(0), np.ptp(centres, axis=0)
    cells = np.maximum(1, np.ceil(extent / step - 1e-9).astype(np.int64))
    steps = np.where(extent > 0, extent / cells, 1.0)
    rows, nodes, weights = bilinear(centres, low, steps, cells)
    used = weights > 0
    found, columns = np.unique(nodes[used], return_inverse=True)
    matrix = scipy.sparse.coo_array((weights[used], (rows[used], columns)), shape=(len(centres), len(found)))
    at = low + np.column_stack([found % (cells[0] + 1), found // (cells[0] + 1)]) * steps
    return np.minimum(at, low + extent), matrix.tocsr()
