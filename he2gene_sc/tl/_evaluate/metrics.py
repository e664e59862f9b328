"""Tables of ``hg.tl.evaluate``: metrics of the genes, baselines and annotation, and their summary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse

from ..._core.matrix import take
from ...stats import (
    ceiling_of_neighbours,
    class_scores,
    moran,
    noise_ceiling,
    pearson,
    sd_ratio,
    skill,
    slope,
    spearman,
    ssim_on_grid,
)
from ...stats._accuracy import column_blocks
from ...training._predictability import mean_by_patient
from .aligned import AlignedExpression
from .baselines import Predictor

#: Metrics of the model; baselines have the first two.
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
#: Metric of the prediction minus that of the baseline, for the same gene and spots.
DIFFERENCES = tuple(f"{metric}_difference" for metric in BASELINE_METRICS)
#: Metrics of a map, which only a section has; the pooled value is the mean over sections.
_MAP_METRICS = ("moran_measured", "moran_predicted", "ssim")
ALL_SECTIONS = "all sections"
#: Number of values in a block of genes, 16 MB in double precision.
_BLOCK = 2**21


#: Values by predictor and metric: ``(s, g)`` with one row per section, or ``(g,)`` over all spots.
Results = dict[str, dict[str, np.ndarray]]


def compute_metrics(
    aligned: AlignedExpression, baselines: Mapping[str, Predictor | None], *, n_splits: int, seed: int
) -> tuple[Results, Results]:
    """Compute the metrics of the model and the baselines in each section and over all spots."""
    model = [_model(aligned, section, n_splits, seed) for section in aligned.sections]
    own = {metric: np.stack([part[metric] for part in model]) for metric in METRICS}
    whole = model[0]
    if len(model) > 1:
        whole = _model(aligned, None, n_splits, seed)
        whole |= {metric: mean_of_sections(aligned, own[metric], None) for metric in _MAP_METRICS}
    by_section, pooled = {aligned.predictor: own}, {aligned.predictor: whole}
    for name, predict in baselines.items():
        for results, scores in zip((by_section, pooled), _baseline(aligned, predict), strict=True):
            model_scores = results[aligned.predictor]
            differences = {f"{metric}_difference": model_scores[metric] - scores[metric] for metric in BASELINE_METRICS}
            results[name] = scores | differences
    return by_section, pooled


def _model(aligned: AlignedExpression, section: str | None, n_splits: int, seed: int) -> dict[str, np.ndarray]:
    """Compute every metric of the prediction in a section; ``None``: over all spots, without metrics of maps."""
    if section is None:
        spots = np.arange(len(aligned.rows))
        # Neighbours are in the same section.
        whole = scipy.sparse.block_diag([*aligned.weights.values()], format="csr")
        order = np.argsort(np.concatenate([*aligned.sections.values()]))
        weights = scipy.sparse.csr_array(whole)[order][:, order]
    else:
        spots, weights = aligned.sections[section], aligned.weights[section]
    n_genes = len(aligned.columns)
    found = {metric: np.full(n_genes, np.nan) for metric in METRICS}
    low, chance = np.full(n_genes, np.nan), 0.0
    depth = aligned.depth
    for block in column_blocks((len(spots), n_genes), _BLOCK):
        p, m = aligned.predicted[:, block][spots], aligned.measured[:, block][spots]
        for name, metric in (("pearson", pearson), ("spearman", spearman), ("sd_ratio", sd_ratio), ("slope", slope)):
            found[name][block] = metric(p, m)
        found["skill"][block] = skill(p, m, aligned.mean[block])
        if aligned.counts is not None:
            low[block], chance = ceiling_of_neighbours(m, weights, None if depth is None else depth[spots])
        if depth is not None:
            found["depth_correlation"][block] = pearson(m - p, np.broadcast_to(depth[spots][:, None], p.shape))
        if section is not None:
            found["moran_measured"][block], found["moran_predicted"][block] = moran(m, weights), moran(p, weights)
            found["ssim"][block] = ssim_on_grid(p, m, *aligned.array_positions[:, spots])
    if aligned.counts is not None:
        counts = take(aligned.counts, spots)
        high = noise_ceiling(counts, genes=aligned.count_columns, n_splits=n_splits, seed=seed)
        low = np.minimum(low, high)
        found["ceiling"], found["ceiling_high"] = low, high
        with np.errstate(invalid="ignore", divide="ignore"):
            found["ceiling_share"] = np.where(high > 0, found["pearson"] / high, np.nan)
            found["ceiling_share_high"] = np.where(low > chance, found["pearson"] / low, np.nan)
    return found


def _baseline(
    aligned: AlignedExpression, predict: Predictor | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute the metrics of a baseline in each section and pooled, in blocks of genes."""
    n, n_genes = aligned.measured.shape
    sections = aligned.sections
    parts = {metric: np.full((len(sections), n_genes), np.nan) for metric in BASELINE_METRICS}
    whole = {metric: np.full(n_genes, np.nan) for metric in BASELINE_METRICS}
    for block in column_blocks((n, n_genes), _BLOCK):
        measured = aligned.measured[:, block].astype(np.float64)
        mean = aligned.mean[block]
        predicted, comparable = np.empty_like(measured), np.empty_like(measured)
        for i, (section, spots) in enumerate(sections.items()):
            if predict is None:
                predicted[spots] = comparable[spots] = mean
            else:
                baseline = predict(section, spots, measured[spots])
                predicted[spots], comparable[spots] = baseline.predicted, baseline.comparable
            parts["pearson"][i, block] = pearson(comparable[spots], measured[spots])
            parts["skill"][i, block] = skill(predicted[spots], measured[spots], mean)
        whole["pearson"][block], whole["skill"][block] = pearson(comparable, measured), skill(predicted, measured, mean)
    return parts, whole


