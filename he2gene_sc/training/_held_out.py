"""Summaries of held-out predictions, for metrics, calibration and the reliability rule; partial correlation given depth."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..stats import pearson
from ..stats._accuracy import centre_columns
from ._calibrate import Calibration


@dataclass(frozen=True)
class Panel:
    """Held-out predictions of one section for the genes of both panels."""

    target: np.ndarray  # positions of the target genes
    variable: np.ndarray
    predicted: np.ndarray  # (n, target + variable), centred by part
    measured: np.ndarray  # same shape and centring; NaN if not measured

    @property
    def genes(self) -> np.ndarray:
        """Positions of all genes."""
        return np.concatenate([self.target, self.variable])

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean correlation of target and of variable genes; constant genes count as 0, unmeasured ones are left out."""
        return self.means(np.nan_to_num(pearson(self.predicted, self.measured)))

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return means of values ``(..., genes)`` over the target and over the variable genes that were measured."""
        measured, n = ~np.any(np.isnan(self.measured), axis=0), len(self.target)
        return values[..., :n][..., measured[:n]].mean(-1), values[..., n:][..., measured[n:]].mean(-1)


@dataclass(frozen=True)
class HeldOut:
    """Accuracy of held-out predictions, each by a model that was not trained on the group of the spot.

    In a section that is held out in parts, values are centred by part: the mean of a model is too high where the part is low.
    """

    pcc: np.ndarray  # (sections, g); NaN if constant or not measured
    pcc_given_depth: np.ndarray  # (sections, g) partial correlation given counts, see Depth
    skill: np.ndarray  # (g,) relative to the training mean; NaN if that has no error
    panel: tuple[Panel, ...]  # per section; genes are chosen on the training spots
    logits: tuple[np.ndarray, ...]  # per section (n, c) before calibration; NaN without labels
    parts: tuple[np.ndarray, ...]  # per section (n,) codes
    calibration: Calibration | None = None
    #: (2, sections, sets) correlations of the scores of gene sets, plain and given depth
    programmes: np.ndarray = field(default_factory=lambda: np.empty((2, 0, 0)))


#: Largest difference from a mean, relative to it, that is taken as rounding error.
_ROUNDING = 1e-12
#: Length of a residual, relative to the values, below which it is rounding error.
_MIN_RESIDUAL = 1e-6


@dataclass(frozen=True)
class Depth:
    """Linear span of a cubic in the log counts of the spots of one section.

    Sparse expression follows depth even without a spatial pattern, and the image shows where there is much RNA.
    """

    axes: np.ndarray  # (n, 3) or fewer, orthonormal, without the mean

    @classmethod
    def fit(cls, totals: np.ndarray, parts: np.ndarray) -> Depth:
        """Fit the span to counts ``(n,)``, centred by part if several parts were held out in turn."""
        depth = np.log(totals)
        depth = (depth - depth.mean()) / max(depth.std(), np.finfo(float).tiny)
        powers = np.vander(depth, 4)[:, :3]
        powers = centre_by_part(powers, parts) if len(np.unique(parts)) > 1 else powers - powers.mean(0)
        axes, sizes, _ = np.linalg.svd(powers, full_matrices=False)
        return cls(axes[:, sizes > 1e-9 * max(sizes.max(initial=0), np.finfo(float).tiny)])

    def residual(self, values: np.ndarray) -> np.ndarray:
        """Subtract the mean and the effect of depth from each column."""
        values = values.astype(np.float64)
        values -= values.mean(0)
        residual = values - self.axes @ (self.axes.T @ values)
        # If depth explains a column entirely, the residual is rounding error.
        return residual * (np.linalg.norm(residual, axis=0) > _MIN_RESIDUAL * np.linalg.norm(values, axis=0))

    def partial(self, predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Return partial correlations of the columns of ``(n, g)`` and ``(n, g)``, ``(g,)``; NaN if one is constant or NaN."""
        return pearson(self.residual(predicted), self.residual(measured))


def standardise(values: np.ndarray) -> np.ndarray:
    """Scale values of the spots of a section ``(n, k)`` to mean 0 and SD 1, float32; constant columns become 0."""
    centred_values, varies = centre_columns(values)
    return np.where(varies, centred_values / np.where(varies, centred_values.std(0), 1), 0).astype(np.float32)


def centre_by_part(values: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Subtract the mean of each part from its spots, ``(n, g)``; a section with one part is returned unchanged; NaN is kept."""
    names = np.unique(parts)
    if len(names) == 1:
        return values
    values = values.astype(np.float64)
    for name in names:
        here = parts == name
        mean = values[here].mean(0)
        centred_values = values[here] - mean
        values[here] = np.where(np.abs(centred_values) <= _ROUNDING * np.abs(mean), 0, centred_values)
    return values
