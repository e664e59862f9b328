"""Closed-form heads on frozen features, fitted from sums over sections.

Standardise by slide → principal components → context of the neighbours → principal components → ridge with shrunk small
components, and a softmax. Each step holds the spots of one section, so memory does not grow with the number of sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.linalg

from ...models._embedding import Basis, Context, rings_of
from .._calibrate import UNSEEN_LOGIT
from .._scratch import spill
from .._sections import Section

#: Slides of fewer µm/px are fine: a prediction without neighbours helps on new patients, see docs/experiments.md.
FINE_BELOW_MPP = 1.5
#: Weight of the first ring beside the spot, which smooths the prediction without neighbours.
_SMOOTHING = 0.35
#: Most features for the exact solver of principal components; above it, a randomised one is used.
_MAX_EXACT_FEATURES = 2500
_TINY = 1e-6
#: Most sets of sections (genes measured in the same ones form a set) and values whose squares are added up at once.
_PATTERNS_AT_ONCE, _VALUES_AT_ONCE = 256, 1_000_000


@dataclass(frozen=True)
class Recipe:
    """Settings of the embedding."""

    weights: np.ndarray  # (f,) factors of standardised features, see feature_weights
    n_components: int = 192  # of a spot's own features
    n_latent: int = 192  # length of the embedding, half of it without neighbours
    context: Context = field(default_factory=lambda: Context(fine_below_mpp=FINE_BELOW_MPP))
    annotation_weights: np.ndarray | None = None  # default: weights
    by_level: bool = True  # whether residuals are also kept by predicted level

    @property
    def annotation(self) -> np.ndarray:
        """Factors of the standardised features for the annotation."""
        return self.weights if self.annotation_weights is None else self.annotation_weights

    @property
    def power(self) -> float:
        """Expected sum of squares of the components of a spot and its rings, the unit of the penalty."""
        return float(np.square(self.weights, dtype=np.float64).sum()) * (1 + sum(self.context.weights))


def feature_weights(stages: Sequence[int], n_windows: int, n_colour: int, colour_share: float) -> np.ndarray:
    """Return factors ``(n_windows · sum(stages) + n_colour,)`` float32 that weight each kind of feature.

    ``stages`` are numbers of features per window. Colour is last, with a sum of squares of ``colour_share``, relative to 1 for
    all other features.
    """
    window = np.concatenate([np.full(n, 1 / (n * n_windows * len(stages))) for n in stages])
    colour = np.full(n_colour, colour_share / max(1, n_colour))
    return np.sqrt(np.concatenate([np.tile(window, n_windows), colour])).astype(np.float32)


@dataclass(frozen=True)
class Choice:
    """Penalty and rank of the gene head."""

    penalty: float
    rank: int | None
    without_rings: Choice | None = None  # of the half without neighbours, if there is one


@dataclass(frozen=True)
class Sums:
    """Sums over the training spots from which a ridge of any penalty can be solved."""

    gram: np.ndarray  # (lists, k, k) squares of the embedding, over the sections that measured the same genes
    cross: np.ndarray  # (k, g) embedding times section-centred targets
    mean: np.ndarray  # (g,) over the spots in which the gene was measured
    measured: np.ndarray  # (lists, g)
    power: float  # unit of the penalty
    without_rings: Sums | None = None  # of the half without neighbours; the other fields are of the half with them

    @property
    def parts(self) -> tuple[Sums, ...]:
        """Sums of the parts of the embedding, each with its own choice."""
        return (self,) if self.without_rings is None else (self.without_rings, self)

    def weights(self, choice: Choice) -> np.ndarray:
        """Solve all parts for the choice: ``(k, g)`` float32, see :meth:`ridge`."""
        choices = (choice,) if choice.without_rings is None else (choice.without_rings, choice)
        return np.concatenate([p.ridge(c.penalty, c.rank) for p, c in zip(self.parts, choices, strict=True)])

    def ridge(self, penalty: float, rank: int | None = None) -> np.ndarray:
        """Solve for one penalty and rank: weights ``(k, g)`` float32, see :meth:`path`."""
        return next(self.path(penalty, (rank,), slice(None)))

    def path(self, penalty: float, ranks: Sequence[int | None], genes: np.ndarray | slice) -> Iterator[np.ndarray]:
        """Solve for one penalty and yield the weights ``(k, len(genes))`` of each rank, float32.

        Fitted values have few components (Izenman, J Multivar Anal 1975). Each is shrunk, the first ``rank`` by less than
        half (Breiman and Friedman, J R Stat Soc B 1997). ``None`` shrinks none.
        """
        k = len(self.cross)
        jitter = penalty * self.power * np.eye(k)
        weight = np.empty(self.cross.shape, np.float64)
        patterns, pattern_index = np.unique(self.measured, axis=1, return_inverse=True)
        step = max(1, min(_PATTERNS_AT_ONCE, _VALUES_AT_ONCE // k**2))
        for start in range(0, patterns.shape[1], step):
            # With many sections, nearly every gene may have its own pattern.
            here = patterns[:, start : start + step].T.astype(np.float64)
            grams = (here @ self.gram.reshape(len(self.gram), -1)).reshape(-1, k, k)
            for i, gram in enumerate(grams, start=start):
                chosen = np.flatnonzero(pattern_index.ravel() == i)
                factor = scipy.linalg.cho_factor(gram + jitter)
                weight[:, chosen] = scipy.linalg.cho_solve(factor, self.cross[:, chosen])
        if any(rank is not None for rank in ranks):
            total = self.gram.sum(0)
            # A constant reference has no squares.
            tiny = max(_TINY * np.trace(total) / k, np.finfo(float).tiny)
            root = np.linalg.cholesky(total + tiny * np.eye(k))
            fitted = root.T @ weight
            squares, directions = np.linalg.eigh(fitted @ fitted.T)
            size, directions = np.maximum(squares[::-1], 0), directions[:, ::-1]
            size /= max(size[0], np.finfo(float).tiny)
        for rank in ranks:
            if rank is None or rank >= k:
                yield weight[:, genes].astype(np.float32)
            else:
                # If there are no more components than the rank, none is shrunk.
                kept = size**2 / (size**2 + max(size[rank], _TINY**2) ** 2)
                shrunk = directions @ (kept[:, None] * (directions.T @ fitted[:, genes]))
                yield scipy.linalg.solve_triangular(root.T, shrunk, lower=False).astype(np.float32)


def fit_basis(sections: Sequence[Section], rows: Sequence[np.ndarray], recipe: Recipe) -> Basis:
    """Fit the principal components of features, and those of spots and rings, on the chosen rows ``(n,)`` of each section."""
    used = [(section, chosen) for section, chosen in zip(sections, rows, strict=True) if chosen.any()]
    means, squares = np.stack([moments(section.features, chosen) for section, chosen in used], axis=1)
    mean = means.mean(0).astype(np.float32)
    scale = np.sqrt(np.maximum(squares - np.square(means), 0).mean(0))
    # A constant feature becomes 0, instead of rounding errors divided by each other.
    scale = np.where(scale > _TINY * (np.abs(mean) + 1), scale, 0).astype(np.float32)
    weights = recipe.weights
    f = len(weights)
    gram = np.zeros((f, f), np.float64)
    for section, chosen in used:
        for view in range(section.features.shape[1]):
            features = np.asarray(section.features[:, view], np.float32)
            z = recipe.context.standardise(features, mean, scale)[chosen] * weights
            gram += z.T @ z
    directions = principal_directions(gram, min(recipe.n_components, f))
    basis = Basis(mean, scale, (weights[:, None] * directions).astype(np.float32), np.empty((0, 0)), recipe.context)
    width = directions.shape[1]
    factors = np.sqrt(np.repeat((1.0, *recipe.context.weights), width)).astype(np.float32)
    size = len(factors)
    gram = np.zeros((size, size), np.float64)
    for section, chosen in used:
        for view in range(section.features.shape[1]):
            parts = components(section, basis, view)[chosen] * factors
            gram += parts.T @ parts
    n_latent = min(recipe.n_latent, size, max(1, sum(int(chosen.sum()) for _, chosen in used) - 1))
    if recipe.context.fine_below_mpp is not None:
        half = min(recipe.n_latent // 2, width, n_latent)
        without_rings = np.zeros((size, half))
        without_rings[:width] = principal_directions(gram[:width, :width], half) / (1 + _SMOOTHING)
        without_rings[width : 2 * width] = _SMOOTHING * without_rings[:width]
        mixing = np.hstack([without_rings, factors[:, None] * principal_directions(gram, half)])
    else:
        mixing = factors[:, None] * principal_directions(gram, n_latent)
    return Basis(mean, scale, basis.projection, mixing.astype(np.float32), recipe.context)


def fit_sums(sections: Sequence[Section], rows: Sequence[np.ndarray], basis: Basis, power: float) -> Sums:
    """Collect the sums of the ridge, with targets centred by section.

    Sections differ in depth and handling that the image does not show; otherwise slopes would transfer them to new slides.
    Both halves of an embedding learn from all sections, the first without neighbours: these only smooth its predictions.
    """
    context = basis.context
    if context.fine_below_mpp is None:
        return _fit_sums(sections, rows, basis, power)
    width, half = basis.projection.shape[1], basis.mixing.shape[1] // 2
    all_rings = replace(context, fine_below_mpp=None)
    no_rings = replace(all_rings, rings_um=(), weights=())
    without_rings = replace(basis, mixing=(1 + _SMOOTHING) * basis.mixing[:width, :half], context=no_rings)
    with_rings = replace(basis, mixing=basis.mixing[:, half:], context=all_rings)
    return replace(
        _fit_sums(sections, rows, with_rings, power),
        without_rings=_fit_sums(sections, rows, without_rings, power / (1 + sum(context.weights))),
    )


def _fit_sums(sections: Sequence[Section], rows: Sequence[np.ndarray], basis: Basis, power: float) -> Sums:
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
        cross += (section.targets.T @ mean_embedding).T - np.outer(mean_embedding.sum(0), sums / chosen.sum())
        total += sums
        n += chosen.sum() * section.measured
        listed = section.measured.tobytes()
        grams[listed] = grams.get(listed, 0) + gram
    measured = np.stack([np.frombuffer(listed, bool) for listed in grams])
    return Sums(np.stack([*grams.values()]), cross, total / np.maximum(n, 1), measured, power)


def fit_softmax(
    embedding: np.ndarray, codes: np.ndarray, n_classes: int, strength: float, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression (scikit-learn, lbfgs); return weights ``(k, c)`` and biases ``(c,)``.

    ``strength`` is the inverse L2 penalty on the standardised embedding. Absent classes get a bias that no spot can overcome.
    """
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(np.average(np.square(embedding, dtype=np.float64).mean(1), weights=weight))
    present = np.unique(codes)
    slope, bias = np.zeros((embedding.shape[1], n_classes)), np.full(n_classes, UNSEEN_LOGIT)
    if len(present) == 1:
        bias[present] = 0.0
        return slope, bias
    fitted = LogisticRegression(C=strength, max_iter=2000, tol=1e-5).fit(embedding / scale, codes, weight)
    coefficients, intercepts = fitted.coef_, fitted.intercept_
    if len(present) == 2:
        # For two classes scikit-learn has one column; ± half of it gives the same softmax.
        coefficients, intercepts = (np.concatenate([-x, x]) / 2 for x in (coefficients, intercepts))
    slope[:, present], bias[present] = coefficients.T / scale, intercepts
    return slope, bias


