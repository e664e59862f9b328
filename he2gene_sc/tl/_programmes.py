"""``hg.tl.programmes``: scores of gene sets at every spot, and how well each is predicted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse

from .._core import validate
from .._core.expression import Scale
from .._core.genes import find_genes
from .._core.keys import PATIENT, check_key
from .._core.matrix import values_of
from .._core.ownership import is_prediction
from .._core.predictions import prediction_of
from .._core.results import Result, check_free, write_results
from .._core.spots import SpotData, read_spots
from ..models._schema import check_class_names
from ..stats import log_normalise, pearson
from ..training._held_out import Depth
from ..training._predictability import MIN_GROUPS, RELIABLE_PCC, bounds, by_patient, least
from ._biomarkers.blind import COLOUR, DEPTH, fields
from ._biomarkers.pool import labelled_spots
from ._compare import correlation, fitted_on_others, in_common
from ._gene_sets import import_decoupler, in_names_of, read_net
from ._paired import paired_spots, sections_trained_on

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

#: Values of a block of spots, and halvings of the counts for a ceiling, as many as of the genes of a model.
_BLOCK, _SPLITS = 2**22, 2
#: Of each set and section; and of each set.
_FIGURES = ("pearson", "pearson_given_depth", "ceiling", DEPTH, COLOUR)
_COLUMNS = ("pearson", "pearson_low", "pearson_high", *_FIGURES[1:])
_UNKNOWN = "unknown: "


def programmes(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    net: pd.DataFrame | str | Path | Mapping[str, Sequence[str]],
    *,
    held_out: SpatialData | AnnData | Iterable[SpatialData | AnnData] | None = None,
    layer: str | None = "he2gene",
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    min_genes: int = 5,
    sample_key: str = "patient",
    section_key: str = "section",
    table_key: str | None = None,
    seed: int = 0,
    key_added: str = "he2gene_programmes",
) -> pd.DataFrame:
    """Score gene sets at every spot, and say which scores may be used on a new patient.

    Parameters
    ----------
    data
        Object or table with the expression in a layer, or several.
    net
        Gene sets: a DataFrame with columns ``source`` (the set), ``target`` (the gene) and perhaps ``weight``, as decoupler and
        :func:`he2gene_sc.datasets.breast_markers` give it; a GMT file; or a mapping of sets to genes.
    held_out
        Slides that were predicted in the same layer and measured too, of patients that **the model has not seen**: how well the
        score of each set is predicted is computed from them. Without, it is unknown, and no set is reliable.
    layer
        Predicted expression; ``None``: ``X``, what was measured.
    layer_scale, measured, measured_scale, sample_key, section_key
        As for :func:`he2gene_sc.tl.calibrate`; all but ``layer_scale`` are of ``held_out`` alone.
    min_genes
        Sets with fewer genes in the layer are left out, with a warning.
    table_key
        Table, where an object has several.
    seed
        For the halving of counts in the noise ceiling.
    key_added
        Where it is written.

    Returns
    -------
    pandas.DataFrame
        A row a set: ``source``; ``n_genes`` of the set and ``n_predicted``, those in the layer; the correlation of predicted with
        measured scores ``pearson``, mean over the held-out patients, with its 95 % t interval ``pearson_low``, ``pearson_high`` (from
        3 patients on); ``pearson_given_depth``; the noise ``ceiling``; the references ``depth`` and ``mean colour``, NaN where there
        is nothing to fit them on; ``reliable``; ``evidence``, what that stands on.

        Written to the table of each object: ``.obsm["he2gene_programmes"]``, a DataFrame with a column a set, NaN for spots
        without expression; ``.uns["he2gene_programmes"]``: ``results``, the ``sections`` that were held out, ``left_out``.

    Raises
    ------
    ImportError
        If decoupler is missing: ``pip install 'he2gene_sc[enrichment]'``.
    ValueError
        If there is no such layer, no set has enough genes, or ``held_out`` holds nothing to compare.

    Warns
    -----
    UserWarning
        If it is unknown how well a score is predicted, or sets are left out.

    Notes
    -----
    The score is decoupler's ``ulm``: t of the slope of the expression of a spot on membership, over all genes of the layer. So it is
    relative to the other genes, and slides of other genes have other scores. A set is reliable by the rule for genes, over at least 3
    patients: the lower end of the 95 % t interval of the correlation given depth is above 0.1, so is the plain correlation in each, and
    it is better than depth and, where there are images, than colour.
    See ``docs/statistics/methods.md``.

    See Also
    --------
    he2gene_sc.tl.enrichment : Gene sets among biomarkers.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((5, 5), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> sets = {"fat": ["ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL"]}
    >>> hg.tl.programmes(slides[0], sets, held_out=slides[1:])["n_predicted"].item()
    5
    >>> slides[0]["table"].obsm["he2gene_programmes"].columns.tolist()
    ['fat']
    """
    validate.arguments(programmes, locals())
    validate.whole(min_genes, "min_genes")
    check_key(key_added, "key_added")
    if layer is None and held_out is not None:
        raise ValueError(
            "`layer` is None, so measured counts are scored and there is no prediction to judge; leave `held_out` out"
        )
    decoupler = import_decoupler("hg.tl.programmes")
    sets = read_net(net)
    try:
        check_class_names(sets["source"].unique(), "set")
    except ValueError as error:
        raise ValueError(f"`net`: {error}") from None
    data = list(data) if isinstance(data, Iterator) else data
    spots = read_spots(data, None, "data", layer=layer, table_key=table_key, samples_needed=False)
    for table in spots.tables:
        check_free(table, "programmes", key_added, obsm=[key_added])
    spots = labelled_spots(spots, None, layer_scale=layer_scale)
    scorer = _Scorer.of(sets, spots.genes, min_genes, decoupler)
    results = pd.DataFrame({"n_genes": sets.groupby("source", sort=False).size()}).rename_axis("source")
    results["n_predicted"] = scorer.sizes.reindex(results.index)
    left_out = results[~results.index.isin(scorer.names)]
    if not scorer.names:
        raise ValueError(
            f"`net`: no set has {min_genes} of the {len(spots.genes)} genes of the layer, with others beside them; the best has "
            f"{int(left_out['n_predicted'].max()) if len(left_out) else 0}. Check the names of the genes, or lower `min_genes`"
        )
    results = results.loc[scorer.names]
    figures = pd.DataFrame(np.nan, index=results.index, columns=list(_COLUMNS))
    evidence = "measured" if layer is None else f"{_UNKNOWN}no held-out slides"
    results = results.join(figures).assign(reliable=False, evidence=evidence)
    params = {"layer": layer, "layer_scale": layer_scale, "min_genes": min_genes, "seed": seed}
    facts: dict[str, Any] = {"left_out": left_out.reset_index()}
    if held_out is not None:
        held_out = list(held_out) if isinstance(held_out, Iterator) else held_out
        where = {"sample_key": sample_key, "section_key": section_key}
        pair = paired_spots(
            held_out,
            str(layer),
            layer_scale,
            measured,
            measured_scale,
            **where,
            table_key=table_key,
            parameter="held_out",
        )
        (predicted,), truth = in_common([pair], "held_out")
        theirs = _Scorer.of(sets[sets["source"].isin(results.index)], truth.genes, min_genes, decoupler)
        if not theirs.names:
            raise ValueError(
                f"`held_out`: no set has {min_genes} of the {len(truth.genes)} genes that were predicted and measured there; give "
                "slides of more genes, or lower `min_genes`"
            )
        facts["sections"] = _sections(theirs, predicted, truth, fields(held_out, truth.tables, truth, str(layer)), seed)
        unit = "patient" if sample_key == PATIENT else sample_key
        found = _over_units(facts["sections"], unit, theirs.names, sections_trained_on(predicted))
        results["evidence"] = f"{_UNKNOWN}fewer than {min_genes} of its genes on the held-out slides"
        results.loc[found.index, found.columns] = found
        params |= {**where, "measured_scale": measured_scale}
    if layer is not None and any(_is_strange(table, layer) for table in spots.tables):
        results = results.assign(reliable=False, evidence=f"{_UNKNOWN}a slide of `data` is out of distribution")
    results = results.astype({"reliable": bool}).reset_index()
    record = {"verb": "programmes", "params": {k: v for k, v in params.items() if v is not None}, **facts}
    scores = scorer.scores(spots.blocks(), len(spots.labels))
    written, start = [], 0
    for table, rows in zip(spots.tables, spots.rows, strict=True):
        values = np.full((table.n_obs, len(scorer.names)), np.nan, np.float32)
        values[rows] = scores[start : start + len(rows)]
        start += len(rows)
        frame = pd.DataFrame(values, index=table.obs_names, columns=scorer.names)
        result = Result("programmes", key_added, {**record, "results": results}, {"obsm": {key_added: frame}})
        written.append((table, result))
    _warn(left_out, min_genes, held_out is None and layer is not None)
    write_results(written)
    logger.info("programmes: %d sets, %d left out, in obsm[%r]", len(results), len(left_out), key_added)
    return results.copy()


@dataclass(frozen=True)
class _Scorer:
    """Scores of the sets that have enough of some genes, but not all of them."""

    net: pd.DataFrame
    sizes: pd.Series
    names: list[str]
    genes: pd.Index
    decoupler: Any

    @classmethod
    def of(cls, sets: pd.DataFrame, genes: pd.Index, min_genes: int, decoupler: Any) -> _Scorer:
        net = in_names_of(sets, genes)
        order = sets["source"].unique()
        net = net[net["target"].isin(genes)]
        sizes = net.groupby("source").size().reindex(order, fill_value=0)
        names = list(order[(sizes >= min_genes) & (sizes < len(genes))])
        return cls(net[net["source"].isin(names)], sizes, names, genes, decoupler)

    def scores(self, blocks: Iterable[tuple[slice, np.ndarray]], n: int) -> np.ndarray:
        """Scores ``(n, sets)`` from the logarithms of some spots at a time."""
        out = np.zeros((n, len(self.names)))
        for where, values in blocks:
            # Spots without any of the genes have no slope, and decoupler refuses them; genes that are 0 belong to the background.
            rows = np.flatnonzero(np.ptp(values, axis=1) > 0)
            if len(rows):
                frame = pd.DataFrame(values[rows], columns=self.genes)
                found, _ = self.decoupler.mt.ulm(frame, self.net, tmin=1, empty=False)
                out[where.start + rows] = found[self.names]
        return out

    def ceiling(self, spots: SpotData, rng: np.random.Generator) -> np.ndarray:
        """Noise ceiling ``(sets,)`` of scores of counts, by binomial halves of the counts of one section."""
        ((table, rows),) = [found for found in zip(spots.tables, spots.rows, strict=True) if len(found[1])]
        counts = scipy.sparse.csr_array(values_of(table[rows], spots.layer, "measured"))
        counts.data = np.rint(counts.data).astype(np.int64)
        columns, step = find_genes(self.genes, table.var_names), max(1, _BLOCK // table.n_vars)
        found = []
        for _ in range(_SPLITS):
            half = counts.copy()
            half.data = rng.binomial(counts.data, 0.5)
            starts = range(0, len(rows), step)
            halves = [
                self.scores(
                    ((slice(i, i + step), log_normalise(part[i : i + step])[:, columns]) for i in starts), len(rows)
                )
                for part in (half, counts - half)
            ]
            found.append(np.nan_to_num(pearson(*halves)))
        r = np.clip(np.mean(found, axis=0), 0, 1)
        return np.sqrt(2 * r / (1 + r))


def _sections(
    scorer: _Scorer, predicted: SpotData, truth: SpotData, seen: Mapping[str, np.ndarray], seed: int
) -> pd.DataFrame:
    """Figures of each set in each section: a row a section and set."""
    n = len(truth.units)
    guess, aim = scorer.scores(predicted.blocks(), n), scorer.scores(truth.blocks(), n)
    units, patients = (pd.factorize(names)[0] for names in (truth.units, truth.samples))
    guesses = {"pearson": guess}
    groups = patients if patients.any() else units
    if groups.any():
        centred = aim - pd.DataFrame(aim).groupby(units).transform("mean").to_numpy()
        guesses |= {name: fitted_on_others(values[:, None], centred, groups) for name, values in seen.items()}
    totals = truth.totals(truth.layer, "measured") if truth.scale == "counts" else None
    rng, rows = np.random.default_rng(seed), []
    for unit in range(units.max() + 1):
        own = units == unit
        figures = {name: correlation(values[own], aim[own]) for name, values in guesses.items()}
        if totals is not None:
            given = Depth.of(totals[own], np.zeros(own.sum())).partial(guess[own], aim[own])
            figures["pearson_given_depth"] = np.where(np.isfinite(figures["pearson"]), np.nan_to_num(given), np.nan)
            figures["ceiling"] = scorer.ceiling(truth.take(own), rng)
        first = np.flatnonzero(own)[0]
        where = {"sample": truth.samples[first], "section": truth.sections[first], "n_spots": int(own.sum())}
        rows.append(pd.DataFrame({"source": scorer.names, **where, **figures}))
    return pd.concat(rows, ignore_index=True).reindex(columns=[*rows[0].columns[:4], *_FIGURES])


def _over_units(sections: pd.DataFrame, unit: str, names: list[str], trained_on: Mapping[str, str]) -> pd.DataFrame:
    """Means of the figures over patients, the interval, and whether a set may be used, by set."""
    n_sets = len(names)
    samples = sections["sample"].to_numpy()[::n_sets]
    of = {name: by_patient(sections[name].to_numpy(float).reshape(-1, n_sets), samples) for name in _FIGURES}
    out = pd.DataFrame({name: bounds(values)[0] for name, values in of.items()}, index=names)
    out["pearson_low"], out["pearson_high"] = bounds(of["pearson"])[1:]
    n = len(set(samples))
    given_low = np.nan_to_num(bounds(of["pearson_given_depth"])[1])
    good = (given_low > RELIABLE_PCC) & (np.nan_to_num(least(of["pearson"])) > RELIABLE_PCC)
    for name in (DEPTH, COLOUR):
        mean, low, _ = bounds(of["pearson"] - of[name], most=2)
        good &= np.isnan(mean) | ((mean if name == DEPTH else low) > 0)
    out["reliable"] = good & (n >= MIN_GROUPS) & (not trained_on)
    out["evidence"] = f"{n} {unit}s held out"
    if trained_on:
        out["evidence"] = f"{_UNKNOWN}the model was trained on {validate.format_list(sorted(trained_on))}"
    elif n < MIN_GROUPS:
        out["evidence"] = f"{_UNKNOWN}{n} {unit}{'s' * (n > 1)} held out, {MIN_GROUPS} are needed"
    elif out["pearson_given_depth"].isna().all():
        out["evidence"] = f"{_UNKNOWN}no counts, so the part of depth cannot be told"
    return out


def _is_strange(table: AnnData, layer: str) -> bool:
    """Whether the slide that was predicted is out of distribution."""
    record = table.uns.get(prediction_of(table, layer) or "", {})
    return is_prediction(record) and record.get("verdict") == "out of distribution"


def _warn(left_out: pd.DataFrame, min_genes: int, alone: bool) -> None:
    if len(left_out):
        sets = [f"{name} ({row.n_predicted} of {row.n_genes})" for name, row in left_out.iterrows()]
        warnings.warn(
            f"`net`: sets with fewer than {min_genes} genes in the layer, or with all of them, are left out: "
            f"{validate.format_list(sets)}",
            UserWarning,
            stacklevel=3,
        )
    if alone:
        warnings.warn(
            "`held_out` is not given: how well the score of any set is predicted is unknown, and none is reliable. Give slides that "
            "were predicted and measured, of patients that the model has not seen: hg.tl.programmes(data, net, held_out=slides)",
            UserWarning,
            stacklevel=3,
        )
