"""Held-out predictions in short: what figures, calibration and the reliability rule are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stats import pearson
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
