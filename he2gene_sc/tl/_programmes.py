"""``hg.tl.programmes``: scores of gene sets at every spot, and their accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale
from .._core.genes import current_symbols, find_genes
from .._core.keys import check_key
from .._core.labelled import labelled_spots
from .._core.logs import logger, warn
from .._core.matrix import in_columns, values_of
from .._core.ownership import check_free
from .._core.predictions import record_of_layer
from .._core.results import Result, write_results
from .._core.spots import SpotData, read_spots
from ..models._card import set_genes
from ..models._schema import check_class_names
from ..stats import SetScores, set_ceiling
from ..training._held_out import Depth
from ..training._predictability import MIN_GROUPS, mean_by_patient
from ..training._programmes import summarise_programmes
from ._biomarkers.reference_fields import COLOUR, DEPTH, fields
from ._compare import correlation, predict_held_out, shared_spots
from ._gene_sets import membership, name_genes, read_net, select_sets
from ._paired import paired_spots, sections_trained_on

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Metrics of each set in each section.
_METRICS = ("pearson", "pearson_given_depth", "ceiling", DEPTH, COLOUR)
#: Metrics of each set.
_COLUMNS = ("pearson", "pearson_low", "pearson_high", *_METRICS[1:])
_UNKNOWN = "unknown: "
#: Share of the model's genes that the layer needs if metrics of training shall apply: scores are relative to all genes.
_MIN_SHARE_OF_GENES = 0.9


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
    """Score gene sets at every spot, and report which scores are reliable on a new patient.

    Parameters
    ----------
    data
        Object or table with the expression in a layer, or several.
    net
        Gene sets: a DataFrame with columns ``source`` (the set), ``target`` (the gene) and optionally ``weight``, as in decoupler and
        :func:`he2gene_sc.datasets.breast_markers`; a GMT file; or a mapping of sets to genes.
    held_out
        Measured slides with a prediction in the same layer, of patients that **the model was not trained on**. The accuracy of each
        score is computed from them. Without them, it is known only for sets that were given when the model was trained
        (:class:`he2gene_sc.GeneSelection`); other sets are not reliable.
    layer
        Predicted expression; ``None``: measured expression in ``X``.
    layer_scale, measured, measured_scale, sample_key, section_key
        As for :func:`he2gene_sc.tl.calibrate`; all except ``layer_scale`` apply only to ``held_out``.
    min_genes
        Sets with fewer genes in the layer are left out, with a warning.
    table_key
        Table, if an object has several.
    seed
        Seed of the split of the counts for the noise ceiling.
    key_added
        Key of the results in ``obsm`` and ``uns``.

    Returns
    -------
    pandas.DataFrame
        One row per set. ``source``: name of the set. ``n_genes``, ``n_predicted``: number of its genes, and of those in the
        layer. ``pearson``: correlation of predicted and measured scores, mean over the held-out patients, with its 95 % t interval
        ``pearson_low``, ``pearson_high`` (from 3 patients on). ``pearson_given_depth``: the same given depth. ``ceiling``: noise
        ceiling. ``depth``, ``mean colour``: the references, NaN if they cannot be fitted. ``reliable``, and ``evidence`` for it.

        Written to the table of each object: ``.obsm["he2gene_programmes"]``, a DataFrame with one column per set, NaN for spots
        without expression; ``.uns["he2gene_programmes"]`` with ``results``, the held-out ``sections`` and ``left_out``.

    Raises
    ------
    ValueError
        If the layer does not exist, no set has enough genes, or ``held_out`` has no spots or genes to compare.

    Warns
    -----
    UserWarning
        If the accuracy of a score is unknown, or sets are left out.

    Notes
    -----
    The score is decoupler's ``ulm``: the t value of the slope of the expression of a spot on membership, over all genes of the layer.
    It is relative to the other genes, so slides with other genes have other scores. A set is reliable by the same rule as genes, over
    at least 3 patients: the lower end of the 95 % t interval of the correlation given depth is above 0.1, the plain correlation is
    above 0.1 in each patient, and it is better than depth and, with images, than colour. Metrics of training are of patients held out
    in turn; there, colour means statistics of the windows of a spot, and coordinates are a third reference.
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
    validate.whole_number(min_genes, "min_genes")
    check_key(key_added, "key_added")
    if layer is None and held_out is not None:
        raise ValueError(
            "`layer` is None, so measured counts are scored and there is no prediction to compare; leave `held_out` out"
        )
    named = read_net(net)
    try:
        check_class_names(named["source"].unique(), "set")
    except ValueError as error:
        raise ValueError(
            f"`net`: {error}. To rename sets of a GMT file: net = decoupler.pp.read_gmt(path); "
            "net['source'] = net['source'].str.replace('/', '|')"
        ) from None
    data = list(data) if isinstance(data, Iterator) else data
    spots = read_spots(data, None, "data", layer=layer, table_key=table_key, samples_needed=False)
    for table in spots.tables:
        check_free(table, "programmes", key_added, obsm=[key_added])
    spots = labelled_spots(spots, None, layer_scale=layer_scale)
    sets, sizes = select_sets(named, spots.genes, min_genes)
    results = pd.DataFrame({"n_genes": named.groupby("source", sort=False).size()}).rename_axis("source")
    results["n_predicted"] = pd.Series(sizes, dtype=int)
    left_out = results[~results.index.isin(sets)]
    if not sets:
        raise ValueError(
            f"`net`: no set has at least {min_genes} of the {len(spots.genes)} genes of the layer, but not all of them; the largest has "
            f"{int(left_out['n_predicted'].max()) if len(left_out) else 0}. Check the names ({name_genes(named, spots.genes)}), or lower "
            "`min_genes`"
        )
    results = results.loc[list(sets)]
    metrics = pd.DataFrame(np.nan, index=results.index, columns=list(_COLUMNS))
    evidence = "measured" if layer is None else f"{_UNKNOWN}no held-out slides"
    results = results.join(metrics).assign(reliable=False, evidence=evidence)
    if layer is not None and held_out is None:
        known = _training_metrics(spots, layer, sets)
        results.loc[known.index, known.columns] = known
    params = {"layer": layer, "layer_scale": layer_scale, "min_genes": min_genes, "seed": seed}
    facts: dict[str, Any] = {"left_out": left_out.reset_index()}
    if held_out is not None:
        held_out = list(held_out) if isinstance(held_out, Iterator) else held_out
        unit_keys = {"sample_key": sample_key, "section_key": section_key}
        pair = paired_spots(
            held_out,
            str(layer),
            layer_scale,
            measured,
            measured_scale,
            **unit_keys,
            table_key=table_key,
            parameter="held_out",
        )
        (predicted,), truth = shared_spots([pair], "held_out")
        held_out_sets, _ = select_sets(named[named["source"].isin(sets)], truth.genes, min_genes)
        if not held_out_sets:
            raise ValueError(
                f"`held_out`: no set has {min_genes} of the {len(truth.genes)} genes that were predicted and measured there; pass "
                "slides with more genes, or lower `min_genes`"
            )
        fields_of_spots = fields(held_out, truth.tables, truth, str(layer))
        references = {name: values[:, None] for name, values in fields_of_spots.items()}
        facts["sections"] = _section_metrics(held_out_sets, predicted, truth, references, seed)
        summary = _over_units(facts["sections"], sample_key, list(held_out_sets), sections_trained_on(predicted))
        results["evidence"] = f"{_UNKNOWN}fewer than {min_genes} of its genes on the held-out slides"
        results.loc[summary.index, summary.columns] = summary
        params |= {**unit_keys, "measured_scale": measured_scale}
    verdicts = [record_of_layer(table, layer).get("verdict") for table in spots.tables if layer is not None]
    if "out of distribution" in verdicts:
        results = results.assign(reliable=False, evidence=f"{_UNKNOWN}a slide of `data` is out of distribution")
    results = results.astype({"reliable": bool}).reset_index()
    record = {"verb": "programmes", "params": {k: v for k, v in params.items() if v is not None}, **facts}
    parts = np.split(_scores(spots, membership(sets, spots.genes)), np.cumsum([len(rows) for rows in spots.rows])[:-1])
    written = []
    for table, rows, part in zip(spots.tables, spots.rows, parts, strict=True):
        values = in_columns(part.T, rows, table.n_obs).T
        frame = pd.DataFrame(values, index=table.obs_names, columns=list(sets))
        result = Result("programmes", key_added, {**record, "results": results}, {"obsm": {key_added: frame}})
        written.append((table, result))
    _warn(left_out, min_genes, results)
    write_results(written)
    logger.info("programmes: %d sets, %d left out, in obsm[%r]", len(results), len(left_out), key_added)
    return results.copy()


