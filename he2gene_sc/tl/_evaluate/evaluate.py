"""``hg.tl.evaluate``: how far the prediction agrees with what was measured, gene by gene."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.duplicates import warn_of_copy
from ..._core.expression import SCALES, Scale
from ..._core.keys import SECTION, Keys, check_key
from ..._core.ownership import check_free
from ..._core.results import write_result
from ..._core.spots import has_samples
from .aligned import UNKNOWN_LABELS, Asked, Judged, proba_of, read
from .baselines import readings
from .layer import MODEL, prediction_named, table_with
from .metrics import BASELINES, METRICS, SEEN, Results, annotation_tables, gene_tables, judge, summarise

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
    """Compare predicted expression and annotation with what was measured, beside baselines.

    Every gene is judged over the spots of a section, never a spot over its genes: a constant profile reaches .5 there.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, or with a layer that another model predicted.
    layer
        Predicted expression: the layer of the prediction (the default), one that :func:`he2gene_sc.tl.adapt` made of it, or one
        of another model. Spots that ``adapt`` was fitted on are left out. The tables call the predictor by the name of the layer.
    layer_scale
        What the layer of another model holds. ``"auto"``: natural logarithms of (1 + counts per 10,000) are expected and raw
        counts refused; ``"counts"``: it holds raw counts; ``"log"``: the values are meant as they are.
    measured
        Layer of raw counts; ``None``: ``X``. Counts become ln(1 + counts per 10,000) by the totals of all genes. Where
        ``predict(genes="all")`` made a table of its own, this is a layer of the measured table beside it.
    measured_scale
        ``"auto"``: counts are expected and anything else is refused; ``"log"``: the values are logarithms already, as
        above (no noise ceiling, correlation with depth or baseline of total counts then); ``"counts"``.
    annotation_key
        Column of ``obs`` with labels, in the words of the model's classes. For a layer of another model it serves
        ``"class mean"`` alone.
    sample_key
        Column of ``obs`` with the patient, the statistical unit. A table without the default column is of one patient. Means
        are over patients, each the mean of its sections; ``"section"``: over sections.
    section_key
        Column of ``obs`` with the section. Without the default column the shapes elements are the sections. Sections of one
        name in several patients are several.
    genes
        Genes to judge, a name or several. Default: all that were predicted and measured.
    baselines
        Of ``"training mean"``, ``"class mean"``, ``"total counts"``, ``"mean colour"``, ``"coordinates"``, ``"nearest spots"``, see Notes.
        Default: all that can be computed.
    model
        The model, for its panels of genes and, in predictions of older versions, the training mean. Default: the one
        that made the prediction, if it is bundled.
    gene_symbols
        As given to predict; default: what it recorded.
    prediction_key
        ``key_added`` of predict. ``None``: another model predicted the layer; not needed where ``predict`` wrote nothing.
    table_key
        Table, where several were predicted.
    n_splits, seed
        Binomial splits of the counts for the noise ceiling.
    key_added
        Prefix of what is written.

    Returns
    -------
    ``None``. Written to the table of the prediction; read it with :func:`he2gene_sc.get.evaluation`:

    ``.var["he2gene_eval_pearson"]``, and so on
        Each metric, float32, over all spots pooled; NaN for genes that were not judged.
    ``.uns["he2gene_eval"]``
        DataFrames ``genes``, ``baselines``, ``summary``, ``predictors``, ``left_out``; with ``annotation_key``
        ``annotation``, ``classes``, ``confusion``.

    The metrics, float32 in the tables:

    ``pearson``, ``spearman``
        Correlation over spots.
    ``skill``
        1 - squared error / squared error of the model's training mean; 0 is no better than that constant. NaN where the
        training mean is not known, as of other models.
    ``sd_ratio``
        Standard deviation, predicted over measured.
    ``slope``
        Of the least-squares line of measured on predicted.
    ``moran_measured``, ``moran_predicted``
        Moran's I, neighbours up to 1.6 pitches away (8 on a square lattice, 6 on a hexagonal one), weights of a spot
        sum to 1, as squidpy does it.
    ``ssim``
        Structural similarity on the grid of the array, :func:`he2gene_sc.stats.ssim_on_grid`; cells without a spot
        have no part in it.
    ``ceiling``, ``ceiling_high``
        Noise ceiling of Pearson, an interval. The lower end takes for signal what neighbouring spots share beyond depth
        (:func:`he2gene_sc.stats.ceiling_of_neighbours`), the upper all that varies beyond counting, by binomial splitting
        of counts (:func:`he2gene_sc.stats.noise_ceiling`). They differ by overdispersion: variation of single spots that may
        be biology or not. Serial sections are near the lower end (``docs/trust.md``).
    ``ceiling_share``, ``ceiling_share_high``
        Pearson over the upper and over the lower end. The latter is NaN where the lower end is not above chance, and above 1
        where the prediction follows depth.
    ``depth_correlation``
        Pearson correlation of measured - predicted with the log of total counts: what is left of the residual that
        sequencing depth explains.

    A baseline has ``pearson`` and ``skill``, and ``pearson_difference`` and ``skill_difference``: those of the prediction minus its
    own, paired on the same gene and spots.

    A row has a ``scope``: ``"section"``; ``"pooled"``, all spots together, so that differences between sections count,
    except for Moran's I and SSIM, where it is the mean over sections; ``"mean"``, the mean over patients, each the
    mean of its sections. With one section all three are the same. A gene that is constant on either side is
    NaN, never 0 or 1, and is counted (``n_constant`` of the summary). A section that the model was trained on, where
    that can be told, is warned of: its figures are too good.

    Raises
    ------
    ValueError
        If there is no prediction, nothing measured in common, fewer than 10 spots in every section, measured values
        that are no counts, or an argument does not fit; nothing has been changed then.

    Notes
    -----
    Baselines know the slide that they are judged on, which no model does, so that a model may fall behind them:

    - ``"training mean"``: a constant, skill 0 by definition;
    - ``"class mean"``: mean of the other spots with the same label in ``annotation_key``, leave-one-out;
    - ``"total counts"``: a line on log total counts, leave-one-out;
    - ``"mean colour"``: ridge on mean and SD of the optical density of three channels in a square as wide as a spot,
      fitted on the other four of five parts of the section, parts dealt from squares of 4 × 4 spots; it needs the image;
    - ``"coordinates"``: the same of both axes and the squared distance from the middle of the section, as in :func:`he2gene_sc.tl.compare`;
    - ``"nearest spots"``: mean of the neighbouring spots, without the spot itself.

    Leaving a spot out lowers the mean of the others where its own value is high: the correlation (not the skill) of a
    baseline is taken with that mean put back, without which a constant would reach -1. It still understates baselines
    that know little, since their sign is fitted: of a gene that it knows nothing of, a line reaches about
    -1 / sqrt(spots). Skill does not suffer from this.

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
    from ...models import load

    check_key(key_added, "key_added")
    genes = None if genes is None else validate.names(genes, "genes", one=True)
    baselines = None if baselines is None else validate.names(baselines, "baselines", one=True)
    if prediction_named(data, key_added):
        raise ValueError(
            f"`key_added` {key_added!r} is a prediction; to judge it pass prediction_key={key_added!r}, and as `key_added` "
            f"a name for the evaluation, {key_added + '_eval'!r} for example"
        )
    validate.one_of(measured_scale, SCALES, "measured_scale")
    if unknown := [name for name in baselines or () if name not in BASELINES]:
        raise ValueError(f"`baselines` {unknown} are unknown, valid: {list(BASELINES)}")
    validate.whole_number(n_splits, "n_splits")
    table, is_other = table_with(data, layer, prediction_key, table_key)
    keys = Keys() if prediction_key is None else Keys(prediction_key)
    if is_other and model is not None:
        raise ValueError(
            f"`model` is of predictions of hg.tl.predict; layer {layer!r} is of another model, leave it out"
        )
    names = {metric: f"{key_added}_{metric}" for metric in METRICS}
    check_free(table, "evaluate", key_added, var=names.values())
    judged = read(
        data,
        table,
        keys,
        Asked(
            layer,
            measured,
            measured_scale,
            genes,
            section_key,
            None if model is None else load(model),
            gene_symbols,
            sample_key,
            is_other,
            layer_scale,
        ),
    )
    warn_of_copy(judged.predicted, judged.measured, layer)
    # The column may be missing: the sections are then the shapes elements.
    over_sections = sample_key == SECTION and (section_key == SECTION or SECTION not in judged.source.obs)
    known = not over_sections and has_samples(judged.source, sample_key)
    samples = _samples(judged, sample_key) if known else None
    left_out, facts = dict(judged.n_left_out), {}
    if annotation_key is not None and is_other:
        judged.labels(annotation_key, "annotation_key")
    elif annotation_key is not None:
        proba, codes, left_out[UNKNOWN_LABELS] = proba_of(judged, annotation_key, table, keys)
        facts = annotation_tables(judged, proba, codes, samples)
    reads, skipped = readings(data, table, judged, baselines, annotation_key, keys)
    results = judge(judged, reads, n_splits=n_splits, seed=seed)
    if np.isnan(judged.mean).all() and not is_other:
        warnings.warn(
            "the training means of the genes are not known, skill is NaN: predict again, or name the `model`",
            UserWarning,
            stacklevel=2,
        )
    left_out["genes constant on either side, pooled"] = int(np.isnan(results.pooled[judged.predictor]["pearson"]).sum())
    facts |= _tables(judged, results, samples, skipped, left_out, is_other)
    params = {
        "layer": None if judged.predictor == MODEL else layer,
        "layer_scale": layer_scale if is_other else None,
        "measured": measured,
        "measured_scale": measured_scale,
        "annotation_key": annotation_key,
        "sample_key": sample_key,
        "section_key": section_key,
        "genes": None if genes is None else [str(gene) for gene in genes],
        "baselines": list(reads),
        "prediction_key": None if is_other else prediction_key,
        "n_splits": int(n_splits),
        "seed": int(seed),
    }
    var = {name: np.full(table.n_vars, np.nan, np.float32) for name in names.values()}
    for metric, name in names.items():
        var[name][judged.columns] = results.pooled[judged.predictor][metric]
    write_result(table, "evaluate", key_added, params=params, facts=facts, var=var)


