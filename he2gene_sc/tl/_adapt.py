"""``hg.tl.adapt``: a prediction corrected by the spots or genes of the slide that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse

from .._core import validate
from .._core.keys import MADE, Keys, check_key
from .._core.results import check_free, write_result
from .._core.tables import Scale, get_table, sections_of, spots_of, values_of
from ._adapt_input import columns_of, measured_of, rows_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

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
    section_key: str | None = None,
    table_key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
) -> None:
    """Correct the prediction by what was measured of the slide: some of its spots, or some of its genes.

    A gene gets a convex combination of the prediction with its level put right, that with the residuals of the measured
    spots kriged, with their part that all genes tell together kriged, with a ridge of them on the embedding, the mean of
    the measured spots and their interpolation. How they are weighted is learned in cross-validation, the gene's own
    experience shrunk to that of 250 genes of like mean, and the whole to the prediction by what may be chance: where the
    measured spots are too few to tell, the prediction keeps its pattern and only its level is corrected. Sections are
    adapted one by one.

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
        Column of ``obs`` that tells sections; default: the regions of the table, and ``obs["section"]``.
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
    ``.var["he2gene_adapted_gain"]``
        Share of the squared error of the prediction that is gone, cross-validated on measured spots; NaN for genes that
        were not adapted, or that no spot measured.
    ``.uns["he2gene_adapted"]``
        ``weights`` (DataFrame, mean weight of each candidate, by section), ``n_measured`` (by section),
        ``residual_levels`` ``(q,)``, ``residual_quantiles`` ``(q, n_vars)`` float32 of measured minus adapted at spots
        that were left out, infinite where the spots are too few for a level (under 19 for 5 %), NaN for genes that were
        not adapted; ``guarantee``, what intervals made of them are worth.

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
    "Never worse" holds in expectation over the spots that are measured, not for every gene and every draw. With fewer than
    30 measured spots of a section a pattern is corrected only on strong evidence, so that a useless prediction is left
    for the neighbours later than it could be. Measured on a section that the model had not seen:
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
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`seed` is {seed!r}; a whole number from 0 is needed")
    table = get_table(data, table_key, key_added=_prefix(data, layer))
    gain_key, measured_key = f"{key_added}_gain", f"{key_added}_measured"
    check_free(table, "adapt", key_added, layers=[key_added], obs=[measured_key], var=[gain_key])
    predicted = values_of(table, layer)
    predicted = np.asarray(predicted.toarray() if scipy.sparse.issparse(predicted) else predicted, np.float32)
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
    result = _adapt_sections(table, predicted, truth, columns, rows, Keys(_prefix(table, layer)).embedding, seed)
    expression, residuals, before, weights = result
    quantiles = np.full((len(RESIDUAL_LEVELS), table.n_vars), np.nan, np.float32)
    quantiles[:, columns] = residual_quantiles(residuals)
    gain = np.full(table.n_vars, np.nan, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        gain[columns] = 1 - np.nansum(np.square(residuals), 0) / np.nansum(np.square(before), 0)
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
            "measured_spots": measured_key,
            "weights": weights,
            "residual_levels": RESIDUAL_LEVELS,
            "residual_quantiles": quantiles,
            "guarantee": _GUARANTEE,
        },
        layers={key_added: expression},
        obs={measured_key: pd.Series(spots, index=table.obs_names)},
        var={gain_key: pd.Series(gain, index=table.var_names)},
    )


def _adapt_sections(
    table: AnnData,
    predicted: np.ndarray,
    truth: np.ndarray,
    columns: np.ndarray,
    rows: Mapping[str, np.ndarray],
    embedding_key: str,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, pd.DataFrame]:
    """Adapt each section; return expression ``(n_obs, n_vars)``, residuals after and before, mean weights."""
    from ..stats import CANDIDATES, adapt

    used = np.sort(np.concatenate(list(rows.values())))
    xy = np.full((table.n_obs, 2), np.nan)
    # Where a spot lies that has no prediction does not matter.
    xy[used] = spots_of(table[used])
    embedding = np.asarray(table.obsm[embedding_key], np.float32) if embedding_key in table.obsm else None
    expression = np.full(table.shape, np.nan, np.float32)
    residuals, before = (np.full(truth.shape, np.nan, np.float32) for _ in range(2))
    weights = {}
    for name, at in rows.items():
        seen = None if embedding is None else embedding[at]
        found = adapt(predicted[np.ix_(at, columns)], truth[at], xy[at], seen, seed=seed)
        expression[np.ix_(at, columns)] = found.expression
        residuals[at], before[at] = found.residuals, np.where(np.isfinite(found.residuals), found.before, np.nan)
        fitted = np.isfinite(found.weights).all(1)
        weights[name] = found.weights[fitted].mean(0) if fitted.any() else np.full(len(CANDIDATES), np.nan)
    table_of = pd.DataFrame(weights, index=pd.Index(CANDIDATES)).T.reset_index(names="section")
    return expression, residuals, before, table_of


def _prefix(data: SpatialData | AnnData, layer: str) -> str:
    """``key_added`` of the prediction that wrote the layer, or the one that it was adapted from."""
    for table in data.tables.values() if hasattr(data, "tables") else [data]:
        uns = getattr(table, "uns", {})
        for key, record in uns.items():
            if isinstance(record, Mapping) and "weights_sha256" in record and record.get("layer") == layer:
                return key
        adapted = uns.get(layer)
        if isinstance(adapted, Mapping) and adapted.get("verb") == "adapt" and layer != adapted["params"]["layer"]:
            return _prefix(table, adapted["params"]["layer"])
    return layer


def _refuse_predictions(table: AnnData, measured: object, counts: str | None, layer: str) -> None:
    """Refuse to adapt a prediction to itself or to another."""
    is_layer = isinstance(measured, str) and measured in table.layers
    source, parameter = (measured, "measured") if is_layer else (counts, "counts")
    made = {layer}
    for record in table.uns.values():
        if isinstance(record, Mapping) and {"weights_sha256", "layer"} <= set(record):
            made.add(record["layer"])
        elif isinstance(record, Mapping) and record.get("verb") in ("adapt", "intervals"):
            made.update(record.get("written", {}).get("layers", []))
    if source in made:
        what = "is the prediction itself" if source == layer else "was predicted"
        raise ValueError(f"`{parameter}` {source!r} {what}; a mask or a layer of measured values is needed")
    if source is None and MADE in table.uns:
        raise ValueError(
            "`counts`: the table was made by hg.tl.predict, its X is the prediction and nothing was measured in it; predict "
            "into the measured table (genes=None) and adapt that, or put a layer of what was measured into this one and name "
            "it by `measured` or `counts`"
        )


def _refuse_twice(table: AnnData, layer: str, spots: np.ndarray) -> None:
    """Refuse to adapt a layer again to spots that it was adapted to: their residuals are too small."""
    key = f"{layer}_measured"
    record = table.uns.get(layer)
    if not (isinstance(record, Mapping) and record.get("verb") == "adapt" and key in table.obs):
        return
    again = int((spots & table.obs[key].to_numpy(bool)).sum())
    if again:
        raise ValueError(
            f"`layer` {layer!r} was adapted to {again} of the {int(spots.sum())} measured spots already; adapt the prediction "
            f"{record['params']['layer']!r} to all that was measured at once"
        )
