"""Correction of a prediction by measured spots or genes of the same slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from ._smoothers import kriging, matched_folds, ridge
from ._stack import stack
from ._support import confirmed_share, evidence_blocks, level_share, support

#: Combined predictions. The first is the prediction with a corrected level, the reference for the others. The last is the
#: unchanged prediction.
CANDIDATES = ("level", "kriged", "shared", "refit", "mean", "neighbours", "prediction")
#: Fewest spots on which a gene must be measured.
MIN_SPOTS = 10
#: Largest number of different sets of measured spots over genes; each set is fitted separately.
MAX_SETS = 20

#: Candidate ranges in median distances between spots, and candidate ratios of noise to signal.
_GRID = tuple((length_scale, noise) for length_scale in (1.0, 2.0, 4.0, 8.0) for noise in (0.3, 1.0, 3.0, 10.0))
_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
#: Genes per block; a block has genes of similar mean, which share a prior for their weights.
_BLOCK = 250
#: Genes of highest measured variance that are used to choose ranges, noises and penalty.
_TUNING_GENES = 500
#: Largest number of directions of the predictions in gene space, and number of spots to compute them.
_DIRECTIONS, _DIRECTION_SPOTS = 20, 1000
#: Penalty of the scores: if measured genes hold this share of the squares of a direction, its score is shrunk by half.
_SCORE_PENALTY = 0.05


@dataclass(frozen=True)
class Adapted:
    """An adapted prediction of one section."""

    expression: np.ndarray  # (n, g) float32, floored at 0; as predicted where not adapted
    residuals: np.ndarray  # (n, g) measured minus adapted, fitted without the fold of the spot
    before: np.ndarray  # (n, g) measured minus predicted
    weights: np.ndarray  # (g, c) of CANDIDATES at supported spots; NaN where not adapted
    support: np.ndarray  # (n,) mean over adapted genes, see _support.support
    reach: np.ndarray  # (g,) expected share of the gain at unmeasured spots


def adapt(
    predicted: np.ndarray,
    measured: np.ndarray,
    xy: np.ndarray,
    embedding: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Adapted:
    """Correct the prediction ``(n, g)`` of one section by measured values of it (NaN where not measured).

    Each gene is a convex combination of six predictions: the model plus the mean of its residuals, shrunk by its
    sampling error (``level``); plus kriged residuals (``kriged``); plus kriged residuals along the gene directions
    of the predictions (``shared``); plus a ridge of residuals on the embedding (``refit``); the mean of the measured
    values (``mean``); and kriged measured values (``neighbours``). Ranges, noises, penalty and weights minimise the
    squared error in cross-validation; folds are as far from the remaining spots as predicted spots are from measured
    spots. Weights are shrunk to ``level`` by their sampling error.

    The correction is limited to the share that held-out spots confirm, by block and class (``confirmed_share``), and
    by the similarity of a spot to measured spots (``support``). The level is corrected equally at all unmeasured spots
    (``level_share``), since a varying correction would create a pattern. Genes measured at fewer than ten spots are not
    changed; genes measured at no spot are corrected by the other genes.
    """
    known = np.isfinite(measured)
    sets, member = np.unique(np.packbits(known, axis=0), axis=1, return_inverse=True)
    if sets.shape[1] > MAX_SETS:
        raise ValueError(
            f"`measured`: genes are measured on {sets.shape[1]} different sets of spots, at most {MAX_SETS} are supported"
        )
    section = _Section(predicted, measured, xy, embedding, classes, seed)
    for i in range(sets.shape[1]):
        genes = np.flatnonzero(member.ravel() == i)
        spots = known[:, genes[0]]
        if spots.sum() >= MIN_SPOTS:
            section.correct(genes, spots)
        elif not spots.any():
            section.correct_unmeasured(genes)
    result = section.result
    np.maximum(result.expression, 0, out=result.expression)
    with np.errstate(invalid="ignore"):
        result.support[:] /= np.isfinite(result.reach).sum()
    return result


def _directions(predicted: np.ndarray) -> np.ndarray:
    """Orthonormal directions ``(g, k)`` in gene space along which predictions vary between spots."""
    if not predicted.shape[1]:
        return np.empty((0, 0), np.float32)
    some = predicted[:: -(-len(predicted) // _DIRECTION_SPOTS)]
    centred = some - some.mean(0)
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(float))
    order = np.argsort(values)[::-1][:_DIRECTIONS]
    order = order[values[order] > 1e-4 * max(values.max(), 1e-12)]
    return ((centred.T @ vectors[:, order]) / np.sqrt(values[order])).astype(np.float32)


def _level(residual: np.ndarray) -> np.ndarray:
    """Mean ``(g,)`` of the residuals ``(m, g)`` of similar genes; the common and the gene's own part are shrunk by their errors."""
    level = residual.mean(0)
    common, own = level.mean(), level - level.mean()
    error = residual.mean(1).var(ddof=1) / len(residual)
    chance = residual.var(0, ddof=1) / len(residual)
    real = max(float((np.square(own) - chance).mean()), 0.0)
    return max(0.0, 1 - error / max(common**2, 1e-12)) * common + real / np.maximum(real + chance, 1e-12) * own


