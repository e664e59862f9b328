"""Tables of hg.tl.evaluate: metrics of each gene, of the baselines, of the annotation, and their summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse

from ...stats import _baselines as of_others
from ...stats import (
    ceiling_of_neighbours,
    class_scores,
    moran,
    neighbour_weights,
    noise_ceiling,
    pearson,
    sd_ratio,
    skill,
    slope,
    spearman,
    ssim_on_grid,
)
from ...stats._blocks import column_blocks
from .aligned import Judged
from .layer import MODEL

#: Metrics of the model; a baseline has the first two.
METRICS = (
    "pearson",
    "skill",
    "spearman",
    "sd_ratio",
    "slope",
    "moran_measured",
    "moran_predicted",
    "ssim",
    "ceiling",
    "ceiling_high",
    "ceiling_share",
    "ceiling_share_high",
    "depth_correlation",
)
BASELINE_METRICS = METRICS[:2]
#: Of each, the prediction's minus that of the baseline, on the same gene and spots.
DIFFERENCES = tuple(f"{metric}_difference" for metric in BASELINE_METRICS)
#: Of these a picture is needed, which only a section is: pooled, they are the mean over sections.
_OF_MAPS = ("moran_measured", "moran_predicted", "ssim")
ALL_SECTIONS = "all sections"
#: What each predictor has seen of the slide that it is judged on.
SEEN = {
    MODEL: "the image; expression of its training sections",
    "training mean": "expression of the model's training sections; nothing of this slide",
    "class mean": "labels of this slide; expression of its other spots",
    "total counts": "total counts of every spot of this slide; expression of its other spots",
    "mean colour": "colour of every spot of this slide; expression of the spots of its other parts",
    "coordinates": "place of every spot of this slide; expression of the spots of its other parts",
    "nearest spots": "expression of the neighbouring spots of this slide",
}
BASELINES = tuple(name for name in SEEN if name != MODEL)

#: Numbers of a block of genes, 16 MB in double precision.
_BLOCK = 2**21


@dataclass(frozen=True, eq=False)
class Results:
    """Metrics by scope."""

    of_sections: dict[str, dict[str, np.ndarray]]  # predictor to metric to (s, g), a row a section
    pooled: dict[str, dict[str, np.ndarray]]  # predictor to metric to (g,)


def judge(judged: Judged, baselines: Mapping[str, np.ndarray | None], *, n_splits: int, seed: int) -> Results:
    """Metrics of the model and the baselines, section by section and over all spots together.

    ``baselines`` map those to compute to what they read of each spot: codes ``(n,)``, log total counts ``(n,)``, colours
    or places ``(n, f)``, or ``None``.
    """
    weights = {name: neighbour_weights(judged.xy[w], judged.pitches[name]) for name, w in judged.sections.items()}
    model = [_model(judged, where, weights[name], True, n_splits, seed) for name, where in judged.sections.items()]
    of_sections = {judged.predictor: {metric: np.stack([part[metric] for part in model]) for metric in METRICS}}
    pooled = {judged.predictor: model[0]}
    if len(model) > 1:
        everywhere = np.arange(len(judged.rows))
        pooled[judged.predictor] = _model(judged, everywhere, _within(judged, weights), False, n_splits, seed)
        pooled[judged.predictor] |= {metric: _mean(of_sections[judged.predictor][metric]) for metric in _OF_MAPS}
    for name, reads in baselines.items():
        for found, scores in zip((of_sections, pooled), _baseline(judged, name, reads, weights), strict=True):
            own = found[judged.predictor]
            found[name] = scores | {f"{metric}_difference": own[metric] - scores[metric] for metric in BASELINE_METRICS}
    return Results(of_sections, pooled)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over rows, NaN left out, and NaN only where there is nothing else."""
    known = np.isfinite(values)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, values, 0).sum(0) / np.maximum(n, 1), np.nan)


def _within(judged: Judged, weights: Mapping[str, scipy.sparse.sparray]) -> scipy.sparse.csr_array:
    """Neighbours of all spots, each in its own section."""
    n = len(judged.rows)
    whole = scipy.sparse.csr_array((n, n))
    for name, where in judged.sections.items():
        part = scipy.sparse.coo_array(weights[name])
        whole = whole + scipy.sparse.csr_array((part.data, (where[part.row], where[part.col])), shape=(n, n))
    return whole


