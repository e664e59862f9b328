"""Means over the neighbours of spots: by pairs, or by sums over a lattice if there are many pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

#: Most pairs of neighbours; as many fit into a GB.
_MAX_PAIRS = 1e7
#: Steps of the lattice across the narrowest ring, most cells, and columns that are summed at once.
_STEPS_PER_RING, _MAX_CELLS, COLUMNS = 12, 4_000_000, 16
#: Points per side of a cell, to estimate its share inside a ring.
_POINTS = 5


@dataclass(frozen=True)
class LatticeRing:
    """Mean over the spots of a ring by sums over the nodes of a lattice; multiplies values like a matrix.

    Each spot is distributed to the four nodes around it. Distances are accurate to about one step, and memory is linear.
    """

    gather: scipy.sparse.csr_array  # (n, cells) float32 bilinear weights
    cells: tuple[int, int]  # rows, columns
    kernel: np.ndarray  # Fourier transform of the ring, on the padded lattice
    padded: tuple[int, int]  # rows, columns

    def __matmul__(self, values: np.ndarray) -> np.ndarray:
        """Average ``(n, c)`` over the ring of each spot; a spot with an empty ring keeps its own values."""
        count = self._sums(np.ones((len(values), 1), np.float32))
        found = np.empty(values.shape, np.float32)
        isolated = count[:, 0] < 0.5
        for start in range(0, values.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            found[:, columns] = self._sums(values[:, columns]) / np.maximum(count, 0.5)
        found[isolated] = values[isolated]
        return found

    def _sums(self, values: np.ndarray) -> np.ndarray:
        import scipy.fft

        on_nodes = (self.gather.T @ values).reshape(*self.cells, -1)
        spectrum = scipy.fft.rfft2(on_nodes, s=self.padded, axes=(0, 1)) * self.kernel[:, :, None]
        ring_sums = scipy.fft.irfft2(spectrum, s=self.padded, axes=(0, 1))[: self.cells[0], : self.cells[1]]
        return self.gather @ ring_sums.reshape(-1, values.shape[1])


def rings_of(
    centres_um: np.ndarray, rings_um: tuple[tuple[float, float], ...]
) -> tuple[scipy.sparse.csr_array | LatticeRing, ...]:
    """Return averaging matrices of rings (inner radius included, outer not): row ``i`` averages the ring around spot ``i``.

    If a ring is empty, the row returns the spot itself. Above 10 million pairs, sums over a lattice replace the pairs.
    """
    from scipy.spatial import cKDTree

    n = len(centres_um)
    if not rings_um or n == 0:
        return tuple(scipy.sparse.csr_array((n, n), dtype=np.float32) for _ in rings_um)
    tree, radius = cKDTree(centres_um), max(outer for _, outer in rings_um)
    sample = centres_um[:: max(1, n // 500)]
    expected = n * float(np.mean(tree.query_ball_point(sample, radius, return_length=True))) / 2
    if expected > _MAX_PAIRS:
        return _lattice_rings(centres_um, rings_um)
    pairs = tree.query_pairs(radius, output_type="ndarray")
    distance = np.linalg.norm(centres_um[pairs[:, 0]] - centres_um[pairs[:, 1]], axis=1)
    matrices = []
    for inner, outer in rings_um:
        chosen = pairs[(distance >= inner) & (distance < outer)]
        rows, columns = np.concatenate([chosen, chosen[:, ::-1]]).T
        links = scipy.sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(n, n)).tocsr()
        count = np.diff(links.indptr)
        isolated = scipy.sparse.diags_array((count == 0).astype(np.float32))
        mean = scipy.sparse.diags_array(1 / np.maximum(count, 1).astype(np.float32))
        matrices.append(scipy.sparse.csr_array(mean @ links + isolated, dtype=np.float32))
    return tuple(matrices)


def bilinear(
    centres: np.ndarray, low: np.ndarray, step: np.ndarray, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, nodes (numbered row by row) and weights of the four nodes around points, ``(4 n,)`` each.

    The lattice starts at ``low`` and has ``cells + 1`` nodes per side, ``step`` apart. ``centres``, ``low``, ``step`` and
    ``cells`` are in the order x, y.
    """
    place = (centres - low) / step
    first = np.clip(np.floor(place).astype(np.int64), 0, cells - 1)
    part = np.clip(place - first, 0, 1)
    nodes, weights = [], []
    for right in (0, 1):
        for down in (0, 1):
            nodes.append((first[:, 1] + down) * (cells[0] + 1) + first[:, 0] + right)
            weights.append(np.abs(1 - right - part[:, 0]) * np.abs(1 - down - part[:, 1]))
    return np.tile(np.arange(len(centres)), 4), np.concatenate(nodes), np.concatenate(weights).astype(np.float32)


def _lattice_rings(centres_um: np.ndarray, rings_um: tuple[tuple[float, float], ...]) -> tuple[LatticeRing, ...]:
    from scipy.fft import next_fast_len, rfft2

    low, extent = centres_um.min(0), np.ptp(centres_um, axis=0)
    step = min(outer - inner for inner, outer in rings_um) / _STEPS_PER_RING
    step = max(step, float(np.sqrt(np.prod(extent) / _MAX_CELLS)))
    cells = np.maximum(1, np.ceil(extent / step).astype(np.int64))
    rows, nodes, weights = bilinear(centres_um, low, np.full(2, step), cells)
    width, height = (int(x) + 1 for x in cells)
    gather = scipy.sparse.coo_array((weights, (rows, nodes)), shape=(len(centres_um), width * height)).tocsr()
    radius = int(np.ceil(max(outer for _, outer in rings_um) / step)) + 1
    padded = tuple(int(next_fast_len(size + radius, real=True)) for size in (height, width))
    offsets = np.arange(-radius, radius + 1)
    inside = (np.arange(_POINTS) + 0.5) / _POINTS - 0.5
    fine = (offsets[:, None] + inside).ravel() * step
    distance = np.hypot(fine[:, None], fine[None, :])
    found = []
    for inner, outer in rings_um:
        share = ((distance >= inner) & (distance < outer)).reshape(len(offsets), _POINTS, len(offsets), _POINTS)
        kernel = np.zeros(padded, np.float32)
        np.add.at(kernel, np.ix_(offsets % padded[0], offsets % padded[1]), share.mean((1, 3), dtype=np.float32))
        found.append(LatticeRing(gather, (height, width), rfft2(kernel), (padded[0], padded[1])))
    return tuple(found)
