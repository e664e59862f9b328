"""``hg.pl.calibration``: coverage of intervals, and reliability of class probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import validate
from .._core.expression import Scale
from .._core.genes import symbols_in
from .._core.keys import OWN_TABLE, Keys
from .._core.matrix import indexable_matrix
from .._core.predictions import predicted_layer, prediction_of, record_of, symbols_of
from .._core.spots import get_table
from ..stats import N_BINS
from ..tl._calibrate import Calibration, check_calibrated
from ..tl._interval_ends import (
    adapted_intervals,
    calibration_intervals,
    check_by,
    find_adaptation,
    model_intervals,
)
from ._canvas import axes_for, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

    from ..models import HE2Gene

_COVERAGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
_MIN_SPOTS = 10


def calibration(
    data: SpatialData | AnnData,
    *,
    layer: str = "he2gene",
    annotation_key: str | None = None,
    coverages: Sequence[float] = _COVERAGES,
    measured: str | None = None,
    measured_scale: Scale = "auto",
    by: Literal["annotation", "detected", "level"] | None = "annotation",
    model: str | Path | HE2Gene | None = None,
    calibration: Calibration | None = None,
    gene_symbols: str | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    figsize: Sequence[float] | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw empirical against nominal coverage of the intervals, and the reliability of the annotation.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, with measured counts in the same table, or in the measured table
        if ``predict(genes="all")`` made a new one. With a ``calibration``, any that has its layer.
    layer
        Prediction to check, as in :func:`he2gene_sc.tl.intervals`. Spots that an adapted layer was fitted on are left out.
    annotation_key
        Column of ``obs`` with known labels: adds the reliability diagram of the annotation (share of correct classes in ten bins
        of the confidence), with the number of spots of each bin.
    coverages
        Nominal coverages.
    measured, measured_scale
        Layer of measured values (``None``: ``X``), and its scale, as in ``hg.tl.evaluate``.
    by, model, calibration, gene_symbols
        As in :func:`he2gene_sc.tl.intervals`: with a ``calibration`` the layer may be of any model.
    ax
        Axes to draw in: one, or two with ``annotation_key``.
    prediction_key, table_key, figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        The line is the mean over genes that were predicted and measured, the band is their 10th to 90th percentile. Spots without
        counts and sections with fewer than ten spots are left out, as in :func:`he2gene_sc.tl.evaluate`.

    Raises
    ------
    ValueError
        If no section has ten spots that were both predicted and measured (and not used for an adapted layer), the measured layer
        is a prediction, the model has no calibration residuals, or a coverage is outside the range of its quantiles.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> ax = hg.pl.calibration(sdata)
    """
    validate.arguments(globals()["calibration"], locals())  # the parameter `calibration` hides the function
    from ..tl._evaluate.aligned import align_expression, class_probabilities

    check_by(by)
    if not np.iterable(coverages):
        raise ValueError(f"`coverages` is {coverages!r}; a list is needed, such as [{coverages!r}]")
    levels = np.array([validate.in_range(coverage, "coverages", above=0, below=1) for coverage in coverages], float)
    if not len(levels):
        raise ValueError("`coverages` is empty; at least one is needed, such as [0.5, 0.9]")
    if calibration is not None:
        table = get_table(data, table_key, layer=layer)
        check_calibrated(calibration, table, indexable_matrix(table, layer), layer, model)
        ours = prediction_of(table, layer)
        if annotation_key is not None and ours is None:
            raise ValueError(
                f"`annotation_key` needs an annotation of hg.tl.predict, but layer {layer!r} is of another model; leave it out"
            )
        keys = Keys(ours or prediction_key)
        bounds = [calibration_intervals(table, calibration, c, by, symbols_in(table, gene_symbols)) for c in levels]
        options: dict[str, Any] = {"other_scale": calibration.layer_scale if ours is None else None}
    else:
        table = get_table(data, table_key, prediction_key=prediction_key)
        keys, record = Keys(prediction_key), record_of(table, prediction_key)
        layer = predicted_layer(table, prediction_key, layer)
        adapted = find_adaptation(table, record, layer)
        gene_symbols = symbols_of(table, record, gene_symbols)
        if adapted is None:
            # The column is in the measured table if the prediction has its own table.
            own = None if OWN_TABLE in table.uns and gene_symbols not in table.var else gene_symbols
            bounds = [model_intervals(table, keys, model, c, by, own) for c in levels]
        else:
            bounds = [adapted_intervals(adapted, c, by, table.n_vars) for c in levels]
        options = {"model": model}
    aligned = align_expression(data, table, keys, layer, measured, measured_scale, gene_symbols=gene_symbols, **options)
    genes = np.flatnonzero(np.all([intervals.known[aligned.columns] for intervals in bounds], axis=0))
    if not len(genes):
        raise ValueError(
            "`measured`: no gene with intervals was measured; pass a layer with measured genes of the prediction"
        )
    axes = axes_for(1 if annotation_key is None else 2, ax, 2, figsize, title, save)
    predicted, truth = aligned.predicted[:, genes], aligned.measured[:, genes]
    ends = (intervals.ends(predicted, aligned.columns[genes], aligned.rows) for intervals in bounds)
    covered = np.stack([_coverage(low, high, truth) for low, high in ends])
    _draw_coverage(axes[0], levels, covered)
    if annotation_key is not None:
        proba, codes, _ = class_probabilities(aligned, annotation_key)
        _draw_reliability(axes[1], proba.to_numpy(float), codes)
    return finish(axes, save, title, show, return_fig)