def gene_tables(
    aligned: AlignedExpression, by_section: Results, pooled: Results, samples: Mapping[str, str] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return tidy tables of the model and of the baselines, with one row per scope, section, predictor and gene."""
    names, n = aligned.table.var_names[aligned.columns].astype(str), len(aligned.rows)
    genes = pd.Categorical(names, categories=pd.unique(names))
    model: list[pd.DataFrame] = []
    baselines: list[pd.DataFrame] = []
    for predictor, values in by_section.items():
        scopes = [
            ("section", section, len(spots), {metric: v[i] for metric, v in values.items()})
            for i, (section, spots) in enumerate(aligned.sections.items())
        ]
        mean = {metric: mean_of_sections(aligned, v, samples) for metric, v in values.items()}
        scopes += [("pooled", ALL_SECTIONS, n, pooled[predictor]), ("mean", ALL_SECTIONS, n, mean)]
        for scope, section, n_spots, found in scopes:
            row = {"gene": genes, "scope": scope, "section": section, "predictor": predictor, "n_spots": n_spots}
            frame = pd.DataFrame(row | {metric: value.astype(np.float32) for metric, value in found.items()})
            (model if predictor == aligned.predictor else baselines).append(frame)
    return _stack(model), _stack(baselines)


def _stack(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables, with categorical columns for scope, section and predictor."""
    if not frames:
        return pd.DataFrame()
    whole = pd.concat(frames, ignore_index=True)
    for column in ("scope", "section", "predictor"):
        whole[column] = pd.Categorical(whole[column], categories=pd.unique(whole[column]))
    return whole


def mean_of_sections(aligned: AlignedExpression, values: np.ndarray, samples: Mapping[str, str] | None) -> np.ndarray:
    """Return the mean over sections ``(s, …)``; with ``samples``, the mean over samples of their section means."""
    if samples is not None:
        values = mean_by_patient(values, [samples[section] for section in aligned.sections])
    return mean_by_patient(values, [""] * len(values))[0]


def summarise(genes: pd.DataFrame, panels: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return mean and median over the genes of each panel, with one row per scope, section, predictor and panel.

    ``n_genes`` counts genes with a correlation; ``n_constant`` counts genes without, constant as predicted or measured.
    """
    metrics = [metric for metric in METRICS + DIFFERENCES if metric in genes]
    rows = []
    for (scope, section, predictor), frame in genes.groupby(
        ["scope", "section", "predictor"], observed=True, sort=False
    ):
        columns = {metric: frame[metric].to_numpy(np.float64) for metric in metrics}
        for panel, mask in panels.items():
            chosen = {metric: values[mask & ~np.isnan(values)] for metric, values in columns.items()}
            n = len(chosen["pearson"])
            row = {"scope": scope, "section": section, "predictor": predictor, "panel": panel}
            row |= {"n_spots": int(frame["n_spots"].iloc[0]), "n_genes": n, "n_constant": int(mask.sum()) - n}
            for metric, values in chosen.items():
                mean, median = (values.mean(), np.median(values)) if len(values) else (np.nan, np.nan)
                row |= {f"{metric}_mean": mean, f"{metric}_median": median}
            rows.append(row)
    return pd.DataFrame(rows)


def annotation_tables(
    aligned: AlignedExpression, proba: pd.DataFrame, codes: np.ndarray, samples: Mapping[str, str] | None
) -> dict[str, pd.DataFrame]:
    """Return scores of the annotation and of each class, and the confusion matrix in long form, by scope and section."""
    values, classes = proba.to_numpy(np.float64), [str(name) for name in proba.columns]
    scopes = {("section", section): spots for section, spots in aligned.sections.items()}
    scopes["pooled", ALL_SECTIONS] = np.arange(len(codes))
    overall, by_class, confusion = [], [], []
    names = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "calibration_error")
    for (scope, section), spots in scopes.items():
        labelled = spots[codes[spots] >= 0]
        row = {"scope": scope, "section": section}
        if not len(labelled):
            overall.append({**row, "n_labelled": 0, **dict.fromkeys(names, np.nan)})
            continue
        scores = class_scores(values[labelled], codes[labelled])
        overall.append({**row, "n_labelled": scores.n, **{name: getattr(scores, name) for name in names}})
        of_class = {"n_labelled": scores.support, "recall": scores.recall, "f1": scores.f1, "auroc": scores.auroc}
        by_class.append(pd.DataFrame({**row, "class": classes, **of_class}))
        pairs = {"label": np.repeat(classes, len(classes)), "predicted": classes * len(classes)}
        confusion.append(pd.DataFrame({**row, **pairs, "n_spots": scores.confusion.ravel()}))
    table = pd.DataFrame(overall)
    of_sections = table[table["scope"] == "section"][list(names)].to_numpy(float)
    mean = dict(zip(names, mean_of_sections(aligned, of_sections, samples), strict=True))
    n = int((codes >= 0).sum())
    table.loc[len(table)] = {"scope": "mean", "section": ALL_SECTIONS, "n_labelled": n, **mean}
    tables = {"classes": by_class, "confusion": confusion}
    return {"annotation": table} | {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
