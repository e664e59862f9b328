"""Grouped cross-validation that holds out sections or patients (or, on request, smaller units)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...models._embedding import Basis
from ...stats import SetScores, pearson
from ...stats._accuracy import column_blocks
from .._calibrate import Calibration, calibrate, join_calibrations
from .._held_out import Depth, HeldOut, Panel, centre_by_part
from .._programmes import compare_scores
from .._scratch import spill
from .._sections import Section, group_codes
from .annotation import AnnotationHead, fit_annotation
from .heads import Choice, Recipe, Sums, embed, fit_basis, fit_sums

#: Penalties to choose from, in units of the expected sum of squares of the components of a spot.
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Ranks of the gene head to choose from; ``None`` is full rank.
RANKS = (3, 5, 8, 12, 20, None)
N_VARIABLE = 50
#: Most genes that are predicted at once, and most values of a block of genes and all spots.
_GENES_AT_ONCE, _VALUES_AT_ONCE = 2048, 4_000_000


@dataclass(frozen=True)
class _Fold:
    basis: Basis
    sums: Sums
    held: tuple[np.ndarray, ...]
    embeddings: dict[int, np.ndarray]  # unweighted
    target: np.ndarray
    variable: np.ndarray
    annotation: AnnotationHead | None


def panels(
    sections: Sequence[Section], rows: Sequence[np.ndarray], n_target: int, n_variable: int = N_VARIABLE
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of the genes of highest mean and of highest variance inside sections, among genes that all measured.

    Pooled variance would select genes that differ between patients, which may be constant in the tissue.
    """
    used = [(section, chosen) for section, chosen in zip(sections, rows, strict=True) if chosen.any()]
    everywhere = np.all([section.measured for section, _ in used], axis=0)
    if not everywhere.any():
        raise ValueError("`sdatas`: no gene was measured in all sections, so nothing can be compared between them")
    (mean, variance), spots = np.zeros((2, len(everywhere))), 0
    for section, chosen in used:
        n = int(chosen.sum())
        total, squares = section.sums(chosen)
        mean, spots = mean + total, spots + n
        variance = variance + squares / n - np.square(total / n)

    def highest(values: np.ndarray, n: int) -> np.ndarray:
        return np.argsort(-np.where(everywhere, values, -1), kind="stable")[: min(n, everywhere.sum())]

    return highest(mean / spots, n_target), highest(variance, n_variable)


def cross_validate(
    sections: Sequence[Section],
    protocols: Mapping[str, Sequence[np.ndarray]],
    recipe: Recipe,
    *,
    n_classes: int,
    n_target: int,
    choice: Choice | None = None,
    calibration: str | None = None,
    programmes: np.ndarray | None = None,
    panels_only: bool = False,
) -> tuple[Choice, dict[str, HeldOut]]:
    """Hold out one group after the other, choose penalty and rank, and return the choice and held-out results by protocol.

    ``protocols`` are codes ``(n,)`` of each section by name. The choice has the highest mean correlation of the target genes,
    averaged over protocols, on the same folds as the metrics. ``calibration`` names the protocol whose residuals are kept, by
    its exchangeable unit: ``"patient"`` or ``"section"``. ``programmes`` are weights of gene sets ``(g, sets)``, whose scores
    are compared too. ``panels_only`` leaves out metrics of all genes.
    """
    fitted = {
        name: spill(
            _fit_fold(sections, [codes != fold for codes in folds], recipe, n_classes, n_target)
            for fold in np.unique(np.concatenate(list(folds)))
        )
        for name, folds in protocols.items()
    }
    if choice is None:
        # The half without neighbours, if there is one, is first.
        for scores in np.mean([_head_scores(sections, folds) for folds in fitted.values()], axis=0):
            penalty, rank = np.unravel_index(scores.argmax(), scores.shape)
            choice = Choice(PENALTIES[penalty], RANKS[rank], choice)
    assert choice is not None
    n_genes = 0 if panels_only else sections[0].targets.shape[1]
    return choice, {
        name: _collect(
            *(sections, folds, choice, n_classes, n_genes, name if name == calibration else None, programmes),
            by_level=recipe.by_level,
        )
        for name, folds in fitted.items()
    }


def _fit_fold(
    sections: Sequence[Section], rows: list[np.ndarray], recipe: Recipe, n_classes: int, n_target: int
) -> _Fold:
    basis = fit_basis(sections, rows, recipe)
    sums = fit_sums(sections, rows, basis, recipe.power)
    held = tuple(~chosen for chosen in rows)
    embeddings = {i: embed(section, basis)[held[i]] for i, section in enumerate(sections) if held[i].any()}
    annotation = fit_annotation(sections, rows, recipe.annotation, n_classes) if n_classes else None
    return _Fold(basis, sums, held, embeddings, *panels(sections, rows, n_target), annotation)