class _Section:
    """Spots of a section, and their corrected prediction, which is filled in."""

    def __init__(
        self,
        predicted: np.ndarray,
        measured: np.ndarray,
        xy: np.ndarray,
        embedding: np.ndarray | None,
        classes: np.ndarray | None,
        seed: int,
    ) -> None:
        (n, g), self.seed = predicted.shape, seed
        pitch = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
        self.xy = xy / (pitch if pitch > 0 else 1)
        self.embedding = np.empty((n, 0), np.float32) if embedding is None else embedding
        self.classes = np.full(n, -1) if classes is None else classes
        self.predicted, self.residual = predicted.astype(np.float32), (measured - predicted).astype(np.float32)
        self.loadings = _directions(self.predicted)
        self.features = [self.predicted @ self.loadings, self.embedding @ _directions(self.embedding)]
        self.result = Adapted(
            self.predicted.copy(),
            np.full((n, g), np.nan, np.float32),
            self.residual,
            np.full((g, len(CANDIDATES)), np.nan, np.float32),
            np.zeros(n, np.float32),
            np.full(g, np.nan, np.float32),
        )

    def correct(self, all_genes: np.ndarray, spots: np.ndarray) -> None:
        """Correct genes that were measured on the same spots ``(n,)``."""
        at = np.flatnonzero(spots)
        folds = matched_folds(self.xy, spots, seed=self.seed)
        splits = [(at[folds != f], at[folds == f], f) for f in np.unique(folds)]
        scored = [self._scores(held, all_genes) for _, held, _ in splits]
        varied = self.residual[np.ix_(spots, all_genes)] + self.predicted[np.ix_(spots, all_genes)]
        some = all_genes[np.argsort(-varied.var(0), kind="stable")[:_TUNING_GENES]]
        chosen = self._choose(splits, scored, some, spots)
        by_mean = all_genes[np.argsort(-varied.mean(0), kind="stable")]
        left = [self._smoothers(*split[:2], score, chosen) for split, score in zip(splits, scored, strict=True)]
        everywhere = np.arange(len(self.xy))
        final = self._smoothers(at, everywhere, self._scores(), chosen)
        near = support(self.xy, spots, folds, self.features, self.classes, seed=self.seed)
        self.result.support[:] += len(all_genes) * near
        level = np.where(spots, 1, level_share(near, spots))
        applied = np.minimum(near, level)
        gain = 2 * applied - applied**2
        self.result.reach[all_genes] = gain[~spots].mean() if len(at) < len(near) else 1.0
        blocks = evidence_blocks(self.xy[at], self.seed)
        for start in range(0, len(by_mean), _BLOCK):
            genes = by_mean[start : start + _BLOCK]
            errors = np.empty((len(CANDIDATES) - 1, len(at), len(genes)), np.float32)
            for smoothers, (known, held, f) in zip(left, splits, strict=True):
                measured = self.predicted[np.ix_(held, genes)] + self.residual[np.ix_(held, genes)]
                errors[:, folds == f] = measured - self._candidates(smoothers, known, held, genes)
            weights, residuals = stack(errors, folds)
            before = self.residual[np.ix_(at, genes)]
            confirmed, by_class = confirmed_share(before, residuals, blocks, self.classes[at])
            limit = np.ones(self.classes.max() + 2)  # the last is for spots without a class
            limit[: len(by_class)] = by_class
            share = np.minimum(confirmed, limit[self.classes])
            self.result.weights[genes, :-1], self.result.weights[genes, -1] = share.max() * weights, 1 - share.max()
            self.result.residuals[np.ix_(at, genes)] = before + share[at, None] * (residuals - before)
            values = np.einsum("gc,cng->ng", weights, self._candidates(final, at, everywhere, genes))
            old = self.predicted[:, genes]
            change = values - old
            offset = change[at].mean(0)
            change = level[:, None] * offset + near[:, None] * (change - offset)
            self.result.expression[:, genes] = old + share[:, None] * change

    def _smoothers(self, known: np.ndarray, wanted: np.ndarray, scores: np.ndarray, chosen: dict) -> dict[str, Any]:
        """Weights of the known spots, a function of their centred values for ``refit``, and scores for ``shared``."""
        weights = {name: kriging(self.xy[wanted], self.xy[known], *chosen[name]) for name in ("kriged", "neighbours")}
        shared = self._krige_scores(scores, wanted, *chosen["shared"])
        refit = ridge(self.embedding[wanted], self.embedding[known], chosen["refit"])
        return {**weights, "refit": refit, "shared": shared}

    def _candidates(self, smoothers: dict, known: np.ndarray, wanted: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Return all candidates ``(c, wanted, genes)`` from the known spots."""
        p = self.predicted[np.ix_(wanted, genes)]
        r = self.residual[np.ix_(known, genes)]
        y = r + self.predicted[np.ix_(known, genes)]
        level, mean = r.mean(0), y.mean(0)
        values = np.empty((len(CANDIDATES) - 1, *p.shape), np.float32)
        values[0] = p + _level(r)
        values[1] = p + level + smoothers["kriged"] @ (r - level)
        values[2] = p + level + smoothers["shared"] @ self.loadings[genes].T
        values[3] = p + level + smoothers["refit"](r - level)
        values[4] = mean
        values[5] = mean + smoothers["neighbours"] @ (y - mean)
        return values

    def _choose(self, splits: list, scored: list, genes: np.ndarray, spots: np.ndarray) -> dict[str, tuple | float]:
        """Ranges, noises and penalty with the least squared error on held-out spots; genes scaled by their variance."""
        r, p = self.residual[:, genes], self.predicted[:, genes]
        trials: dict[str, dict] = {"kriged": {}, "neighbours": {}, "refit": {}, "shared": {}}
        scale = (r + p)[spots].var(0) + 1e-12
        for (known, held, _), scores in zip(splits, scored, strict=True):
            level, mean = r[known].mean(0), (r + p)[known].mean(0)
            residual, measured = r[known] - level, (r + p)[known] - mean
            wanted, whole = r[held] - level, (r + p)[held] - mean

            def count(name: str, setting: object, error: np.ndarray) -> None:
                trials[name][setting] = trials[name].get(setting, 0) + (np.square(error) / scale).sum()

            for setting in _GRID:
                weights = kriging(self.xy[held], self.xy[known], *setting)
                count("kriged", setting, wanted - weights @ residual)
                count("neighbours", setting, whole - weights @ measured)
                shared = self._krige_scores(scores, held, *setting)
                count("shared", setting, wanted - shared @ self.loadings[genes].T)
            for penalty in _PENALTIES:
                fitted = ridge(self.embedding[held], self.embedding[known], penalty)(residual)
                count("refit", penalty, wanted - fitted)
        return {name: min(tried, key=tried.__getitem__) for name, tried in trials.items()}

    def _scores(self, *hidden: np.ndarray) -> np.ndarray:
        """Scores ``(n, k)`` of the residuals of each spot along the directions, from its measured genes; NaN without any.

        ``hidden`` are spots and genes that are treated as not measured.
        """
        k = self.loadings.shape[1]
        values = self.residual
        if hidden:
            values = values.copy()
            values[np.ix_(*hidden)] = np.nan
        known = np.isfinite(values)
        scores = np.full((len(values), k), np.nan)
        whole = known.all(1)
        scores[whole] = values[whole] @ self.loadings / (1 + _SCORE_PENALTY)
        for i in np.flatnonzero(known.any(1) & ~whole):
            part = self.loadings[known[i]].astype(float)
            scores[i] = np.linalg.solve(part.T @ part + _SCORE_PENALTY * np.eye(k), part.T @ values[i, known[i]])
        return scores

    def _krige_scores(self, scores: np.ndarray, wanted: np.ndarray, length_scale: float, noise: float) -> np.ndarray:
        """Krige the centred scores ``(n, k)`` of the spots that have scores to the wanted spots."""
        known = np.isfinite(scores).all(1)
        if not known.any():
            return np.zeros((len(wanted), scores.shape[1]))
        weights = kriging(self.xy[wanted], self.xy[known], length_scale, noise)
        return weights @ (scores[known] - scores[known].mean(0))

    def correct_unmeasured(self, genes: np.ndarray) -> None:
        """Correct genes that were measured at no spot by the measured genes, along the directions of the predictions.

        Range, noise and one weight minimise the squared error in five folds of measured genes.
        """
        seen = np.flatnonzero(np.isfinite(self.residual).sum(0) >= MIN_SPOTS)
        if len(seen) < 10:
            return
        everywhere = np.arange(len(self.xy))
        parts = np.array_split(np.random.default_rng(self.seed).permutation(seen), 5)
        hidden = [self._scores(everywhere, part) for part in parts]
        best, weight, setting = 0.0, 0.0, _GRID[0]
        for trial in _GRID:
            product = square = base = 0.0
            for part, scores in zip(parts, hidden, strict=True):
                r = self.residual[:, part] - np.nanmean(self.residual[:, part], axis=0)
                f = self._krige_scores(scores, everywhere, *trial) @ self.loadings[part].T
                scale = np.nanmean(np.square(r), axis=0) + 1e-12
                product += np.nansum(r * f / scale)
                square += np.nansum(np.where(np.isfinite(r), f * f, np.nan) / scale)
                base += np.nansum(r * r / scale)
            w = float(np.clip(product / square, 0, 1)) if square > 0 else 0.0
            gain = (2 * w * product - w * w * square) / base
            if gain > best:
                best, weight, setting = gain, w, trial
        shared = self._krige_scores(self._scores(), everywhere, *setting)
        self.result.expression[:, genes] += weight * (shared @ self.loadings[genes].T)
