"""Ends of intervals, gene by gene: from what a model keeps, or from the residuals of an adaptation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.genes import find_genes
from .._core.keys import Keys
from .._core.model_genes import match_genes
from .._core.ownership import is_record_of
from .._core.predictions import predicting_model, symbols_of

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene
    from ._calibrate import Calibration


#: Genes detected in a smaller share of the training spots have intervals that say "not detected".
RARELY = 0.2


@dataclass(frozen=True)
class OfModel:
    """Intervals from what a model keeps: score by class and gene, ``(1 + c, n_vars)``, times the spread of a gene.

    With ``edges`` of predicted levels ``(b - 1, n_vars)``, scores are those below and above by level, ``(2, b, n_vars)``.
    """

    scores: np.ndarray
    spread: np.ndarray
    codes: np.ndarray
    known: np.ndarray
    facts: dict[str, Any]
    #: Genes detected in fewer than a fifth of the training spots; ``None`` where the model does not state it.
    rare: np.ndarray | None = None
    edges: np.ndarray | None = None

    def ends(
        self, predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        from ..stats import level_of, spread_of

        spread = spread_of(predicted, self.spread[:, genes])
        if self.edges is None:
            half = self.scores[:, genes][self.codes[rows]] * spread
            return predicted - half, predicted + half
        level = level_of(predicted, self.edges[:, genes])
        below, above = (np.take_along_axis(score[:, genes], level, axis=0) * spread for score in self.scores)
        # The prediction lies inside, as it does in the others.
        return np.minimum(predicted, predicted - below), np.maximum(predicted, predicted + above)


@dataclass(frozen=True)
class OfAdapted:
    """Intervals from quantiles of signed residuals, ``(n_vars,)`` each."""

    lower: np.ndarray
    upper: np.ndarray
    known: np.ndarray
    facts: dict[str, Any]
    rare: np.ndarray | None = None

    def ends(
        self, predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        return predicted + self.lower[genes], predicted + self.upper[genes]


def check_coverage(coverage: object, parameter: str = "coverage") -> None:
    """Refuse what is no share above 0 and below 1."""
    if isinstance(coverage, bool) or not isinstance(coverage, int | float | np.number) or not 0 < coverage < 1:
        raise ValueError(f"`{parameter}` is {coverage!r}; a share above 0 and below 1 is needed, such as 0.9")


def check_by(by: object) -> None:
    """Refuse what residuals cannot be told apart by."""
    if by not in ("annotation", "detected", "level", None):
        raise ValueError(
            f"`by` is {by!r}, valid: 'annotation' (the predicted class), 'detected' (spots that show a gene, too), 'level' "
            "(the predicted level of the gene) or None"
        )


def adaptation_of(table: AnnData, record: Mapping[str, Any], layer: str) -> Mapping[str, Any] | None:
    """Return the record of the adaptation that wrote a layer; ``None`` for the layer of the prediction."""
    if layer == record["layer"]:
        return None
    adapted = table.uns.get(layer)
    if not is_record_of("adapt", adapted):
        raise ValueError(
            f"`layer` {layer!r} was written neither by hg.tl.predict, which wrote {record['layer']!r}, nor by hg.tl.adapt: "
            "nothing is known of its residuals"
        )
    return adapted


def of_adapted(record: Any, coverage: float, by: str | None, n_vars: int) -> OfAdapted:
    from ..stats import interpolated

    if by == "level":
        raise ValueError(
            "`by` is 'level', and of an adapted layer no residuals are kept by predicted level; use by=None, or the layer of "
            "the prediction"
        )
    if by == "detected":
        warnings.warn(
            "`by` is 'detected', and of an adapted layer no residuals are kept of the spots that show a gene: the intervals are those of all "
            "spots and hold fewer of these; use the layer of the prediction, or by=None",
            UserWarning,
            stacklevel=3,
        )
    if "residual_quantiles" not in record:
        raise ValueError("`layer`: hg.tl.adapt kept no residuals with it; run hg.tl.adapt again")
    levels, quantiles = (np.asarray(record[name], float) for name in ("residual_levels", "residual_quantiles"))
    if quantiles.shape != (len(levels), n_vars):
        raise ValueError(
            f"`layer`: its residual quantiles are {quantiles.shape}, the table has {n_vars} genes; run hg.tl.adapt again"
        )
    low, high = (1 - coverage) / 2, (1 + coverage) / 2
    if low < levels[0] - 1e-9 or high > levels[-1] + 1e-9:
        most = 1 - 2 * max(levels[0], 1 - levels[-1])
        raise ValueError(f"`coverage` is {coverage}; the residuals kept by hg.tl.adapt reach to {most:.4g}")
    lower, upper = (interpolated(quantiles, levels, level) for level in (low, high))
    known = np.isfinite(lower) & np.isfinite(upper)
    adapted = ~np.all(np.isnan(quantiles), axis=0)
    if (adapted & ~known).any() or not known.any():
        _tell_few(coverage, levels, quantiles, adapted, known, low)
    facts = {"guarantee": "none", "unit": "spot", "residuals": str(record.get("guarantee", "of hg.tl.adapt"))}
    # Adaptations of versions before this was kept do not say.
    rare = np.asarray(record["detected"]) < RARELY if "detected" in record else None
    return OfAdapted(lower, upper, known, facts | {"by": "none"}, rare)


def _tell_few(
    coverage: float, levels: np.ndarray, quantiles: np.ndarray, adapted: np.ndarray, known: np.ndarray, low: float
) -> None:
    """Warn of adapted genes that too few spots were measured of for an interval, refuse where it is all of them."""
    if not adapted.any():
        raise ValueError("`layer`: no gene of it has residuals, none was measured at ten spots; measure more")
    # The kept level at or below the lower end: its rank among n residuals is 1 or more from n + 1 = 1 / level on.
    needed = int(np.ceil(1 / levels[np.flatnonzero(levels <= low + 1e-9)[-1]] - 1 - 1e-9))
    message = (
        f"an interval of {coverage:g} needs {needed} measured spots; {int((adapted & ~known).sum()):,} of "
        f"{int(adapted.sum()):,} adapted genes were measured at fewer"
    )
    if known.any():
        warnings.warn(f"`coverage`: {message} and get no interval", UserWarning, stacklevel=4)
        return
    finite = levels[np.isfinite(quantiles[:, adapted]).any(1)]
    most = 1 - 2 * max(finite.min(), 1 - finite.max())
    raise ValueError(f"`coverage`: {message}; measure more, or ask for {most:.4g} or less")


def of_model(
    table: AnnData,
    record: Any,
    model: str | Path | HE2Gene | None,
    coverage: float,
    by: str | None,
    gene_symbols: str | None,
    keys: Keys,
) -> OfModel:
    model = predicting_model(record, model)
    facts = model.card.intervals
    if facts is None:
        raise ValueError(
            f"`model` {model.name!r} keeps no calibration residuals: train it by hg.tl.train(..., preset='default') with two "
            "sections or more and validation='grouped'"
        )
    wanted = match_genes(model, table, None, symbols_of(table, record, gene_symbols))
    kept = _Kept(
        f"model {model.name!r}",
        model.tensors,
        np.asarray(facts["levels"]),
        facts["max_coverage"],
        model.genes["detected"].to_numpy(float) if "detected" in model.genes else None,
        "train it again by hg.tl.train, calibrate on measured slides by hg.tl.calibrate, or use by='annotation'",
    )
    told_apart = [bool(n.any()) and by == "annotation" for n in model.tensors["intervals.groups"][1:]]
    codes = np.zeros(table.n_obs, int)
    if by == "annotation" and model.card.classes and keys.annotation not in table.obs:
        warnings.warn(
            f"`by`: obs has no {keys.annotation!r}, which hg.tl.predict wrote: intervals are those of all spots",
            UserWarning,
            stacklevel=4,
        )
    shown = [told and keys.annotation in table.obs for told in told_apart]
    if any(shown):
        codes = pd.Index(model.card.classes).get_indexer(table.obs[keys.annotation].astype(object)) + 1
    found = _of_kept(kept, coverage, by, told_apart, wanted.columns, wanted.positions, table.n_vars)
    return replace(
        found,
        codes=codes,
        known=found.known & table.var[keys.predicted].to_numpy(bool),
        facts={
            **found.facts,
            "unit": facts["unit"],
            "n_groups": int(facts["n_groups"]),
            "by": by if by in ("detected", "level") else "annotation" if any(shown) else "none",
            "classes": [name for name, told in zip(model.card.classes, shown, strict=True) if told],
            "model": model.name,
            "weights_sha256": model.weights_sha256,
        },
    )


def of_calibration(
    table: AnnData, calibration: Calibration, coverage: float, by: str | None, names: pd.Index
) -> OfModel:
    """Intervals from a calibration, of the genes of a table that are called ``names``."""
    from ..stats import LEVELS, MAX_COVERAGE

    places = find_genes(names, calibration.genes)
    columns = np.flatnonzero(places >= 0)
    if not len(columns):
        raise ValueError(
            f"`calibration` has none of the genes of the table: it has {list(calibration.genes[:3])}, the table {list(names[:3])}; "
            "where symbols stand in a column of var, name it by `gene_symbols`"
        )
    n_absent = len(calibration.genes) - len(columns)
    if calibration.layer_scale == "counts" and n_absent:
        warnings.warn(
            f"`data` lacks {n_absent:,} of {len(calibration.genes):,} genes of the `calibration`: their counts are missing in the "
            "totals that the layer is divided by, so the intervals are not those of the calibrated values; keep these genes",
            UserWarning,
            stacklevel=3,
        )
    residuals = calibration.residuals.tensors()
    kept = _Kept(
        "`calibration`", residuals, LEVELS, MAX_COVERAGE, calibration.detected, "make it again by hg.tl.calibrate"
    )
    found = _of_kept(kept, coverage, by, [], columns, places[columns], table.n_vars)
    return replace(
        found,
        codes=np.zeros(table.n_obs, int),
        facts={
            **found.facts,
            "unit": calibration.unit,
            "n_groups": len(calibration.groups),
            "by": by if by in ("detected", "level") else "none",
            "classes": [],
        },
    )


@dataclass(frozen=True)
class _Kept:
    """What intervals are made of: arrays as a model folder names them, and the share of spots that detect each gene."""

    name: str
    tensors: Mapping[str, np.ndarray]
    levels: np.ndarray
    max_coverage: float
    detected: np.ndarray | None
    remedy: str


def _of_kept(
    kept: _Kept,
    coverage: float,
    by: str | None,
    told_apart: Sequence[bool],
    columns: np.ndarray,
    positions: np.ndarray,
    n_vars: int,
) -> OfModel:
    """Scores and spread of the genes at ``positions`` of what is kept, in the columns of a table."""
    from ..stats import half_scores

    if not kept.levels[0] <= coverage <= kept.max_coverage:
        raise ValueError(
            f"`coverage` is {coverage}; the quantiles that {kept.name} keeps are for {kept.levels[0]:g} to {kept.max_coverage:g}"
        )
    spread = np.full((2, n_vars), np.nan, np.float32)
    spread[:, columns] = kept.tensors["intervals.spread"][:, positions]
    rare = None
    if kept.detected is not None:
        rare = np.zeros(n_vars, bool)
        rare[columns] = kept.detected[positions] < RARELY
    if by == "level":
        return _of_levels(kept, coverage, columns, positions, spread, rare)
    quantiles, groups = kept.tensors["intervals.quantiles"], kept.tensors["intervals.groups"]
    found = [half_scores(q, n, coverage, kept.levels) for q, n in zip(quantiles, groups, strict=True)]
    pooled, guaranteed = found[0]
    if by == "detected":
        if "intervals.detected" not in kept.tensors:
            raise ValueError(
                f"`by` is 'detected', and {kept.name} keeps no residuals of the spots that show a gene; {kept.remedy}"
            )
        detected, detected_groups = kept.tensors["intervals.detected"], kept.tensors["intervals.detected_groups"]
        score, also = half_scores(detected, detected_groups, coverage, kept.levels)
        pooled, guaranteed = np.fmax(pooled, score), guaranteed & also
        found[0] = pooled, guaranteed
    scores = np.full((len(found), n_vars), np.nan, np.float32)
    for i, (score, also) in enumerate(found):
        told = i == 0 or told_apart[i - 1]
        own = score if told else pooled
        scores[i, columns] = np.where(np.isfinite(own), own, pooled)[positions]
        guaranteed = guaranteed & also if told else guaranteed
    facts = _guarantee(guaranteed[positions], coverage)
    return OfModel(scores, spread, np.zeros(0, int), np.isfinite(scores[0]), facts, rare)


def _guarantee(guaranteed: np.ndarray, level: float) -> dict[str, Any]:
    from ..stats import MIN_GROUPS

    needed = max(MIN_GROUPS, int(np.ceil(level / (1 - level) - 1e-9)))
    return {"guarantee": "hierarchical" if guaranteed.all() else "none", "n_groups_needed": needed}


def _of_levels(
    kept: _Kept,
    coverage: float,
    columns: np.ndarray,
    positions: np.ndarray,
    spread: np.ndarray,
    rare: np.ndarray | None,
) -> OfModel:
    """Scores below and above by predicted level: half of what the interval may miss lies on either side."""
    from ..stats import TAILS, half_scores

    names = [f"intervals.level_{name}" for name in ("quantiles", "groups", "edges")]
    if not kept.tensors.keys() >= set(names):
        raise ValueError(f"`by` is 'level', and {kept.name} keeps no residuals by predicted level; {kept.remedy}")
    quantiles, groups, upper_ends = (kept.tensors[name][..., positions] for name in names)
    tail = (1 + coverage) / 2
    scores = np.full((2, max(len(groups) - 1, 1), spread.shape[1]), np.nan, np.float32)
    guaranteed = np.ones(len(positions), bool)
    for side in (0, 1):
        (pooled, of_all), *levels = (
            half_scores(q, n, tail, TAILS) for q, n in zip(quantiles[side], groups, strict=True)
        )
        for i, (score, also) in enumerate(levels):
            own = np.isfinite(score)
            scores[side, i, columns] = np.where(own, score, pooled)
            guaranteed &= np.where(own, also, of_all)
    edges = np.full((len(upper_ends), spread.shape[1]), np.nan, np.float32)
    edges[:, columns] = upper_ends
    known = np.isfinite(scores.max(axis=(0, 1)))
    return OfModel(scores, spread, np.zeros(0, int), known, _guarantee(guaranteed, tail), rare, edges)
