"""Held-out metrics for the card, per section, with intervals; there is no mean over patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..models._card import BLOCK_BOOTSTRAP, PAIRED
from ..stats import N_BINS, calibration_error, noise_ceiling, pearson
from ._calibrate import UNSEEN_LOGIT, temperature
from ._held_out import Depth, HeldOut, Panel
from ._predictability import bounds, mean_by_patient, with_unmodelled_counts
from ._sections import Section, groups_of

#: Side in µm of the blocks that the bootstrap draws: a few spots, about the distance over which neighbours are similar.
BLOCK_UM = 800.0
N_BOOTSTRAP = 500
#: Fewest blocks for an interval.
MIN_BLOCKS = 5
_N_DIGITS = 4


def expression_figures(
    sections: Sequence[Section], held_out: HeldOut, baselines: Mapping[str, HeldOut]
) -> dict[str, dict[str, object]]:
    """Return mean correlations of both panels in each section, plain and given depth, with baselines and noise ceiling.

    The intervals are from a bootstrap over blocks of each section, conditional on these patients and sections.
    """
    own = list(zip(sections, held_out.panel, held_out.parts, strict=True))
    # Values of both panels, by section.
    tables: dict[str, list[Any]] = {
        "mean Pearson": [panel.scores() for panel in held_out.panel],
        BLOCK_BOOTSTRAP: [interval(panel, section.centres_um) for section, panel, _ in own],
        "mean partial Pearson given the spots' counts": [
            partial_correlations(panel, section.totals, parts) for section, panel, parts in own
        ],
        **{title: [panel.scores() for panel in baseline.panel] for title, baseline in baselines.items()},
        "noise ceiling": [
            panel.means(np.nan_to_num(noise_ceiling(with_unmodelled_counts(section), genes=panel.genes)))
            for section, panel, _ in own
        ],
    }
    figures: dict[str, dict[str, object]] = {}
    for i, panel_title in enumerate(_panel_titles(held_out)):
        for title, values in tables.items():
            found = zip(sections, values, strict=True)
            # Sections with too few blocks have no interval.
            row = {s.name: _round(x[i]) for s, x in found if title != BLOCK_BOOTSTRAP or np.isfinite(x).all()}
            if row:
                figures[f"{title}, {panel_title}"] = row
    return figures


def _panel_titles(held_out: HeldOut) -> tuple[str, str]:
    panel = held_out.panel[0]
    return f"{len(panel.target)} target genes", f"{len(panel.variable)} most variable genes"


def paired_figures(
    sections: Sequence[Section], held_out: HeldOut, references: Mapping[str, HeldOut], *, unit: str
) -> dict[str, dict[str, object]]:
    """Return mean correlations of both panels minus those of each reference, per patient or section, with a 95 % t interval."""
    group_unit = "patient" if unit == "patient" else "section"
    names = groups_of(sections, unit)
    figures: dict[str, dict[str, object]] = {}
    own = np.array([panel.scores() for panel in held_out.panel])
    for name, reference in references.items():
        pairs = mean_by_patient(own - [panel.scores() for panel in reference.panel], names)
        mean, low, high = bounds(pairs, most=2)
        for i, title in enumerate(_panel_titles(held_out)):
            row: dict[str, object] = {
                group: _round(pair) for group, pair in zip(dict.fromkeys(names), pairs[:, i], strict=True)
            }
            row[f"mean of {group_unit}s"] = _round(mean[i])
            if np.isfinite(low[i]):
                row["95 % interval"] = _round([low[i], high[i]])
            figures[f"{PAIRED} {name}, {title}"] = row
    return figures


def partial_correlations(panel: Panel, totals: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean partial correlations of both panels given counts ``(n,)``, centred by part if there are several."""
    depth = Depth.fit(totals, parts)
    measured = np.nan_to_num(panel.measured)
    varies = np.isfinite(pearson(panel.predicted, measured))
    return panel.means(np.where(varies, np.nan_to_num(depth.partial(panel.predicted, measured)), 0))


