"""``hg.tl.intervals``: prediction intervals of expression with a stated coverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import validate
from .._core.expression import as_logs
from .._core.genes import find_genes, symbols_in
from .._core.keys import Keys
from .._core.lazy import genes_at_once
from .._core.logs import warn
from .._core.matrix import dense, indexable_matrix
from .._core.ownership import check_free
from .._core.predictions import check_layer_unchanged, predicted_layer, record_of
from .._core.results import write_result
from .._core.spots import get_table
from .._settings import settings
from ..stats import MIN_GROUPS
from ._calibrate import Calibration, check_calibrated, warn_of_level
from ._interval_ends import (
    RARE_SHARE,
    adapted_intervals,
    calibration_intervals,
    check_by,
    find_adaptation,
    model_intervals,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene


def intervals(
    data: SpatialData | AnnData,
    *,
    coverage: float = 0.9,
    layer: str = "he2gene",
    by: Literal["annotation", "detected", "level"] | None = "annotation",
    model: str | Path | HE2Gene | None = None,
    calibration: Calibration | None = None,
    gene_symbols: str | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
) -> None:
    """Compute an interval around each predicted value that contains the measured value with a stated probability.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to; with a ``calibration``, any that has its layer.
    coverage
        Share of measured values inside the interval, in the range of the quantiles of the model (0.1 to 0.98).
    layer
        Layer for the intervals: the layer of the prediction (the default) or one of ``hg.tl.adapt``. The latter uses the
        cross-validated residuals of the adaptation. Their number limits the coverage: 90 % needs 19 measured spots, 95 % 39, 99 %
        199; genes with fewer get NaN, with a warning. With a ``calibration``: its layer.
    by
        ``"annotation"``: residuals of spots of the same predicted class, or of all spots if the class has too few. ``"detected"``:
        wide enough also for the spots that express the gene. ``"level"``: residuals of the tenth of the spots with about the same
        predicted value of the gene; half of the values outside are on each side, see Notes. ``None``: residuals of all spots.
        ``uns`` records what was used: ``"annotation"`` uses residuals of all spots if there is no annotation or with a
        ``calibration``; adapted layers have only residuals of all spots.
    model
        Model of the prediction. Default: the bundled model that is named in ``uns``, if its weights match.
    calibration
        Result of :func:`he2gene_sc.tl.calibrate` on measured slides, for a layer of any model. The ends are natural logarithms of
        (1 + counts per 10,000), also for predicted counts.
    gene_symbols
        As given to predict. Default: the recorded value. With a ``calibration``: column of ``var`` with the names of its genes.
    prediction_key
        ``key_added`` of predict.
    table_key
        Table, if several have predictions.

    Returns
    -------
    ``None``. Results are written to the table, for ``layer="he2gene"``:

    ``.layers["he2gene_lower"]``, ``.layers["he2gene_upper"]``
        Ends of the intervals, float32 ``(n_obs, n_vars)``, in the unit of the prediction, the lower one floored at 0; NaN
        where there is no prediction. Left out, with a warning, if both need more than ``hg.settings.memory_limit``.
    ``.var["he2gene_halfwidth"]``
        Median over the spots of half the width before the lower end is floored.
    ``.var["he2gene_rarely_detected"]``
        Whether the gene was detected in fewer than 20 % of the training spots (adapted layer or ``calibration``: of the measured
        spots). Such an interval means "not detected": it contains the spots without a count and few of those that express the
        gene, at any coverage. Only for :func:`he2gene_sc.tl.adapt` and for models that state how often genes were detected.
    ``.uns["he2gene_intervals"]``
        Coverage, and ``guarantee``: ``"hierarchical"`` or ``"none"``, with ``unit`` and ``n_groups``; ``by``:
        ``"annotation"``, ``"detected"``, ``"level"`` or ``"none"``.

    Warns
    -----
    UserWarning
        If the coverage is not guaranteed, or genes were detected in fewer than 20 % of the training spots. With a
        ``calibration``: if the values of the slide are on another level than those of the calibrated slides (for example
        logarithms to another base), if another model predicted them, or if the patient was used for the calibration.

    Raises
    ------
    ValueError
        If the coverage is outside (0, 1) or the range of the quantiles, the model has no calibration residuals or none by
        predicted level (the bundled model), or an adapted layer has too few measured spots.

    Notes
    -----
    Split conformal intervals: the absolute residual of held-out spots is divided by a spread that rises with the prediction (Lei et
    al., J Am Stat Assoc 2018, sec. 5.2). Its quantile is taken by predicted class (Mondrian: Vovk, Gammerman and Shafer 2005, sec.
    4.5), with sections or patients as the unit (Lee, Barber and Willett, arXiv 2306.06342). The guarantee needs nine groups, and
    ``coverage / (1 - coverage)`` groups above 90 %. With ``by="level"`` it needs 19 groups for 90 %, since each side is calibrated
    separately. The bundled model has six sections of three patients, so it has no guarantee: spots of a new patient, and spots of low
    depth, are covered less often than ``coverage``, whatever ``by``. See ``docs/trust.md``; :func:`he2gene_sc.get.coverage` measures it.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.intervals(sdata, coverage=0.8)
    >>> sdata["table"].uns["he2gene_intervals"]["guarantee"]
    'none'
    """
    validate.arguments(intervals, locals())
    validate.in_range(coverage, "coverage", above=0, below=1)
    check_by(by)
    adapted: Mapping[str, Any] | None = None
    if calibration is not None:
        table = get_table(data, table_key, layer=layer)
        predicted = indexable_matrix(table, layer)
        check_calibrated(calibration, table, predicted, layer, model)
    else:
        table = get_table(data, table_key, prediction_key=prediction_key)
        record = record_of(table, prediction_key)
        layer = predicted_layer(table, prediction_key, layer)
        check_layer_unchanged(table, prediction_key, layer)
        predicted = indexable_matrix(table, layer)
        adapted = find_adaptation(table, record, layer)
    lower, upper, halfwidth_key, rare_key = (
        f"{layer}_{name}" for name in ("lower", "upper", "halfwidth", "rarely_detected")
    )
    uns = f"{layer}_intervals"
    check_free(table, "intervals", uns, parameter="layer", layers=[lower, upper], var=[halfwidth_key, rare_key])
    if calibration is not None:
        source = calibration_intervals(table, calibration, coverage, by, symbols_in(table, gene_symbols))
        predicted = as_logs(predicted, "counts") if calibration.layer_scale == "counts" else predicted
    elif adapted is not None:
        source = adapted_intervals(adapted, coverage, by, table.n_vars)
    else:
        source = model_intervals(table, Keys(prediction_key), model, coverage, by, gene_symbols)
    # hg.tl.calibrate warns of too few groups for any guarantee, and an adapted layer never has one.
    if (
        adapted is None
        and source.facts["guarantee"] == "none"
        and (calibration is None or len(calibration.groups) >= MIN_GROUPS)
    ):
        warn(_no_guarantee(source.facts, coverage))
    n_bytes = 2 * 4 * table.n_obs * table.n_vars
    layers: dict[str, np.ndarray] = {}
    if n_bytes <= settings.memory_limit:
        layers = {key: np.full(table.shape, np.nan, np.float32) for key in (lower, upper)}
    else:
        warn(
            f"the two layers need {n_bytes / 2**20:,.3g} MiB, more than hg.settings.memory_limit "
            f"({settings.memory_limit / 2**20:,.3g} MiB): only var[{halfwidth_key!r}] is written; raise the limit, or subset "
            "the genes first"
        )
    halfwidth = np.full(table.n_vars, np.nan, np.float32)
    known = np.flatnonzero(source.known)
    means = np.full(table.n_vars, np.nan)
    step = genes_at_once(table.n_obs)
    for start in range(0, len(known), step):
        genes = known[start : start + step]
        values = np.asarray(dense(predicted[:, genes]), np.float32)
        ends = low, high = source.ends(values, genes, slice(None))
        finite = np.isfinite(high).any(0)
        means[genes[finite]] = np.nanmean(values[:, finite], axis=0)
        halfwidth[genes[finite]] = np.nanmedian((high - low)[:, finite], axis=0) / 2
        for key, end in zip(layers, ends, strict=False):
            layers[key][:, genes] = np.maximum(end, 0)
    if calibration is not None:
        warn_of_level(calibration, means, find_genes(symbols_in(table, gene_symbols), calibration.genes), layer)
    var: dict[str, np.ndarray] = {halfwidth_key: halfwidth}
    if source.rare is not None:
        rare = var[rare_key] = source.rare & source.known
        if rare.any():
            spots = "training" if adapted is None and calibration is None else "measured"
            warn(
                f"{int(rare.sum()):,} of {int(source.known.sum()):,} genes were detected in fewer than {RARE_SHARE:.0%} of the "
                f"{spots} spots: their intervals mean 'not detected' and cover few of the spots that express them, at any coverage; var[{rare_key!r}] marks them"
            )
    params = {"coverage": float(coverage), "layer": layer, "by": by}
    params["prediction_key"] = prediction_key if calibration is None else None
    write_result(table, "intervals", uns, params=params, facts=source.facts, layers=layers, var=var)


def _no_guarantee(facts: Mapping[str, Any], coverage: float) -> str:
    """State that the coverage is not guaranteed, why, and what to do."""
    n, needed, unit = facts["n_groups"], facts["n_groups_needed"], facts["unit"]
    why, more = f"the residuals are of {n} {unit}s, {needed} are needed", ""
    if n >= needed:
        why, more = f"some genes or predicted levels have residuals of fewer than {needed} {unit}s", ", or use by=None"
    elif n >= MIN_GROUPS:
        more = ", or use a smaller coverage"
    return (
        f"the coverage of {coverage:.0%} is not guaranteed: {why}. Spots of a new {unit} are often covered less. Calibrate on more "
        f"measured slides with hg.tl.calibrate{more}"
    )
