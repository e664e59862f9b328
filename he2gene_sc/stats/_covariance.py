"""Spatial covariances of spots in blocks, and how likely each of them makes a gene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Up to so many spots each is a block of its own and the restricted likelihood is exact.
MAX_BLOCKS = 500
#: Parts that a block has in its correlation with other blocks, each at its centre: up to so many spots it is exact.
_PARTS = 16
#: Pairs of blocks whose distances have a coefficient of variation of at most this are seen at two distances, mean ± SD:
#: an exponential is then met to 3e-4 whatever its range. Of the other, nearer, pairs all parts are.
_FAR = 0.2
#: Field to white noise, as a ratio of variances: from nearly white to nearly none.
ODDS = np.geomspace(0.02, 1000, 25)
#: Families, numbers of ranges, the longest in sides of the tissue, and anisotropy (ratio of the ranges along and across).
#: A Gaussian field of four sides is a linear trend. Smooth stretched fields need a smooth stretched family: rough and Gaussian
#: ones alone misjudge the difference between rim and core.
_GRID = (
    ("exponential", 9, 1, 1),
    ("matern", 15, 1, 1),
    ("gaussian", 20, 4, 1),
    ("exponential", 6, 1, 3),
    ("matern", 6, 1, 3),
    ("gaussian", 6, 1, 3),
    ("matern", 6, 1, 6),
)
_DIRECTIONS = 4


@dataclass(frozen=True)
class Blocks:
    """Spots of one section and one group, a few neighbours to a block; columns of the basis are ``1/sqrt(size)``.

    Label and sections are constant in a block, so the basis holds exactly what their test needs of a covariance.
    """

    xy: np.ndarray  #: (n, 2) positions
    section: np.ndarray  #: (n,) integer codes
    of_spot: np.ndarray  #: (n,) block of each spot
    size: np.ndarray  #: (m,) spots in a block

    def project(self, values: np.ndarray) -> np.ndarray:
        """``(n, g)`` values in the basis of blocks, ``(m, g)``."""
        order = np.argsort(self.of_spot, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.size)[:-1]]).astype(int)
        return np.add.reduceat(values[order], starts, axis=0) / np.sqrt(self.size)[:, None]


def make_blocks(xy: np.ndarray, section: np.ndarray, group: np.ndarray, max_blocks: int = MAX_BLOCKS) -> Blocks:
    """Halve each group of each section at the median of its longer side until blocks are as small as allowed."""
    n = len(xy)
    if n <= max_blocks:
        return Blocks(xy, section, np.arange(n), np.ones(n))
    parts = [
        np.flatnonzero((section == code) & (group == side)) for code in np.unique(section) for side in (False, True)
    ]
    parts = _halved([part for part in parts if len(part)], xy, max_blocks)
    of_spot = np.empty(n, int)
    for code, part in enumerate(parts):
        of_spot[part] = code
    return Blocks(xy, section, of_spot, np.bincount(of_spot).astype(float))


def _halved(parts: list[np.ndarray], xy: np.ndarray, n: int) -> list[np.ndarray]:
    """Halve the largest part at the median of its longer side until there are ``n``."""
    while len(parts) < n:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts.pop(largest)
        axis = int(np.ptp(xy[part], axis=0).argmax())
        part = part[np.argsort(xy[part, axis], kind="stable")]
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def correlations(blocks: Blocks) -> Iterator[np.ndarray]:
    """Yield correlation matrices ``(m, m)`` of the fixed grid, in the basis of blocks; sections do not correlate.

    Ranges are geometric from half the pitch (anisotropic: the pitch) to the side of the tissue (Gaussian: four
    sides), that of a square with the second moments of the largest section.
    """
    from scipy.spatial import cKDTree

    sections = [blocks.xy[blocks.section == code] for code in np.unique(blocks.section)]
    nearest = [cKDTree(xy).query(xy, k=2)[0][:, 1] for xy in sections if len(xy) > 1]
    pitch = float(np.median(np.concatenate(nearest)))
    side = max(float(np.sqrt(6 * np.var(xy, axis=0).sum())) for xy in sections)
    parts = _Parts(blocks)
    ratios = list(dict.fromkeys(ratio for *_, ratio in _GRID))
    for ratio in ratios:
        for turn in range(1 if ratio == 1 else _DIRECTIONS):
            angle = np.pi * turn / _DIRECTIONS
            along = np.array([np.cos(angle), np.sin(angle)]) / np.sqrt(ratio)
            across = np.array([-np.sin(angle), np.cos(angle)]) * np.sqrt(ratio)
            distances = _Distances(blocks, parts, np.column_stack([along, across]))
            for family, n_ranges, longest, _ in (entry for entry in _GRID if entry[-1] == ratio):
                shortest = pitch / 2 if ratio == 1 else pitch
                for reach in np.geomspace(shortest, max(longest * side, shortest), n_ranges):
                    yield distances.correlation(family, reach)


class _Parts:
    """Blocks cut into a few parts, each at its centre, and all pairs of spots within a block."""

    def __init__(self, blocks: Blocks):
        order = np.argsort(blocks.of_spot, kind="stable")
        members = np.split(order, np.cumsum(blocks.size).astype(int)[:-1])
        cut = [_halved([part], blocks.xy, min(len(part), _PARTS)) for part in members]
        self.xy = np.array([blocks.xy[spots].mean(0) for parts in cut for spots in parts])
        self.counts = np.array([len(parts) for parts in cut])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        sizes: np.ndarray = np.array([len(spots) for parts in cut for spots in parts], float)
        self.weight = sizes / np.repeat(blocks.size, self.counts)
        section = blocks.section[[part[0] for part in members]]
        self.apart = section[:, None] != section
        inside = [np.array(np.meshgrid(part, part)).reshape(2, -1) for part in members]
        self.first, self.second = np.concatenate(inside, axis=1)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over the parts of each block, of ``(k, parts)`` values."""
        return np.add.reduceat(values * self.weight, self.starts, axis=1)