def components(section: Section, basis: Basis, view: int = 0) -> np.ndarray:
    """Return components of the spots of a section and of their rings under one symmetry, ``(n, c · (1 + rings))``."""
    return components_of(section, basis, section.features[:, view])


def components_of(section: Section, basis: Basis, features: np.ndarray) -> np.ndarray:
    """Return components of given features ``(n, f)`` of the spots of a section, and of their rings, which are kept."""
    rings_um = basis.context.rings_um
    if rings_um not in section.rings:
        section.rings[rings_um] = rings_of(section.centres_um, rings_um)
    return basis.components(np.asarray(features, np.float32), section.rings[rings_um])


def embed(section: Section, basis: Basis, view: int = 0) -> np.ndarray:
    """Return the unweighted embedding of the spots of a section under one symmetry, ``(n, k)`` float32."""
    return components(section, basis, view) @ basis.mixing


def find_rings(sections: Sequence[Section], contexts: Sequence[Context]) -> None:
    """Compute the rings of several sections and keep them in one file, since they need more memory than any other data."""
    pairs = [(section, context.rings_um) for section in sections for context in contexts]
    found = spill(rings_of(section.centres_um, rings_um) for section, rings_um in pairs)
    for (section, rings_um), rings in zip(pairs, found, strict=True):
        section.rings[rings_um] = rings


def moments(features: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return mean and mean square of the features over the chosen spots and symmetries, ``(2, f)`` float64."""
    found = np.zeros((2, features.shape[2]))
    for view in range(features.shape[1]):
        x = np.asarray(features[chosen, view], np.float64)
        found += np.stack([x.mean(0), np.square(x).mean(0)]) / features.shape[1]
    return found


def principal_directions(gram: np.ndarray, k: int) -> np.ndarray:
    """Return the first ``k`` principal directions of a sum of squares, ``(f, k)``, largest first, with reproducible signs."""
    f = len(gram)
    if f <= _MAX_EXACT_FEATURES or k > f // 2:
        directions = scipy.linalg.eigh(gram, subset_by_index=(f - k, f - 1))[1][:, ::-1]
    else:
        from sklearn.utils.extmath import randomized_svd

        directions = randomized_svd(gram, k, n_oversamples=64, n_iter=6, random_state=0)[0]
    return directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(k)])
