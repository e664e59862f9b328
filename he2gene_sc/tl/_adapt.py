"""``hg.tl.adapt``: a prediction corrected by the spots or genes of the slide that were measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._keys import Keys, check_key
from .._tables import Scale, check_free, get_table, log_expression, sections_of, spots_of, values_of, write_result

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
    key_added: str = "he2gene_adapted",
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
        With a mask, the layer of raw counts; default ``X``.
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
        Name of everything that is written.
    seed
        Of the folds.

    Returns
    -------
    ``None``. Written to the table (``key_added="he2gene_adapted"``):

    ``.layers["he2gene_adapted"]``
        ``(n_obs, n_vars)`` float32, on the scale of the prediction, floored at 0. At measured spots too it is an
        estimate, which their own measurement moves, and not the measurement, which is mostly noise of counting. A
        gene measured at fewer than ten spots, but some, keeps its prediction. NaN for genes that are not predicted, or
        not among ``genes``, for spots outside the image, and for sections of which nothing was measured.
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
        not on the scale that is expected; if genes are unknown; or if the keys are taken. Nothing has been changed then.

    Notes
    -----
    Stacked regression (Breiman, Machine Learning 1996) of regression kriging (Hengl et al., Computers & Geosciences
    2007), with folds matched to the distance of the unmeasured spots (Linnenbrink et al., Geosci. Model Dev. 2024).
    "Never worse" holds in expectation over the spots that are measured, not for every gene and every draw.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> import numpy as np
    >>> sdata = hg.datasets.toy((6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.adapt(sdata, np.arange(36) % 3 == 0)
    >>> sdata["table"].layers["he2gene_adapted"].shape
    (36, 32)
    """
    from ..stats import LEVELS, residual_quantiles

    check_key(key_added, "key_added")
    table = get_table(data, table_key, key_added=_prefix(data, layer))
    gain_key = f"{key_added}_gain"
    check_free(table, "adapt", key_added, layers=[key_added], var=[gain_key])
    predicted = np.asarray(values_of(table, layer), np.float32)
    columns = _columns(table, predicted, layer, genes)
    inside = np.isfinite(predicted[:, columns]).all(1)
    truth = _measured(table, measured, counts, measured_scale, columns, layer)
    truth[~inside] = np.nan
    sections = sections_of(table, section_key)
    rows = _rows(truth, sections, inside)
    result = _adapt_sections(table, predicted, truth, columns, rows, Keys(_prefix(table, layer)).embedding, seed)
    expression, residuals, before, weights = result
    quantiles = np.full((len(LEVELS), table.n_vars), np.nan, np.float32)
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
            "seed": seed,
        },
        facts={
            "sections": list(rows),
            "n_measured": list(n_measured.values()),
            "weights": weights,
            "residual_levels": LEVELS,
            "residual_quantiles": quantiles,
            "guarantee": _GUARANTEE,
        },
        layers={key_added: expression},
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

    xy = spots_of(table)
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
    """``key_added`` of the prediction that wrote the layer."""
    for table in data.tables.values() if hasattr(data, "tables") else [data]:
        for key, record in getattr(table, "uns", {}).items():
            if isinstance(record, Mapping) and "weights_sha256" in record and record.get("layer") == layer:
                return key
    return layer


def _columns(table: AnnData, predicted: np.ndarray, layer: str, genes: Sequence[str] | None) -> np.ndarray:
    """Positions of the genes to adapt."""
    known = np.isfinite(predicted).any(0)
    if genes is None:
        if not known.any():
            raise ValueError(f"`layer` {layer!r} predicts no gene of the table")
        return np.flatnonzero(known)
    if isinstance(genes, str):
        raise ValueError(f"`genes` is {genes!r}; a list of genes is needed")
    genes = list(dict.fromkeys(genes))
    at = table.var_names.get_indexer(genes)
    missing = [gene for gene, i in zip(genes, at, strict=True) if i < 0 or not known[i]]
    if missing or not genes:
        raise ValueError(
            f"`genes`: {len(missing)} of {len(genes)} are not predicted in layer {layer!r}: {missing[:5]}; those that are: "
            f"hg.get.genes(data), {int(known.sum())} in all"
        )
    return at


