"""Ends of intervals by gene, from the residuals of a model, of a calibration or of an adaptation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.genes import find_genes, match_genes
from .._core.keys import Keys
from .._core.logs import warn
from .._core.matrix import in_columns
from .._core.ownership import is_record_of
from .._core.predictions import predicting_model, symbols_of

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene
    from ._calibrate import Calibration


#: The intervals of genes detected in a smaller share of the training spots mean "not detected".
RARE_SHARE = 0.2
#: Valid values of the argument `by`, and what they mean.
_BY = {
    "annotation": "the predicted class",
    "detected": "also the spots that express the gene",
    "level": "the predicted level of the gene",
}
#: Residuals that an argument `by` needs, and that models or calibrations of older versions do not have.
_NEEDED = {"detected": "of the spots that express a gene", "level": "by predicted level"}


def check_by(by: object) -> None:
    """Raise unless residuals can be grouped by ``by``."""
    if by is not None and by not in _BY:
        valid = ", ".join(f"{name!r} ({meaning})" for name, meaning in _BY.items())
        raise ValueError(f"`by` is {by!r}, valid: {valid} or None")


@dataclass(frozen=True)
class Intervals:
    """Intervals of the genes of a table."""

    #: Gives the lower and upper ends for predicted values ``(n, g)``, the columns of the genes and the rows of the spots.
    ends: Callable[[np.ndarray, np.ndarray, np.ndarray | slice], tuple[np.ndarray, np.ndarray]]
    known: np.ndarray  # genes with intervals
    facts: dict[str, Any]
    rare: np.ndarray | None  # genes detected in fewer than a fifth of the spots; None if the model does not state it


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


def adapted_intervals(record: Any, coverage: float, by: str | None, n_vars: int) -> Intervals:
    """Return the intervals of an adapted layer, from the record of its adaptation."""
    from ..stats import interpolated

    if by == "level":
        raise ValueError(
            "`by` is 'level', but an adapted layer has no residuals by predicted level; use by=None, or the layer of the prediction"
        )
    if by == "detected":
        warn(
            "`by` is 'detected', but an adapted layer has no residuals of the spots that express a gene. The intervals are those of "
            "all spots, so they cover fewer of the expressing spots; use the layer of the prediction, or by=None"
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
    residuals = str(record.get("guarantee", "of hg.tl.adapt"))
    facts = {"guarantee": "none", "unit": "spot", "residuals": residuals, "by": "none"}
    # Older versions did not record it.
    rare = np.asarray(record["detected"]) < RARE_SHARE if "detected" in record else None
    return Intervals(
        lambda predicted, genes, _: (predicted + lower[genes], predicted + upper[genes]), known, facts, rare
    )


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
        warn(f"`coverage`: {message} and get no interval")
        return
    finite = levels[np.isfinite(quantiles[:, adapted]).any(1)]
    most = 1 - 2 * max(finite.min(), 1 - finite.max())
    raise ValueError(f"`coverage`: {message}; measure more spots, or use a coverage of {most:.4g} or less")


def model_intervals(
    table: AnnData,
    keys: Keys,
    model: str | Path | HE2Gene | None,
    coverage: float,
    by: str | None,
    gene_symbols: str | None,
) -> Intervals:
    """Return the intervals of a prediction, from the residuals of its model."""
    record = table.uns[keys.uns]
    model = predicting_model(record, model)
    facts = model.card.intervals
    if facts is None:
        raise ValueError(
            f"`model` {model.name!r} has no calibration residuals; train it with hg.tl.train(..., preset='default'), two or more "
            "sections and validation='grouped'"
        )
    wanted = match_genes(model, table, None, symbols_of(table, record, gene_symbols))
    residuals = _Residuals(
        f"model {model.name!r}",
        model.tensors,
        np.asarray(facts["levels"]),
        facts["max_coverage"],
        model.genes["detected"].to_numpy(float) if "detected" in model.genes else None,
        "train it again with hg.tl.train, calibrate on measured slides with hg.tl.calibrate, or use by='annotation'",
        wanted.columns,
        wanted.positions,
    )
    class_specific = [bool(n.any()) and by == "annotation" for n in model.tensors["intervals.groups"][1:]]
    codes = np.zeros(table.n_obs, int)
    if by == "annotation" and model.card.classes and keys.annotation not in table.obs:
        warn(
            f"`by` is 'annotation', but obs[{keys.annotation!r}], which hg.tl.predict wrote, is missing: intervals are those of all spots"
        )
    used = [specific and keys.annotation in table.obs for specific in class_specific]
    if any(used):
        codes = pd.Index(model.card.classes).get_indexer(table.obs[keys.annotation].astype(object)) + 1
    own_facts = {
        "unit": facts["unit"],
        "n_groups": int(facts["n_groups"]),
        "by": by if by in ("detected", "level") else "annotation" if any(used) else "none",
        "classes": [name for name, is_used in zip(model.card.classes, used, strict=True) if is_used],
        "model": model.name,
        "weights_sha256": model.weights_sha256,
    }
    intervals = _intervals_from(residuals, coverage, by, class_specific, codes, own_facts, table.n_vars)
    return replace(intervals, known=intervals.known & table.var[keys.predicted].to_numpy(bool))


def calibration_intervals(
    table: AnnData, calibration: Calibration, coverage: float, by: str | None, names: pd.Index
) -> Intervals:
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
        warn(
            f"`data` lacks {n_absent:,} of {len(calibration.genes):,} genes of the `calibration`: their counts are missing in the "
            "library sizes, so the intervals do not fit the normalised values; keep these genes in `data`"
        )
    residuals = _Residuals(
        "`calibration`",
        calibration.residuals.tensors(),
        LEVELS,
        MAX_COVERAGE,
        calibration.detected,
        "make it again with hg.tl.calibrate",
        columns,
        positions[columns],
    )
    facts = {
        "unit": calibration.unit,
        "n_groups": len(calibration.groups),
        "by": by if by in ("detected", "level") else "none",
        "classes": [],
    }
    return _intervals_from(residuals, coverage, by, [], np.zeros(table.n_obs, int), facts, table.n_vars)


@dataclass(frozen=True)
class _Residuals:
    """Residual quantiles, with the names of a model folder, and the genes that are read from them."""

    name: str
    tensors: Mapping[str, np.ndarray]
    levels: np.ndarray
    max_coverage: float
    detected: np.ndarray | None  # share of spots that detect each gene
    remedy: str
    columns: np.ndarray  # of the table
    positions: np.ndarray  # of the same genes in the arrays

    def read(self, *names: str) -> list[np.ndarray]:
        """Return arrays, for the genes."""
        return [self.tensors[f"intervals.{name}"][..., self.positions] for name in names]


def _intervals_from(
    residuals: _Residuals,
    coverage: float,
    by: str | None,
    class_specific: Sequence[bool],
    codes: np.ndarray,
    facts: dict[str, Any],
    n_vars: int,
) -> Intervals:
    """Return intervals: scores by class ``codes``, or by level, times the spread of the gene; the guarantee joins ``facts``."""
    from ..stats import MIN_GROUPS, level_of, spread_of

    if not residuals.levels[0] <= coverage <= residuals.max_coverage:
        raise ValueError(
            f"`coverage` is {coverage}; the quantiles of {residuals.name} are for {residuals.levels[0]:g} to "
            f"{residuals.max_coverage:g}"
        )
    if by in _NEEDED and not any(name.startswith(f"intervals.{by}") for name in residuals.tensors):
        raise ValueError(f"`by` is {by!r}, but {residuals.name} has no residuals {_NEEDED[by]}; {residuals.remedy}")

    def in_table(values: np.ndarray) -> np.ndarray:
        return in_columns(values, residuals.columns, n_vars)

    edges, level = None, coverage
    if by == "level":
        level = (1 + coverage) / 2
        found, guaranteed = _scores_by_level(residuals, level)
        edges = in_table(*residuals.read("level_edges"))
    else:
        found, guaranteed = _scores_by_class(residuals, coverage, by, class_specific)
    scores = in_table(found)
    known = np.isfinite(scores.max(axis=(0, 1)) if by == "level" else scores[0])
    rare = None
    if residuals.detected is not None:
        rare = in_table(residuals.detected[residuals.positions]) < RARE_SHARE
    n_needed = max(MIN_GROUPS, int(np.ceil(level / (1 - level) - 1e-9)))
    guarantee = {"guarantee": "hierarchical" if guaranteed.all() else "none", "n_groups_needed": n_needed}
    spread = in_table(*residuals.read("spread"))

    def ends(predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        width = spread_of(predicted, spread[:, genes])
        if edges is None:
            half = scores[:, genes][codes[rows]] * width
            return predicted - half, predicted + half
        at = level_of(predicted, edges[:, genes])
        below, above = (np.take_along_axis(score[:, genes], at, axis=0) * width for score in scores)
        # Keep the prediction inside, as in the other intervals.
        return np.minimum(predicted, predicted - below), np.maximum(predicted, predicted + above)

    return Intervals(ends, known, guarantee | facts, rare)


def _scores_by_class(
    residuals: _Residuals, coverage: float, by: str | None, class_specific: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of all spots and of each class ``(1 + c, g)``, and whether the coverage of a gene is guaranteed."""
    from ..stats import half_scores

    quantiles, groups = residuals.read("quantiles", "groups")
    (pooled, guaranteed), *by_class = (
        half_scores(q, n, coverage, residuals.levels) for q, n in zip(quantiles, groups, strict=True)
    )
    if by == "detected":
        detected, groups = residuals.read("detected", "detected_groups")
        score, is_guaranteed = half_scores(detected, groups, coverage, residuals.levels)
        pooled, guaranteed = np.fmax(pooled, score), guaranteed & is_guaranteed
    scores = [pooled]
    for (score, is_guaranteed), is_specific in zip(by_class, class_specific, strict=True):
        scores.append(np.where(np.isfinite(score), score, pooled) if is_specific else pooled)
        guaranteed = guaranteed & is_guaranteed if is_specific else guaranteed
    return np.stack(scores), guaranteed


def _scores_by_level(residuals: _Residuals, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Return scores below and above by predicted level ``(2, b, g)``, and whether the coverage of a gene is guaranteed."""
    from ..stats import TAILS, half_scores

    quantiles, groups = residuals.read("level_quantiles", "level_groups")
    scores, guaranteed = [], np.ones(len(residuals.positions), bool)
    for side in quantiles:
        (pooled, pooled_guaranteed), *levels = (
            half_scores(q, n, tail, TAILS) for q, n in zip(side, groups, strict=True)
        )
        scores.append([np.where(np.isfinite(score), score, pooled) for score, _ in levels])
        for score, is_guaranteed in levels:
            guaranteed &= np.where(np.isfinite(score), is_guaranteed, pooled_guaranteed)
    return np.array(scores), guaranteed
