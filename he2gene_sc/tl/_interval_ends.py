"""Ends of intervals by gene, from the residuals of a model, of a calibration or of an adaptation."""

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


#: The intervals of genes detected in a smaller share of the training spots mean "not detected".
RARE_SHARE = 0.2


@dataclass(frozen=True)
class ModelIntervals:
    """Intervals of a model: scores by class and gene ``(1 + c, n_vars)``, multiplied by the spread of the gene.

    With ``edges`` of predicted levels ``(b - 1, n_vars)``, ``scores`` are ``(2, b, n_vars)``: below and above, by level.
    """

    scores: np.ndarray
    spread: np.ndarray
    codes: np.ndarray
    known: np.ndarray
    facts: dict[str, Any]
    #: Genes detected in fewer than a fifth of the training spots; ``None`` if the model does not state it.
    rare: np.ndarray | None = None
    edges: np.ndarray | None = None

    def ends(
        self, predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper ends for predicted values ``(n, g)``."""
        from ..stats import level_of, spread_of

        spread = spread_of(predicted, self.spread[:, genes])
        if self.edges is None:
            half = self.scores[:, genes][self.codes[rows]] * spread
            return predicted - half, predicted + half
        level = level_of(predicted, self.edges[:, genes])
        below, above = (np.take_along_axis(score[:, genes], level, axis=0) * spread for score in self.scores)
        # Keep the prediction inside, as in the other intervals.
        return np.minimum(predicted, predicted - below), np.maximum(predicted, predicted + above)


@dataclass(frozen=True)
class AdaptedIntervals:
    """Intervals from quantiles of signed residuals, ``(n_vars,)`` each."""

    lower: np.ndarray
    upper: np.ndarray
    known: np.ndarray
    facts: dict[str, Any]
    rare: np.ndarray | None = None

    def ends(
        self, predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper ends for predicted values ``(n, g)``."""
        return predicted + self.lower[genes], predicted + self.upper[genes]


def check_coverage(coverage: object, parameter: str = "coverage") -> None:
    """Raise unless the value is between 0 and 1."""
    if isinstance(coverage, bool) or not isinstance(coverage, int | float | np.number) or not 0 < coverage < 1:
        raise ValueError(f"`{parameter}` is {coverage!r}; a number between 0 and 1 is needed, such as 0.9")


def check_by(by: object) -> None:
    """Raise unless residuals can be grouped by ``by``."""
    if by not in ("annotation", "detected", "level", None):
        raise ValueError(
            f"`by` is {by!r}, valid: 'annotation' (the predicted class), 'detected' (also the spots that express the gene), "
            "'level' (the predicted level of the gene) or None"
        )


def find_adaptation(table: AnnData, record: Mapping[str, Any], layer: str) -> Mapping[str, Any] | None:
    """Return the record of the adaptation that wrote a layer; ``None`` for the layer of the prediction."""
    if layer == record["layer"]:
        return None
    adapted = table.uns.get(layer)
    if not is_record_of("adapt", adapted):
        raise ValueError(
            f"`layer` {layer!r} was written neither by hg.tl.predict, which wrote {record['layer']!r}, nor by hg.tl.adapt, so its "
            "residuals are unknown; pass the layer of one of them, or a `calibration` of hg.tl.calibrate"
        )
    return adapted


def adapted_intervals(record: Any, coverage: float, by: str | None, n_vars: int) -> AdaptedIntervals:
    """Return the intervals of an adapted layer, from the record of its adaptation."""
    from ..stats import interpolated

    if by == "level":
        raise ValueError(
            "`by` is 'level', but an adapted layer has no residuals by predicted level; use by=None, or the layer of the prediction"
        )
    if by == "detected":
        warnings.warn(
            "`by` is 'detected', but an adapted layer has no residuals of the spots that express a gene. The intervals are those of "
            "all spots, so they cover fewer of the expressing spots; use the layer of the prediction, or by=None",
            UserWarning,
            stacklevel=3,
        )
    if "residual_quantiles" not in record:
        raise ValueError("`layer`: hg.tl.adapt stored no residuals with it; run hg.tl.adapt again")
    levels, quantiles = (np.asarray(record[name], float) for name in ("residual_levels", "residual_quantiles"))
    if quantiles.shape != (len(levels), n_vars):
        raise ValueError(
            f"`layer`: its residual quantiles have shape {quantiles.shape}, the table has {n_vars} genes; run hg.tl.adapt again"
        )
    low, high = (1 - coverage) / 2, (1 + coverage) / 2
    if low < levels[0] - 1e-9 or high > levels[-1] + 1e-9:
        most = 1 - 2 * max(levels[0], 1 - levels[-1])
        raise ValueError(f"`coverage` is {coverage}; the residuals of hg.tl.adapt allow up to {most:.4g}")
    lower, upper = (interpolated(quantiles, levels, level) for level in (low, high))
    known = np.isfinite(lower) & np.isfinite(upper)
    adapted = ~np.all(np.isnan(quantiles), axis=0)
    if (adapted & ~known).any() or not known.any():
        _check_measured(coverage, levels, quantiles, adapted, known, low)
    facts = {"guarantee": "none", "unit": "spot", "residuals": str(record.get("guarantee", "of hg.tl.adapt"))}
    # Older versions did not record it.
    rare = np.asarray(record["detected"]) < RARE_SHARE if "detected" in record else None
    return AdaptedIntervals(lower, upper, known, facts | {"by": "none"}, rare)


def _check_measured(
    coverage: float, levels: np.ndarray, quantiles: np.ndarray, adapted: np.ndarray, known: np.ndarray, low: float
) -> None:
    """Warn of adapted genes with too few measured spots for an interval; raise if all genes have too few."""
    if not adapted.any():
        raise ValueError(
            "`layer`: none of its genes has residuals, because none was measured at ten spots; measure more"
        )
    # The stored level at or below the lower end has a rank of 1 or more among n residuals if n + 1 >= 1 / level.
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
    raise ValueError(f"`coverage`: {message}; measure more spots, or use a coverage of {most:.4g} or less")


def model_intervals(
    table: AnnData,
    record: Any,
    model: str | Path | HE2Gene | None,
    coverage: float,
    by: str | None,
    gene_symbols: str | None,
    keys: Keys,
) -> ModelIntervals:
    """Return the intervals of a prediction, from the residuals of its model."""
    model = predicting_model(record, model)
    facts = model.card.intervals
    if facts is None:
        raise ValueError(
            f"`model` {model.name!r} has no calibration residuals; train it with hg.tl.train(..., preset='default'), two or more "
            "sections and validation='grouped'"
        )
    wanted = match_genes(model, table, None, symbols_of(table, record, gene_symbols))
    arrays = _CalibrationArrays(
        f"model {model.name!r}",
        model.tensors,
        np.asarray(facts["levels"]),
        facts["max_coverage"],
        model.genes["detected"].to_numpy(float) if "detected" in model.genes else None,
        "train it again with hg.tl.train, calibrate on measured slides with hg.tl.calibrate, or use by='annotation'",
    )
    class_specific = [bool(n.any()) and by == "annotation" for n in model.tensors["intervals.groups"][1:]]
    codes = np.zeros(table.n_obs, int)
    if by == "annotation" and model.card.classes and keys.annotation not in table.obs:
        warnings.warn(
            f"`by` is 'annotation', but obs[{keys.annotation!r}], which hg.tl.predict wrote, is missing: intervals are those of all spots",
            UserWarning,
            stacklevel=4,
        )
    used = [specific and keys.annotation in table.obs for specific in class_specific]
    if any(used):
        codes = pd.Index(model.card.classes).get_indexer(table.obs[keys.annotation].astype(object)) + 1
    intervals = _intervals_from(arrays, coverage, by, class_specific, wanted.columns, wanted.positions, table.n_vars)
    return replace(
        intervals,
        codes=codes,
        known=intervals.known & table.var[keys.predicted].to_numpy(bool),
        facts={
            **intervals.facts,
            "unit": facts["unit"],
            "n_groups": int(facts["n_groups"]),
            "by": by if by in ("detected", "level") else "annotation" if any(used) else "none",
            "classes": [name for name, is_used in zip(model.card.classes, used, strict=True) if is_used],
            "model": model.name,
            "weights_sha256": model.weights_sha256,
        },
    )


def calibration_intervals(
    table: AnnData, calibration: Calibration, coverage: float, by: str | None, names: pd.Index
) -> ModelIntervals:
    """Return the intervals of a calibration; ``names`` are the genes of the table."""
    from ..stats import LEVELS, MAX_COVERAGE

    positions = find_genes(names, calibration.genes)
    columns = np.flatnonzero(positions >= 0)
    if not len(columns):
        raise ValueError(
            f"`calibration` has none of the genes of the table: it has {list(calibration.genes[:3])}, the table {list(names[:3])}; "
            "if gene symbols are in a column of var, pass its name as `gene_symbols`"
        )
    n_absent = len(calibration.genes) - len(columns)
    if calibration.layer_scale == "counts" and n_absent:
        warnings.warn(
            f"`data` lacks {n_absent:,} of {len(calibration.genes):,} genes of the `calibration`: their counts are missing in the "
            "library sizes, so the intervals do not fit the normalised values; keep these genes in `data`",
            UserWarning,
            stacklevel=3,
        )
    residuals = calibration.residuals.tensors()
    arrays = _CalibrationArrays(
        "`calibration`", residuals, LEVELS, MAX_COVERAGE, calibration.detected, "make it again with hg.tl.calibrate"
    )
    intervals = _intervals_from(arrays, coverage, by, [], columns, positions[columns], table.n_vars)
    return replace(
        intervals,
        codes=np.zeros(table.n_obs, int),
        facts={
            **intervals.facts,
            "unit": calibration.unit,
            "n_groups": len(calibration.groups),
            "by": by if by in ("detected", "level") else "none",
            "classes": [],
        },
    )


@dataclass(frozen=True)
class _CalibrationArrays:
    """Residual quantiles, with the names of a model folder, and the share of spots that detect each gene."""

    name: str
    tensors: Mapping[str, np.ndarray]
    levels: np.ndarray
    max_coverage: float
    detected: np.ndarray | None
    remedy: str


def _intervals_from(
    arrays: _CalibrationArrays,
    coverage: float,
    by: str | None,
    class_specific: Sequence[bool],
    columns: np.ndarray,
    positions: np.ndarray,
    n_vars: int,
) -> ModelIntervals:
    """Return intervals with the scores and spread of the genes at ``positions``, in ``columns`` of a table."""
    from ..stats import half_scores

    if not arrays.levels[0] <= coverage <= arrays.max_coverage:
        raise ValueError(
            f"`coverage` is {coverage}; the quantiles of {arrays.name} are for {arrays.levels[0]:g} to {arrays.max_coverage:g}"
        )
    spread = np.full((2, n_vars), np.nan, np.float32)
    spread[:, columns] = arrays.tensors["intervals.spread"][:, positions]
    rare = None
    if arrays.detected is not None:
        rare = np.zeros(n_vars, bool)
        rare[columns] = arrays.detected[positions] < RARE_SHARE
    if by == "level":
        return _intervals_by_level(arrays, coverage, columns, positions, spread, rare)
    quantiles, groups = arrays.tensors["intervals.quantiles"], arrays.tensors["intervals.groups"]
    by_class = [half_scores(q, n, coverage, arrays.levels) for q, n in zip(quantiles, groups, strict=True)]
    pooled, guaranteed = by_class[0]
    if by == "detected":
        if "intervals.detected" not in arrays.tensors:
            raise ValueError(
                f"`by` is 'detected', but {arrays.name} has no residuals of the spots that express a gene; {arrays.remedy}"
            )
        detected, detected_groups = arrays.tensors["intervals.detected"], arrays.tensors["intervals.detected_groups"]
        score, is_guaranteed = half_scores(detected, detected_groups, coverage, arrays.levels)
        pooled, guaranteed = np.fmax(pooled, score), guaranteed & is_guaranteed
        by_class[0] = pooled, guaranteed
    scores = np.full((len(by_class), n_vars), np.nan, np.float32)
    for i, (score, is_guaranteed) in enumerate(by_class):
        is_specific = i == 0 or class_specific[i - 1]
        own = score if is_specific else pooled
        scores[i, columns] = np.where(np.isfinite(own), own, pooled)[positions]
        guaranteed = guaranteed & is_guaranteed if is_specific else guaranteed
    facts = _guarantee(guaranteed[positions], coverage)
    return ModelIntervals(scores, spread, np.zeros(0, int), np.isfinite(scores[0]), facts, rare)


def _guarantee(guaranteed: np.ndarray, level: float) -> dict[str, Any]:
    """Return the guarantee and the number of groups that it needs."""
    from ..stats import MIN_GROUPS

    needed = max(MIN_GROUPS, int(np.ceil(level / (1 - level) - 1e-9)))
    return {"guarantee": "hierarchical" if guaranteed.all() else "none", "n_groups_needed": needed}


def _intervals_by_level(
    arrays: _CalibrationArrays,
    coverage: float,
    columns: np.ndarray,
    positions: np.ndarray,
    spread: np.ndarray,
    rare: np.ndarray | None,
) -> ModelIntervals:
    """Return intervals with scores below and above by predicted level; each side may miss half of the values outside."""
    from ..stats import TAILS, half_scores

    names = [f"intervals.level_{name}" for name in ("quantiles", "groups", "edges")]
    if not arrays.tensors.keys() >= set(names):
        raise ValueError(f"`by` is 'level', but {arrays.name} has no residuals by predicted level; {arrays.remedy}")
    quantiles, groups, upper_ends = (arrays.tensors[name][..., positions] for name in names)
    tail = (1 + coverage) / 2
    scores = np.full((2, max(len(groups) - 1, 1), spread.shape[1]), np.nan, np.float32)
    guaranteed = np.ones(len(positions), bool)
    for side in (0, 1):
        (pooled, pooled_guaranteed), *levels = (
            half_scores(q, n, tail, TAILS) for q, n in zip(quantiles[side], groups, strict=True)
        )
        for i, (score, is_guaranteed) in enumerate(levels):
            has_score = np.isfinite(score)
            scores[side, i, columns] = np.where(has_score, score, pooled)
            guaranteed &= np.where(has_score, is_guaranteed, pooled_guaranteed)
    edges = np.full((len(upper_ends), spread.shape[1]), np.nan, np.float32)
    edges[:, columns] = upper_ends
    known = np.isfinite(scores.max(axis=(0, 1)))
    return ModelIntervals(scores, spread, np.zeros(0, int), known, _guarantee(guaranteed, tail), rare, edges)