def interval(panel: Panel, centres_um: np.ndarray) -> np.ndarray:
    """Return low and high ends of the mean correlation of both panels over blocks of the section, ``(2, 2)``.

    They are percentiles of :func:`bootstrap`, expanded for few blocks by t and n / (n - 1) (Hesterberg, Am Stat 2015).
    The coverage is 95 % if blocks are independent, else 94 to 46 % (``bench_trust.py blocks``). NaN below :data:`MIN_BLOCKS`.
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
    """Return mean correlations of both panels for draws, with replacement, of squares of :data:`BLOCK_UM`, ``(n_draws, 2)``.

    Blocks are drawn since neighbouring spots are not independent (Politis and Romano, J Am Stat Assoc 1994).
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
    calibration_folds: HeldOut | None = None,
    exclude_patient: bool = False,
    is_calibrated: bool = True,
) -> dict[str, dict[str, object]]:
    """Return balanced accuracy of each section, and AUROC of each class and calibration error over all sections."""
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    scaled: Sequence[np.ndarray] = held_out.logits
    if is_calibrated:
        scaled = calibrate_logits(sections, held_out, calibration_folds, exclude_patient=exclude_patient)
    accuracy: dict[str, object] = {}
    usable = []
    for section, *logits in zip(sections, held_out.logits, scaled, strict=True):
        rows = (section.codes >= 0) & np.isfinite(logits[0]).all(1)
        usable.append([section.codes[rows], *(values[rows] for values in logits)])
        recall = balanced_accuracy(*usable[-1][:2])
        if np.isfinite(recall):
            accuracy[section.name] = _round(recall)
    if not accuracy:
        return {}
    codes, raw, calibrated = map(np.concatenate, zip(*usable, strict=True))
    proba = softmax(calibrated, axis=1)
    # AUROC of a class uses only spots whose model was trained on that class.
    auroc: dict[str, object] = {}
    for c, name in enumerate(classes):
        known = raw[:, c] != UNSEEN_LOGIT
        if 0 < (codes[known] == c).sum() < known.sum():
            auroc[name] = _round(roc_auc_score(codes[known] == c, proba[known, c]))
    return {
        "balanced accuracy of the annotation": accuracy,
        "AUROC of each class against the rest, held-out spots whose model had seen the class": auroc,
        "calibration of the annotation, all held-out spots": {
            f"expected calibration error, {N_BINS} bins": _round(calibration_error(proba, codes)),
            "labelled spots": len(codes),
        },
    }


def balanced_accuracy(codes: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean recall over the classes that occur, for scores ``(n, c)``; NaN with fewer than two classes."""
    present = np.unique(codes[codes >= 0])
    if not scores.shape[1] or len(present) < 2:
        return float("nan")
    chosen = scores.argmax(1)
    return float(np.mean([(chosen[codes == code] == code).mean() for code in present]))


def calibrate_logits(
    sections: Sequence[Section],
    held_out: HeldOut,
    calibration_folds: HeldOut | None = None,
    *,
    exclude_patient: bool = False,
) -> list[np.ndarray]:
    """Divide the held-out logits of each section by a temperature fitted on the other sections, or patients.

    Temperatures are fitted on the logits of ``calibration_folds`` (default ``held_out``). In a single section, they are fitted
    on its other parts.
    """
    calibration_folds = calibration_folds or held_out
    result = []
    for i, (section, logits) in enumerate(zip(sections, held_out.logits, strict=True)):
        others = [
            (other, calibration_folds.logits[j])
            for j, other in enumerate(sections)
            if j != i and (not exclude_patient or other.patient != section.patient)
        ]
        if others:
            result.append(logits / pooled_temperature(*zip(*others, strict=True)))
            continue
        scaled = logits.copy()
        for part in np.unique(held_out.parts[i]):
            here = held_out.parts[i] == part
            other_parts = replace(section, codes=np.where(here, -1, section.codes))
            scaled[here] /= pooled_temperature([other_parts], [calibration_folds.logits[i]])
        result.append(scaled)
    return result


def pooled_temperature(sections: Sequence[Section], logits: Sequence[np.ndarray]) -> float:
    """Return the temperature of held-out logits over the labelled spots of all sections; 1 without labelled spots."""
    scores, codes = labelled_logits(sections, logits)
    return temperature(scores, codes) if len(codes) else 1.0


def labelled_logits(sections: Sequence[Section], logits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return held-out logits and codes of the labelled spots whose fold was trained on their class."""
    codes = np.concatenate([section.codes for section in sections])
    scores = np.concatenate(list(logits))
    rows = (codes >= 0) & np.isfinite(scores).all(1)
    # A fold that was not trained on a class has no confidence for it.
    rows[rows] = scores[rows, codes[rows]] != UNSEEN_LOGIT
    return scores[rows], codes[rows]


def _round(value: Any) -> Any:
    return [_round(x) for x in value] if np.ndim(value) else round(float(value), _N_DIGITS)
