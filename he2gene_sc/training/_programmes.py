"""Gene sets whose scores a model predicts: how well, on patients that were held out whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..stats import pearson, set_ceiling
from ._held_out import Depth, within
from ._predictability import MIN_GROUPS, RELIABLE_PCC, bounds, by_patient, least, with_rest
from ._sections import Section

if TYPE_CHECKING:
    from ._held_out import HeldOut
    from ._metadata import Programmes

#: Genes of a set that have to be there for a score.
MIN_GENES = 5


def compared(
    guess: np.ndarray, aim: np.ndarray, used: np.ndarray, depth: Depth, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of predicted with measured scores of one section, ``(n, sets)`` twice, plain and given depth.

    NaN where too few genes of a set, ``used`` ``(sets,)``, were measured.
    """
    pair = within(guess, parts), within(aim, parts)
    enough = used >= MIN_GENES
    plain, given = pearson(*pair), depth.partial(*pair)
    return np.where(enough, np.nan_to_num(plain), np.nan), np.where(enough, np.nan_to_num(given), np.nan)


def judged(of: Mapping[str, np.ndarray], references: Sequence[str]) -> pd.DataFrame:
    """Means of the figures over patients, an interval, and whether a set may be used on a new one.

    ``of`` has ``(patients, sets)``: ``pearson``, ``pearson_given_depth``, ``ceiling``, and each of ``references``. The rule is that
    of genes: the lower end of the 95 % t interval given depth, and the plain correlation in each patient, are above 0.1, and a set
    is better than every reference that is there: than depth in the mean, than others by the lower end of the interval.
    """
    out = pd.DataFrame({name: bounds(values)[0] for name, values in of.items()})
    out["pearson_low"], out["pearson_high"] = bounds(of["pearson"])[1:]
    good = np.nan_to_num(bounds(of["pearson_given_depth"])[1]) > RELIABLE_PCC
    good &= np.nan_to_num(least(of["pearson"])) > RELIABLE_PCC
    for name in references:
        mean, low, _ = bounds(of["pearson"] - of[name], most=2)
        good &= np.isnan(mean) | ((mean if name == "depth" else low) > 0)
    out["reliable"] = good & (len(of["pearson"]) >= MIN_GROUPS)
    return out


def programme_figures(
    programmes: Programmes, sections: Sequence[Section], held_out: HeldOut, references: Mapping[str, HeldOut], seed: int
) -> dict[str, Any]:
    """Say on a card how gene sets are predicted, from predictions of patients held out in turn."""
    patients = [section.patient for section in sections]
    rng, columns = np.random.default_rng(seed), np.arange(len(programmes.weights))
    ceiling = [set_ceiling(with_rest(s), columns, programmes.weights, rng, s.measured) for s in sections]
    found = {name: figures.programmes for name, figures in {"pearson": held_out, **references}.items()}
    of = {name: values[0] for name, values in found.items() if values is not None}
    assert held_out.programmes is not None
    of |= {"pearson_given_depth": held_out.programmes[1], "ceiling": np.stack(ceiling)}
    table = judged({name: by_patient(values, patients) for name, values in of.items()}, list(references))
    rows = table.round(4).astype(object).where(table.notna(), None).to_dict("records")
    sets = zip(programmes.genes.items(), rows, strict=True)
    return {
        "n_patients": len(set(patients)),
        "sets": {name: {"genes": dict(genes), **row} for (name, genes), row in sets},
    }
