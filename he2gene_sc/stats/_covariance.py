"""Spatial covariances of spots in blocks, and how likely each of them makes a gene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Up to so many spots each is a block of its own and the restricted likelihood is exact.
MAX_BLOCKS = 500
#: Spots that stand for a block in its correlation with other blocks.
_REPRESENTATIVES = 4
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
#: Pairs of more spots than this are computed in single precision.
_MAX_DOUBLE = 1000
_DIRECTIONS = 4


@dataclass(frozen=True)
class Blocks:
    """Spots of one section and one group, a few neighbours to a block; columns of the basis are ``1/sqrt(size)``.

    Label and sections are constant in a block, so what their test needs of a covariance lives in this basis exactly.
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
    parts = [part for part in parts if len(part)]
    while len(parts) < max_blocks:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts.pop(largest)
        axis = int(np.ptp(xy[part], axis=0).argmax())
        part = part[np.argsort(xy[part, axis], kind="stable")]
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    of_spot = np.empty(n, int)
    for code, part in enumerate(parts):
        of_spot[part] = code
    return Blocks(xy, section, of_spot, np.bincount(of_spot).astype(float))


def correlations(blocks: Blocks) -> Iterator[np.ndarray]:
    """Correlation matrices of the fixed grid, in the basis of blocks.

    Ranges run geometrically from half the pitch (anisotropic: the pitch) to the side of the tissue (Gaussian: four
    sides): the pitch is the median distance of a spot to its nearest neighbour, the side that of a square with the
    second moments of the largest section. Spots of different sections do not correlate.

    Yields
    ------
    numpy.ndarray
        ``(m, m)``.
    """
    from scipy.spatial import cKDTree

    sections = [blocks.xy[blocks.section == code] for code in np.unique(blocks.section)]
    nearest = [cKDTree(xy).query(xy, k=2)[0][:, 1] for xy in sections if len(xy) > 1]
    pitch = float(np.median(np.concatenate(nearest)))
    side = max(float(np.sqrt(6 * np.var(xy, axis=0).sum())) for xy in sections)
    pairs = _Pairs(blocks)
    for family, n_ranges, longest, ratio in _GRID:
        shortest = pitch / 2 if ratio == 1 else pitch
        for reach in np.geomspace(shortest, max(longest * side, shortest), n_ranges):
            for turn in range(1 if ratio == 1 else _DIRECTIONS):
                angle = np.pi * turn / _DIRECTIONS
                along = np.array([np.cos(angle), np.sin(angle)]) / np.sqrt(ratio)
                across = np.array([-np.sin(angle), np.cos(angle)]) * np.sqrt(ratio)
                yield pairs.correlation(family, blocks.xy @ np.column_stack([along, across]) / reach)


class _Pairs:
    """Pairs of spots whose correlation makes that of two blocks: a few spots a block, all within a block."""

    def __init__(self, blocks: Blocks):
        order = np.argsort(blocks.of_spot, kind="stable")
        ends = np.cumsum(blocks.size).astype(int)
        members = np.split(order, ends[:-1])
        chosen = [
            part[np.linspace(0, len(part) - 1, min(len(part), _REPRESENTATIVES)).round().astype(int)]
            for part in members
        ]
        self.spots = np.concatenate(chosen)
        counts = np.array([len(part) for part in chosen])
        self.starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.weight = np.sqrt(blocks.size) / counts
        section = blocks.section[[part[0] for part in members]]
        self.apart = section[:, None] != section
        self.size = blocks.size
        inside = [np.array(np.meshgrid(part, part)).reshape(2, -1) for part in members]
        self.first, self.second = np.concatenate(inside, axis=1)

    def correlation(self, family: str, xy: np.ndarray) -> np.ndarray:
        from scipy.spatial.distance import cdist

        distance = cdist(xy[self.spots], xy[self.spots])
        between = _correlation(family, distance.astype(np.float32) if len(self.spots) > _MAX_DOUBLE else distance)
        if len(self.spots) > len(self.size):
            between = np.add.reduceat(np.add.reduceat(between, self.starts, axis=0), self.starts, axis=1)
        between = between.astype(np.float64)
        between *= self.weight[:, None] * self.weight
        between[self.apart] = 0
        within = _correlation(family, np.linalg.norm(xy[self.first] - xy[self.second], axis=1))
        starts = np.concatenate([[0], np.cumsum(self.size**2)[:-1]]).astype(int)
        np.fill_diagonal(between, np.add.reduceat(within, starts) / self.size)
        return between


def _correlation(family: str, distance: np.ndarray) -> np.ndarray:
    """Correlation at a distance in units of the range; ``matern`` is that of smoothness 3/2."""
    if family == "exponential":
        return np.exp(-distance)
    if family == "gaussian":
        return np.exp(-np.square(distance))
    scaled = distance * distance.dtype.type(np.sqrt(3))
    return (1 + scaled) * np.exp(-scaled)