def _scores(spots: SpotData, weights: np.ndarray) -> np.ndarray:
    """Compute the scores of each spot ``(n, sets)``, from the weights of the genes in the sets ``(g, sets)``."""
    out = np.zeros((len(spots.labels), weights.shape[1]))
    for where, values in spots.blocks():
        out[where] = SetScores(weights).add(values).t()
    return out


def _section_metrics(
    sets: Mapping[str, Mapping[str, float]],
    predicted: SpotData,
    truth: SpotData,
    references: Mapping[str, np.ndarray],
    seed: int,
) -> pd.DataFrame:
    """Return the metrics of each set in each section, with one row per section and set."""
    weights = membership(sets, truth.genes)
    score, target = _scores(predicted, weights), _scores(truth, weights)
    units, patients = (pd.factorize(names)[0] for names in (truth.units, truth.samples))
    predictions = {"pearson": score, **predict_held_out(references, target, units, patients)}
    totals = truth.totals(truth.layer, "measured") if truth.scale == "counts" else None
    rng, rows = np.random.default_rng(seed), []
    for unit in range(units.max() + 1):
        own = units == unit
        first = np.flatnonzero(own)[0]
        metrics = {name: correlation(values[own], target[own]) for name, values in predictions.items()}
        if totals is not None:
            given_depth = Depth.fit(totals[own], np.zeros(own.sum())).partial(score[own], target[own])
            known = np.isfinite(metrics["pearson"])
            metrics["pearson_given_depth"] = np.where(known, np.nan_to_num(given_depth), np.nan)
            i = truth.objects[first]
            table = truth.tables[i][truth.take(own).rows[i]]
            counts = values_of(table, truth.layer, "measured")
            metrics["ceiling"] = set_ceiling(counts, find_genes(truth.genes, table.var_names), weights, rng)
        section = {"sample": truth.samples[first], "section": truth.sections[first], "n_spots": int(own.sum())}
        rows.append(pd.DataFrame({"source": list(sets), **section, **metrics}))
    return pd.concat(rows, ignore_index=True).reindex(columns=[*rows[0].columns[:4], *_METRICS])


