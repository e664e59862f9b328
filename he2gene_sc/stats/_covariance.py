"""Grid of spatial covariances of spots, computed for blocks of spots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

#: Largest number of blocks. With at most this number of spots, each spot is a block and the restricted likelihood is exact.
MAX_BLOCKS = 500
#: Parts of a block for correlations with other blocks, each at its centre; exact if a block has at most this number of spots.
_PARTS = 16
#: Pairs of blocks whose distances have at most this coefficient of variation are approximated by two distances, mean ± SD;
#: the error of an exponential is below 3e-4 at any range. Nearer pairs use the distances of all parts.
_FAR = 0.2
#: Ratios of the variance of the field to white noise, from almost only noise to almost no noise.
ODDS = np.geomspace(0.02, 1000, 25)
#: By anisotropy (ratio of the ranges along and across): family, number of ranges, longest range in sides of the tissue.
#: A Gaussian field with a range of four sides is a linear trend. Smooth anisotropic fields need a smooth anisotropic family:
#: with only rough and Gaussian ones, differences between rim and core are misestimated.
_GRID = {
    1: (("exponential", 9, 1), ("matern", 15, 1), ("gaussian", 20, 4)),
    3: (("exponential", 6, 1), ("matern", 6, 1), ("gaussian", 6, 1)),
    6: (("matern", 6, 1),),
}
_DIRECTIONS = 4


@dataclass(frozen=True)
class Blocks:
    """Blocks of neighbouring spots of one section and one group; columns of the basis are ``1/sqrt(size)``.

    Label and section are constant in a block, so a test of the label needs the covariance only in this basis.
    """

    xy: np.ndarray  #: (n, 2) positions
    section: np.ndarray  #: (n,) integer codes
    of_spot: np.ndarray  #: (n,) block of each spot
    size: np.ndarray  #: (m,) spots in a block

    def project(self, values: np.ndarray) -> np.ndarray:
        """Project values ``(n, g)`` on the basis of blocks, ``(m, g)``."""
        order = np.argsort(self.of_spot, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.size)[:-1]]).astype(int)
        return np.add.reduceat(values[order], starts, axis=0) / np.sqrt(self.size)[:, None]


def make_blocks(xy: np.ndarray, section: np.ndarray, group: np.ndarray, max_blocks: int = MAX_BLOCKS) -> Blocks:
    """Make blocks: halve each group of each section at the median of its longer side until there are ``max_blocks``."""
    n = len(xy)
    if n <= max_blocks:
        return Blocks(xy, section, np.arange(n), np.ones(n))
    parts = [
        np.flatnonzero((section == code) & (group == side)) for code in np.unique(section) for side in (False, True)
    ]
    parts = _halve([part for part in parts if len(part)], xy, max_blocks)
    size = np.array([len(part) for part in parts])
    of_spot = np.empty(n, int)
    of_spot[np.concatenate(parts)] = np.repeat(np.arange(len(parts)), size)
    return Blocks(xy, section, of_spot, size.astype(float))


def _halve(parts: list[np.ndarray], xy: np.ndarray, n: int) -> list[np.ndarray]:
    """Halve the largest part at the median of its longer side until there are ``n`` parts."""
    while len(parts) < n:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts.pop(largest)
        axis = int(np.ptp(xy[part], axis=0).argmax())
        part = part[np.argsort(xy[part, axis], kind="stable")]
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def correlations(blocks: Blocks) -> Iterator[np.ndarray]:
    """Yield correlation matrices ``(m, m)`` of the fixed grid in the basis of blocks; sections are uncorrelated.

    Ranges are a geometric sequence from half the pitch (anisotropic: the pitch) to the side of the tissue (Gaussian: four
    sides): the side of a square with the second moments of the largest section.
    """
    sections = [blocks.xy[blocks.section == code] for code in np.unique(blocks.section)]
    nearest = [cKDTree(xy).query(xy, k=2)[0][:, 1] for xy in sections if len(xy) > 1]
    pitch = float(np.median(np.concatenate(nearest)))
    side = max(float(np.sqrt(6 * np.var(xy, axis=0).sum())) for xy in sections)
    parts = _Parts(blocks)
    for ratio, families in _GRID.items():
        shortest = pitch / 2 if ratio == 1 else pitch
        for turn in range(1 if ratio == 1 else _DIRECTIONS):
            angle = np.pi * turn / _DIRECTIONS
            along = np.array([np.cos(angle), np.sin(angle)]) / np.sqrt(ratio)
            across = np.array([-np.sin(angle), np.cos(angle)]) * np.sqrt(ratio)
            distances = _Distances(blocks, parts, np.column_stack([along, across]))
            for family, n_ranges, longest in families:
                for length_scale in np.geomspace(shortest, max(longest * side, shortest), n_ranges):
                    yield distances.correlation(family, length_scale)


class _Parts:
    """Parts of the blocks, each at its centre, and all pairs of spots within a block."""

    def __init__(self, blocks: Blocks):
        order = np.argsort(blocks.of_spot, kind="stable")
        members = np.split(order, np.cumsum(blocks.size).astype(int)[:-1])
        cut = [_halve([part], blocks.xy, min(len(part), _PARTS)) for part in members]
        self.xy = np.array([blocks.xy[spots].mean(0) for parts in cut for spots in parts])
        self.counts = np.array([len(parts) for parts in cut])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        sizes: np.ndarray = np.array([len(spots) for parts in cut for spots in parts], float)
        self.weight = sizes / np.repeat(blocks.size, self.counts)
        section = blocks.section[[part[0] for part in members]]
        self.other_section = section[:, None] != section
        inside = [np.array(np.meshgrid(part, part)).reshape(2, -1) for part in members]
        self.first, self.second = np.concatenate(inside, axis=1)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of values ``(k, parts)`` over the parts of each block."""
        return np.add.reduceat(values * self.weight, self.starts, axis=1)


