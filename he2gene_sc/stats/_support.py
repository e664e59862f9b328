"""Support of unmeasured spots by measured ones (position, features and class), and the confirmed share of a correction."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

#: Fewest measured spots of a class for a correction of its spots.
_MIN_OF_CLASS = 3
#: Number of leading features to compare measured with other spots.
_COMPONENTS = 10
#: Folds of this comparison, and fewest measured spots per fold.
_FOLDS, _MIN_OF_FOLD = 5, 4
#: Support falls from 1 to 0 between these numbers of SD below the mean of measured spots.
_NEAR, _FAR = 2.0, 3.0
#: The correction of the level rises from 0 to 1 between these values of the mean support of other spots.
_LEVEL_FROM, _LEVEL_TO = 0.5, 0.8
#: Fewest and most blocks of measured spots to test a correction, and spots per block.
_MIN_BLOCKS, _MAX_BLOCKS, _BLOCK_SPOTS = 3, 10, 4


def evidence_blocks(xy: np.ndarray, seed: int) -> np.ndarray:
    """Codes of 3 to 10 compact blocks of measured spots, which are treated as independent."""
    n = np.clip(len(xy) // _BLOCK_SPOTS, _MIN_BLOCKS, _MAX_BLOCKS)
    return KMeans(min(int(n), len(xy)), n_init=1, random_state=seed).fit_predict(xy)


def support(
    xy: np.ndarray,
    known: np.ndarray,
    folds: np.ndarray,
    features: list[np.ndarray],
    classes: np.ndarray,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Similarity ``(n,)`` of each spot to measured spots, from 0 to 1: the minimum over position, features and class.

    Position: 1 up to the largest distance in the folds, 0 from twice this distance. Class: 0 with fewer than three measured spots.
    """
    if known.all():
        return np.ones(len(xy))
    at = xy[known]
    longest = max(cKDTree(at[folds != f]).query(at[folds == f])[0].max() for f in np.unique(folds))
    distance = cKDTree(at).query(xy)[0]
    result = np.clip(2 - distance / max(longest, 1e-12), 0, 1)
    for values in features:
        result = np.minimum(result, feature_support(values, xy, known, seed=seed))
    measured = np.bincount(classes[known & (classes >= 0)], minlength=max(classes.max(), 0) + 1)
    result[(classes >= 0) & (measured[classes] < _MIN_OF_CLASS)] = 0
    result[known] = 1
    return result


def level_share(near: np.ndarray, known: np.ndarray) -> float:
    """Share of the level correction for unmeasured spots, by their mean support: 0 up to .5, 1 from .8 on."""
    others = near[~known]
    return float(np.clip((others.mean() - _LEVEL_FROM) / (_LEVEL_TO - _LEVEL_FROM), 0, 1)) if len(others) else 1.0


def feature_support(features: np.ndarray, xy: np.ndarray, known: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Similarity ``(n,)`` of the features of each spot to those of measured spots.

    By a linear discriminant in folds of tissue blocks: 1 down to two SD below the mean of measured spots, 0 from three SD.
    """
    n_folds = min(_FOLDS, int(known.sum()) // _MIN_OF_FOLD, int((~known).sum()) // _MIN_OF_FOLD)
    varied = np.asarray(features[:, :_COMPONENTS], float)
    varied = varied[:, np.ptp(varied, axis=0) > 0]
    if n_folds < 2 or not varied.shape[1]:
        return np.ones(len(xy))
    fold = np.empty(len(xy), int)
    for part in (known, ~known):
        fold[part] = KMeans(n_folds, n_init=1, random_state=seed).fit_predict(xy[part])
    z = np.zeros(len(xy))
    for f in range(n_folds):
        rest, held = fold != f, fold == f
        if min(known[rest].sum(), (~known)[rest].sum()) < 2 or not held.any():
            continue
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        score = model.fit(varied[rest], known[rest]).decision_function(varied)
        inside = score[known & rest]
        z[held] = (score[held] - inside.mean()) / max(inside.std(), 1e-12)
    # Held-out measured spots have lower scores than those in the fit, so standardise by them.
    z = (z - z[known].mean()) / max(z[known].std(), 1.0)
    return np.clip((z + _FAR) / (_FAR - _NEAR), 0, 1)


def confirmed_share(
    before: np.ndarray, after: np.ndarray, blocks: np.ndarray, classes: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """Share (0 to 1) of a correction that held-out spots confirm, and the largest share for each class ``(c,)``.

    The least-squares factor, shrunk by ``1 - c / t²`` (at least 0), where t is the factor over its error between k blocks of
    tissue and c = (k + 1) / (k - 1). The limit of a class is its own factor plus a standard error.
    """
    scale = np.square(before).mean(0)
    correction = before - after
    weight = 1 / np.where(scale > 0, scale, 1)
    product, square = ((x * correction * weight).sum(1, dtype=float) for x in (before, correction))
    ratio, error, k = _ratio(product, square, blocks)
    share = ratio * max(0.0, 1 - (k + 1) / max(k - 1, 1e-12) * (error / ratio) ** 2) if ratio > 0 else 0.0
    by_class = np.ones(0 if classes is None else classes.max(initial=-1) + 1)
    for code in range(len(by_class)):
        own = np.flatnonzero(classes == code)
        if len(own) >= _MIN_OF_CLASS:
            ratio, error, _ = _ratio(product[own], square[own], np.arange(len(own)))
            by_class[code] = np.clip(ratio + error, 0, 1)
    return min(share, 1.0), by_class


def _ratio(product: np.ndarray, square: np.ndarray, blocks: np.ndarray) -> tuple[float, float, int]:
    """Ratio of two sums, its standard error between blocks, and the number of blocks."""
    codes = np.unique(blocks, return_inverse=True)[1]
    a, b = (np.bincount(codes, weights=x) for x in (product, square))
    k = len(a)
    if b.sum() <= 0 or k < 2:
        return 0.0, np.inf, k
    ratio = a.sum() / b.sum()
    return float(ratio), float(np.sqrt(k / (k - 1) * np.square(a - ratio * b).sum()) / b.sum()), k
