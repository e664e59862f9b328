"""``hg.tl.adapt``: correct a prediction with measured spots or genes of the slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale
from .._core.keys import OWN_TABLE, Keys, check_key
from .._core.lazy import is_large
from .._core.logs import warn
from .._core.matrix import dense, in_columns, matrix_of
from .._core.ownership import check_free, is_prediction, recorded_keys
from .._core.predictions import adaptation_spots, prediction_of, source_layer
from .._core.results import write_result
from .._core.spots import get_table, sections_of, spots_of
from .._settings import settings
from ._adapt_input import columns_of, measured_of, rows_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Warn if this share of the other spots, and at least this number, is not represented by measured spots.
_UNREPRESENTED_SHARE, _MIN_UNREPRESENTED = 0.1, 5
_GUARANTEE = (
    "Cross-validated residuals of measured spots, with ranks corrected for their number. If the measured spots were drawn at random, "
    "intervals made of them cover about the nominal share on average over the unmeasured spots of this slide. They cover at least "
    "1 - 2 alpha where 1 - alpha is nominal, as cross-conformal intervals do. Nothing is guaranteed for single spots, for other slides, "
    "or if the spots were not drawn at random."
)


def adapt(
    data: SpatialData | AnnData,
    measured: str | np.ndarray | pd.Series,
    *,
    counts: str | None = None,
    measured_scale: Scale = "auto",
    layer: str = "he2gene",
    genes: Sequence[str] | None = None,
    section_key: str = "section",
    table_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
) -> None:
    """Correct the prediction with measured spots or genes of the slide.

    A gene gets a convex combination of candidates: the mean of the measured spots; their interpolation; and the prediction with
    corrected level, alone or with one of three terms added (kriged residuals of the measured spots, the kriged part of the residuals
    that all genes share, a ridge regression of the residuals on the embedding). Weights are learned in cross-validation, and those
    of a gene are shrunk to those of 250 genes with similar mean. The whole correction is shrunk by the part that may be chance. A spot is
    corrected as far as measured spots represent it: by distance, by its embedding and predicted expression, and by its predicted
    class. Other spots keep their prediction. Each section is adapted separately.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    measured
        Measured spots: a boolean array ``(n_obs,)``, a boolean Series indexed by ``obs_names``, or the name of a boolean column
        of ``obs``. Or the name of a layer with the measured values, NaN where a gene of a spot was not measured.
    counts
        With a mask, the layer of raw counts; default ``X``. A table that ``predict(genes="all")`` made holds no counts: adapt
        the prediction in the measured table, or add a layer with the measured values.
    measured_scale
        ``"counts"`` or ``"log"``, natural log of (1 + counts per 10,000); ``"auto"``: expect raw counts and raise for other values.
        Spots with only some genes measured have no known total: they need ``"log"``.
    layer
        Layer of the prediction.
    genes
        Genes to adapt; default: all that are predicted.
    section_key
        Column of ``obs`` with the section. Without the default column, each shapes element is a section.
    table_key
        Table, if several hold the prediction.
    key_added
        Name of all keys that are written; default: the name of the layer and ``"_adapted"``.
    seed
        Seed of the folds, a whole number from 0.

    Returns
    -------
    ``None``. Results are written to the table (``layer="he2gene"``, without ``key_added``):

    ``.layers["he2gene_adapted"]``
        ``(n_obs, n_vars)`` float32, on the scale of the prediction, floored at 0. At measured spots it is also an estimate. Their
        own measurement moves it but does not replace it, because counting noise dominates a measurement. A gene measured at one
        to nine spots keeps its prediction. A gene that no spot measured is corrected by the part that it shares with measured
        genes, if there are ten or more; the accuracy is unknown. NaN for genes that are not predicted or not in ``genes``, for
        spots outside the image, and for sections without measurements.
    ``.obs["he2gene_adapted_measured"]``
        Whether the layer was fitted on the spot, by any of its genes; :func:`he2gene_sc.tl.evaluate` and
        :func:`he2gene_sc.pl.calibration` use the other spots.
    ``.obs["he2gene_adapted_support"]``
        float32, 0 to 1: how far measured spots represent a spot, which is the share of the corrected pattern that it gets. 1 up
        to the largest distance in cross-validation, 0 from twice that distance. Lower if a linear discriminant separates the spot
        from the measured ones; 0 in a predicted class with fewer than three measured spots. NaN where nothing was adapted. The
        level of a gene is corrected equally at all other spots, if they are represented on average.
    ``.var["he2gene_adapted_gain"]``
        Expected relative reduction of the squared error of the prediction at spots that were not measured: cross-validated on
        measured spots, times the share of the correction that the other spots get. NaN for genes that were not adapted, or
        that no spot measured.
    ``.uns["he2gene_adapted"]``
        ``weights`` (DataFrame, mean weight of each candidate, by section), ``n_measured`` and ``support`` (by section),
        ``residual_levels`` ``(q,)``, ``residual_quantiles`` ``(q, n_vars)`` float32 of measured minus adapted at held-out spots
        (infinite if a level has too few spots, under 19 for 5 %; NaN for genes that were not adapted), ``detected`` ``(n_vars,)``,
        share of the measured spots that express a gene, and ``guarantee``, that of intervals from these residuals.

    Warns
    -----
    UserWarning
        If measured spots do not represent more than a tenth of the other spots, which keep most of their prediction.

    Raises
    ------
    ValueError
        If the mask does not fit the spots, selects none or all of them, or fewer than ten of a section; if the measured values
        are not on the expected scale, or are a prediction; if the layer was already adapted to some of these spots; if genes are
        unknown; or if the keys are taken. Then nothing is changed.

    Notes
    -----
    Stacked regression (Breiman, Machine Learning 1996) of regression kriging (Hengl et al., Computers & Geosciences
    2007), with folds matched to the distance of the unmeasured spots (Linnenbrink et al., Geosci. Model Dev. 2024).
    In simulation the mean squared error of the other spots was at most 1.02 times that of the prediction in every design:
    12 spots in a corner, a half plane, one class, spots at random (``docs/trust.md``). This holds on average, not for every gene
    and every draw. It requires that differences between measured and other spots are visible in position, embedding, predicted
    expression or predicted class. ``tests/benchmarks/bench_adapt.py`` has simulations, and results on a section that the model
    was not trained on.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> import numpy as np
    >>> sdata = hg.datasets.toy((6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.adapt(sdata, np.arange(36) % 3 == 0)
    >>> sdata["table"].layers["he2gene_adapted"].shape == sdata["table"].shape
    True
    """
    validate.arguments(adapt, locals())
    from ..stats import RESIDUAL_LEVELS, residual_quantiles

    key_added = f"{layer}_adapted" if key_added is None else key_added
    check_key(key_added, "key_added")
    table = get_table(data, table_key, layer=layer)
    keys = Keys(prediction_of(table, layer) or layer)
    gain_key, measured_key, support_key = (f"{key_added}_{name}" for name in ("gain", "measured", "support"))
    check_free(table, "adapt", key_added, layers=[key_added], obs=[measured_key, support_key], var=[gain_key])
    values = matrix_of(table, layer)
    if hasattr(values, "dask") and is_large(*table.shape):
        raise ValueError(
            f"`layer` {layer!r} is lazy, and the adapted layer would need {4e-9 * table.n_obs * table.n_vars:,.1f} GB, more than "
            f"hg.settings.memory_limit ({settings.memory_limit / 1e9:,.1f} GB); subset the genes first, or raise the limit"
        )
    predicted = np.asarray(dense(values), np.float32)
    infinite = int(np.isinf(predicted).sum())
    if infinite:
        raise ValueError(f"`layer`: layer {layer!r} holds {infinite} infinite value(s); finite ones are needed")
    _check_not_predicted(table, measured, counts, layer)
    columns = columns_of(table, predicted, layer, genes)
    inside = np.all(np.isfinite(predicted[:, columns]), axis=1)
    if not inside.any():
        raise ValueError(
            f"`layer` {layer!r}: no spot has values of all {len(columns)} genes, for example because regions were predicted for different genes; pass "
            "`genes` that all of them have, or the table of one region"
        )
    truth = measured_of(table, measured, counts, measured_scale, columns)
    truth[~inside] = np.nan
    spots = np.any(np.isfinite(truth), axis=1)
    _check_not_adapted(table, layer, spots)
    sections = sections_of(table, section_key)
    rows = rows_of(truth, sections, inside)
    classes = None
    if keys.annotation in table.obs:
        classes = pd.Categorical(table.obs[keys.annotation].astype(object))
    elif keys.annotation in recorded_keys(keys.uns, table.uns.get(keys.uns)).get("obs", ()):
        warn(
            f"obs[{keys.annotation!r}], which hg.tl.predict wrote, is missing: the correction is not limited in classes without "
            "measured spots; keep the column, or predict again"
        )
    expression, residuals, support, gain, weights = _adapt_sections(
        table, predicted, truth, columns, rows, keys, classes, seed
    )
    _warn_of_unrepresented(support, spots, classes, rows)
    with np.errstate(invalid="ignore"):
        detected = (truth > 0).sum(axis=0) / np.isfinite(truth).sum(axis=0)
    quantiles, gain, detected = (
        in_columns(values, columns, table.n_vars) for values in (residual_quantiles(residuals), gain, detected)
    )
    others = ~spots & np.isfinite(support)
    write_result(
        table,
        "adapt",
        key_added,
        params={
            "measured": measured if isinstance(measured, str) else "mask",
            "counts": counts,
            "measured_scale": measured_scale,
            "layer": layer,
            "n_genes": len(columns),
            "section_key": section_key,
            "seed": int(seed),
        },
        facts={
            "sections": list(rows),
            "n_measured": [int(spots[own].sum()) for own in rows.values()],
            "support": [float(support[own][others[own]].mean()) if others[own].any() else 1.0 for own in rows.values()],
            "measured_spots": measured_key,
            "weights": weights,
            "residual_levels": RESIDUAL_LEVELS,
            "residual_quantiles": quantiles,
            "detected": detected,
            "guarantee": _GUARANTEE,
        },
        layers={key_added: expression},
        obs={
            measured_key: pd.Series(spots, index=table.obs_names),
            support_key: pd.Series(support, index=table.obs_names),
        },
        var={gain_key: gain},
    )


def _adapt_sections(
    table: AnnData,
    predicted: np.ndarray,
    truth: np.ndarray,
    columns: np.ndarray,
    rows: Mapping[str, np.ndarray],
    keys: Keys,
    classes: pd.Categorical | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, pd.DataFrame]:
    """Adapt each section; return expression, residuals and support of all spots, gain of each gene, and weights."""
    from ..stats import CANDIDATES, adapt

    used = np.sort(np.concatenate(list(rows.values())))
    xy = np.full((table.n_obs, 2), np.nan)
    # Spots without a prediction need no centre.
    xy[used] = spots_of(table[used])
    embedding = np.asarray(table.obsm[keys.embedding], np.float32) if keys.embedding in table.obsm else None
    expression = np.full(table.shape, np.nan, np.float32)
    support = np.full(table.n_obs, np.nan, np.float32)
    residuals = np.full(truth.shape, np.nan, np.float32)
    reduction, total = np.zeros(truth.shape[1]), np.zeros(truth.shape[1])
    weights = {}
    for name, own in rows.items():
        features = None if embedding is None else embedding[own]
        codes = None if classes is None else classes.codes[own].astype(int)
        adapted = adapt(predicted[np.ix_(own, columns)], truth[own], xy[own], features, codes, seed=seed)
        expression[np.ix_(own, columns)] = adapted.expression
        residuals[own], support[own] = adapted.residuals, adapted.support
        before = np.nansum(np.square(np.where(np.isfinite(adapted.residuals), adapted.before, np.nan)), 0)
        reduction += (before - np.nansum(np.square(adapted.residuals), 0)) * np.nan_to_num(adapted.reach)
        total += before
        fitted = np.isfinite(adapted.weights).all(1)
        weights[name] = adapted.weights[fitted].mean(0) if fitted.any() else np.full(len(CANDIDATES), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = reduction / total
    by_section = pd.DataFrame(weights, index=pd.Index(CANDIDATES)).T.reset_index(names="section")
    return expression, residuals, support, gain, by_section


def _warn_of_unrepresented(
    support: np.ndarray, measured: np.ndarray, classes: pd.Categorical | None, rows: Mapping[str, np.ndarray]
) -> None:
    others = ~measured & np.isfinite(support)
    unrepresented = others & (support < 0.5)
    where = []
    for name, own in rows.items():
        n, total = int(unrepresented[own].sum()), int(others[own].sum())
        if n >= max(_MIN_UNREPRESENTED, _UNREPRESENTED_SHARE * total):
            where.append(f"{n} of {total}" + (f" ({name!r})" if len(rows) > 1 else ""))
    if not where:
        return
    unmeasured: list[str] = []
    if classes is not None:
        known = set(classes[measured].dropna())
        unmeasured = [
            str(name) for name in classes.categories if name not in known and (unrepresented & (classes == name)).any()
        ]
    hint = f", also of class {', '.join(map(repr, unmeasured))}" if unmeasured else ""
    warn(
        f"`measured`: the measured spots do not represent {', '.join(where)} others, which are far from them, look different or are of "
        f"another class; these keep most of their prediction; measure spots across the section{hint}"
    )


def _check_not_predicted(table: AnnData, measured: object, counts: str | None, layer: str) -> None:
    is_layer = isinstance(measured, str) and measured in table.layers
    source, parameter = (measured, "measured") if is_layer else (counts, "counts")
    predicted = {layer}
    for record in table.uns.values():
        if is_prediction(record):
            predicted.add(record["layer"])
        elif isinstance(record, Mapping) and record.get("verb") in ("adapt", "intervals"):
            predicted.update(record.get("written", {}).get("layers", []))
    if source in predicted:
        what = "is the prediction itself" if source == layer else "was predicted"
        raise ValueError(f"`{parameter}` {source!r} {what}; a mask or a layer of measured values is needed")
    if source is None and OWN_TABLE in table.uns:
        raise ValueError(
            "`counts`: hg.tl.predict made the table, its X is the prediction and nothing was measured in it; predict into the "
            "measured table (genes=None) and adapt that, or add a layer with the measured values to this table and pass its name "
            "as `measured` or `counts`"
        )


def _check_not_adapted(table: AnnData, layer: str, spots: np.ndarray) -> None:
    """Raise if the layer was already adapted to some of these spots: their residuals are too small."""
    source, steps = source_layer(table, layer)
    adapted = adaptation_spots(table, [step for step in steps if f"{step}_measured" in table.obs])
    n_adapted = 0 if adapted is None else int((spots & adapted).sum())
    if n_adapted:
        raise ValueError(
            f"`layer` {layer!r} was already adapted to {n_adapted} of the {int(spots.sum())} measured spots; adapt the prediction "
            f"{source!r} to all measured spots at once"
        )