def _measured(
    table: AnnData,
    measured: str | np.ndarray | pd.Series,
    counts: str | None,
    scale: Scale,
    columns: np.ndarray,
    layer: str,
) -> np.ndarray:
    """Measured expression ``(n_obs, genes)`` as logarithms, NaN where nothing was measured."""
    is_layer = isinstance(measured, str) and measured in table.layers
    if is_layer and measured in table.obs:
        raise ValueError(f"`measured` {measured!r} is a layer and a column of obs: rename one")
    if is_layer and measured == layer:
        raise ValueError(
            f"`measured` {measured!r} is the prediction itself; a mask or a layer of measured values is needed"
        )
    if is_layer and counts is not None:
        raise ValueError(f"`counts` is {counts!r}, but `measured` {measured!r} is a layer already: give one of them")
    mask = np.ones(table.n_obs, bool) if is_layer else _mask(table, measured)
    source, parameter = (measured, "measured") if is_layer else (counts, "counts")
    values = values_of(table, source, parameter)
    if not hasattr(values, "toarray"):
        missing = np.isnan(values)
        mask &= ~missing.all(1)
        partly = int((missing.any(1) & mask).sum())
        if partly and scale != "log":
            raise ValueError(
                f"`{parameter}`: {partly} spots have some genes measured and others not (NaN): their total is not known, so "
                "counts cannot be normalised; give natural logarithms of (1 + counts per 10,000) and measured_scale='log'"
            )
    if is_layer and (not mask.any() or (mask.all() and not partly)):
        what = "everywhere" if not mask.any() else "nowhere"
        raise ValueError(
            f"`measured`: layer {measured!r} is NaN {what}; NaN where a gene of a spot was not measured is needed"
        )
    truth = log_expression(
        table,
        source,
        genes=columns,
        scale=scale,
        expected="counts",
        parameter=parameter,
        scale_parameter="measured_scale",
    )
    empty = mask & (np.asarray(np.nan_to_num(values.sum(axis=1), nan=1)).ravel() == 0)
    if empty.any():
        warnings.warn(
            f"{int(empty.sum())} measured spots have no counts: taken as not measured", UserWarning, stacklevel=3
        )
    truth[~mask | empty] = np.nan
    return truth


def _mask(table: AnnData, measured: str | np.ndarray | pd.Series) -> np.ndarray:
    """Boolean mask of the measured spots, checked."""
    found = measured
    if isinstance(measured, str):
        if measured not in table.obs:
            valid = [key for key in table.obs if table.obs[key].dtype == bool]
            raise ValueError(
                f"`measured` {measured!r} is no column of obs and no layer, boolean columns: {valid}, layers: "
                f"{sorted(table.layers)}"
            )
        found = table.obs[measured]
    elif isinstance(measured, pd.Series):
        missing = ~table.obs_names.isin(measured.index)
        if missing.any() or measured.index.has_duplicates:
            raise ValueError(
                f"`measured`: a Series indexed by the spots is needed; {int(missing.sum())} of {table.n_obs} spots are not "
                f"in its index{', which has duplicates' if measured.index.has_duplicates else ''}"
            )
        found = measured.reindex(table.obs_names)
    mask = np.array(found)
    if mask.dtype != bool:
        raise ValueError(f"`measured` holds {mask.dtype}; True and False are needed")
    if mask.shape != (table.n_obs,):
        raise ValueError(f"`measured` has shape {mask.shape}; ({table.n_obs},), one a spot, is needed")
    if not mask.any():
        raise ValueError(f"`measured` is False for all {len(mask)} spots: there is nothing to learn from")
    if mask.all():
        raise ValueError(f"`measured` is True for all {len(mask)} spots: there is nothing left to predict")
    return mask


def _rows(truth: np.ndarray, sections: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each section that something was measured of."""
    from ..stats import MIN_SPOTS

    rows, few, none = {}, [], []
    spots = np.isfinite(truth).any(1)
    for name in dict.fromkeys(sections):
        here = sections == name
        n = int((spots & here).sum())
        if n >= MIN_SPOTS:
            rows[name] = np.flatnonzero(here & inside)
        elif n:
            few.append(f"{name!r} ({n})")
        else:
            none.append(str(name))
    if few:
        raise ValueError(
            f"`measured`: too few spots with a prediction are measured in {', '.join(few)}; at least {MIN_SPOTS} are needed, "
            "or none of a section"
        )
    if not rows:
        raise ValueError("`measured`: no predicted gene is measured at a spot that has a prediction")
    if none:
        warnings.warn(f"nothing was measured of section(s) {none}: they get NaN", UserWarning, stacklevel=3)
    return rows
