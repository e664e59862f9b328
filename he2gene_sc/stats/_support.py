"""How far measured spots stand for the others: in place, in features and by class; and how far a correction is believed."""

from __future__ import annotations

import numpy as np

#: Measured spots that a class needs, so that its spots are corrected.
_MIN_OF_CLASS = 3
#: Features that measured spots are compared with the others in: the first.
_COMPONENTS = 10
#: Folds of this comparison, and fewest measured spots in one.
_FOLDS, _MIN_OF_FOLD = 5, 4
#: Standard deviations below the mean of measured spots from which, and to which, support falls from 1 to 0.
_NEAR, _FAR = 2.0, 3.0
#: Mean support of the other spots from which, and to which, the correction of the level rises from 0 to 1.
_LEVEL_FROM, _LEVEL_TO = 0.5, 0.8
#: Blocks of measured spots that a correction is tried on.
_MIN_BLOCKS, _MAX_BLOCKS, _OF_BLOCK = 3, 10, 4


def blocks_of(xy: np.ndarray, n_blocks: int, seed: int) -> np.ndarray:
    """Codes of compact blocks of spots."""
    from sklearn.cluster import KMeans

    return KMeans(min(n_blocks, len(xy)), n_init=1, random_state=seed).fit_predict(xy)


def evidence_blocks(xy: np.ndarray, seed: int) -> np.ndarray:
    """Blocks of measured spots that count as independent: 3 to 10."""
    return blocks_of(xy, int(np.clip(len(xy) // _OF_BLOCK, _MIN_BLOCKS, _MAX_BLOCKS)), seed)


def support(
    xy: np.ndarray,
    known: np.ndarray,
    folds: np.ndarray,
    features: list[np.ndarray],
    classes: np.ndarray | None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """How far each spot is like the measured ones, ``(n,)`` from 0 to 1: the least of place, features and class.

    Place: 1 up to the largest distance the folds tried, 0 from twice that. Class: 0 with under three measured spots.
    """
    from scipy.spatial import cKDTree

    found = np.ones(len(xy))
    if known.all():
        return found
    at = xy[known]
    tried = max(cKDTree(at[folds != f]).query(at[folds == f])[0].max() for f in np.unique(folds))
    distance = cKDTree(at).query(xy)[0]
    found = np.clip(2 - distance / max(tried, 1e-12), 0, 1)
    for values in features:
        found = np.minimum(found, feature_support(values, xy, known, seed=seed))
    if classes is not None:
        measured = np.bincount(classes[known & (classes >= 0)], minlength=max(classes.max(), 0) + 1)
        found[(classes >= 0) & (measured[classes] < _MIN_OF_CLASS)] = 0
    found[known] = 1
    return found


def level_share(near: np.ndarray, known: np.ndarray) -> float:
    """Share of the level correction for unmeasured spots, by mean support: 0 up to a half, 1 from .8 on."""
    others = near[~known]
    return float(np.clip((others.mean() - _LEVEL_FROM) / (_LEVEL_TO - _LEVEL_FROM), 0, 1)) if len(others) else 1.0


def feature_support(features: np.ndarray, xy: np.ndarray, known: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """How far features lie among those of measured spots, ``(n,)``.

    By a linear discriminant in folds of tissue blocks; 1 down to two SD below the measured mean, 0 from three.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    n_folds = min(_FOLDS, int(known.sum()) // _MIN_OF_FOLD, int((~known).sum()) // _MIN_OF_FOLD)
    varied = np.asarray(features[:, :_COMPONENTS], float)
    varied = varied[:, np.ptp(varied, axis=0) > 0]
    if n_folds < 2 or not varied.shape[1]:
        return np.ones(len(xy))
    fold = np.empty(len(xy), int)
    for part in (known, ~known):
        fold[part] = blocks_of(xy[part], n_folds, seed)
    z = np.zeros(len(xy))
    for f in range(n_folds):
        rest, held = fold != f, fold == f
        if min(known[rest].sum(), (~known)[rest].sum()) < 2 or not held.any():
            continue
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        score = model.fit(varied[rest], known[rest]).decision_function(varied)
        inside = score[known & rest]
        z[held] = (score[held] - inside.mean()) / max(inside.std(), 1e-12)
    # Measured spots that were held out lie further out than those that the discriminant was fitted to.
    z = (z - z[known].mean()) / max(z[known].std(), 1.0)
    return np.clip((z + _FAR) / (_FAR - _NEAR), 0, 1)


def believed(
    before: np.ndarray, after: np.ndarray, blocks: np.ndarray, classes: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """Share (0 to 1) of a correction that held-out spots confirm, and the most that each class ``(c,)`` allows.

    Least-squares multiple, shrunk by ``1 - c / t²`` (not below 0): t over its error between k blocks of tissue,
    c = (k + 1) / (k - 1). A class allows its own multiple plus a standard error.
    """
    scale = np.square(before).mean(0)
    correction = before - after
    weight = 1 / np.where(scale > 0, scale, 1)
    product, square = ((x * correction * weight).sum(1, dtype=float) for x in (before, correction))
    ratio, error, k = _ratio(product, square, blocks)
    share = ratio * max(0.0, 1 - (k + 1) / max(k - 1, 1e-12) * (error / ratio) ** 2) if ratio > 0 else 0.0
    of_class = np.ones(0 if classes is None else classes.max(initial=-1) + 1)
    for code in range(len(of_class)):
        own = np.flatnonzero(classes == code)
        if len(own) >= _MIN_OF_CLASS:
            ratio, error, _ = _ratio(product[own], square[own], np.arange(len(own)))
            of_class[code] = np.clip(ratio + error, 0, 1)
    return min(share, 1.0), of_class


def _ratio(product: np.ndarray, square: np.ndarray, blocks: np.ndarray) -> tuple[float, float, int]:
    """Ratio of two sums, its standard error between blocks, and their number."""
    codes = np.unique(blocks, return_inverse=True)[1]
    a, b = (np.bincount(codes, weights=x) for x in (product, square))
    k = len(a)
    if b.sum() <= 0 or k < 2:
        return 0.0, np.inf, k
    ratio = a.sum() / b.sum()
    return float(ratio), float(np.sqrt(k / (k - 1) * np.square(a - ratio * b).sum()) / b.sum()), k
