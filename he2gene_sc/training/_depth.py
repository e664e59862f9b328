"""What is left of a correlation given the number of counts of each spot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stats import pearson

#: Rounding error of a mean, relative to it, beyond which a value differs from it.
_DUST = 1e-12
#: Length of what is left, relative to what was there, below which it is rounding.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Depth:
    """The span of a cubic of the log counts of the spots of one section.

    Sparse expression follows depth even without a pattern, and an image shows where there is much RNA.
    """

    axes: np.ndarray  # (n, 3) or fewer, orthonormal, without the mean

    @classmethod
    def of(cls, totals: np.ndarray, parts: np.ndarray) -> Depth:
        """Read the counts of each spot, ``(n,)``; within parts where several were held out in turn."""
        depth = np.log(totals)
        depth = (depth - depth.mean()) / max(depth.std(), np.finfo(float).tiny)
        powers = np.vander(depth, 4)[:, :3]
        powers = within(powers, parts) if len(np.unique(parts)) > 1 else powers - powers.mean(0)
        axes, sizes, _ = np.linalg.svd(powers, full_matrices=False)
        return cls(axes[:, sizes > 1e-9 * max(sizes.max(initial=0), np.finfo(float).tiny)])

    def rest(self, values: np.ndarray) -> np.ndarray:
        """Take mean and depth off each column."""
        values = values.astype(np.float64)
        values = values - values.mean(0)
        rest = values - self.axes @ (self.axes.T @ values)
        # Of what depth says whole, rounding is left.
        return rest * (np.linalg.norm(rest, axis=0) > _NOTHING * np.linalg.norm(values, axis=0))

    def partial(self, predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Partial correlation of each column, ``(n, g)`` twice to ``(g,)``; NaN where one of both is constant or NaN."""
        return pearson(self.rest(predicted), self.rest(measured))


def within(values: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Take the mean of each part off its spots, ``(n, g)``; a section that was held out whole stays as it is, as NaN does."""
    names = np.unique(parts)
    if len(names) == 1:
        return values
    values = values.astype(np.float64)
    for name in names:
        here = parts == name
        mean = values[here].mean(0)
        left = values[here] - mean
        left[np.abs(left) <= _DUST * np.abs(mean)] = 0
        values[here] = left
    return values
