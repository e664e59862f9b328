"""``hg.tl.adapt``: a prediction corrected by the spots or genes of the slide that were measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale
from .._core.keys import OWN_TABLE, Keys, check_key
from .._core.lazy import is_large
from .._core.matrix import dense, matrix_of
from .._core.ownership import check_free, is_prediction, is_record_of, recorded_keys
from .._core.predictions import prediction_of
from .._core.results import write_result
from .._core.spots import get_table, sections_of, spots_of
from .._settings import settings
from ._adapt_input import columns_of, measured_of, rows_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Share of the other spots that measured ones need not represent, and how few of them.
_UNLIKE, _FEW_UNLIKE = 0.1, 5
_GUARANTEE = (
    "Cross-validated residuals of measured spots, ranks corrected for their number: intervals made of them cover, on "
    "average over the unmeasured spots of this slide, about the nominal share (at least 1 - 2 alpha where 1 - alpha is "
    "nominal, as for cross-conformal intervals) if the measured spots were drawn at random; none otherwise, and none "
    "for a single spot or another slide."
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
    """Correct the prediction by what was measured of the slide: some of its spots, or some of its genes.

    A gene gets a convex combination of the prediction with its level put right, that with the residuals of the measured
    spots kriged, with their part that all genes tell together kriged, with a ridge of them on the embedding, the mean of
    the measured spots and their interpolation. How they are weighted is learned in cross-validation, the gene's own
    experience shrunk to that of 250 genes of like mean, and the whole to the prediction by what may be chance. A spot is
    corrected as far as the measured spots represent it: by distance, by its embedding and predicted expression, and by its
    predicted class. Others keep their prediction. Sections are adapted one by one.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    measured
        Which spots were measured: a boolean array ``(n_obs,)``, a boolean Series indexed by ``obs_names``, or the name
        of a boolean column of ``obs``. Or the name of a layer of what was measured, NaN where a gene of a spot was not.
    counts
        With a mask, the layer of raw counts; default ``X``. A table that ``predict(genes="all")`` made holds no counts: adapt
        the prediction in the measured table, or put a layer of what was measured beside it.
    measured_scale
        ``"counts"`` or ``"log"``, natural log of (1 + counts per 10,000); ``"auto"``: raw counts are expected, and what
        is not is refused. Spots of which only some genes were measured have no known total: they need ``"log"``.
    layer
        The prediction.
    genes
        Genes to adapt; default: all that are predicted.
    section_key
        Column of ``obs`` with the section. Without the default column the shapes elements are the sections.
    table_key
        Table, where several hold the prediction.
    key_added
        Name of everything that is written; default: that of the layer and ``"_adapted"``.
    seed
        Of the folds, a whole number from 0.

    Returns
    -------
    ``None``. Written to the table (``layer="he2gene"``, without ``key_added``):

    ``.layers["he2gene_adapted"]``
        ``(n_obs, n_vars)`` float32, on the scale of the prediction, floored at 0. At measured spots too it is an
        estimate, which their own measurement moves, and not the measurement, which is mostly noise of counting. A
        gene measured at fewer than ten spots, but some, keeps its prediction. A gene that no spot measured is changed too,
        by what it shares with those that were, where these are ten or more; how well is not known. NaN for genes that are not predicted, or
        not among ``genes``, for spots outside the image, and for sections of which nothing was measured.
    ``.obs["he2gene_adapted_measured"]``
        Whether the layer was fitted on the spot, by any gene of it; :func:`he2gene_sc.tl.evaluate` and
        :func:`he2gene_sc.pl.calibration` judge the others.
    ``.obs["he2gene_adapted_support"]``
        float32, how far the measured spots represent a spot, 0 to 1: the share of the corrected pattern that it gets. 1 up to
        the largest distance that cross-validation tried, 0 from twice that; less where a linear discriminant tells the spot
        from the measured ones; 0 in a predicted class of which fewer than three spots were measured. NaN where nothing
        was adapted. The level of a gene is corrected alike at all other spots, if they are represented on average.
    ``.var["he2gene_adapted_gain"]``
        Share of the squared error of the prediction that is expected to be gone at the spots that were not measured:
        cross-validated on measured spots, times what of the correction the others get. NaN for genes that were not
        adapted, or that no spot measured.
    ``.uns["he2gene_adapted"]``
        ``weights`` (DataFrame, mean weight of each candidate, by section), ``n_measured`` and ``support`` (by section),
        ``residual_levels`` ``(q,)``, ``residual_quantiles`` ``(q, n_vars)`` float32 of measured minus adapted at spots
        that were left out, infinite where the spots are too few for a level (under 19 for 5 %), NaN for genes that were
        not adapted; ``detected`` ``(n_vars,)``, share of the measured spots that show a gene; ``guarantee``, what intervals
        made of them are worth.

    Warns
    -----
    UserWarning
        If the measured spots do not represent more than a tenth of the others, which keep most of their prediction.

    Raises
    ------
    ValueError
        If the mask fits no spots, measures none or all of them, or fewer than ten of a section; if what was measured is
        not on the scale that is expected, or is a prediction; if the layer was adapted to some of these spots before; if
        genes are unknown; or if the keys are taken. Nothing has been changed then.

    Notes
    -----
    Stacked regression (Breiman, Machine Learning 1996) of regression kriging (Hengl et al., Computers & Geosciences
    2007), with folds matched to the distance of the unmeasured spots (Linnenbrink et al., Geosci. Model Dev. 2024).
    In simulation the mean squared error of the other spots was at most 1.02 times that of the prediction in every design:
    12 spots in a corner, a half plane, one class, spots at random (``docs/trust.md``). This holds on average, not for
    every gene and every draw. It needs that what differs between measured and other spots shows in place, embedding,
    predicted expression or predicted class. Measured on a section that the model had not seen, and simulated:
    ``tests/benchmarks/bench_adapt.py``.

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
            f"`layer` {layer!r} is lazy, and the adapted one would take {4e-9 * table.n_obs * table.n_vars:,.1f} GB, over "
            f"hg.settings.memory_limit ({settings.memory_limit / 1e9:,.1f} GB); subset the genes first, or raise the limit"
        )
    predicted = np.asarray(dense(values), np.float32)
    infinite = int(np.isinf(predicted).sum())
    if infinite:
        raise ValueError(f"`layer`: layer {layer!r} holds {infinite} infinite value(s); finite ones are needed")
    _refuse_predictions(table, measured, counts, layer)
    columns = columns_of(table, predicted, layer, genes)
    inside = np.all(np.isfinite(predicted[:, columns]), axis=1)
    truth = measured_of(table, measured, counts, measured_scale, columns, layer)
    truth[~inside] = np.nan
    spots = np.any(np.isfinite(truth), axis=1)
    _refuse_twice(table, layer, spots)
    sections = sections_of(table, section_key)
    rows = rows_of(truth, sections, inside)
    if keys.annotation not in table.obs and keys.annotation in recorded_keys(keys.uns, table.uns.get(keys.uns)).get(
        "obs", ()
    ):
        warnings.warn(
            f"obs[{keys.annotation!r}], which hg.tl.predict wrote, is not there: the correction is not limited in classes that "
            "were not measured; keep it, or predict again",
            stacklevel=2,
        )
    found = _adapt_sections(table, predicted, truth, columns, rows, keys, seed)
    represented = {name: _represented(found.support[at], spots[at]) for name, at in rows.items()}
    _warn_of_others(found.support, spots, _classes(table, keys), rows)
    quantiles = np.full((len(RESIDUAL_LEVELS), table.n_vars), np.nan, np.float32)
    quantiles[:, columns] = residual_quantiles(found.residuals)
    gain = np.full(table.n_vars, np.nan, np.float32)
    gain[columns] = found.gain
    shown = np.full(table.n_vars, np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        shown[columns] = (truth > 0).sum(axis=0) / np.isfinite(truth).sum(axis=0)
    n_measured = {name: int(np.isfinite(truth[at]).any(1).sum()) for name, at in rows.items()}
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
            "n_measured": list(n_measured.values()),
            "support": list(represented.values()),
            "measured_spots": measured_key,
            "weights": found.weights,
            "residual_levels": RESIDUAL_LEVELS,
            "residual_quantiles": quantiles,
            "detected": shown,
            "guarantee": _GUARANTEE,
        },
        layers={key_added: found.expression},
        obs={
            measured_key: pd.Series(spots, index=table.obs_names),
            support_key: pd.Series(found.support, index=table.obs_names),
        },
        var={gain_key: pd.Series(gain, index=table.var_names)},
    )


