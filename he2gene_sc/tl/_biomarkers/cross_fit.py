"""Labels that do not depend on the image: predicted from measured expression by a classifier fitted on the other sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..._core.logs import logger, warn
from ..._core.spots import SpotData
from .contrast import MIN_SPOTS

#: Number of genes of highest mean in the classifier, and of their principal components.
CLASSIFIER_GENES, _COMPONENTS = 1000, 30
#: Agreement with the given labels below which there is an error, and below which there is a warning.
_MIN_AGREEMENT, _GOOD_AGREEMENT = 0.85, 0.95


def cross_fitted_halves(
    spots: SpotData,
    known: SpotData,
    outside: Sequence[np.ndarray],
    depth: np.ndarray | None,
    *,
    groups: Sequence[str] | None,
    reference: str,
) -> tuple[list[SpotData], float]:
    """Two halves of the genes, each with labels from measured genes outside it, and the lower agreement of their labels.

    ``known`` are the same spots with their labels, ``outside`` has their measured values ``(n, g)`` outside each half, and
    ``depth`` their log depth.
    """
    halves, agreements, worst = [], [], []
    for i, values in enumerate(outside):
        labels = cross_fitted_labels(known, values, depth)
        halves.append(replace(spots, genes=spots.genes[i::2], labels=labels))
        agreements.append(_agreement(labels, spots.labels, groups, reference))
        worst.append(_worst_group(labels, spots, groups, reference))
    agreement = _check_agreement(min(agreements))
    share, group = min(worst)
    if share < _MIN_AGREEMENT and agreement >= _GOOD_AGREEMENT:
        warn(
            f"`cross_fit`: of the spots that are {group!r} by the given or the new label, only {share:.0%} have both. P-values of this "
            "group may be too small: other factors that counts and image share, such as cell density, can appear as a difference"
        )
    return halves, agreement


def _agreement(new: np.ndarray, given: np.ndarray, groups: Sequence[str] | None, reference: str) -> float:
    """Share of the spots of the tested groups whose new labels equal the given ones."""
    tested = np.ones(len(new), bool)
    if groups is not None and reference != "rest":
        tested = np.isin(given, [*groups, reference]) | np.isin(new, [*groups, reference])
    return float((new.astype(str) == given.astype(str))[tested].mean()) if tested.any() else 0.0


def _worst_group(new: np.ndarray, spots: SpotData, groups: Sequence[str] | None, reference: str) -> tuple[float, str]:
    """Smallest overlap (Jaccard index) of new and given labels over the groups: a rare group hardly affects the total agreement."""
    given = spots.labels
    sizes = pd.DataFrame({"label": given, "sample": spots.samples}).value_counts()
    enough = sizes[sizes >= MIN_SPOTS].groupby("label").size()
    tested = set(enough.index[enough > 1]) & (set(given) if groups is None else {*groups, reference})
    masks = {group: (new == group, given == group) for group in tested}
    shares = ((float((a & b).sum() / (a | b).sum()), str(group)) for group, (a, b) in masks.items())
    return min(shares, default=(1.0, ""))


def _check_agreement(agreement: float) -> float:
    message = f"`cross_fit`: its labels agree with those of `groupby` in {agreement:.0%} of the spots"
    if agreement < _MIN_AGREEMENT:
        raise ValueError(
            f"{message}; at least {_MIN_AGREEMENT:.0%} are needed. Measured expression does not separate these groups well, so other "
            "factors that counts and image share, such as cell density, would appear as a difference. Use a pathologist's labels "
            "with cross_fit=False"
        )
    if agreement < _GOOD_AGREEMENT:
        warn(
            f"{message}. Below {_GOOD_AGREEMENT:.0%}, p-values may be too small: other factors that counts and image share, such as "
            "cell density, can appear as a difference"
        )
    logger.info("biomarkers: cross-fitted labels agree with those given in %.1f %% of the spots", 100 * agreement)
    return agreement


def cross_fitted_labels(pool: SpotData, values: np.ndarray, depth: np.ndarray | None = None) -> np.ndarray:
    """Label every spot by a classifier of its measured values ``(n, g)`` that was fitted on the other samples, or sections, ``(n,)``.

    Multinomial regression on principal components, centred and adjusted for depth within sections.
    """
    units = pool.samples if len(set(pool.samples)) > 1 else pool.units
    names = sorted(set(units))
    if len(names) < 2:
        raise ValueError(
            "`cross_fit` needs several sections, found one: the labels of each section are learned on the others"
        )
    if values.shape[1] < 2:
        raise ValueError(f"`cross_fit` needs at least 2 measured genes that are not tested, found {values.shape[1]}")
    values = values.copy()
    for section in set(pool.units):
        inside = pool.units == section
        values[inside] = _depth_residuals(values[inside], None if depth is None else depth[inside])
    labels = np.empty(len(units), object)
    for name in names:
        held = units == name
        if len(set(pool.labels[~held])) < 2:
            raise ValueError(f"`cross_fit`: the sections other than {name!r} have one label; at least 2 are needed")
        labels[held] = _classifier(values[~held], pool.labels[~held]).predict(values[held])
    return labels


def _depth_residuals(values: np.ndarray, depth: np.ndarray | None) -> np.ndarray:
    """Residuals of the values after their mean and their slope on depth."""
    values = values - values.mean(0)
    if depth is None or np.ptp(depth) < 1e-9:
        return values
    x = (depth - depth.mean()).astype(values.dtype)
    return values - np.outer(x, x @ values / (x @ x))


def _classifier(values: np.ndarray, labels: np.ndarray) -> Any:
    n = min(_COMPONENTS, *values.shape)
    model = make_pipeline(PCA(n, random_state=0), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(values, labels.astype(str))
