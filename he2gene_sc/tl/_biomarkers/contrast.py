"""Contrasts of a group of spots with a reference: means in each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.spots import SpotData
from .design import Design
from .sums import CountCells, DepthCells, keep_genes, pair_design

if TYPE_CHECKING:
    from ...stats import CountSums

#: Fewest spots of a group for a mean in a sample, and fewest spots of a group over all samples.
MIN_SPOTS = 3


@dataclass(frozen=True)
class Cells:
    """Sums over the spots of every label in every sample, ``(samples, labels, g)`` float64."""

    samples: np.ndarray
    labels: np.ndarray
    counts: np.ndarray  # (samples, labels) number of spots
    sums: np.ndarray  # sums of logarithms
    squares: np.ndarray | None = None  # sums of squared logarithms
    detected: np.ndarray | None = None  # number of spots where a gene is not 0
    raw: CountCells | None = None
    depth: DepthCells | None = None

    @classmethod
    def from_spots(
        cls,
        pool: SpotData,
        *,
        squares: bool = False,
        detected: bool = False,
        raw: bool = False,
        depth: np.ndarray | None = None,
    ) -> Cells:
        """Sum over the spots of a pool in one pass."""
        samples, sample = np.unique(pool.samples.astype(str), return_inverse=True)
        labels, label = np.unique(pool.labels.astype(str), return_inverse=True)
        shape = (len(samples), len(labels))
        code = sample * shape[1] + label
        transforms: dict[str, Callable[[Any], Any]] = {"sums": np.asarray}
        if squares:
            transforms["squares"] = lambda values: np.square(values, dtype=np.float64)
        if detected:
            transforms["detected"] = lambda values: (values != 0).astype(np.float32)
        sums = pool.sums(code, shape[0] * shape[1], *transforms.values())
        counts = np.bincount(code, minlength=shape[0] * shape[1]).reshape(shape)
        return cls(
            samples,
            labels,
            counts,
            raw=CountCells.from_spots(pool, code, shape, depth) if raw else None,
            depth=None if depth is None or raw else DepthCells.from_spots(pool, depth, code, shape),
            **dict(zip(transforms, sums.reshape(len(transforms), *shape, -1), strict=True)),
        )

    def side(self, labels: Sequence[str] | np.ndarray, name: str = "sums") -> tuple[np.ndarray, np.ndarray]:
        """Return sums ``(samples, g)`` and counts ``(samples,)`` over several labels."""
        chosen = np.isin(self.labels, list(labels))
        return getattr(self, name)[:, chosen].sum(1), self.counts[:, chosen].sum(1)


@dataclass(frozen=True)
class Contrast:
    """Means of one group and of its reference in every sample."""

    pool: SpotData
    genes: pd.Index
    samples: np.ndarray
    inside: np.ndarray  # (n,) bool, spots of the group
    outside: np.ndarray  # (n,) bool, spots of the reference
    means: np.ndarray  # (2, samples, g), group first; NaN below three spots
    counts: np.ndarray  # (2, samples)
    pooled_means: np.ndarray
    design: Design = field(default_factory=Design)
    spot_variance: np.ndarray | None = None  # (g,) within group and sample
    measured: Contrast | None = None  # contrast of measured values
    raw: CountSums | None = None
    adjustment: np.ndarray | None = None
    depth_variance: np.ndarray | None = None
    depth: np.ndarray | None = None  # (n,) log depth
    shift: np.ndarray | None = None  # effect of depth on the means

    @classmethod
    def from_cells(
        cls, pool: SpotData, cells: Cells, genes: pd.Index, group: str, reference: str, **more: Any
    ) -> Contrast:
        """Contrast a label with another, or with all others (``"rest"``)."""
        others = [label for label in cells.labels if label != group] if reference == "rest" else [reference]
        sides = [cells.side([group]), cells.side(others)]
        counts = np.array([count for _, count in sides])
        sums = np.array([total for total, _ in sides])
        enough = counts >= MIN_SPOTS
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(enough[..., None], sums / counts[..., None], np.nan)
            pooled = sums.sum(1) / counts.sum(1)[:, None]
        if cells.squares is not None:
            squares = np.array([cells.side(side, "squares")[0] for side in ([group], others)])
            residual_squares = (squares - np.square(sums) / np.maximum(counts, 1)[..., None]).sum((0, 1))
            more["spot_variance"] = residual_squares / max(counts.sum() - (counts > 0).sum(), 1)
        masks = [np.isin(cells.labels, side) for side in ([group], others)]
        paired = np.all(enough, axis=0)
        if cells.raw is not None:
            more["raw"] = cells.raw.pairs(masks, counts, paired)
        if cells.depth is not None:
            more["adjustment"], more["depth_variance"] = cells.depth.adjust(masks, counts, sums, paired)
            more["shift"] = cells.depth.shift(masks, counts, sums)
        inside = pool.labels == group
        return cls(pool, genes, cells.samples, inside, np.isin(pool.labels, others), means, counts, pooled, **more)

    @property
    def paired(self) -> np.ndarray:
        """Samples that have both groups, ``(samples,)`` bool."""
        return np.all(self.counts >= MIN_SPOTS, axis=0)

    @property
    def differences(self) -> np.ndarray:
        """Mean of the group minus that of the reference in every paired sample, ``(paired, g)``, adjusted for depth."""
        gap = self.means[0, self.paired] - self.means[1, self.paired]
        return gap if self.adjustment is None else gap - self.adjustment

    @property
    def mean(self) -> np.ndarray:
        """Mean ``(g,)`` over all spots of both groups. Independent of the group difference under the null, so it may filter genes."""
        return np.average(self.pooled_means, axis=0, weights=self.counts.sum(1))

    @property
    def matrix(self) -> tuple[np.ndarray, int]:
        """Design of the differences ``(paired, p)`` and the index of the tested column."""
        return pair_design(self.pool, self.samples[self.paired], (self.inside, self.outside), self.design)

    def fold_changes(self, effect: np.ndarray) -> np.ndarray:
        """log2 fold changes of expression for an effect at the mean of both groups; NaN if the mean is below 0."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            middle = self.mean if self.paired.sum() < 2 else self.means[:, self.paired].mean((0, 1))
            low = middle - np.abs(effect) / 2
            exact = np.sign(effect) * np.log2(np.expm1(low + np.abs(effect)) / np.expm1(low))
            # If the adjusted effect would take a mean below 0, use the slope of the logarithm.
            return np.where(low > 0, exact, np.where(middle > 0, effect / -np.expm1(-middle) / np.log(2), np.nan))

    @property
    def pooled_fold_changes(self) -> np.ndarray:
        """log2 fold changes as scanpy computes them, from the means of the logarithms over all spots; NaN below 0."""
        above, below = np.expm1(self.pooled_means) + 1e-9
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((above > 0) & (below > 0), np.log2(above / below), np.nan)

    def keep(self, genes: np.ndarray) -> Contrast:
        """Keep the genes of a mask ``(g,)``."""
        return replace(
            self,
            genes=self.genes[genes],
            means=self.means[..., genes],
            pooled_means=self.pooled_means[:, genes],
            spot_variance=None if self.spot_variance is None else self.spot_variance[genes],
            measured=None if self.measured is None else self.measured.keep(genes),
            raw=None if self.raw is None else keep_genes(self.raw, genes),
            adjustment=None if self.adjustment is None else self.adjustment[:, genes],
            shift=None if self.shift is None else self.shift[..., genes],
        )
