"""A prediction corrected by those spots or genes of the slide that were measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._smoothers import kriging, matched_folds, ridge
from ._stack import stack
from ._support import believed, evidence_blocks, level_share, support

#: What is combined; the first, the prediction with its level put right, is what the others have to be better than. The last
#: is the prediction as it was.
CANDIDATES = ("level", "kriged", "shared", "refit", "mean", "neighbours", "prediction")
#: Fewest spots on which a gene must be measured.
MIN_SPOTS = 10
#: Sets of spots that genes may be measured on: each is a fit of its own.
MAX_SETS = 20

#: Ranges in median distances between spots, and ratios of noise to signal, that are tried.
_GRID = tuple((reach, noise) for reach in (1.0, 2.0, 4.0, 8.0) for noise in (0.3, 1.0, 3.0, 10.0))
_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
#: Genes that are worked on at a time, of like mean, and that share a prior for their weights.
_BLOCK = 250
#: Genes of most measured variance that ranges, noises and penalty are chosen on.
_CHOOSING = 500
#: Directions of the predictions in gene space, at most, and spots they are taken from.
_DIRECTIONS, _DIRECTION_SPOTS = 20, 1000
#: Share of the directions' squares that measured genes must hold to be believed by half.
_BELIEVED = 0.05


@dataclass(frozen=True)
class Adapted:
    """An adapted prediction of one section."""

    expression: np.ndarray  # (n, g) float32, floored at 0; as predicted where not adapted
    residuals: np.ndarray  # (n, g) measured minus adapted, without the spot's fold
    before: np.ndarray  # the same of the prediction
    weights: np.ndarray  # (g, c) of CANDIDATES at supported spots; NaN where not adapted
    support: np.ndarray  # (n,) mean over adapted genes, see _support.support
    reach: np.ndarray  # (g,) share of the gain that unmeasured spots may expect


def adapt(
    predicted: np.ndarray,
    measured: np.ndarray,
    xy: np.ndarray,
    embedding: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Adapted:
    """Correct the prediction ``(n, g)`` of one section by what was measured of it, NaN elsewhere.

    Each gene is a convex combination of six predictions: the model's with the mean of its residuals as far as that
    is not chance (``level``); with residuals kriged besides (``kriged``); with their part along the gene directions
    of the predictions kriged (``shared``); with a ridge of residuals on the embedding (``refit``); the mean of what
    was measured (``mean``), and that kriged (``neighbours``). Ranges, noises, penalty and weights have least
    squared error in cross-validation with folds as far from the rest as wanted spots are from measured ones.
    Weights are shrunk to ``level`` by what may be chance.

    The correction is taken as far as held-out spots confirm it, by block and class (``believed``), and as far as
    measured spots stand for a spot (``support``). The level is corrected alike at all unmeasured spots
    (``level_share``): by parts it would be a pattern. Genes measured at fewer than ten spots stay as they are, but
    for those measured nowhere.
    """
    from scipy.spatial import cKDTree

    pitch = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    xy = xy / (pitch if pitch > 0 else 1)
    known = np.isfinite(measured)
    predicted, residual = predicted.astype(np.float32), (measured - predicted).astype(np.float32)
    loadings = _directions(predicted)
    result = Adapted(
        predicted.copy(),
        np.full(predicted.shape, np.nan, np.float32),
        residual,
        np.full((predicted.shape[1], len(CANDIDATES)), np.nan, np.float32),
        np.zeros(len(predicted), np.float32),
        np.full(predicted.shape[1], np.nan, np.float32),
    )
    features = [predicted @ loadings] + ([] if embedding is None else [embedding @ _directions(embedding)])
    sets, member = np.unique(np.packbits(known, axis=0), axis=1, return_inverse=True)
    if sets.shape[1] > MAX_SETS:
        raise ValueError(
            f"`measured`: genes are measured on {sets.shape[1]} different sets of spots, at most {MAX_SETS} are handled"
        )
    for i in range(sets.shape[1]):
        genes = np.flatnonzero(member.ravel() == i)
        spots = known[:, genes[0]]
        if spots.sum() >= MIN_SPOTS:
            _Group(result, predicted, residual, loadings, xy, embedding, features, classes, spots, genes, seed).fit()
        elif not spots.any():
            _unmeasured(result, predicted, residual, loadings, xy, genes, seed)
    np.maximum(result.expression, 0, out=result.expression)
    with np.errstate(invalid="ignore"):
        result.support[:] /= np.isfinite(result.reach).sum()
    return result


def _directions(predicted: np.ndarray) -> np.ndarray:
    """Orthonormal directions ``(g, k)`` of gene space along which the predictions differ between spots."""
    some = predicted[:: -(-len(predicted) // _DIRECTION_SPOTS)]
    centred = some - some.mean(0)
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(float))
    order = np.argsort(values)[::-1][:_DIRECTIONS]
    order = order[values[order] > 1e-4 * max(values.max(), 1e-12)]
    return ((centred.T @ vectors[:, order]) / np.sqrt(values[order])).astype(np.float32)


def _scores(residual: np.ndarray, loadings: np.ndarray, hidden: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Place ``(n, k)`` of each spot's residuals along the directions, from its measured genes; NaN without any.

    ``hidden`` are spots and genes that are taken as not measured.
    """
    k = loadings.shape[1]
    values = residual
    if hidden is not None:
        values = residual.copy()
        values[np.ix_(*hidden)] = np.nan
    known = np.isfinite(values)
    scores = np.full((len(values), k), np.nan)
    whole = known.all(1)
    scores[whole] = values[whole] @ loadings / (1 + _BELIEVED)
    for i in np.flatnonzero(known.any(1) & ~whole):
        part = loadings[known[i]].astype(float)
        scores[i] = np.linalg.solve(part.T @ part + _BELIEVED * np.eye(k), part.T @ values[i, known[i]])
    return scores