def _model(
    judged: Judged, where: np.ndarray, weights: scipy.sparse.sparray, maps: bool, n_splits: int, seed: int
) -> dict[str, np.ndarray]:
    """Every metric of the prediction on some spots; that of maps only where they are one section."""
    n_genes = len(judged.genes)
    found = {metric: np.full(n_genes, np.nan) for metric in METRICS}
    shared, low, chance = np.full(n_genes, np.nan), np.full(n_genes, np.nan), 0.0
    depth = judged.depth
    for block in column_blocks((len(where), n_genes), _BLOCK):
        p, m = judged.predicted[:, block][where], judged.measured[:, block][where]
        for name, metric in (("pearson", pearson), ("spearman", spearman), ("sd_ratio", sd_ratio), ("slope", slope)):
            found[name][block] = metric(p, m)
        found["skill"][block] = skill(p, m, judged.mean[block])
        shared[block] = moran(m, weights)
        if judged.counts is not None:
            low[block], chance = ceiling_of_neighbours(m, weights, None if depth is None else depth[where])
        if depth is not None:
            found["depth_correlation"][block] = pearson(m - p, np.broadcast_to(depth[where][:, None], p.shape))
        if maps:
            found["moran_measured"][block], found["moran_predicted"][block] = shared[block], moran(p, weights)
            found["ssim"][block] = ssim_on_grid(p, m, judged.row[where], judged.column[where])
    if judged.counts is not None:
        counts = judged.counts[where]
        high = noise_ceiling(counts, genes=judged.count_columns, n_splits=n_splits, seed=seed)
        low = np.minimum(low, high)
        found["ceiling"], found["ceiling_high"] = low, high
        with np.errstate(invalid="ignore", divide="ignore"):
            found["ceiling_share"] = np.where(high > 0, found["pearson"] / high, np.nan)
            found["ceiling_share_high"] = np.where(low > chance, found["pearson"] / low, np.nan)
    return found