@dataclass
class _Found:
    """What all sections together give: see :class:`he2gene_sc.stats._adapt.Adapted`."""

    expression: np.ndarray
    residuals: np.ndarray
    support: np.ndarray
    gain: np.ndarray
    weights: pd.DataFrame


def _adapt_sections(
    table: AnnData,
    predicted: np.ndarray,
    truth: np.ndarray,
    columns: np.ndarray,
    rows: Mapping[str, np.ndarray],
    keys: Keys,
    seed: int,
) -> _Found:
    """Adapt each section."""
    from ..stats import CANDIDATES, adapt

    used = np.sort(np.concatenate(list(rows.values())))
    xy = np.full((table.n_obs, 2), np.nan)
    # Where a spot lies that has no prediction does not matter.
    xy[used] = spots_of(table[used])
    embedding = np.asarray(table.obsm[keys.embedding], np.float32) if keys.embedding in table.obsm else None
    classes = _classes(table, keys)
    expression = np.full(table.shape, np.nan, np.float32)
    support = np.full(table.n_obs, np.nan, np.float32)
    residuals = np.full(truth.shape, np.nan, np.float32)
    saved, whole = np.zeros(truth.shape[1]), np.zeros(truth.shape[1])
    weights = {}
    for name, at in rows.items():
        seen = None if embedding is None else embedding[at]
        codes = None if classes is None else classes.codes[at].astype(int)
        found = adapt(predicted[np.ix_(at, columns)], truth[at], xy[at], seen, codes, seed=seed)
        expression[np.ix_(at, columns)] = found.expression
        residuals[at], support[at] = found.residuals, found.support
        before = np.nansum(np.square(np.where(np.isfinite(found.residuals), found.before, np.nan)), 0)
        saved += (before - np.nansum(np.square(found.residuals), 0)) * np.nan_to_num(found.reach)
        whole += before
        fitted = np.isfinite(found.weights).all(1)
        weights[name] = found.weights[fitted].mean(0) if fitted.any() else np.full(len(CANDIDATES), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = saved / whole
    by_section = pd.DataFrame(weights, index=pd.Index(CANDIDATES)).T.reset_index(names="section")
    return _Found(expression, residuals, support, gain, by_section)


def _classes(table: AnnData, keys: Keys) -> pd.Categorical | None:
    """Predicted class of each spot."""
    if keys.annotation not in table.obs:
        return None
    return pd.Categorical(table.obs[keys.annotation].astype(object))


def _represented(support: np.ndarray, measured: np.ndarray) -> float:
    """Mean share of the correction that spots not measured get; 1 where there are none."""
    others = support[~measured & np.isfinite(support)]
    return float(others.mean()) if len(others) else 1.0


def _warn_of_others(
    support: np.ndarray, measured: np.ndarray, classes: pd.Categorical | None, rows: Mapping[str, np.ndarray]
) -> None:
    """Warn of spots that the measured ones do not stand for."""
    others = ~measured & np.isfinite(support)
    far = others & (support < 0.5)
    found = {name: (int(far[at].sum()), int(others[at].sum())) for name, at in rows.items()}
    found = {name: (n, of) for name, (n, of) in found.items() if n >= max(_FEW_UNLIKE, _UNLIKE * of)}
    if not found:
        return
    where = ", ".join(f"{n} of {of}" + (f" ({name!r})" if len(rows) > 1 else "") for name, (n, of) in found.items())
    unseen: list[str] = []
    if classes is not None:
        seen = set(classes[measured].dropna())
        unseen = [str(name) for name in classes.categories if name not in seen and (far & (classes == name)).any()]
    named = f", also of {', '.join(map(repr, unseen))}" if unseen else ""
    warnings.warn(
        f"`measured`: the measured spots do not represent {where} others, which lie far from them, look different or are of "
        f"another class; these keep most of their prediction; measure spots across the section{named}",
        stacklevel=3,
    )


def _refuse_predictions(table: AnnData, measured: object, counts: str | None, layer: str) -> None:
    """Refuse to adapt a prediction to itself or to another."""
    is_layer = isinstance(measured, str) and measured in table.layers
    source, parameter = (measured, "measured") if is_layer else (counts, "counts")
    made = {layer}
    for record in table.uns.values():
        if is_prediction(record):
            made.add(record["layer"])
        elif isinstance(record, Mapping) and record.get("verb") in ("adapt", "intervals"):
            made.update(record.get("written", {}).get("layers", []))
    if source in made:
        what = "is the prediction itself" if source == layer else "was predicted"
        raise ValueError(f"`{parameter}` {source!r} {what}; a mask or a layer of measured values is needed")
    if source is None and OWN_TABLE in table.uns:
        raise ValueError(
            "`counts`: the table was made by hg.tl.predict, its X is the prediction and nothing was measured in it; predict "
            "into the measured table (genes=None) and adapt that, or put a layer of what was measured into this one and name "
            "it by `measured` or `counts`"
        )


def _refuse_twice(table: AnnData, layer: str, spots: np.ndarray) -> None:
    """Refuse to adapt a layer again to spots that it was adapted to: their residuals are too small."""
    key = f"{layer}_measured"
    record = table.uns.get(layer)
    if not (is_record_of("adapt", record) and key in table.obs):
        return
    again = int((spots & table.obs[key].to_numpy(bool)).sum())
    if again:
        raise ValueError(
            f"`layer` {layer!r} was adapted to {again} of the {int(spots.sum())} measured spots already; adapt the prediction "
            f"{record['params']['layer']!r} to all that was measured at once"
        )
