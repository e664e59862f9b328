"""Contrasts of a group of spots with a reference: sums and means in each sample, of expression, raw counts and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from ..._core.spots import SpotData
from ...stats import CountSums
from .design import Design, pair_design

#: Fewest spots of a group for a mean in a sample, and fewest spots of a group over all samples.
MIN_SPOTS = 3
#: Fewest spots for a separate slope of a sample.
_MIN_SLOPE = 20


def sum_sides(cells: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Sum cells ``(samples, labels, …)`` over the labels of each side ``(2, labels)``: ``(2, samples, …)``."""
    return np.array([cells[:, side].sum(1) for side in sides])


@dataclass(frozen=True)
class DepthCells:
    """Sums of x (log depth of a spot), x², and x times log expression, over the spots of every label in every sample."""

    sums: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    def effects(
        self, sides: np.ndarray, spots: np.ndarray, sums: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Effect of depth on the difference of each sample ``(n, g)``, on its variance ``(n,)``, and on both means ``(2, n, g)``.

        Each sample has its own slope within groups, so the errors of the slopes are part of the variance between samples.
        The effect on a mean is relative to the mean depth of all spots, and samples with fewer than 20 spots use the common slope.
        """
        x, xx, xy = (sum_sides(part, sides) for part in (self.sums, self.squares, self.products))
        mean = x / np.maximum(spots, 1)
        spread = (xx - mean * x).sum(0)
        shared = (xy - mean[..., None] * sums).sum(0)
        gap = mean[0] - mean[1]
        varies = spread > 1e-9 * np.maximum(xx.sum(0), 1e-300)
        divisor = np.where(varies, spread, 1)
        slope = np.where(varies[:, None], shared / divisor[:, None], 0)
        variance = np.where(varies, np.square(gap) / divisor, np.where(np.abs(gap) > 1e-9, np.inf, 0.0))
        common = shared.sum(0) / spread.sum() if spread.sum() > 1e-9 * xx.sum() else np.zeros(shared.shape[1])
        own = varies & (spots.sum(0) >= _MIN_SLOPE)
        return gap[:, None] * slope, variance, mean[..., None] * np.where(own[:, None], slope, common)


@dataclass(frozen=True)
class Cells:
    """Sums over the spots of every label in every sample, ``(samples, labels, g)`` float64."""

    pool: SpotData
    samples: np.ndarray
    labels: np.ndarray
    counts: np.ndarray  # (samples, labels) number of spots
    sums: np.ndarray  # sums of logarithms
    squares: np.ndarray | None = None  # sums of squared logarithms
    detected: np.ndarray | None = None  # number of spots where a gene is not 0
    raw: CountSums | None = None
    depth: np.ndarray | None = None  # (n,) log depth of the spots
    by_depth: DepthCells | None = None

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
        code, n = sample * shape[1] + label, shape[0] * shape[1]
        transforms: dict[str, Callable[[Any], Any]] = {"sums": np.asarray}
        if squares:
            transforms["squares"] = lambda values: np.square(values, dtype=np.float64)
        if detected:
            transforms["detected"] = lambda values: (values != 0).astype(np.float32)
        x = None if depth is None or raw else depth - depth.mean()
        sums = pool.sums(code, n, *transforms.values(), weights=x)
        counted = pool.count_sums(code, n, depth) if raw else None
        sums = sums.reshape(len(sums), *shape, -1)

        def sum_spots(weights: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(code, weights, n).reshape(shape)

        raw_sums = None
        if counted is not None:
            y, yy, yd = counted[0].reshape(3, *shape, -1)
            d, dd = counted[1].reshape(2, *shape)
            raw_sums = CountSums(y, yy, yd, sum_spots(), d, dd)
        return cls(
            pool,
            samples,
            labels,
            sum_spots(),
            raw=raw_sums,
            depth=depth,
            by_depth=None if x is None else DepthCells(sum_spots(x), sum_spots(np.square(x)), sums[-1]),
            **dict(zip(transforms, sums[: len(transforms)], strict=True)),
        )

    def sides(self, group: str, reference: str) -> np.ndarray:
        """Masks ``(2, labels)`` of a group and of its reference; ``"rest"``: all other labels."""
        inside = self.labels == group
        return np.array([inside, ~inside if reference == "rest" else self.labels == reference])


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
    design: Design
    spot_variance: np.ndarray | None = None  # (g,) within group and sample
    measured: Contrast | None = None  # contrast of measured values
    raw: CountSums | None = None
    adjustment: np.ndarray | None = None
    depth_variance: np.ndarray | None = None
    depth: np.ndarray | None = None  # (n,) log depth
    shift: np.ndarray | None = None  # effect of depth on the means

    @classmethod
    def from_cells(
        cls, cells: Cells, group: str, reference: str, design: Design, measured: Contrast | None = None
    ) -> Contrast:
        """Contrast a label with another, or with all others (``"rest"``)."""
        sides = cells.sides(group, reference)
        counts, sums = sum_sides(cells.counts, sides), sum_sides(cells.sums, sides)
        enough = counts >= MIN_SPOTS
        paired = np.all(enough, axis=0)
        more: dict[str, Any] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(enough[..., None], sums / counts[..., None], np.nan)
            pooled = sums.sum(1) / counts.sum(1)[:, None]
        if cells.squares is not None:
            squares = sum_sides(cells.squares, sides)
            residual_squares = (squares - np.square(sums) / np.maximum(counts, 1)[..., None]).sum((0, 1))
            more["spot_variance"] = residual_squares / max(counts.sum() - (counts > 0).sum(), 1)
        if cells.raw is not None:
            parts = (getattr(cells.raw, field.name) for field in fields(cells.raw))
            more["raw"] = CountSums(*(sum_sides(part, sides)[:, paired] for part in parts))
        if cells.by_depth is not None:
            adjustment, variance, more["shift"] = cells.by_depth.effects(sides, counts, sums)
            more |= {"adjustment": adjustment[paired], "depth_variance": variance[paired]}
        pool = cells.pool
        inside = pool.labels == group
        outside = ~inside if reference == "rest" else pool.labels == reference
        return cls(
            *(pool, pool.genes, cells.samples, inside, outside, means, counts, pooled, design),
            measured=measured,
            depth=cells.depth,
            **more,
        )

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

        def kept(part: Any, *names: str) -> dict[str, Any]:
            arrays = {name: getattr(part, name) for name in names}
            return {name: array[..., genes] for name, array in arrays.items() if array is not None}

        return replace(
            self,
            genes=self.genes[genes],
            measured=None if self.measured is None else self.measured.keep(genes),
            raw=None if self.raw is None else replace(self.raw, **kept(self.raw, "counts", "squares", "by_depth")),
            **kept(self, "means", "pooled_means", "spot_variance", "adjustment", "shift"),
        )
