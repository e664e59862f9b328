"""Held-out predictions in short: what figures, calibration and the reliability rule are computed from, and given depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stats import pearson
from ..stats._accuracy import centred
from ._calibrate import Calibration


@dataclass(frozen=True)
class Panel:
    """Held-out predictions of one section for the genes that metrics are taken of."""

    target: np.ndarray  # positions of genes
    variable: np.ndarray
    predicted: np.ndarray  # (n, target + variable), centred within parts
    measured: np.ndarray  # the same; NaN where not measured

    def scores(self) -> tuple[float, float]:
        """Mean correlation over target and over variable genes; constant genes count as 0, unmeasured ones not."""
        target, variable = self.means(np.nan_to_num(pearson(self.predicted, self.measured)))
        return float(target), float(variable)

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of something of each gene, ``(..., genes)``, over the target and the variable genes that were measured."""
        known, n = ~np.any(np.isnan(self.measured), axis=0), len(self.target)
        return values[..., :n][..., known[:n]].mean(-1), values[..., n:][..., known[n:]].mean(-1)


@dataclass(frozen=True)
class HeldOut:
    """How held-out spots were predicted, each by a model that has not seen its group.

    In a section held out in parts, correlations are within parts: a model's mean is too high where the part is low.
    """

    pcc: np.ndarray  # (sections, g) NaN where constant or not measured
    given: np.ndarray  # the same, partial given counts, see Depth
    skill: np.ndarray  # (g,) against the training mean; NaN where that is right everywhere
    panel: tuple[Panel, ...]  # by section; genes chosen on the spots trained on
    logits: tuple[np.ndarray, ...]  # by section (n, c) before calibration; NaN without labels
    parts: tuple[np.ndarray, ...]  # by section (n,) codes
    calibration: Calibration | None = None
    programmes: np.ndarray | None = None  # (2, sections, sets) correlations of scores, plain and given depth


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


def standardised(values: np.ndarray) -> np.ndarray:
    """Numbers of the spots of a section ``(n, k)`` with mean 0 and SD 1, float32; 0 where they do not vary."""
    left, varies = centred(values)
    return np.where(varies, left / np.where(varies, left.std(0), 1), 0).astype(np.float32)


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
