"""``hg.pl.calibration``: whether intervals hold what they say, and probabilities too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._intervals import check_by, check_coverage, of_model
from .._keys import MADE, Keys
from .._predicted import predicted_layer
from .._tables import Scale, column_of, get_table, log_expression
from ._canvas import axes_for, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from ..models import HE2Gene

_COVERAGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
_N_BINS = 10


def calibration(
    data: SpatialData | AnnData,
    *,
    annotation_key: str | None = None,
    coverages: Sequence[float] = _COVERAGES,
    measured: str | None = None,
    measured_scale: Scale = "auto",
    by: Literal["annotation"] | None = "annotation",
    model: str | Path | HE2Gene | None = None,
    gene_symbols: str | None = None,
    key_added: str = "he2gene",
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the coverage of the intervals against what was asked for, and the reliability of the annotation.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, with measured counts.
    annotation_key
        Column of ``obs`` with known labels: adds the reliability diagram of the annotation (share of right classes in
        ten bins of the confidence).
    coverages
        Coverages to ask for.
    measured, measured_scale
        Layer of what was measured (``None``: ``X``), and what it holds, as in ``hg.tl.evaluate``.
    by, model, gene_symbols
        As in :func:`he2gene_sc.tl.intervals`.
    key_added, table_key
        As given to predict.
    ax
        Axes to draw in: one, or two with ``annotation_key``.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        The line is the mean over the genes that were predicted and measured, the band their 10th to 90th percentile.

    Raises
    ------
    ValueError
        If nothing was measured, the model has no calibration residuals, or a coverage lies outside what it keeps.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> ax = hg.pl.calibration(sdata)
    """
    check_by(by)
    for coverage in coverages:
        check_coverage(coverage, "coverages")
    table = get_table(data, table_key, key_added=key_added)
    keys = Keys(key_added)
    if measured is None and MADE in table.uns:
        raise ValueError("`data`: the table holds predictions only; counts are needed to compare with")
    layer = predicted_layer(table, key_added)
    bounds = [of_model(table, table.uns[keys.uns], model, c, by, gene_symbols, keys) for c in coverages]
    genes = np.flatnonzero(bounds[0].known)
    truth = log_expression(
        table,
        measured,
        genes=genes,
        scale=measured_scale,
        expected="counts",
        parameter="measured",
        scale_parameter="measured_scale",
    )
    predicted = np.asarray(table.layers[layer][:, genes], np.float32)
    rows = np.isfinite(predicted).all(1)
    covered = np.stack([_covered(found.ends(predicted, genes), truth, rows) for found in bounds])
    axes = axes_for(1 if annotation_key is None else 2, ax, ncols=2, panel=4.5)
    _draw_coverage(axes[0], np.asarray(coverages, float), covered)
    if annotation_key is not None:
        _draw_reliability(axes[1], table, annotation_key, keys)
    return finish(axes, save)


def _covered(ends: tuple[np.ndarray, np.ndarray], truth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    low, high = ends
    # What is at 0 is inside where the lower end was floored there.
    inside = (truth >= np.maximum(low, 0)) & (truth <= np.maximum(high, 0))
    return inside[rows].mean(0)


def _draw_coverage(ax: Axes, coverages: np.ndarray, covered: np.ndarray) -> None:
    order = np.argsort(coverages)
    low, high = np.quantile(covered, (0.1, 0.9), axis=1)
    ax.plot([0, 1], [0, 1], color="k", lw=0.8, ls="--", label="as asked for")
    ax.fill_between(coverages[order], low[order], high[order], color="#cfd8e3", lw=0, label="10th to 90th percentile")
    ax.plot(coverages[order], covered.mean(1)[order], marker="o", ms=4, label=f"mean over {covered.shape[1]:,} genes")
    ax.set(xlabel="coverage asked for", ylabel="coverage found", title="intervals", xlim=(0, 1), ylim=(0, 1.01))
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_reliability(ax: Axes, table: AnnData, annotation_key: str, keys: Keys) -> None:
    if keys.annotation not in table.obs:
        raise ValueError(f"`annotation_key`: the model has no annotation head, obs has no {keys.annotation!r}")
    classes = list(table.obsm[keys.proba].columns)
    known = column_of(table, annotation_key, "annotation_key").astype(object)
    usable = known.isin(classes).to_numpy() & table.obs[keys.annotation].notna().to_numpy()
    if not usable.any():
        raise ValueError(f"`annotation_key` {annotation_key!r} holds none of the classes of the model, {classes}")
    confidence = table.obs[keys.confidence].to_numpy(float)[usable]
    right = (table.obs[keys.annotation].astype(object) == known).to_numpy()[usable]
    bins = np.minimum((confidence * _N_BINS).astype(int), _N_BINS - 1)
    there = np.unique(bins)
    x, y = (np.array([values[bins == b].mean() for b in there]) for values in (confidence, right))
    size = np.array([(bins == b).sum() for b in there])
    ax.plot([0, 1], [0, 1], color="k", lw=0.8, ls="--")
    ax.plot(x, y, color="#1f77b4", lw=0.8)
    ax.scatter(x, y, s=10 + 150 * size / size.max(), color="#1f77b4", alpha=0.7)
    error = float(np.abs(x - y) @ size / size.sum())
    ax.set(
        xlabel="confidence",
        ylabel="share of right classes",
        title=f"annotation, {size.sum():,} labelled spots, calibration error {error:.3f}",
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
