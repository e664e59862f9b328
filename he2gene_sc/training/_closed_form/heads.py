"""Closed-form heads on frozen features, fitted section by section from sums alone.

Standardise within the slide → principal components → context of the neighbours → principal components → ridge whose
small components are shrunk, and a softmax. No step holds more than one section's spots, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.linalg

from ...models._embedding import Basis, Context, rings_of
from .._calibrate import UNSEEN
from .._scratch import spilled
from .._sections import Section

#: Above this many features their components come from a randomised solver.
_EXACT_UP_TO = 2500
_TINY = 1e-6
#: Sets of sections that some genes were measured in, whose squares are added up at once: the more sections, the more sets.
_PATTERNS_AT_ONCE, _VALUES_AT_ONCE = 256, 1_000_000


@dataclass(frozen=True)
class Recipe:
    """How features become an embedding."""

    weights: np.ndarray  # (f,) factors of standardised features, see feature_weights
    n_components: int = 192  # of a spot's own features
    n_latent: int = 128  # length of the embedding
    context: Context = field(default_factory=Context)
    annotation_weights: np.ndarray | None = None  # default: weights
    by_level: bool = True  # whether residuals are kept by predicted level

    @property
    def annotation(self) -> np.ndarray:
        """Factor of each standardised feature, for the annotation."""
        return self.weights if self.annotation_weights is None else self.annotation_weights

    @property
    def power(self) -> float:
        """Expected sum of squares of what a spot and its rings are described by, the unit of the penalty."""
        return float(np.square(self.weights, dtype=np.float64).sum()) * (1 + sum(self.context.weights))


def feature_weights(stages: Sequence[int], n_windows: int, n_colour: int, colour_share: float) -> np.ndarray:
    """Factors ``(n_windows · sum(stages) + n_colour,)`` float32 that give every kind of feature its part.

    ``stages`` are numbers of features a window. Colour comes last, with a sum of squares of ``colour_share`` beside
    1.
    """
    window = np.concatenate([np.full(n, 1 / (n * n_windows * len(stages))) for n in stages])
    colour = np.full(n_colour, colour_share / max(1, n_colour))
    return np.sqrt(np.concatenate([np.tile(window, n_windows), colour])).astype(np.float32)


@dataclass(frozen=True)
class Sums:
    """What a ridge needs of the training spots, whatever its penalty."""

    gram: np.ndarray  # (lists, k, k) squares of the embedding, over the sections that measured the same genes
    cross: np.ndarray  # (k, g) embedding times section-centred targets
    mean: np.ndarray  # (g,) over spots where it was measured
    measured: np.ndarray  # (lists, g)
    power: float  # unit of the penalty

    @cached_property
    def root(self) -> np.ndarray:
        """Lower Cholesky factor of the squares of all sections, ``(k, k)``."""
        total = self.gram.sum(0)
        # A reference that is the same in all spots has no squares.
        jitter = max(_TINY * np.trace(total) / len(total), np.finfo(float).tiny)
        return np.linalg.cholesky(total + jitter * np.eye(len(total)))

    def ridge(self, penalty: float, rank: int | None = None) -> np.ndarray:
        """Solve for one penalty and rank: weights ``(k, g)`` float32, see :meth:`path`."""
        return next(self.path(penalty, (rank,), slice(None)))

    def path(self, penalty: float, ranks: Sequence[int | None], genes: np.ndarray | slice) -> Iterator[np.ndarray]:
        """Solve for one penalty and yield the weights ``(k, len(genes))`` of each rank, float32.

        Fitted values lie in few components (Izenman, J Multivar Anal 1975); each is shrunk, the first ``rank``
        by less than half (Breiman and Friedman, J R Stat Soc B 1997). ``None`` leaves all as they are.
        """
        k = len(self.cross)
        jitter = penalty * self.power * np.eye(k)
        weight = np.empty(self.cross.shape, np.float64)
        patterns, which = np.unique(self.measured, axis=1, return_inverse=True)
        step = max(1, min(_PATTERNS_AT_ONCE, _VALUES_AT_ONCE // k**2))
        for start in range(0, patterns.shape[1], step):
            # Of many sections, nearly every gene may have been measured by others.
            here = patterns[:, start : start + step].T.astype(np.float64)
            grams = (here @ self.gram.reshape(len(self.gram), -1)).reshape(-1, k, k)
            for i, gram in enumerate(grams, start=start):
                chosen = np.flatnonzero(which.ravel() == i)
                factor = scipy.linalg.cho_factor(gram + jitter)
                weight[:, chosen] = scipy.linalg.cho_solve(factor, self.cross[:, chosen])
        if any(rank is not None for rank in ranks):
            root = self.root
            fitted = root.T @ weight
            squares, directions = np.linalg.eigh(fitted @ fitted.T)
            size, directions = np.maximum(squares[::-1], 0), directions[:, ::-1]
            size /= max(size[0], np.finfo(float).tiny)
        for rank in ranks:
            if rank is None or rank >= k:
                yield weight[:, genes].astype(np.float32)
            else:
                # Where there are no more components than the rank, all stay.
                kept = size**2 / (size**2 + max(size[rank], _TINY**2) ** 2)
                shrunk = directions @ (kept[:, None] * (directions.T @ fitted[:, genes]))
                yield scipy.linalg.solve_triangular(root.T, shrunk, lower=False).astype(np.float32)


def fit_basis(sections: Sequence[Section], rows: Sequence[np.ndarray], recipe: Recipe) -> Basis:
    """Fit the two sets of principal components on the chosen rows ``(n,)`` of each section."""
    used = [(section, chosen) for section, chosen in zip(sections, rows, strict=True) if chosen.any()]
    means, variances = zip(*(_moments(section.features, chosen) for section, chosen in used), strict=True)
    mean = np.mean(means, axis=0).astype(np.float32)
    scale = np.sqrt(np.mean(variances, axis=0))
    # A feature that never varies is left at 0 instead of dividing rounding dust by itself.
    scale = np.where(scale > _TINY * (np.abs(mean) + 1), scale, 0).astype(np.float32)
    weights = recipe.weights
    f = len(weights)
    gram = np.zeros((f, f), np.float64)
    for section, chosen in used:
        for view in range(section.features.shape[1]):
            features = np.asarray(section.features[:, view], np.float32)
            z = recipe.context.standardise(features, mean, scale)[chosen] * weights
            gram += z.T @ z
    own = principal(gram, min(recipe.n_components, f))
    basis = Basis(mean, scale, (weights[:, None] * own).astype(np.float32), np.empty((0, 0)), recipe.context)
    size = own.shape[1] * (1 + len(recipe.context.rings_um))
    factors = np.sqrt(np.repeat((1.0, *recipe.context.weights), own.shape[1])).astype(np.float32)
    gram = np.zeros((size, size), np.float64)
    n_spots = 0
    for section, chosen in used:
        for view in range(section.features.shape[1]):
            parts = components(section, basis, view)[chosen] * factors
            gram += parts.T @ parts
        n_spots += int(chosen.sum())
    mixing = factors[:, None] * principal(gram, min(recipe.n_latent, size, max(1, n_spots - 1)))
    return Basis(mean, scale, basis.projection, mixing.astype(np.float32), recipe.context)


def fit_sums(sections: Sequence[Section], rows: Sequence[np.ndarray], basis: Basis, power: float) -> Sums:
    """Collect the sums of the ridge, targets centred within their section.

    Sections differ by depth and handling that the image does not show; that slope would be carried to new slides.
    """
    k, g = basis.mixing.shape[1], sections[0].targets.shape[1]
    cross, total, n = np.zeros((k, g)), np.zeros(g), np.zeros(g)
    grams: dict[bytes, np.ndarray] = {}
    for section, chosen in zip(sections, rows, strict=True):
        if not chosen.any():
            continue
        views = section.features.shape[1]
        gram, mean_embedding = np.zeros((k, k)), np.zeros((len(section), k))
        for view in range(views):
            embedding = embed(section, basis, view)[chosen].astype(np.float64)
            gram += embedding.T @ embedding / views
            mean_embedding[chosen] += embedding / views
        sums, _ = section.sums(chosen)
        cross += (section.transposed @ mean_embedding).T - np.outer(mean_embedding.sum(0), sums / chosen.sum())
        total += sums
        n += chosen.sum() * section.measured
        listed = section.measured.tobytes()
        grams[listed] = grams[listed] + gram if listed in grams else gram
    measured = np.stack([np.frombuffer(listed, bool) for listed in grams])
    return Sums(np.stack([*grams.values()]), cross, total / np.maximum(n, 1), measured, power)


def fit_softmax(
    embedding: np.ndarray, codes: np.ndarray, n_classes: int, strength: float, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression (scikit-learn, lbfgs): weights ``(k, c)`` and biases ``(c,)``.

    ``strength`` is the inverse L2 penalty on the standardised embedding. Absent classes get a bias no spot overcomes.
    """
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(np.average(np.square(embedding, dtype=np.float64).mean(1), weights=weight))
    present = np.unique(codes)
    slope, bias = np.zeros((embedding.shape[1], n_classes)), np.full(n_classes, UNSEEN)
    if len(present) == 1:
        bias[present] = 0.0
        return slope, bias
    fitted = LogisticRegression(C=strength, max_iter=2000, tol=1e-5).fit(embedding / scale, codes, weight)
    if len(present) == 2:
        # scikit-learn keeps one column for two classes; half of it each way is the same softmax.
        coefficients = np.concatenate([-fitted.coef_, fitted.coef_]) / 2
        intercepts = np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2
    else:
        coefficients, intercepts = fitted.coef_, fitted.intercept_
    slope[:, present] = coefficients.T / scale
    bias[present] = intercepts
    return slope, bias


