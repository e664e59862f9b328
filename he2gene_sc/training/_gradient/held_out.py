"""Metrics of held-out predictions of a network, by section and by gene, and for the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...stats import pearson
from .._closed_form.validate import N_VARIABLE
from .._figures import balanced_accuracy
from .._predictability import GROUP_UNITS, RELIABLE_PCC, bounds, mean_by_patient, rule_in_words
from .fit import Fitted
from .patches import PatchSet, column_means

_DIGITS = 4
#: Fewest held-out sections for the bound on known patients.
_MIN_SECTIONS = 2


@dataclass(frozen=True)
class HeldOutSection:
    """Metrics of held-out spots of one section, predicted by a network that was not trained on its group."""

    section: int  # code
    pcc: np.ndarray  # (g,); NaN if not measured, 0 if constant
    panel: float  # mean correlation over the target genes
    variable: float  # mean correlation over the genes most variable inside training sections
    accuracy: float  # balanced accuracy; NaN with fewer than two classes
    error: np.ndarray  # (g,) sum of squared errors
    base: np.ndarray  # (g,) the same of the training mean


def held_out_sections(data: PatchSet, fitted: Fitted) -> list[HeldOutSection]:
    """Compare the held-out predictions of a fit with measured expression, section by section."""
    mean = np.nan_to_num(column_means(data.targets, fitted.trained))
    variable = variable_genes(data, fitted.trained)
    found = []
    for section in np.unique(data.sections[fitted.rows]):
        here = np.flatnonzero(data.sections[fitted.rows] == section)
        rows, predicted = fitted.rows[here], fitted.expression[here]
        measured = data.targets[rows]
        listed = ~np.any(np.isnan(measured), axis=0)
        pcc = np.full(len(listed), np.nan)
        pcc[listed] = np.nan_to_num(pearson(predicted[:, listed], measured[:, listed]))
        found.append(
            HeldOutSection(
                section=int(section),
                pcc=pcc,
                panel=_mean(pcc[data.target_mask]),
                variable=_mean(pcc[variable]),
                accuracy=balanced_accuracy(data.codes[rows], fitted.proba[here]),
                error=np.where(listed, np.square(predicted - measured).sum(0, dtype=np.float64), 0),
                base=np.where(listed, np.square(mean - measured).sum(0, dtype=np.float64), 0),
            )
        )
    return found


def variable_genes(data: PatchSet, rows: np.ndarray) -> np.ndarray:
    """Return the genes of highest variance inside sections, averaged over the sections that measured them."""
    parts = (rows[data.sections[rows] == section] for section in np.unique(data.sections[rows]))
    variances = np.array([data.targets[part].var(0, dtype=np.float64) for part in parts])
    return np.argsort(-np.nan_to_num(bounds(variances)[0]), kind="stable")[:N_VARIABLE]


def figures(found: Sequence[HeldOutSection], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of a card by section, without a mean over patients; blocks held out in turn are averaged."""
    tables = {
        "mean Pearson, target genes": "panel",
        f"mean Pearson, {N_VARIABLE} genes most variable within sections": "variable",
        "balanced accuracy of the annotation": "accuracy",
    }
    result: dict[str, dict[str, float]] = {}
    for title, attribute in tables.items():
        values: dict[str, list[float]] = {}
        for part in found:
            values.setdefault(names[part.section], []).append(getattr(part, attribute))
        means = {name: round(_mean(np.array(v)), _DIGITS) for name, v in values.items()}
        means = {name: v for name, v in means.items() if np.isfinite(v)}
        if means:
            result[title] = means
    return result


def gene_figures(found: Sequence[HeldOutSection], unit: str, patients: Sequence[int]) -> dict[str, np.ndarray]:
    """Return metrics of each gene, and whether it is reliable; ``patients`` has the code of each section.

    ``pcc`` has a 95 % interval (t over held-out sections, two are needed). ``pcc_new_patient`` needs two held-out patients, and
    ``reliable`` needs :data:`MIN_GROUPS`. Without depth and references, its bound is that of the mean correlation over patients.
    """
    pcc = np.array([part.pcc for part in found])
    mean, low, high = bounds(pcc, min_groups=_MIN_SECTIONS)
    error, base = (np.sum([getattr(part, name) for part in found], axis=0) for name in ("error", "base"))
    skill = np.where(np.isfinite(mean), 1 - error / np.where(base > 0, base, 1), np.nan)
    new_patient, reliable = np.full(pcc.shape[1], np.nan), np.zeros(pcc.shape[1], bool)
    if unit == "patient":
        across = mean_by_patient(pcc, [patients[part.section] for part in found])
        new_patient, new_patient_low, _ = bounds(across)
        new_patient = np.where(np.isfinite(across).sum(0) > 1, new_patient, np.nan)
        reliable = (new_patient_low > RELIABLE_PCC) & (np.fmin.reduce(across) > RELIABLE_PCC) & (skill > 0)
    return {
        "pcc": mean,
        "pcc_low": low,
        "pcc_high": high,
        "pcc_new_patient": new_patient,
        "skill": skill,
        "reliable": reliable,
        "reliable_known_patient": (unit in GROUP_UNITS) & (low > RELIABLE_PCC) & (skill > 0),
    }


def reliable_rule(found: Sequence[HeldOutSection], unit: str, patients: Sequence[int]) -> str:
    """Return the rule of reliable genes of :func:`gene_figures` in words."""
    n = len({patients[part.section] for part in found}) if unit == "patient" else 0
    new_patient = (
        f"the lower 95 % bound of its mean correlation over the {n} patients, held out whole, is above {RELIABLE_PCC}, so is "
        "its correlation in each of them, and its held-out skill against the training mean is positive; it was not compared "
        "with depth, colour and coordinates."
    )
    groups = "sections of held-out patients" if n else "sections, held out; valid only for known patients"
    return rule_in_words(
        unit, n, new_patient, f"{len(found)} {groups}", least=_MIN_SECTIONS, no_groups=f"only held-out {unit}s"
    )


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
