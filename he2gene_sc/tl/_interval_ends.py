"""Ends of intervals, gene by gene: from what a model keeps, or from the residuals of an adaptation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.keys import Keys
from .._core.model_genes import match_genes
from .._core.ownership import is_of
from .._core.predictions import predicted_by, symbols_of

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene


#: Genes detected in a smaller share of the training spots have intervals that say "not detected".
RARELY = 0.2


@dataclass(frozen=True)
class OfModel:
    """Intervals from what a model keeps: score by class and gene, ``(1 + c, n_vars)``, times the spread of a gene."""

    scores: np.ndarray
    spread: np.ndarray
    codes: np.ndarray
    known: np.ndarray
    facts: dict[str, Any]
    #: Genes detected in fewer than a fifth of the training spots; ``None`` where the model does not state it.
    rare: np.ndarray | None = None

    def ends(
        self, predicted: np.ndarray, genes: np.ndarray, rows: np.ndarray | slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        from ..stats import spread_of

        half = self.scores[:, genes][self.codes[rows]] * spread_of(predicted, self.spread[:, genes])
        return predicted - half, predicted + half


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
    if by not in ("annotation", "detected", None):
        raise ValueError(
            f"`by` is {by!r}, valid: 'annotation' (the predicted class), 'detected' (spots that show a gene, too) or None"
        )


def adaptation_of(table: AnnData, record: Mapping[str, Any], layer: str) -> Mapping[str, Any] | None:
    """Return the record of the adaptation that wrote a layer; ``None`` for the layer of the prediction.

    Raises
    ------
    ValueError
        If neither did.
    """
    if layer == record["layer"]:
        return None
    adapted = table.uns.get(layer)
    if not is_of("adapt", adapted):
        raise ValueError(
            f"`layer` {layer!r} was written neither by hg.tl.predict, which wrote {record['layer']!r}, nor by hg.tl.adapt: "
            "nothing is known of its residuals"
        )
    return adapted


def of_adapted(record: Any, coverage: float, n_vars: int) -> OfAdapted:
    from ..stats import interpolated

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
    return OfAdapted(lower, upper, known, facts | {"by": "none"})


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
    from ..stats import MIN_GROUPS, half_scores

    model = predicted_by(record, model)
    facts = model.card.intervals
    if facts is None:
        raise ValueError(
            f"`model` {model.name!r} keeps no calibration residuals: train it by hg.tl.train(..., preset='default') with two "
            "sections or more and validation='grouped'"
        )
    levels = np.asarray(facts["levels"])
    if not levels[0] <= coverage <= facts["max_coverage"]:
        raise ValueError(
            f"`coverage` is {coverage}; the quantiles that model {model.name!r} keeps are for {levels[0]:g} to "
            f"{facts['max_coverage']:g}"
        )
    wanted = match_genes(model, table, None, symbols_of(table, record, gene_symbols))
    quantiles, groups = model.tensors["intervals.quantiles"], model.tensors["intervals.groups"]
    found = [half_scores(q, n, coverage, levels) for q, n in zip(quantiles, groups, strict=True)]
    pooled, guaranteed = found[0]
    told_apart = [bool(n.any()) and by == "annotation" for n in groups[1:]]
    if by == "detected":
        pooled, guaranteed = _of_detected(model, pooled, guaranteed, coverage, levels)
        found[0] = pooled, guaranteed
    scores = np.full((len(found), table.n_vars), np.nan, np.float32)
    for i, (score, _) in enumerate(found):
        own = score if i == 0 or told_apart[i - 1] else pooled
        scores[i, wanted.columns] = np.where(np.isfinite(own), own, pooled)[wanted.positions]
    for (_, also), told in zip(found[1:], told_apart, strict=True):
        guaranteed = guaranteed & also if told else guaranteed
    spread = np.full((2, table.n_vars), np.nan, np.float32)
    spread[:, wanted.columns] = model.tensors["intervals.spread"][:, wanted.positions]
    codes = np.zeros(table.n_obs, int)
    told_apart = [told and keys.annotation in table.obs for told in told_apart]
    if by == "annotation" and model.card.classes and keys.annotation not in table.obs:
        warnings.warn(
            f"`by`: obs has no {keys.annotation!r}, which hg.tl.predict wrote: intervals are those of all spots",
            UserWarning,
            stacklevel=4,
        )
    if any(told_apart):
        codes = pd.Index(model.card.classes).get_indexer(table.obs[keys.annotation].astype(object)) + 1
    known = np.zeros(table.n_vars, bool)
    known[wanted.columns] = True
    known &= table.var[keys.predicted].to_numpy(bool) & np.isfinite(scores[0])
    holds = bool(guaranteed[wanted.positions].all())
    return OfModel(
        scores,
        spread,
        codes,
        known,
        {
            "guarantee": "hierarchical" if holds else "none",
            "unit": facts["unit"],
            "n_groups": int(facts["n_groups"]),
            "n_groups_needed": max(MIN_GROUPS, int(np.ceil(coverage / (1 - coverage) - 1e-9))),
            "by": "detected" if by == "detected" else "annotation" if any(told_apart) else "none",
            "classes": [name for name, told in zip(model.card.classes, told_apart, strict=True) if told],
            "model": model.name,
            "weights_sha256": model.weights_sha256,
        },
        _rare(model, wanted.columns, wanted.positions, table.n_vars),
    )


def _of_detected(
    model: HE2Gene, pooled: np.ndarray, guaranteed: np.ndarray, coverage: float, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores that cover the spots that show a gene as well as all spots, and whether both are guaranteed."""
    from ..stats import half_scores

    if "intervals.detected" not in model.tensors:
        raise ValueError(
            f"`by` is 'detected', and model {model.name!r} keeps no residuals of the spots that show a gene; train it again by "
            "hg.tl.train, or use by='annotation'"
        )
    score, also = half_scores(
        model.tensors["intervals.detected"], model.tensors["intervals.detected_groups"], coverage, levels
    )
    return np.fmax(pooled, score), guaranteed & also


def _rare(model: HE2Gene, columns: np.ndarray, positions: np.ndarray, n_vars: int) -> np.ndarray | None:
    """Genes of the table that training seldom detected."""
    if "detected" not in model.genes:
        return None
    found = np.zeros(n_vars, bool)
    found[columns] = model.genes["detected"].to_numpy(float)[positions] < RARELY
    return found
