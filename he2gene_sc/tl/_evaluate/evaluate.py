"""``hg.tl.evaluate``: agreement of predicted and measured expression, by gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.duplicates import warn_of_copy
from ..._core.expression import SCALES, Scale
from ..._core.keys import SECTION, Keys, check_key
from ..._core.logs import warn
from ..._core.ownership import check_free
from ..._core.results import write_result
from ..._core.spots import has_samples
from .aligned import UNKNOWN_LABELS, AlignedExpression, align_expression, class_probabilities
from .baselines import BASELINES, SEEN, baseline_predictors
from .layer import MODEL, prediction_named, table_with
from .metrics import METRICS, annotation_tables, compute_metrics, gene_tables, summarise

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ...models import HE2Gene


def evaluate(
    data: SpatialData | AnnData,
    *,
    layer: str = "he2gene",
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    annotation_key: str | None = None,
    sample_key: str = "patient",
    section_key: str = "section",
    genes: str | Sequence[str] | None = None,
    baselines: str | Sequence[str] | None = None,
    model: str | Path | HE2Gene | None = None,
    gene_symbols: str | None = None,
    prediction_key: str | None = "he2gene",
    table_key: str | None = None,
    n_splits: int = 10,
    seed: int = 0,
    key_added: str = "he2gene_eval",
) -> None:
    """Compare predicted expression and annotation with measured values, and with baselines.

    Metrics of a gene are over the spots of a section, never of a spot over its genes: there a constant profile reaches 0.5.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, or with a layer that another model predicted.
    layer
        Predicted expression: the layer of the prediction (the default), a layer that :func:`he2gene_sc.tl.adapt` made of it, or
        a layer of another model. Spots that ``adapt`` was fitted on are left out. The tables name the predictor after the layer.
    layer_scale
        Scale of the layer of another model, as for :func:`he2gene_sc.tl.calibrate`.
    measured
        Layer of raw counts; ``None``: ``X``. Counts become ln(1 + counts per 10,000), with totals over all genes. If
        ``predict(genes="all")`` made a new table, this is a layer of the measured table.
    measured_scale
        ``"auto"``: expect counts and raise for other values; ``"log"``: the values are logarithms as above (no noise ceiling,
        correlation with depth or baseline of total counts then); ``"counts"``.
    annotation_key
        Column of ``obs`` with labels, named as the classes of the model. For a layer of another model only the baseline
        ``"class mean"`` uses it.
    sample_key
        Column of ``obs`` with the patient, the statistical unit. A table without the default column is of one patient. Means
        are over patients, each the mean of its sections; ``"section"``: over sections.
    section_key
        Column of ``obs`` with the section. Without the default column, each shapes element is a section. Sections of several
        patients may share a name.
    genes
        Names of one or several genes to compare. Default: all that were predicted and measured.
    baselines
        Of ``"training mean"``, ``"class mean"``, ``"total counts"``, ``"mean colour"``, ``"coordinates"``, ``"nearest spots"``, see Notes.
        Default: all that can be computed.
    model
        Model, for its gene panels and, in predictions of older versions, the training means. Default: the model that made the
        prediction, if it is bundled.
    gene_symbols
        As given to predict. Default: the recorded value.
    prediction_key
        ``key_added`` of predict. ``None``: another model predicted the layer; not needed if ``predict`` wrote nothing.
    table_key
        Table, if several have predictions.
    n_splits, seed
        Number and seed of the binomial splits of the counts for the noise ceiling.
    key_added
        Prefix of all keys that are written.

    Returns
    -------
    ``None``. Results are written to the table of the prediction; read them with :func:`he2gene_sc.get.evaluation`:

    ``.var["he2gene_eval_pearson"]``, and so on
        Each metric, float32, over all spots pooled; NaN for genes that were not compared.
    ``.uns["he2gene_eval"]``
        DataFrames ``genes``, ``baselines``, ``summary``, ``predictors``, ``left_out``; with ``annotation_key``
        ``annotation``, ``classes``, ``confusion``.

    The metrics, float32 in the tables:

    ``pearson``, ``spearman``
        Correlation over spots.
    ``skill``
        1 - squared error / squared error of the model's training mean; 0 is as good as that constant. NaN if the training
        mean is unknown, as for other models.
    ``sd_ratio``
        Standard deviation, predicted over measured.
    ``slope``
        Slope of the least-squares line of measured on predicted values.
    ``moran_measured``, ``moran_predicted``
        Moran's I with neighbours up to 1.6 pitches away (8 on a square lattice, 6 on a hexagonal one); the weights of a spot
        sum to 1, as in squidpy.
    ``ssim``
        Structural similarity on the grid of the array, :func:`he2gene_sc.stats.ssim_on_grid`; cells without a spot are left
        out.
    ``ceiling``, ``ceiling_high``
        Noise ceiling of Pearson, an interval. For the lower end, signal is variation that neighbouring spots share beyond depth
        (:func:`he2gene_sc.stats.ceiling_of_neighbours`). For the upper end, it is all variation beyond counting noise, from
        binomial splits of the counts (:func:`he2gene_sc.stats.noise_ceiling`). The difference is overdispersion: variation of
        single spots that may be biological or not. Serial sections are near the lower end (``docs/trust.md``).
    ``ceiling_share``, ``ceiling_share_high``
        Pearson divided by the upper and by the lower end. The latter is NaN if the lower end is not above chance, and exceeds 1
        if the prediction follows depth.
    ``depth_correlation``
        Pearson correlation of measured - predicted with the log of total counts: the part of the residual that sequencing
        depth explains.

    A baseline has ``pearson`` and ``skill``. ``pearson_difference`` and ``skill_difference`` are the metric of the prediction minus
    that of the baseline, paired on the same gene and spots.

    A row has a ``scope``. ``"section"``: one section. ``"pooled"``: all spots, including differences between sections, but for
    Moran's I and SSIM the mean over sections. ``"mean"``: the mean over patients, each the mean of its sections. With one
    section all three are the same. A gene that is constant as predicted or as measured is NaN, never 0 or 1, and is counted in
    ``n_constant`` of the summary. A warning names sections that the model was trained on, if known: their metrics are
    optimistic.

    Raises
    ------
    ValueError
        If there is no prediction, no gene or spot was both predicted and measured, every section has fewer than 10 spots, the
        measured values are not counts, or an argument is invalid. Then nothing is changed.

    Notes
    -----
    Baselines use measurements of the evaluated slide, which no model does, so they may be better than a model:

    - ``"training mean"``: a constant, skill 0 by definition;
    - ``"class mean"``: mean of the other spots with the same label in ``annotation_key``, leave-one-out;
    - ``"total counts"``: a line on log total counts, leave-one-out;
    - ``"mean colour"``: ridge regression on mean and SD of the optical density of three channels in a square as wide as a spot,
      cross-validated over five parts of the section, which are made of squares of 4 × 4 spots; it needs the image;
    - ``"coordinates"``: the same with both axes and the squared distance from the middle of the section, as in :func:`he2gene_sc.tl.compare`;
    - ``"nearest spots"``: mean of the neighbouring spots, without the spot itself.

    Leaving out a spot with a high value lowers the mean of the others. The correlation of baselines is corrected for this shift;
    their skill is not. Uncorrected, a constant baseline would have correlation -1. Correlation still understates weak baselines,
    because their sign is fitted: for an unrelated gene, a line reaches about -1 / sqrt(spots). Skill does not have this bias.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy(shape=(6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.evaluate(sdata)
    >>> hg.get.evaluation(sdata).columns[:4].tolist()
    ['scope', 'section', 'predictor', 'panel']
    """
    validate.arguments(evaluate, locals())
    check_key(key_added, "key_added")
    genes = None if genes is None else validate.names(genes, "genes", one=True)
    baselines = None if baselines is None else validate.names(baselines, "baselines", one=True)
    if prediction_named(data, key_added):
        raise ValueError(
            f"`key_added` {key_added!r} is a prediction; to evaluate it pass prediction_key={key_added!r}, and another `key_added`, "
            f"for example {key_added + '_eval'!r}"
        )
    validate.one_of(measured_scale, SCALES, "measured_scale")
    validate.all_in(baselines or (), BASELINES, "baselines", "are unknown")
    validate.whole_number(n_splits, "n_splits")
    table, is_other = table_with(data, layer, prediction_key, table_key)
    keys = Keys() if prediction_key is None else Keys(prediction_key)
    if is_other and model is not None:
        raise ValueError(
            f"`model` is only for predictions of hg.tl.predict, and layer {layer!r} is of another model; leave it out"
        )
    names = {metric: f"{key_added}_{metric}" for metric in METRICS}
    check_free(table, "evaluate", key_added, var=names.values())
    validate.one_of(layer_scale, SCALES, "layer_scale")
    aligned = align_expression(
        data,
        table,
        keys,
        layer,
        measured,
        measured_scale,
        other_scale=layer_scale if is_other else None,
        genes=genes,
        sample_key=sample_key,
        section_key=section_key,
        model=model,
        gene_symbols=gene_symbols,
    )
    warn_of_copy(aligned.predicted, aligned.measured, layer)
    # Without the column, the shapes elements are the sections.
    over_sections = sample_key == SECTION and (section_key == SECTION or SECTION not in aligned.source.obs)
    over_samples = not over_sections and has_samples(aligned.source, sample_key)
    samples = _samples(aligned, sample_key) if over_samples else None
    left_out, facts = dict(aligned.n_left_out), {}
    if annotation_key is not None and is_other:
        aligned.labels(annotation_key, "annotation_key")
    elif annotation_key is not None:
        proba, codes, left_out[UNKNOWN_LABELS] = class_probabilities(aligned, annotation_key)
        facts = annotation_tables(aligned, proba, codes, samples)
    predictors, skipped = baseline_predictors(data, aligned, baselines, annotation_key)
    by_section, pooled = compute_metrics(aligned, predictors, n_splits=n_splits, seed=seed)
    if np.isnan(aligned.mean).all() and not is_other:
        warn("the training means of the genes are unknown, so skill is NaN: predict again, or name the `model`")
    left_out["genes constant on either side, pooled"] = int(np.isnan(pooled[aligned.predictor]["pearson"]).sum())
    of_model, of_baselines = gene_tables(aligned, by_section, pooled, samples)
    facts |= {
        "genes": of_model,
        "summary": summarise(pd.concat([of_model, of_baselines], ignore_index=True), aligned.panels),
        "predictors": _predictor_table(aligned, skipped, is_other),
        "left_out": pd.DataFrame({"what": list(left_out), "n": list(left_out.values())}),
        **({"baselines": of_baselines} if len(of_baselines) else {}),
    }
    params = {
        "layer": None if aligned.predictor == MODEL else layer,
        "layer_scale": layer_scale if is_other else None,
        "measured": measured,
        "measured_scale": measured_scale,
        "annotation_key": annotation_key,
        "sample_key": sample_key,
        "section_key": section_key,
        "genes": None if genes is None else [str(gene) for gene in genes],
        "baselines": list(predictors),
        "prediction_key": None if is_other else prediction_key,
        "n_splits": int(n_splits),
        "seed": int(seed),
    }
    var = {name: np.full(table.n_vars, np.nan, np.float32) for name in names.values()}
    for metric, name in names.items():
        var[name][aligned.columns] = pooled[aligned.predictor][metric]
    write_result(table, "evaluate", key_added, params=params, facts=facts, var=var)


def _predictor_table(aligned: AlignedExpression, skipped: Mapping[str, str], is_other: bool) -> pd.DataFrame:
    """Return what each predictor has seen, and why it was left out."""
    model = "another model predicted it: not known" if is_other else SEEN[MODEL]
    model += f", and {', '.join(aligned.trained_on)} are among them" if aligned.trained_on else ""
    if aligned.n_fitted is None:
        model += "; expression of unknown measured spots of this slide, which are not left out"
    elif aligned.predictor != MODEL and (aligned.n_fitted or not is_other):
        model += f"; expression of {aligned.n_fitted} measured spots of this slide, which are left out"
    seen = {aligned.predictor: model} | {name: SEEN[name] for name in BASELINES}
    return pd.DataFrame(
        {"predictor": p, "computed": p not in skipped, "seen": seen[p], "reason": skipped.get(p, "")} for p in seen
    )


def _samples(aligned: AlignedExpression, sample_key: str) -> Mapping[str, str]:
    values = aligned.labels(sample_key, "sample_key").to_numpy(object)
    sample_of_section = {}
    for section, spots in aligned.sections.items():
        found = pd.unique(pd.Series(values[spots], dtype=object))
        if len(found) != 1 or pd.isna(found[0]):
            raise ValueError(
                f"`sample_key` {sample_key!r}: section {section!r} has {validate.format_list(map(repr, found))}; one sample is needed. "
                "Give sections of several samples different names by `section_key`, or pass sample_key='section' for means over sections"
            )
        sample_of_section[section] = str(found[0])
    return sample_of_section
