"""From features to the embedding of spots, relative to their slide and neighbours. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse

#: Colour statistics of a window: mean, SD and covariances of the optical density of three channels.
N_COLOUR = 9

#: Arrays of a :class:`Basis` among the tensors of a model.
TENSORS = ("latent.mean", "latent.scale", "latent.projection", "latent.mixing")

#: Number of spots whose features are in memory at once, if features are computed when read: they fit into a processor cache.
_ROWS_AT_ONCE = 1024
#: Number of means over a ring in memory at once, if they are computed on a lattice.
_VALUES_AT_ONCE = 2**24
#: Most pairs of neighbours; as many fit into a GB.
_MAX_PAIRS = 1e7
#: Steps of the lattice across the narrowest ring, most cells, and columns that are summed at once.
_STEPS_PER_RING, _MAX_CELLS, _COLUMNS = 12, 4_000_000, 16
#: Points per side of a cell, to estimate its share inside a ring.
_POINTS = 5


def reciprocal(values: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return 1 / values where they are usable, else 0."""
    return np.where(usable, 1 / np.where(usable, values, 1), 0)


class Rows(Protocol):
    """Features of spots, ``(n, f)`` float32: an array, or an object that computes rows when they are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of spots, and number of features."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


def row_blocks(n: int, at_once: int = _ROWS_AT_ONCE) -> list[slice]:
    """Split ``n`` rows into slices."""
    return [slice(start, min(n, start + at_once)) for start in range(0, n, at_once)]


@dataclass(frozen=True)
class Context:
    """Neighbours of a spot, and standardisation by its slide.

    The default rings end between the distances of grids of 100 and 200 µm, so an error of 0.5 % in µm/px moves no neighbour
    to another ring.
    """

    #: Inner and outer radius; the inner is included.
    rings_um: tuple[tuple[float, float], ...] = ((50.0, 353.0), (353.0, 616.0), (616.0, 930.0))
    weights: tuple[float, ...] = (0.7, 0.5, 0.3)  # of the rings; the spot has weight 1
    prior_spots: float | None = 20.0  # number of spots that training counts as; None: only training is used
    fine_below_mpp: float | None = None  # finer slides use both halves of the embedding, see Basis.column_weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "rings_um", tuple(tuple(float(um) for um in ring) for ring in self.rings_um))
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != len(self.rings_um) or any(not 0 <= a < b for a, b in self.rings_um):
            raise ValueError(
                f"`rings_um` {self.rings_um} must be pairs of inner and outer radius, with one weight each; `weights` is {self.weights}"
            )
        if self.fine_below_mpp is not None and not self.rings_um:
            raise ValueError("`fine_below_mpp` needs `rings_um`: it averages predictions with and without them")

    def standardise(self, features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Standardise features of all spots of a slide ``(n, f)`` by mean and variance of the slide and of training.

        This removes effects of stain and scanner. ``mean`` and ``scale`` ``(f,)`` of training are the prior, which matters for
        slides of few spots. Features with scale 0 become 0.
        """
        centre, inverse = self._center_and_inverse_scale(features, mean, scale)
        return (features - centre) * inverse

    def project(self, features: Rows, mean: np.ndarray, scale: np.ndarray, projection: np.ndarray) -> np.ndarray:
        """Standardise the features of all spots of one slide and project them, block by block: ``(n, f)`` to ``(n, c)``."""
        if isinstance(features, np.ndarray):
            return self.standardise(features, mean, scale) @ projection
        centre, inverse = self._center_and_inverse_scale(features, mean, scale)
        found = np.empty((len(features), projection.shape[1]), np.float32)
        for rows in row_blocks(len(features)):
            found[rows] = ((features[rows] - centre) * inverse) @ projection
        return found

    def _center_and_inverse_scale(
        self, features: Rows, mean: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the centre and the inverse scale of each feature for a slide."""
        centre, spread = mean, scale
        if self.prior_spots is not None and len(features):
            n, prior = len(features), self.prior_spots
            own, variance = _moments(features, mean)
            centre = ((n * own + prior * mean) / (n + prior)).astype(np.float32)
            spread = np.sqrt((n * variance + prior * np.square(scale, dtype=np.float64)) / (n + prior))
        return centre, reciprocal(spread, scale > 0).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for the card."""
        return {key: value for key, value in asdict(self).items() if key != "fine_below_mpp" or value is not None}


def _moments(features: Rows, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over spots, float64; ``shift`` is near the mean, for numerical stability."""
    if isinstance(features, np.ndarray):
        return features.mean(0, dtype=np.float64), features.var(0, dtype=np.float64)
    total, squares = np.zeros((2, features.shape[1]))
    for rows in row_blocks(len(features)):
        x = features[rows] - np.asarray(shift, np.float64)
        total, squares = total + x.sum(0), squares + np.square(x).sum(0)
    mean = total / len(features)
    return shift + mean, np.maximum(squares / len(features) - np.square(mean), 0)


#: No neighbours, and standardisation by training only.
NO_CONTEXT = Context((), (), None)


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
        for start in range(0, values.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
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


@dataclass(frozen=True)
class Basis:
    """Map from the features of the spots of a slide to their embedding."""

    mean: np.ndarray  # (f,) mean of the section means
    scale: np.ndarray  # (f,) root of the mean variance inside sections
    projection: np.ndarray  # (f, c) from standardised features to components
    mixing: np.ndarray  # (c · (1 + rings), k) from components of spot and rings to the embedding
    context: Context

    def column_weights(self, mpp: float) -> np.ndarray:
        """Return the weights of the columns of the embedding on slides of a resolution in µm/px, ``(k,)`` float32.

        With ``fine_below_mpp``, the first half does not depend on the rings, except for a smoothing, and the second does. The
        prediction of a finer slide is the mean of those of both halves, that of a coarser slide is of the second alone.
        """
        k, limit = self.mixing.shape[1], self.context.fine_below_mpp
        if limit is None:
            return np.ones(k, np.float32)
        return np.full(k, 0.5, np.float32) if mpp < limit else (np.arange(k) >= k // 2).astype(np.float32)

    def components(self, features: Rows, rings: Sequence[scipy.sparse.csr_array | LatticeRing]) -> np.ndarray:
        """Return the components of all spots of a slide and of their rings: ``(n, f)`` to ``(n, c · (1 + rings))``."""
        own = self.context.project(features, self.mean, self.scale, self.projection)
        return np.concatenate([own, *(ring @ own for ring in rings)], axis=1)

    def embed(self, features: Rows, rings: Sequence[scipy.sparse.csr_array | LatticeRing]) -> np.ndarray:
        """Embed all spots of a slide, ``(n, f)`` to ``(n, k)`` float32; ``rings`` are those of :func:`rings_of`."""
        if not any(isinstance(ring, LatticeRing) for ring in rings):
            return self.components(features, rings) @ self.mixing
        # For many spots, the concatenated components of all rings would take gigabytes.
        own = self.context.project(features, self.mean, self.scale, self.projection)
        width = own.shape[1]
        found = own @ self.mixing[:width]
        step = max(_COLUMNS, _VALUES_AT_ONCE // len(own))
        for i, ring in enumerate(rings, start=1):
            mixing = self.mixing[i * width : (i + 1) * width]
            for start in range(0, width, step):
                columns = slice(start, start + step)
                found += (ring @ own[:, columns]) @ mixing[columns]
        return found