def _tables(
    judged: Judged,
    results: Results,
    samples: Mapping[str, str] | None,
    skipped: Mapping[str, str],
    left_out: Mapping[str, int],
    is_other: bool,
) -> dict[str, pd.DataFrame]:
    """Everything but the annotation."""
    of_model, of_baselines = gene_tables(judged, results, samples)
    model = "another model predicted it: not known" if is_other else SEEN[MODEL]
    model += f", and {', '.join(judged.trained_on)} are among them" if judged.trained_on else ""
    if judged.n_fitted is None:
        model += "; expression of measured spots of this slide, which of them is not known: they are judged too"
    elif judged.predictor != MODEL and (judged.n_fitted or not is_other):
        model += f"; expression of {judged.n_fitted} measured spots of this slide, which are not judged"
    seen = {judged.predictor: model} | {name: SEEN[name] for name in BASELINES}
    predictors = [
        {"predictor": p, "computed": p not in skipped, "seen": seen[p], "reason": skipped.get(p, "")} for p in seen
    ]
    tables = {
        "genes": of_model,
        "summary": summarise(pd.concat([of_model, of_baselines], ignore_index=True), judged.panels),
        "predictors": pd.DataFrame(predictors),
        "left_out": pd.DataFrame({"what": list(left_out), "n": list(left_out.values())}),
    }
    return tables | ({"baselines": of_baselines} if len(of_baselines) else {})


def _samples(judged: Judged, sample_key: str) -> Mapping[str, str]:
    """Sample of each section."""
    values = judged.labels(sample_key, "sample_key").to_numpy(object)
    of = {}
    for section, where in judged.sections.items():
        found = pd.unique(pd.Series(values[where], dtype=object))
        if len(found) != 1 or pd.isna(found[0]):
            raise ValueError(
                f"`sample_key` {sample_key!r}: section {section!r} has {validate.format_list(map(repr, found))}; one sample is needed: "
                "tell sections apart by `section_key`, or pass sample_key='section' for means over sections"
            )
        of[section] = str(found[0])
    return of
