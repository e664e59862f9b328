"""Accuracy of predicted scores of gene sets on held-out patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..stats import SetScores, pearson, set_ceiling
from ._held_out import Depth, HeldOut, centre_by_part
from ._metadata import Programmes
from ._predictability import MIN_GROUPS, RELIABLE_PCC, bounds, mean_by_patient, with_unmodelled_counts
from ._sections import Section, groups_of

#: Fewest measured genes of a set for a score.
MIN_GENES = 5


def compare_scores(
    scores: Sequence[SetScores], used: np.ndarray, depth: Depth, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Correlate predicted and measured scores of one section, plain and given depth, ``(sets,)`` each.

    ``used`` ``(sets,)`` is the number of measured genes of each set; the result is NaN if they are too few.
    """
    predicted, measured = (centre_by_part(score.t(), parts) for score in scores)
    plain, partial = pearson(predicted, measured), depth.partial(predicted, measured)
    enough = used >= MIN_GENES
    return np.where(enough, np.nan_to_num(plain), np.nan), np.where(enough, np.nan_to_num(partial), np.nan)


def summarise_programmes(metrics: Mapping[str, np.ndarray], references: Sequence[str]) -> pd.DataFrame:
    """Return means of the metrics over patients, an interval, and whether a set may be used on a new patient.

    ``metrics`` has arrays ``(patients, sets)``: ``pearson``, ``pearson_given_depth``, ``ceiling``, and each of ``references``. The
    rule is that of genes: the lower end of the 95 % t interval given depth, and the plain correlation in each patient, must be
    above 0.1. A set must also be better than every available reference: than depth in the mean, than others by the lower end of
    the interval.
    """
    out = pd.DataFrame({name: bounds(values)[0] for name, values in metrics.items()})
    out["pearson_low"], out["pearson_high"] = bounds(metrics["pearson"])[1:]
    good = bounds(metrics["pearson_given_depth"])[1] > RELIABLE_PCC
    good &= np.fmin.reduce(metrics["pearson"]) > RELIABLE_PCC
    for name in references:
        mean, low, _ = bounds(metrics["pearson"] - metrics[name], most=2)
        good &= np.isnan(mean) | ((mean if name == "depth" else low) > 0)
    out["reliable"] = good & (len(metrics["pearson"]) >= MIN_GROUPS)
    return out


def programme_figures(
    programmes: Programmes, sections: Sequence[Section], held_out: HeldOut, references: Mapping[str, HeldOut], seed: int
) -> dict[str, Any]:
    """Return the entry of the card on gene sets, from predictions of patients held out in turn."""
    patients = groups_of(sections, "patient")
    rng, columns = np.random.default_rng(seed), np.arange(len(programmes.weights))
    ceiling = [set_ceiling(with_unmodelled_counts(s), columns, programmes.weights, rng, s.measured) for s in sections]
    metrics = {name: found.programmes[0] for name, found in {"pearson": held_out, **references}.items()}
    metrics |= {"pearson_given_depth": held_out.programmes[1], "ceiling": np.stack(ceiling)}
    by_patient = {name: mean_by_patient(values, patients) for name, values in metrics.items()}
    table = summarise_programmes(by_patient, list(references))
    rows = table.round(4).astype(object).where(table.notna(), None).to_dict("records")
    sets = zip(programmes.genes.items(), rows, strict=True)
    return {
        "n_patients": len(set(patients)),
        "sets": {name: {"genes": dict(genes), **row} for (name, genes), row in sets},
    }
