"""Grouped cross-validation that holds out sections or patients (or, on request, smaller units)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...models._embedding import Basis
from ...stats import SetScores, pearson
from .._calibrate import Calibration, calibrate, groups_of, join_calibrations
from .._held_out import Depth, HeldOut, Panel, centre_by_part
from .._programmes import compare_scores
from .._scratch import spill
from .._sections import Section
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

    def predict(self, i: int, section: Section, weight: np.ndarray, genes: np.ndarray | slice) -> np.ndarray:
        """Predict some genes of the held-out spots of section ``i``, as on a slide of its resolution."""
        embedding = self.embeddings[i] * self.basis.column_weights(section.mpp)
        return np.maximum(embedding @ weight[:, genes] + self.sums.mean[genes], 0)


def panels(
    sections: Sequence[Section], rows: Sequence[np.ndarray], n_target: int, n_variable: int = N_VARIABLE
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of the genes of highest mean and of highest variance inside sections, among genes that all measured.

    Pooled variance would select genes that differ between patients, which may be constant in the tissue.
    """
    mean: np.ndarray | float = 0.0
    variance: np.ndarray | float = 0.0
    spots = 0
    used = [(section, chosen) for section, chosen in zip(sections, rows, strict=True) if chosen.any()]
    everywhere = np.all([section.measured for section, _ in used], axis=0)
    for section, chosen in used:
        n = int(chosen.sum())
        total, squares = section.sums(chosen)
        mean, spots = mean + total, spots + n
        variance = variance + squares / n - np.square(total / n)
    n = int(everywhere.sum())
    if not n:
        raise ValueError("`sdatas`: no gene was measured in all sections, so nothing can be compared between them")
    mean, variance = np.where(everywhere, mean / spots, -1), np.where(everywhere, variance, -1)
    return np.argsort(-mean, kind="stable")[: min(n, n_target)], np.argsort(-variance, kind="stable")[
        : min(n, n_variable)
    ]


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
        scores = np.mean([_head_scores(sections, folds) for folds in fitted.values()], axis=0)
        best = [np.unravel_index(part.argmax(), part.shape) for part in scores]
        *without_rings, choice = (Choice(PENALTIES[penalty], RANKS[rank]) for penalty, rank in best)
        if without_rings:
            choice = replace(choice, without_rings=without_rings[0])
    return choice, {
        name: _collect(
            *(sections, folds, choice, n_classes, name if name == calibration else None, programmes),
            n_genes=0 if panels_only else None,
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
    unit: str | None,
    programmes: np.ndarray | None,
    n_genes: int | None,
    by_level: bool = True,
) -> HeldOut:
    g = sections[0].targets.shape[1] if n_genes is None else n_genes
    weights = spill(fold.sums.weights(choice) for fold in fitted)
    parts = tuple(_parts(i, section, fitted) for i, section in enumerate(sections))
    held = spill(_predict_section(i, sections, fitted, weights, parts[i], n_classes) for i in range(len(sections)))
    panel, logits = zip(*held, strict=True)
    classes = np.concatenate(
        [np.where(np.isnan(x).any(1), -1, x.argmax(1)) if n_classes else np.full(len(x), -1) for x in logits]
    )
    pcc, pcc_given_depth = np.full((2, len(sections), g), np.nan)
    depths = [Depth.fit(section.totals, part) for section, part in zip(sections, parts, strict=True)]
    error, baseline_error = np.zeros(g), np.zeros(g)
    kept: list[Calibration] = []
    sets = () if programmes is None else (programmes, programmes)
    scores = [tuple(SetScores(weights_of_sets, section.measured) for weights_of_sets in sets) for section in sections]
    cuts = np.cumsum([0, *(len(section) for section in sections)])
    step = max(1, min(_GENES_AT_ONCE, _VALUES_AT_ONCE // int(cuts[-1])))
    for start in range(0, g, step):
        genes = slice(start, min(start + step, g))
        measured = np.concatenate([section.dense(genes) for section in sections])
        predicted, means = np.empty_like(measured), np.empty_like(measured)
        for i in range(len(sections)):
            here = slice(cuts[i], cuts[i + 1])
            for fold, weight in zip(fitted, weights, strict=True):
                if i in fold.embeddings:
                    rows = fold.held[i]
                    means[here][rows] = fold.sums.mean[genes]
                    predicted[here][rows] = fold.predict(i, sections[i], weight, genes)
            pair = centre_by_part(predicted[here], parts[i]), centre_by_part(measured[here], parts[i])
            pcc[i, genes] = pearson(*pair)
            pcc_given_depth[i, genes] = depths[i].partial(*pair)
            for score, values in zip(scores[i], (predicted, measured), strict=False):
                score.add(values[here], genes)
            error[genes] += np.nan_to_num(np.square(predicted[here] - measured[here])).sum(0, dtype=np.float64)
            baseline_error[genes] += np.nan_to_num(np.square(means[here] - measured[here])).sum(0, dtype=np.float64)
        if unit is not None:
            kept.append(
                calibrate(predicted, measured, groups_of(sections, unit), classes, n_classes, by_level=by_level)
            )
    skill = np.where(baseline_error > 0, 1 - error / np.where(baseline_error > 0, baseline_error, 1), np.nan)
    programme_metrics = None
    if programmes is not None:
        found = [
            compare_scores(
                predicted_scores.t(), measured_scores.t(), (programmes[section.measured] != 0).sum(0), depth, part
            )
            for (predicted_scores, measured_scores), section, depth, part in zip(
                scores, sections, depths, parts, strict=True
            )
        ]
        programme_metrics = np.stack(found, axis=1)
    (correlations,) = spill([(pcc, pcc_given_depth)])
    return HeldOut(
        *correlations, skill, panel, logits, parts, join_calibrations(kept) if kept else None, programme_metrics
    )


def _parts(i: int, section: Section, fitted: Sequence[_Fold]) -> np.ndarray:
    """Return the number of the fold that held out each spot of section ``i``."""
    codes = np.full(len(section), -1)
    for f, fold in enumerate(fitted):
        codes[fold.held[i]] = f
    return codes


def _predict_section(
    i: int,
    sections: Sequence[Section],
    fitted: Sequence[_Fold],
    weights: Sequence[np.ndarray],
    parts: np.ndarray,
    n_classes: int,
) -> tuple[Panel, np.ndarray]:
    """Return held-out panel and logits of section ``i``."""
    section = sections[i]
    folds = [(fold, weight) for fold, weight in zip(fitted, weights, strict=True) if i in fold.embeddings]
    target, variable = folds[0][0].target, folds[0][0].variable
    genes = np.concatenate([target, variable])
    predicted = np.empty((len(section), len(genes)), np.float32)
    scores = np.full((len(section), n_classes), np.nan)
    for fold, weight in folds:
        predicted[fold.held[i]] = fold.predict(i, section, weight, genes)
        if fold.annotation is not None:
            scores[fold.held[i]] = fold.annotation.logits(section)[fold.held[i]]
    return Panel(
        target, variable, centre_by_part(predicted, parts), centre_by_part(section.dense(genes), parts)
    ), scores