def _over_units(sections: pd.DataFrame, unit: str, names: list[str], trained_on: Mapping[str, str]) -> pd.DataFrame:
    """Return the means of the metrics over patients, the interval, and whether each set is reliable."""
    n_sets = len(names)
    samples = sections["sample"].to_numpy()[::n_sets]
    metrics = {name: mean_by_patient(sections[name].to_numpy(float).reshape(-1, n_sets), samples) for name in _METRICS}
    out = summarise_programmes(metrics, (DEPTH, COLOUR)).set_axis(names)
    out["reliable"] &= not trained_on
    n = len(set(samples))
    out["evidence"] = f"{n} {unit}s held out"
    if trained_on:
        out["evidence"] = f"{_UNKNOWN}the model was trained on {validate.format_list(sorted(trained_on))}"
    elif n < MIN_GROUPS:
        out["evidence"] = f"{_UNKNOWN}{n} {unit}{'s' * (n > 1)} held out, {MIN_GROUPS} are needed"
    elif out["pearson_given_depth"].isna().all():
        out["evidence"] = f"{_UNKNOWN}no counts, so the effect of depth is unknown"
    return out


def _training_metrics(spots: SpotData, layer: str, sets: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return the metrics of sets that were given when the model was trained, if the layer is its prediction."""
    records = [record_of_layer(table, layer) for table in spots.tables]
    # Models that were never saved have no SHA-256.
    models = {(record.get("weights_sha256"), record.get("head")) for record in records}
    if len(models) > 1 or any(record.get("layer") != layer or "programmes" not in record for record in records):
        return pd.DataFrame()
    trained: pd.DataFrame = records[0]["programmes"]
    enough = len(spots.genes) >= _MIN_SHARE_OF_GENES * trained["n_learned"].iloc[0]
    known = {name: _current_genes(text) for name, text in trained["genes"].items()}
    same = [name for name, weights in sets.items() if known.get(name) == _current_genes(set_genes(weights))]
    trained = trained.loc[same if enough else []].rename(columns={"colour": COLOUR})
    trained[list(_COLUMNS)] = trained[list(_COLUMNS)].apply(pd.to_numeric, errors="coerce")
    held_out = "patients held out in training"
    trained["evidence"] = [
        f"{n} {held_out}" if n >= MIN_GROUPS else f"{_UNKNOWN}{n} {held_out}, {MIN_GROUPS} are needed"
        for n in trained["n_patients"]
    ]
    return trained[[*_COLUMNS, "reliable", "evidence"]]


def _current_genes(genes: str) -> list[tuple[str, str]]:
    """Return current symbols and weights of a set that is written as one text."""
    parts = [gene.partition(":") for gene in genes.split(" ")]
    return sorted(zip(current_symbols(name for name, _, _ in parts), (weight for _, _, weight in parts), strict=True))


def _warn(left_out: pd.DataFrame, min_genes: int, results: pd.DataFrame) -> None:
    if len(left_out):
        sets = [f"{name} ({row.n_predicted} of {row.n_genes})" for name, row in left_out.iterrows()]
        warn(
            f"`net`: sets with fewer than {min_genes} genes in the layer, or with all of them, are left out: "
            f"{validate.format_list(sets)}"
        )
    for evidence, sets in results["source"].groupby(results["evidence"], sort=False):
        if not str(evidence).startswith(_UNKNOWN):
            continue
        names = "any set" if len(sets) == len(results) else f"the sets {validate.format_list(sets.tolist())}"
        reason = str(evidence).removeprefix(_UNKNOWN)
        if reason == "no held-out slides":
            reason = (
                "`held_out` is not given, and the model was not trained with them. Pass slides that were predicted and measured, "
                "of patients that the model was not trained on: hg.tl.programmes(data, net, held_out=slides)"
            )
        warn(f"the accuracy of the score of {names} is unknown, and none is reliable: {reason}")