class _Distances:
    """Distances of blocks once the plane is stretched: two of far pairs, those of all parts of near ones."""

    def __init__(self, blocks: Blocks, parts: _Parts, stretch: np.ndarray):
        from scipy.spatial.distance import cdist

        self.root, self.apart = np.sqrt(blocks.size), parts.apart
        xy, m = parts.xy @ stretch, len(blocks.size)
        mean, square = np.empty((m, m)), np.empty((m, m))
        for block, (start, count) in enumerate(zip(parts.starts, parts.counts, strict=True)):
            own = slice(start, start + count)
            distance = cdist(xy[own], xy)
            mean[block] = parts.weight[own] @ parts.mean(distance)
            square[block] = parts.weight[own] @ parts.mean(np.square(distance))
        spread = np.sqrt(np.maximum(square - np.square(mean), 0))
        self.nodes = np.stack([mean - spread, mean + spread] if len(xy) > m else [mean])
        near = np.triu((spread > _FAR * mean) & ~parts.apart, 1) if len(xy) > m else np.zeros((m, m), bool)
        self.near = i, j = np.nonzero(near)
        pairs = parts.counts[i] * parts.counts[j]
        self.near_starts = (np.cumsum(pairs) - pairs).astype(int)
        within = np.arange(pairs.sum()) - np.repeat(self.near_starts, pairs)
        first, second = np.divmod(within, np.repeat(parts.counts[j], pairs))
        first, second = first + np.repeat(parts.starts[i], pairs), second + np.repeat(parts.starts[j], pairs)
        self.near_distance = np.linalg.norm(xy[first] - xy[second], axis=1).astype(np.float32)
        self.near_weight = (parts.weight[first] * parts.weight[second]).astype(np.float32)
        spots = blocks.xy @ stretch
        self.inside = np.linalg.norm(spots[parts.first] - spots[parts.second], axis=1)
        self.inside_starts = np.concatenate([[0], np.cumsum(blocks.size**2)[:-1]]).astype(int)

    def correlation(self, family: str, reach: float) -> np.ndarray:
        """Correlation matrix in the basis of blocks, ``(m, m)``."""
        between = np.mean([_correlation(family, node / reach) for node in self.nodes], axis=0)
        if len(self.near_starts):
            i, j = self.near
            near = _correlation(family, self.near_distance / np.float32(reach)) * self.near_weight
            between[i, j] = between[j, i] = np.add.reduceat(near, self.near_starts)
        between *= self.root[:, None] * self.root
        between[self.apart] = 0
        within = _correlation(family, self.inside / reach)
        np.fill_diagonal(between, np.add.reduceat(within, self.inside_starts) / np.square(self.root))
        return between


def _correlation(family: str, distance: np.ndarray) -> np.ndarray:
    """Correlation at a distance in units of the range; ``matern`` is that of smoothness 3/2."""
    if family == "exponential":
        return np.exp(-distance)
    if family == "gaussian":
        return np.exp(-np.square(distance))
    scaled = distance * distance.dtype.type(np.sqrt(3))
    return (1 + scaled) * np.exp(-scaled)
