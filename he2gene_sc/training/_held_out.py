"""Held-out predictions in short: what figures, calibration and the reliability rule are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..stats import pearson
from ._calibrate import Calibration


@dataclass(frozen=True)
class Panel:
    """Held-out predictions of one section for the genes that figures are taken of.

    Attributes
    ----------
    target, variable
        Positions of the genes.
    predicted, measured
        ``(n, len(target) + len(variable))``; measured is NaN for genes that the section did not measure. Of a section that
        was held out in parts, less the mean of each part.
    """

    target: np.ndarray
    variable: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray

    def scores(self) -> tuple[float, float]:
        """Mean correlation over the target genes and over the variable ones.

        A gene that is constant counts as 0, one that was not measured does not count.
        """
        target, variable = self.means(np.nan_to_num(pearson(self.predicted, self.measured)))
        return float(target), float(variable)

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of something of each gene, ``(..., genes)``, over the target and the variable genes that were measured."""
        known, n = ~np.any(np.isnan(self.measured), axis=0), len(self.target)
        return values[..., :n][..., known[:n]].mean(-1), values[..., n:][..., known[n:]].mean(-1)


@dataclass(frozen=True)
class HeldOut:
    """How held-out spots were predicted, each by a model that has not seen its group.

    Attributes
    ----------
    pcc
        ``(sections, g)``: Pearson correlation of each gene within each section; NaN where it is constant or was not
        measured. Of a section that was held out in parts, within the parts: a model's mean is too high where the part
        that it has not seen is low, and the other way round.
    given
        As ``pcc``, partial correlations given the counts of each spot, see :class:`he2gene_sc.training._depth.Depth`.
    skill
        ``(g,)`` against the training mean, over all held-out spots; NaN where that mean is right everywhere, as of a
        gene that was never seen.
    panel
        For each section the predicted and measured target genes, ``(n, n_target)`` each, and the same of the most
        variable genes; both panels were chosen on the spots that its model was trained on, of a section that was held
        out in parts, that of the first part.
    logits
        For each section ``(n, c)``, before calibration; NaN where the fold had no labels to learn from.
    parts
        For each section what each spot was held out with, ``(n,)`` codes.
    calibration
        Residuals in short, where they were asked for.
    """

    pcc: np.ndarray
    given: np.ndarray
    skill: np.ndarray
    panel: tuple[Panel, ...]
    logits: tuple[np.ndarray, ...]
    parts: tuple[np.ndarray, ...]
    calibration: Calibration | None = None
