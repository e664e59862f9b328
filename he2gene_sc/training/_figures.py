"""Held-out figures for the card: per section, with intervals, never a mean over patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import SupportsFloat

import numpy as np

from ..models._card import BLOCK_BOOTSTRAP, PAIRED
from ..stats import N_BINS, calibration_error, noise_ceiling, pearson
from ._calibrate import UNSEEN, temperature
from ._held_out import Depth, HeldOut, Panel
from ._predictability import bounds, by_patient, with_rest
from ._sections import Section

#: Side of the blocks of tissue that the bootstrap draws, µm: a few spots, as far as neighbours resemble each other.
BLOCK_UM = 800.0
N_BOOTSTRAP = 500
#: Blocks below which their spread says nothing.
MIN_BLOCKS = 5
_N_DIGITS = 4


def expression_figures(
    sections: Sequence[Section], held_out: HeldOut, baselines: Mapping[str, HeldOut]
) -> dict[str, dict[str, object]]:
    """Mean correlation of both panels in each section, with a bootstrap, given depth, baselines and the noise ceiling.

    The bootstrap draws blocks of tissue within each section; it is conditional on these patients and sections.
    """
    n_target, n_variable = len(held_out.panel[0].target), len(held_out.panel[0].variable)
    names = (f"{n_target} target genes", f"{n_variable} most variable genes")
    intervals = [interval(panel, s.centres_um) for s, panel in zip(sections, held_out.panel, strict=True)]
    given = [
        given_depth(*found) for found in zip(held_out.panel, (s.totals for s in sections), held_out.parts, strict=True)
    ]
    ceilings = [_ceiling(section, panel) for section, panel in zip(sections, held_out.panel, strict=True)]
    figures: dict[str, dict[str, object]] = {}
    for which, name in enumerate(names):
        rows: dict[str, dict[str, object]] = {
            f"mean Pearson, {name}": {},
            f"{BLOCK_BOOTSTRAP}, {name}": {},
            f"mean partial Pearson given the spots' counts, {name}": {},
            **{f"{title}, {name}": {} for title in baselines},
            f"noise ceiling, {name}": {},
        }
        model, between, rest, *others, ceiling = rows.values()
        for i, section in enumerate(sections):
            model[section.name] = _rounded(held_out.panel[i].scores()[which])
            if np.isfinite(intervals[i]).all():
                between[section.name] = [_rounded(q) for q in intervals[i][which]]
            rest[section.name] = _rounded(given[i][which])
            for row, baseline in zip(others, baselines.values(), strict=True):
                row[section.name] = _rounded(baseline.panel[i].scores()[which])
            ceiling[section.name] = _rounded(ceilings[i][which])
        figures |= {title: row for title, row in rows.items() if row}
    return figures


def paired_figures(
    sections: Sequence[Section], held_out: HeldOut, references: Mapping[str, HeldOut], *, unit: str
) -> dict[str, dict[str, object]]:
    """Mean correlation of both panels minus that of each reference, by patient or section, and a 95 % t interval."""
    of = "patient" if unit == "patient" else "section"
    names = [section.patient if of == "patient" else section.name for section in sections]
    groups = list(dict.fromkeys(names))
    figures: dict[str, dict[str, object]] = {}
    own = np.array([panel.scores() for panel in held_out.panel])
    for name, reference in references.items():
        pairs = by_patient(own - [panel.scores() for panel in reference.panel], names)
        mean, low, high = bounds(pairs, most=2)
        first = held_out.panel[0]
        titles = f"{len(first.target)} target genes", f"{len(first.variable)} most variable genes"
        for which, title in enumerate(titles):
            row: dict[str, object] = {group: _rounded(pairs[i, which]) for i, group in enumerate(groups)}
            row[f"mean of {of}s"] = _rounded(mean[which])
            if np.isfinite(low[which]):
                row["95 % interval"] = [_rounded(low[which]), _rounded(high[which])]
            figures[f"{PAIRED} {name}, {title}"] = row
    return figures


def given_depth(panel: Panel, totals: np.ndarray, parts: np.ndarray) -> tuple[float, float]:
    """Mean partial correlation of both panels given counts ``(n,)``, centred within parts where there are several."""
    depth = Depth.of(totals, parts)
    measured = np.nan_to_num(panel.measured)
    varies = np.isfinite(pearson(panel.predicted, measured))
    target, variable = panel.means(np.where(varies, np.nan_to_num(depth.partial(panel.predicted, measured)), 0))
    return float(target), float(variable)


def _ceiling(section: Section, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    genes = np.concatenate([panel.target, panel.variable])
    return panel.means(np.nan_to_num(noise_ceiling(with_rest(section), genes=genes)))


def interval(panel: Panel, centres_um: np.ndarray) -> np.ndarray:
    """Low and high of the mean correlation of target and variable panel over blocks of the section, ``(2, 2)``.

    Percentiles of :func:`bootstrap`, expanded for few blocks by t and n / (n - 1) (Hesterberg, Am Stat 2015).
    Covers 95 % if blocks are independent, else 94 to 46 % (``bench_trust.py blocks``). NaN below :data:`MIN_BLOCKS`.
    """
    from scipy.stats import norm, t

    n = len(np.unique(_blocks(centres_um), axis=0))
    if n < MIN_BLOCKS:
        return np.full((2, 2), np.nan)
    tail = norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1))
    return np.quantile(bootstrap(panel, centres_um), (tail, 1 - tail), axis=0).T


def _blocks(centres_um: np.ndarray) -> np.ndarray:
    return np.floor(centres_um / BLOCK_UM).astype(int)


def bootstrap(panel: Panel, centres_um: np.ndarray, *, n_draws: int = N_BOOTSTRAP, seed: int = 0) -> np.ndarray:
    """Mean correlations of both panels over draws of squares of :data:`BLOCK_UM` with replacement, ``(n_draws, 2)``.

    Blocks, since neighbouring spots are not independent (Politis and Romano, J Am Stat Assoc 1994).
    """
    rng = np.random.default_rng(seed)
    _, block = np.unique(_blocks(centres_um), axis=0, return_inverse=True)
    n_blocks = int(block.max()) + 1
    drawn = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_draws)[:, block.ravel()].astype(float)
    weights = drawn / np.maximum(drawn.sum(1, keepdims=True), 1)
    p, y = (x.astype(np.float64) - x.mean(0) for x in (panel.predicted, np.nan_to_num(panel.measured)))
    mean_p, mean_y = weights @ p, weights @ y
    variance = (weights @ (p * p) - mean_p**2) * (weights @ (y * y) - mean_y**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where(variance > 1e-12, (weights @ (p * y) - mean_p * mean_y) / np.sqrt(np.maximum(variance, 0)), 0)
    return np.stack(panel.means(r), axis=1)


def annotation_figures(
    sections: Sequence[Section],
    held_out: HeldOut,
    classes: Sequence[str],
    *,
    telling: HeldOut | None = None,
    by_patient: bool = False,
    tempered: bool = True,
) -> dict[str, dict[str, object]]:
    """Balanced accuracy of each section, and over all of them AUROC of each class and calibration error."""
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    figures: dict[str, dict[str, object]] = {}
    usable = [
        np.flatnonzero((section.codes >= 0) & np.isfinite(logits).all(1))
        for section, logits in zip(sections, held_out.logits, strict=True)
    ]
    accuracy: dict[str, object] = {}
    for section, logits, rows in zip(sections, held_out.logits, usable, strict=True):
        recall = balanced_accuracy(section.codes[rows], logits[rows])
        if np.isfinite(recall):
            accuracy[section.name] = _rounded(recall)
    if not accuracy:
        return {}
    figures["balanced accuracy of the annotation"] = accuracy
    codes = np.concatenate([section.codes[rows] for section, rows in zip(sections, usable, strict=True)])
    fair = calibrated(sections, held_out, telling, by_patient=by_patient) if tempered else held_out.logits
    proba = softmax(np.concatenate([logits[rows] for logits, rows in zip(fair, usable, strict=True)]), axis=1)
    # A class is judged on the spots whose model had seen it: of another, it knows nothing.
    raw = np.concatenate([logits[rows] for logits, rows in zip(held_out.logits, usable, strict=True)])
    auroc: dict[str, object] = {}
    for c, name in enumerate(classes):
        known = raw[:, c] != UNSEEN
        if 0 < (codes[known] == c).sum() < known.sum():
            auroc[name] = _rounded(roc_auc_score(codes[known] == c, proba[known, c]))
    figures["AUROC of each class against the rest, held-out spots whose model had seen the class"] = auroc
    figures["calibration of the annotation, all held-out spots"] = {
        f"expected calibration error, {N_BINS} bins": _rounded(calibration_error(proba, codes)),
        "labelled spots": len(codes),
    }
    return figures


def balanced_accuracy(codes: np.ndarray, scores: np.ndarray) -> float:
    """Mean recall over the classes that occur, of ``(n, c)`` scores; NaN where fewer than two do."""
    present = np.unique(codes[codes >= 0])
    if not scores.shape[1] or len(present) < 2:
        return float("nan")
    chosen = scores.argmax(1)
    return float(np.mean([(chosen[codes == code] == code).mean() for code in present]))


def calibrated(
    sections: Sequence[Section], held_out: HeldOut, telling: HeldOut | None = None, *, by_patient: bool = False
) -> list[np.ndarray]:
    """Divide held-out logits by a temperature fitted on the other sections, or patients, section by section.

    Those are taken from ``telling`` (default ``held_out``). A single section takes the temperature of its other parts.
    """
    telling = telling or held_out
    result = []
    for i, (section, logits) in enumerate(zip(sections, held_out.logits, strict=True)):
        others = [
            j for j in range(len(sections)) if j != i and (not by_patient or sections[j].patient != section.patient)
        ]
        if others:
            result.append(
                logits / pooled_temperature([sections[j] for j in others], [telling.logits[j] for j in others])
            )
            continue
        scaled = logits.copy()
        for part in np.unique(held_out.parts[i]):
            here = held_out.parts[i] == part
            rest = replace(section, codes=np.where(here, -1, section.codes))
            scaled[here] /= pooled_temperature([rest], [telling.logits[i]])
        result.append(scaled)
    return result


def pooled_temperature(sections: Sequence[Section], logits: Sequence[np.ndarray]) -> float:
    """Temperature of held-out logits over the labelled spots of all sections; 1 where there are none."""
    scores, codes = _telling(sections, logits)
    return temperature(scores, codes) if len(codes) else 1.0


def can_be_calibrated(sections: Sequence[Section], logits: Sequence[np.ndarray]) -> bool:
    """Whether any held-out spot says something about the confidence of the annotation."""
    return len(_telling(sections, logits)[1]) > 0


def _telling(sections: Sequence[Section], logits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Held-out logits and codes of the labelled spots whose fold had seen their class."""
    codes = np.concatenate([section.codes for section in sections])
    scores = np.concatenate(list(logits))
    rows = (codes >= 0) & np.isfinite(scores).all(1)
    # Of a class that its fold had not seen, a spot says nothing about confidence.
    rows[rows] = scores[rows, codes[rows]] != UNSEEN
    return scores[rows], codes[rows]


def _rounded(value: SupportsFloat) -> float:
    return round(float(value), _N_DIGITS)