@dataclass
class _Group:
    """Genes measured on the same spots."""

    result: Adapted
    predicted: np.ndarray
    residual: np.ndarray
    loadings: np.ndarray
    xy: np.ndarray
    embedding: np.ndarray | None
    features: list[np.ndarray]
    classes: np.ndarray | None
    spots: np.ndarray
    genes: np.ndarray
    seed: int

    def fit(self) -> None:
        """Fill in what is found for these genes."""
        at = np.flatnonzero(self.spots)
        folds = matched_folds(self.xy, self.spots, seed=self.seed)
        splits = [(at[folds != f], at[folds == f], f) for f in np.unique(folds)]
        scored = [_scores(self.residual, self.loadings, (held, self.genes)) for _, held, _ in splits]
        varied = self.residual[np.ix_(self.spots, self.genes)] + self.predicted[np.ix_(self.spots, self.genes)]
        some = self.genes[np.argsort(-varied.var(0), kind="stable")[:_CHOOSING]]
        chosen = self._choose(splits, scored, some)
        by_mean = self.genes[np.argsort(-varied.mean(0), kind="stable")]
        left = [self._smoothers(*split[:2], score, chosen) for split, score in zip(splits, scored, strict=True)]
        everywhere = np.arange(len(self.xy))
        final = self._smoothers(at, everywhere, _scores(self.residual, self.loadings, None), chosen)
        near = support(self.xy, self.spots, folds, self.features, self.classes, seed=self.seed)
        self.result.support[:] += len(self.genes) * near
        level = np.where(self.spots, 1, level_share(near, self.spots))
        got = np.minimum(near, level)
        self.result.reach[self.genes] = (2 * got - got**2)[~self.spots].mean() if len(at) < len(near) else 1.0
        blocks = evidence_blocks(self.xy[at], self.seed)
        for start in range(0, len(by_mean), _BLOCK):
            genes = by_mean[start : start + _BLOCK]
            errors = np.empty((len(CANDIDATES) - 1, len(at), len(genes)), np.float32)
            for smoothers, (known, held, f) in zip(left, splits, strict=True):
                measured = self.predicted[np.ix_(held, genes)] + self.residual[np.ix_(held, genes)]
                errors[:, folds == f] = measured - self._candidates(smoothers, known, held, genes)
            weights, residuals = stack(errors, folds)
            before = self.residual[np.ix_(at, genes)]
            share = self._believed(before, residuals, blocks)
            self.result.weights[genes, :-1], self.result.weights[genes, -1] = share.max() * weights, 1 - share.max()
            self.result.residuals[np.ix_(at, genes)] = before + share[at, None] * (residuals - before)
            values = np.einsum("gc,cng->ng", weights, self._candidates(final, at, everywhere, genes))
            old = self.predicted[:, genes]
            change = values - old
            offset = change[at].mean(0)
            change = level[:, None] * offset + near[:, None] * (change - offset)
            self.result.expression[:, genes] = old + share[:, None] * change

    def _believed(self, before: np.ndarray, after: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Share of the correction that each spot ``(n,)`` gets."""
        codes = self.classes
        share, of_class = believed(before, after, blocks, None if codes is None else codes[self.spots])
        found = np.full(len(self.xy), share)
        if codes is not None and len(of_class):
            known = (codes >= 0) & (codes < len(of_class))
            found[known] = np.minimum(share, of_class[codes[known]])
        return found

    def _smoothers(
        self, known: np.ndarray, wanted: np.ndarray, scores: np.ndarray, chosen: dict
    ) -> dict[str, Callable]:
        """Make the maps of values of mean 0 at the known spots to the wanted ones, by candidate."""
        of = {name: self._kriging(known, wanted, *chosen[name]) for name in ("kriged", "neighbours")}
        of["refit"] = self._ridge(known, wanted, chosen["refit"])
        shared = self._shared(scores, wanted, *chosen["shared"])
        return {**of, "shared": lambda genes: shared @ self.loadings[genes].T}

    def _kriging(self, known: np.ndarray, wanted: np.ndarray, reach: float, noise: float) -> Callable:
        weights = kriging(self.xy[wanted], self.xy[known], reach, noise)
        return lambda values: weights @ values

    def _ridge(self, known: np.ndarray, wanted: np.ndarray, penalty: float) -> Callable:
        if self.embedding is None:
            return lambda values: np.zeros((len(wanted), values.shape[1]), values.dtype)
        return ridge(self.embedding[wanted], self.embedding[known], penalty)

    def _shared(self, scores: np.ndarray, wanted: np.ndarray, reach: float, noise: float) -> np.ndarray:
        return krige_scores(scores, self.xy, wanted, reach, noise)

    def _candidates(self, smoothers: dict, known: np.ndarray, wanted: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Return all candidates ``(c, wanted, genes)`` from the known spots."""
        p = self.predicted[np.ix_(wanted, genes)]
        r = self.residual[np.ix_(known, genes)]
        y = r + self.predicted[np.ix_(known, genes)]
        level, mean = r.mean(0), y.mean(0)
        values = np.empty((len(CANDIDATES) - 1, *p.shape), np.float32)
        values[0] = p + _level(r)
        values[1] = p + level + smoothers["kriged"](r - level)
        values[2] = p + level + smoothers["shared"](genes)
        values[3] = p + level + smoothers["refit"](r - level)
        values[4] = mean
        values[5] = mean + smoothers["neighbours"](y - mean)
        return values

    def _choose(self, splits: list, scored: list, genes: np.ndarray) -> dict[str, tuple | float]:
        """Ranges, noises and penalty of least squared error on held-out spots, genes scaled by that of their mean."""
        r, p = self.residual[:, genes], self.predicted[:, genes]
        trials: dict[str, dict] = {"kriged": {}, "neighbours": {}, "refit": {}, "shared": {}}
        scale = (r + p)[self.spots].var(0) + 1e-12
        for (known, held, _), scores in zip(splits, scored, strict=True):
            level, mean = r[known].mean(0), (r + p)[known].mean(0)
            residual, measured = r[known] - level, (r + p)[known] - mean
            wanted, whole = r[held] - level, (r + p)[held] - mean

            def count(name: str, setting: object, error: np.ndarray) -> None:
                trials[name][setting] = trials[name].get(setting, 0) + (np.square(error) / scale).sum()

            for setting in _GRID:
                smooth = self._kriging(known, held, *setting)
                count("kriged", setting, wanted - smooth(residual))
                count("neighbours", setting, whole - smooth(measured))
                count("shared", setting, wanted - self._shared(scores, held, *setting) @ self.loadings[genes].T)
            for penalty in _PENALTIES:
                count("refit", penalty, wanted - self._ridge(known, held, penalty)(residual))
        return {name: min(tried, key=tried.__getitem__) for name, tried in trials.items()}


def _level(residual: np.ndarray) -> np.ndarray:
    """Mean ``(g,)`` of the residuals ``(m, g)`` of like genes, the common and the own part less what chance makes."""
    level = residual.mean(0)
    common, own = level.mean(), level - level.mean()
    error = residual.mean(1).var(ddof=1) / len(residual)
    chance = residual.var(0, ddof=1) / len(residual)
    real = max(float((np.square(own) - chance).mean()), 0.0)
    return max(0.0, 1 - error / max(common**2, 1e-12)) * common + real / np.maximum(real + chance, 1e-12) * own


def krige_scores(scores: np.ndarray, xy: np.ndarray, wanted: np.ndarray, reach: float, noise: float) -> np.ndarray:
    """Krige the scores ``(n, k)`` of the spots that have them to the wanted spots, without their mean."""
    known = np.isfinite(scores).all(1)
    if not known.any():
        return np.zeros((len(wanted), scores.shape[1]))
    return kriging(xy[wanted], xy[known], reach, noise) @ (scores[known] - scores[known].mean(0))


def _unmeasured(
    result: Adapted,
    predicted: np.ndarray,
    residual: np.ndarray,
    loadings: np.ndarray,
    xy: np.ndarray,
    genes: np.ndarray,
    seed: int,
) -> None:
    """Correct genes that no spot measured by those that were, along the directions that they share.

    Range, noise and one weight are those of least squared error with each fifth of the measured genes hidden.
    """
    seen = np.flatnonzero(np.isfinite(residual).sum(0) >= MIN_SPOTS)
    if len(seen) < 10:
        return
    parts = np.array_split(np.random.default_rng(seed).permutation(seen), 5)
    hidden = [_scores(residual, loadings, (np.arange(len(xy)), part)) for part in parts]
    everywhere = np.arange(len(xy))
    best, weight, setting = 0.0, 0.0, _GRID[0]
    for trial in _GRID:
        product = square = base = 0.0
        for part, scores in zip(parts, hidden, strict=True):
            r = residual[:, part] - np.nanmean(residual[:, part], axis=0)
            f = krige_scores(scores, xy, everywhere, *trial) @ loadings[part].T
            scale = np.nanmean(np.square(r), axis=0) + 1e-12
            product += np.nansum(r * f / scale)
            square += np.nansum(np.where(np.isfinite(r), f * f, np.nan) / scale)
            base += np.nansum(r * r / scale)
        w = float(np.clip(product / square, 0, 1)) if square > 0 else 0.0
        gain = (2 * w * product - w * w * square) / base
        if gain > best:
            best, weight, setting = gain, w, trial
    shared = krige_scores(_scores(residual, loadings, None), xy, everywhere, *setting)
    result.expression[:, genes] += weight * (shared @ loadings[genes].T)