class _Distances:
    """Distances between blocks after stretching the plane: two distances for far pairs, those of all parts for near pairs."""

    def __init__(self, blocks: Blocks, parts: _Parts, stretch: np.ndarray):
        self.root, self.other_section = np.sqrt(blocks.size), parts.other_section
        xy, m = parts.xy @ stretch, len(blocks.size)
        mean, square = np.empty((m, m)), np.empty((m, m))
        for block, (start, count) in enumerate(zip(parts.starts, parts.counts, strict=True)):
            own = slice(start, start + count)
            distance = cdist(xy[own], xy)
            mean[block] = parts.weight[own] @ parts.mean(distance)
            square[block] = parts.weight[own] @ parts.mean(np.square(distance))
        spread = np.sqrt(np.maximum(square - np.square(mean), 0))
        self.nodes = [mean - spread, mean + spread] if spread.any() else [mean]
        self.near = i, j = np.nonzero(np.triu((spread > _FAR * mean) & ~parts.other_section, 1))
        pairs = parts.counts[i] * parts.counts[j]
        self.near_starts = (np.cumsum(pairs) - pairs).astype(int)
        index = np.arange(pairs.sum()) - np.repeat(self.near_starts, pairs)
        first, second = np.divmod(index, np.repeat(parts.counts[j], pairs))
        first, second = first + np.repeat(parts.starts[i], pairs), second + np.repeat(parts.starts[j], pairs)
        self.near_distance = np.linalg.norm(xy[first] - xy[second], axis=1).astype(np.float32)
        self.near_weight = (parts.weight[first] * parts.weight[second]).astype(np.float32)
        spots = blocks.xy @ stretch
        self.inside = np.linalg.norm(spots[parts.first] - spots[parts.second], axis=1)
        self.inside_starts = np.concatenate([[0], np.cumsum(blocks.size**2)[:-1]]).astype(int)

    def correlation(self, family: str, length_scale: float) -> np.ndarray:
        """Correlation matrix in the basis of blocks, ``(m, m)``."""
        between = np.mean([_correlation(family, node / length_scale) for node in self.nodes], axis=0)
        if len(self.near_starts):
            i, j = self.near
            near = _correlation(family, self.near_distance / np.float32(length_scale)) * self.near_weight
            between[i, j] = between[j, i] = np.add.reduceat(near, self.near_starts)
        between *= self.root[:, None] * self.root
        between[self.other_section] = 0
        inside = _correlation(family, self.inside / length_scale)
        np.fill_diagonal(between, np.add.reduceat(inside, self.inside_starts) / np.square(self.root))
        return between


def _correlation(family: str, distance: np.ndarray) -> np.ndarray:
    """Correlation at a distance in units of the range; ``matern`` has smoothness 3/2."""
    if family == "exponential":
        return np.exp(-distance)
    if family == "gaussian":
        return np.exp(-np.square(distance))
    scaled = distance * distance.dtype.type(np.sqrt(3))
    return (1 + scaled) * np.exp(-scaled)
