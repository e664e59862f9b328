"""Features of dense spots: computed on one lattice per window, and interpolated when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from ..models._embedding import N_COLOUR, bilinear
from ..models._ood import SlideFacts

#: Share of the smallest window below which a pitch is dense; a grid of half the window is not.
DENSE = 0.49
#: Least weight of a node, relative to nodes inside tissue, and least weight that a bin must keep if nodes are dropped.
_MIN_NODE_WEIGHT, _MIN_BIN_WEIGHT = 0.3, 0.1
#: Ratio of a large to a small distance to the nearest spot, up to which spots are bins of a regular grid.
_MAX_DISTANCE_RATIO = 1.2


@dataclass(frozen=True)
class Interpolated:
    """Features of the spots of a slide, interpolated from the nodes of lattices when rows are read."""

    nodes: tuple[np.ndarray, ...]  # per window, (m, r, f) float32: features of the nodes of its lattice
    weights: tuple[scipy.sparse.csr_array, ...]  # per window, (n, m): rows sum to 1
    fusion: str

    def __len__(self) -> int:
        return int(self.weights[0].shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of spots, and number of features of one view."""
        widths = [part.shape[2] for part in self.nodes]
        return len(self), widths[0] if self.fusion == "mean" else sum(widths)

    def views(self, rows: slice) -> np.ndarray:
        """Return the features of some spots in the layout of the extractor, ``(b, views, f)`` float32."""
        parts = []
        for weights, nodes in zip(self.weights, self.nodes, strict=True):
            flat = weights[rows] @ nodes.reshape(len(nodes), -1)
            parts.append(flat.reshape(flat.shape[0], *nodes.shape[1:]).astype(np.float32, copy=False))
        if self.fusion == "mean":
            return np.stack(parts, axis=2).reshape(len(parts[0]), -1, parts[0].shape[2])
        return np.concatenate([*(p[..., :-N_COLOUR] for p in parts), *(p[..., -N_COLOUR:] for p in parts)], axis=2)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Return the features of some spots, averaged over views, ``(b, f)`` float32."""
        views = self.views(rows)
        return views[:, 0] if views.shape[1] == 1 else views.mean(1)


@dataclass(frozen=True)
class SpotFeatures:
    """Features of the spots of one slide, and the quality of their pixels."""

    values: np.ndarray | Interpolated  # (n, views, f) float32
    facts: SlideFacts  # tissue and faults of the spots
    centres_um: np.ndarray


def is_dense(centres_um: np.ndarray, windows_um: Sequence[float]) -> bool:
    """Return whether the median distance of spots is less than half the smallest window."""
    return len(centres_um) > 1 and bool(np.median(_nearest(centres_um)) < DENSE * min(windows_um))


def drop_idle_nodes(
    nodes: np.ndarray, weights: scipy.sparse.csr_array, centres: np.ndarray
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Drop nodes at borders that hardly any bin uses; their weight goes to the other nodes of these bins.

    ``nodes`` and ``weights`` are those of :func:`lattice_of` for ``centres``; the same two are returned. All nodes are kept for
    cells, whose density varies: a node that few cells use may lie inside tissue. A bin that would lose nearly all of its
    weight keeps its nodes.
    """
    low, high = np.quantile(_nearest(centres), [0.1, 0.9])
    if high > _MAX_DISTANCE_RATIO * low:
        return nodes, weights
    read = np.asarray(weights.sum(axis=0)).ravel()
    kept = read >= _MIN_NODE_WEIGHT * np.quantile(read, 0.9)
    starved = np.asarray(weights[:, kept].sum(axis=1)).ravel() < _MIN_BIN_WEIGHT
    kept |= np.asarray(weights[starved].sum(axis=0)).ravel() > 0
    kept_weights = weights[:, kept]
    total = np.asarray(kept_weights.sum(axis=1)).ravel()
    return nodes[kept], scipy.sparse.csr_array(scipy.sparse.diags_array(1 / total).astype(np.float32) @ kept_weights)


def _nearest(centres: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest other spot for up to 10,000 spots."""
    from scipy.spatial import cKDTree

    sample = centres[:: max(1, len(centres) // 10_000)]
    return cKDTree(centres).query(sample, k=2)[0][:, 1]


def lattice_of(centres: np.ndarray, step: float) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Return nodes ``(m, 2)`` of a lattice around spots ``(n, 2)``, at most ``step`` apart, and bilinear weights ``(n, m)`` float32.

    The lattice spans the spots exactly, so all nodes lie inside any image that holds the spots.
    """
    low, extent = centres.min(0), np.ptp(centres, axis=0)
    cells = np.maximum(1, np.ceil(extent / step - 1e-9).astype(np.int64))
    steps = np.where(extent > 0, extent / cells, 1.0)
    rows, nodes, weights = bilinear(centres, low, steps, cells)
    used = weights > 0
    found, columns = np.unique(nodes[used], return_inverse=True)
    matrix = scipy.sparse.coo_array((weights[used], (rows[used], columns)), shape=(len(centres), len(found)))
    positions = low + np.column_stack([found % (cells[0] + 1), found // (cells[0] + 1)]) * steps
    return np.minimum(positions, low + extent), matrix.tocsr()