def _head_scores(sections: Sequence[Section], fitted: Sequence[_Fold]) -> np.ndarray:
    """Return the mean correlation of the target genes over the sections, ``(parts, penalties, ranks)``.

    Each part of the embedding predicts all sections, since a training set may have no coarse section.
    """
    scores = np.zeros((len(fitted[0].sums.parts), len(PENALTIES), len(RANKS)))
    n = 0
    for fold in fitted:
        paths = [[[*part.path(penalty, RANKS, fold.target)] for penalty in PENALTIES] for part in fold.sums.parts]
        for i, embedding in fold.embeddings.items():
            # Read once, since slicing columns of a sparse matrix is slow.
            measured = sections[i].dense(fold.target)[fold.held[i]]
            for part, x in enumerate(np.split(embedding, len(paths), axis=1)):
                for p, path in enumerate(paths[part]):
                    for r, weight in enumerate(path):
                        scores[part, p, r] += np.nan_to_num(pearson(x @ weight, measured)).mean()
        n += len(fold.embeddings)
    return scores / n


def _collect(
    sections: Sequence[Section],
    fitted: Sequence[_Fold],
    choice: Choice,
    n_classes: int,
    g: int,
    unit: str | None,
    programmes: np.ndarray | None,
    by_level: bool,
) -> HeldOut:
    folds = list(zip(fitted, spill(fold.sums.weights(choice) for fold in fitted), strict=True))
    # The number of the fold that held out each spot.
    parts = tuple(np.argmax([fold.held[i] for fold in fitted], axis=0) for i in range(len(sections)))
    held = spill(_predict_section(i, section, folds, parts[i], n_classes) for i, section in enumerate(sections))
    panel, logits = zip(*held, strict=True)
    classes = np.concatenate(
        [np.where(np.isnan(x).any(1), -1, x.argmax(1)) if n_classes else np.full(len(x), -1) for x in logits]
    )
    means = np.stack([fold.sums.mean for fold in fitted])
    pcc, pcc_given_depth = np.full((2, len(sections), g), np.nan)
    depths = [Depth.fit(section.totals, part) for section, part in zip(sections, parts, strict=True)]
    error, baseline_error = np.zeros((2, g))
    kept: list[Calibration] = []
    sets = () if programmes is None else (programmes, programmes)
    scores = [tuple(SetScores(weights, section.measured) for weights in sets) for section in sections]
    n = len(classes)
    for genes in column_blocks((n, g), min(_GENES_AT_ONCE * n, _VALUES_AT_ONCE)):
        measured = [section.dense(genes) for section in sections]
        predicted = [
            _predict(i, section, folds, genes, np.empty_like(y))
            for i, (section, y) in enumerate(zip(sections, measured, strict=True))
        ]
        for i, (x, y) in enumerate(zip(predicted, measured, strict=True)):
            pair = centre_by_part(x, parts[i]), centre_by_part(y, parts[i])
            pcc[i, genes] = pearson(*pair)
            pcc_given_depth[i, genes] = depths[i].partial(*pair)
            for score, values in zip(scores[i], (x, y), strict=False):
                score.add(values, genes)
            baseline = np.empty_like(y)
            baseline[:] = means[parts[i], genes]
            for total, values in ((error, x), (baseline_error, baseline)):
                total[genes] += np.nan_to_num(np.square(values - y)).sum(0, dtype=np.float64)
        if unit is not None:
            joined = np.concatenate(predicted), np.concatenate(measured), group_codes(sections, unit)
            kept.append(calibrate(*joined, classes, n_classes, by_level=by_level))
    skill = np.where(baseline_error > 0, 1 - error / np.where(baseline_error > 0, baseline_error, 1), np.nan)
    set_pcc = np.empty((2, len(sections), 0))
    if programmes is not None:
        found = [
            compare_scores(score, (programmes[section.measured] != 0).sum(0), depth, part)
            for score, section, depth, part in zip(scores, sections, depths, parts, strict=True)
        ]
        set_pcc = np.stack(found, axis=1)
    (correlations,) = spill([(pcc, pcc_given_depth)])
    return HeldOut(*correlations, skill, panel, logits, parts, join_calibrations(kept) if kept else None, set_pcc)


def _predict(
    i: int, section: Section, folds: Sequence[tuple[_Fold, np.ndarray]], genes: np.ndarray | slice, out: np.ndarray
) -> np.ndarray:
    """Predict some genes of section ``i``, each spot by the fold that held it out, as on a slide of its resolution."""
    for fold, weight in folds:
        if i in fold.embeddings:
            embedding = fold.embeddings[i] * fold.basis.column_weights(section.mpp)
            out[fold.held[i]] = np.maximum(embedding @ weight[:, genes] + fold.sums.mean[genes], 0)
    return out


def _predict_section(
    i: int, section: Section, folds: Sequence[tuple[_Fold, np.ndarray]], parts: np.ndarray, n_classes: int
) -> tuple[Panel, np.ndarray]:
    """Return held-out panel and logits of section ``i``."""
    used = [fold for fold, _ in folds if i in fold.embeddings]
    target, variable = used[0].target, used[0].variable
    genes = np.concatenate([target, variable])
    predicted = _predict(i, section, folds, genes, np.empty((len(section), len(genes)), np.float32))
    scores = np.full((len(section), n_classes), np.nan)
    for fold in used:
        if fold.annotation is not None:
            scores[fold.held[i]] = fold.annotation.logits(section)[fold.held[i]]
    pair = centre_by_part(predicted, parts), centre_by_part(section.dense(genes), parts)
    return Panel(target, variable, *pair), scores
