"""Labels of each section that owe nothing to its image: assigned from what was measured, learned on the other sections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from .pool import Pool

#: Genes of highest mean that the classifier reads, and the components it makes of them.
_GENES, _COMPONENTS = 1000, 30


def cross_fitted_labels(
    pool: Pool, features: pd.Index, measured: str | None, scale: Literal["counts", "log"]
) -> np.ndarray:
    """Label every spot by a classifier of measured expression that was fitted to the other samples' spots and labels.

    Multinomial logistic regression on principal components of measured expression, centred within the section. Held out
    are samples; with one sample, sections.

    Parameters
    ----------
    pool
        Measured spots with the labels to learn from.
    features
        Genes to read: none of those that are tested with these labels.
    measured, scale
        Layer of what was measured (``None``: ``X``) and its scale.

    Returns
    -------
    numpy.ndarray
        ``(n,)`` labels.

    Raises
    ------
    ValueError
        If there is one section, or too few genes to read.
    """
    units = pool.samples if len(set(pool.samples)) > 1 else pool.sections
    names = sorted(set(units))
    if len(names) < 2:
        raise ValueError("`cross_fit` needs several sections: labels of each are learned on the others; there is one")
    if len(features) < 2:
        raise ValueError(
            f"`cross_fit`: {len(features)} measured genes are not tested themselves; at least 2 are needed"
        )
    values = replace(pool, layer=measured, scale=scale).values(np.ones(len(units), bool), features)
    top = np.sort(np.argsort(-np.nan_to_num(values).mean(0), kind="stable")[:_GENES])
    values = np.nan_to_num(values[:, top])
    for section in set(pool.sections):
        values[pool.sections == section] -= values[pool.sections == section].mean(0)
    labels = np.empty(len(units), object)
    for name in names:
        held = units == name
        if len(set(pool.labels[~held])) < 2:
            raise ValueError(f"`cross_fit`: the sections other than {name!r} hold one label; at least 2 are needed")
        labels[held] = _classifier(values[~held], pool.labels[~held]).predict(values[held])
    return labels


def _classifier(values: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(_COMPONENTS, *values.shape)
    model = make_pipeline(PCA(n, random_state=0), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(values, labels.astype(str))