def _coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the share of the measured values of each gene inside its intervals, ``(g,)``."""
    known = np.isfinite(truth) & np.isfinite(high)
    # A value of 0 is inside if the lower end was floored at 0.
    inside = known & (truth >= np.maximum(low, 0)) & (truth <= np.maximum(high, 0))
    n = known.sum(0)
    return np.divide(inside.sum(0), n, out=np.full(len(n), np.nan), where=n >= _MIN_SPOTS)


def _draw_coverage(ax: Axes, coverages: np.ndarray, covered: np.ndarray) -> None:
    order = np.argsort(coverages)
    covered = covered[:, np.isfinite(covered).all(0)]
    low, high = np.quantile(covered, (0.1, 0.9), axis=1)
    ax.plot([0, 1], [0, 1], color="k", lw=0.8, ls="--", label="nominal")
    ax.fill_between(coverages[order], low[order], high[order], color="#cfd8e3", lw=0, label="10th to 90th percentile")
    ax.plot(coverages[order], covered.mean(1)[order], marker="o", ms=4, label=f"mean over {covered.shape[1]:,} genes")
    ax.set(xlabel="nominal coverage", ylabel="empirical coverage", title="intervals", xlim=(0, 1), ylim=(0, 1.01))
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_reliability(ax: Axes, proba: np.ndarray, codes: np.ndarray) -> None:
    usable = (codes >= 0) & np.isfinite(proba).all(1)
    if not usable.any():
        raise ValueError(
            "`annotation_key`: none of the compared spots has a label; pass a column with labels of these spots"
        )
    confidence, correct = proba[usable].max(1), proba[usable].argmax(1) == codes[usable]
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    used = np.unique(bins)
    x, y = (np.array([values[bins == b].mean() for b in used]) for values in (confidence, correct))
    size = np.array([(bins == b).sum() for b in used])
    ax.plot([0, 1], [0, 1], color="k", lw=0.8, ls="--")
    ax.plot(x, y, color="#1f77b4", lw=0.8)
    ax.scatter(x, y, s=10 + 150 * size / size.max(), color="#1f77b4", alpha=0.7)
    for point, n in zip(np.column_stack([x, y]), size, strict=True):
        offset, va = (-9, "top") if point[1] > 0.5 else (9, "bottom")
        ax.annotate(f"{n:,}", point, (0, offset), textcoords="offset points", ha="center", va=va, fontsize=8)
    error = float(np.abs(x - y) @ size / size.sum())
    ax.set(xlabel="confidence", ylabel="share of correct classes", xlim=(0, 1.05), ylim=(0, 1.05))
    ax.set_title(f"annotation, {size.sum():,} labelled spots, calibration error {error:.3f}")