def components(section: Section, basis: Basis, view: int = 0) -> np.ndarray:
    """Components of the spots of a section and of their rings under one symmetry, ``(n, c · (1 + rings))``."""
    return basis.components(np.asarray(section.features[:, view], np.float32), _rings(section, basis.context))


def embed(section: Section, basis: Basis, view: int = 0) -> np.ndarray:
    """Embedding of the spots of a section under one symmetry, ``(n, k)`` float32."""
    return components(section, basis, view) @ basis.mixing


def find_rings(sections: Sequence[Section], contexts: Sequence[Context]) -> None:
    """Find the rings of several sections ahead, on one file: neighbours take more memory than anything else of a spot."""
    wanted = [(section, context.rings_um) for section in sections for context in contexts]
    found = spilled(rings_of(section.centres_um, rings_um) for section, rings_um in wanted)
    for (section, rings_um), rings in zip(wanted, found, strict=True):
        section.rings[rings_um] = rings


def _rings(section: Section, context: Context) -> tuple:
    """Ring matrices of a section, found once."""
    if context.rings_um not in section.rings:
        section.rings[context.rings_um] = rings_of(section.centres_um, context.rings_um)
    return section.rings[context.rings_um]


def _moments(features: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the features over spots and symmetries, ``(f,)`` float64."""
    total, squares = np.zeros((2, features.shape[2]))
    views = features.shape[1]
    for view in range(views):
        x = np.asarray(features[chosen, view], np.float64)
        total, squares = total + x.mean(0) / views, squares + np.square(x).mean(0) / views
    return total, np.maximum(squares - np.square(total), 0)


def principal(gram: np.ndarray, k: int) -> np.ndarray:
    """First ``k`` principal directions of a sum of squares, ``(f, k)``, largest first, signs made reproducible."""
    f = len(gram)
    if f <= _EXACT_UP_TO or k > f // 2:
        directions = scipy.linalg.eigh(gram, subset_by_index=(f - k, f - 1))[1][:, ::-1]
    else:
        from sklearn.utils.extmath import randomized_svd

        directions = randomized_svd(gram, k, n_oversamples=64, n_iter=6, random_state=0)[0]
    return directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(k)])