def _baseline(
    judged: Judged, name: str, reads: np.ndarray | None, weights: Mapping[str, scipy.sparse.sparray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Metrics of a baseline, in each section and pooled, a block of genes at a time."""
    n, n_genes = judged.measured.shape
    sections = judged.sections
    parts = {metric: np.full((len(sections), n_genes), np.nan) for metric in BASELINE_METRICS}
    whole = {metric: np.full(n_genes, np.nan) for metric in BASELINE_METRICS}
    predict = _predictor(judged, name, reads, weights)
    for block in column_blocks((n, n_genes), _BLOCK):
        measured = judged.measured[:, block].astype(np.float64)
        mean = judged.mean[block]
        predicted, comparable = np.empty_like(measured), np.empty_like(measured)
        for i, (section, where) in enumerate(sections.items()):
            if predict is None:
                predicted[where] = comparable[where] = mean
            else:
                made = predict(section, where, measured[where])
                predicted[where], comparable[where] = made.predicted, made.comparable
            parts["pearson"][i, block] = pearson(comparable[where], measured[where])
            parts["skill"][i, block] = skill(predicted[where], measured[where], mean)
        whole["pearson"][block], whole["skill"][block] = pearson(comparable, measured), skill(predicted, measured, mean)
    return parts, whole


def _predictor(
    judged: Judged, name: str, reads: np.ndarray | None, weights: Mapping[str, scipy.sparse.sparray]
) -> Callable[[str, np.ndarray, np.ndarray], of_others.Baseline] | None:
    """Return a function of a section, its spots and what was measured there; ``None`` for the training mean."""
    if name == "class mean" and reads is not None:
        return lambda _, where, values: of_others.class_mean(values, reads[where])
    if name == "total counts" and reads is not None:
        return lambda _, where, values: of_others.line(values, reads[where])
    if name == "nearest spots":
        return lambda section, _, values: of_others.neighbours_mean(values, weights[section])
    if name in ("mean colour", "coordinates") and reads is not None:
        tissue = {s: of_others.tissue_parts(judged.xy[w], judged.pitches[s]) for s, w in judged.sections.items()}
        return lambda section, where, values: of_others.ridge(values, reads[where], tissue[section])
    return None


def gene_tables(
    judged: Judged, results: Results, samples: Mapping[str, str] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tidy tables of the model and of the baselines: a row a scope, section, predictor and gene."""
    model: list[pd.DataFrame] = []
    baselines: list[pd.DataFrame] = []
    for scope, section, n_spots, predictor, values in _scopes(judged, results, samples):
        frame = pd.DataFrame(
            {
                "gene": pd.Categorical(judged.genes.astype(str), categories=pd.unique(judged.genes.astype(str))),
                "scope": scope,
                "section": section,
                "predictor": predictor,
                "n_spots": n_spots,
                **{metric: value.astype(np.float32) for metric, value in values.items()},
            }
        )
        (model if predictor == judged.predictor else baselines).append(frame)
    return _stack(model), _stack(baselines)


def _stack(frames: list[pd.DataFrame]) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame()
    whole = pd.concat(frames, ignore_index=True)
    for column in ("scope", "section", "predictor"):
        whole[column] = pd.Categorical(whole[column], categories=pd.unique(whole[column]))
    return whole


def _scopes(
    judged: Judged, results: Results, samples: Mapping[str, str] | None
) -> Iterator[tuple[str, str, int, str, dict[str, np.ndarray]]]:
    """Scope, section, spots, predictor and metrics: each section, all spots pooled, and the mean over sections."""
    n_spots = len(judged.rows)
    for predictor, values in results.of_sections.items():
        for i, (section, where) in enumerate(judged.sections.items()):
            yield "section", section, len(where), predictor, {metric: v[i] for metric, v in values.items()}
        yield "pooled", ALL_SECTIONS, n_spots, predictor, results.pooled[predictor]
        yield (
            "mean",
            ALL_SECTIONS,
            n_spots,
            predictor,
            {m: mean_of_sections(judged, v, samples) for m, v in values.items()},
        )


def mean_of_sections(judged: Judged, values: np.ndarray, samples: Mapping[str, str] | None) -> np.ndarray:
    """Mean over sections ``(s, …)``; with ``samples`` over the samples, each the mean of its sections."""
    if samples is None:
        return _mean(values)
    of = np.array([samples[section] for section in judged.sections])
    return _mean(np.stack([_mean(values[of == sample]) for sample in pd.unique(of)]))


def summarise(genes: pd.DataFrame, panels: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Mean and median over the genes of each panel: a row a scope, section, predictor and panel.

    ``n_genes`` are those with a correlation, ``n_constant`` those without: constant on either side.
    """
    metrics = [metric for metric in METRICS + DIFFERENCES if metric in genes]
    rows = []
    for (scope, section, predictor), frame in genes.groupby(
        ["scope", "section", "predictor"], observed=True, sort=False
    ):
        columns = {metric: frame[metric].to_numpy(np.float64) for metric in metrics}
        for panel, mask in panels.items():
            chosen = {metric: of_gene[mask & ~np.isnan(of_gene)] for metric, of_gene in columns.items()}
            n = len(chosen["pearson"])
            row = {"scope": scope, "section": section, "predictor": predictor, "panel": panel}
            row |= {"n_spots": int(frame["n_spots"].iloc[0]), "n_genes": n, "n_constant": int(mask.sum()) - n}
            for metric, values in chosen.items():
                mean, median = (values.mean(), np.median(values)) if len(values) else (np.nan, np.nan)
                row |= {f"{metric}_mean": mean, f"{metric}_median": median}
            rows.append(row)
    return pd.DataFrame(rows)


def annotation_tables(
    judged: Judged, proba: pd.DataFrame, codes: np.ndarray, samples: Mapping[str, str] | None
) -> dict[str, pd.DataFrame]:
    """Scores of the annotation, of each class, and the confusion matrix as a list, by scope and section."""
    values, classes = proba.to_numpy(np.float64), [str(name) for name in proba.columns]
    everything = {("section", section): where for section, where in judged.sections.items()}
    everything["pooled", ALL_SECTIONS] = np.arange(len(codes))
    overall, of_class, confusion = [], [], []
    names = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "calibration_error")
    for (scope, section), where in everything.items():
        labelled = where[codes[where] >= 0]
        place = {"scope": scope, "section": section}
        if not len(labelled):
            overall.append({**place, "n_labelled": 0, **dict.fromkeys(names, np.nan)})
            continue
        scores = class_scores(values[labelled], codes[labelled])
        overall.append({**place, "n_labelled": scores.n, **{name: getattr(scores, name) for name in names}})
        for c, name in enumerate(classes):
            of_class.append(
                {
                    **place,
                    "class": name,
                    "n_labelled": int(scores.support[c]),
                    "recall": scores.recall[c],
                    "f1": scores.f1[c],
                    "auroc": scores.auroc[c],
                }
            )
            for d, other in enumerate(classes):
                confusion.append({**place, "label": name, "predicted": other, "n_spots": int(scores.confusion[c, d])})
    table = pd.DataFrame(overall)
    parts = table[table["scope"] == "section"][list(names)].to_numpy(float)
    mean = dict(zip(names, mean_of_sections(judged, parts, samples), strict=True))
    n = int((codes >= 0).sum())
    table.loc[len(table)] = {"scope": "mean", "section": ALL_SECTIONS, "n_labelled": n, **mean}
    return {"annotation": table, "classes": pd.DataFrame(of_class), "confusion": pd.DataFrame(confusion)}
