"""Labels of each section that owe nothing to its image: assigned from what was measured, learned on the other sections."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..._core.expression import Scale
from ..._core.genes import find_genes
from ..._core.logs import logger
from ..._core.spots import SpotData
from .contrast import MIN_SPOTS
from .provenance import measured_part
from .sums import depth_of

#: Genes of highest mean that the classifier reads, and the components it makes of them.
_GENES, _COMPONENTS = 1000, 30
#: Agreement with the given labels below which the labels are refused, and below which they are warned of.
_REFUSED, _WARNED = 0.85, 0.95


def cross_fitted_halves(
    spots: SpotData, measured: str | None, scale: Scale, depth: str | None, groups: Sequence[str] | None, reference: str
) -> tuple[list[SpotData], float]:
    """Two halves of the genes, each with labels read from measured genes outside it; the lower agreement of labels."""
    known, seen = measured_part(spots, measured, scale)
    lacking = sorted(set(spots.units) - set(known.units))
    if lacking:
        raise ValueError(
            f"`cross_fit`: {lacking[0]} has no measured counts. Its labels would have to come from its image, which its "
            "predicted genes come from too; use a pathologist's labels there, or leave it out"
        )
    spots = spots.take(seen)
    common = spots.tables[0].var_names
    for table in spots.tables[1:]:
        common = common[find_genes(common, table.var_names) >= 0]
    depths = depth_of(known, depth)
    halves, agreements, worst = [], [], []
    for i in (0, 1):
        genes = spots.genes[i::2]
        labels = cross_fitted_labels(spots, common[~common.isin(genes)], known.layer, known.scale, depths)
        halves.append(replace(spots, genes=genes, labels=labels))
        agreements.append(_agreement(labels, spots.labels, groups, reference))
        worst.append(_worst_group(labels, spots, groups, reference))
    agreement = _checked(min(agreements))
    share, group = min(worst)
    if share < _REFUSED and agreement >= _WARNED:
        warnings.warn(
            f"`cross_fit`: of the spots that are {group!r} by either label only {share:.0%} are by both; what else counts and image "
            "share can pass for a difference of this group: its p-values may be too small",
            stacklevel=3,
        )
    return halves, agreement


def _agreement(found: np.ndarray, given: np.ndarray, groups: Sequence[str] | None, reference: str) -> float:
    """Share of the spots of the tested groups whose labels are those given."""
    if groups is None or reference == "rest":
        return _share(found, given)
    named = [*groups, reference]
    return _share(*(labels[np.isin(given, named) | np.isin(found, named)] for labels in (found, given)))


def _worst_group(found: np.ndarray, spots: SpotData, groups: Sequence[str] | None, reference: str) -> tuple[float, str]:
    """Least share of the spots of a group by either label that are of it by both; rare groups do not show in all spots."""
    given = spots.labels
    sizes = pd.DataFrame({"label": given, "sample": spots.samples}).value_counts()
    enough = sizes[sizes >= MIN_SPOTS].groupby("label").size()
    tested = set(enough.index[enough > 1]) & (set(given) if groups is None else {*groups, reference})
    of = {group: (found == group, given == group) for group in tested}
    shares = ((float((a & b).sum() / (a | b).sum()), str(group)) for group, (a, b) in of.items())
    return min(shares, default=(1.0, ""))


def _share(found: np.ndarray, given: np.ndarray) -> float:
    return float((found.astype(str) == given.astype(str)).mean()) if len(found) else 0.0


def _checked(agreement: float) -> float:
    said = f"`cross_fit`: its labels agree with those of `groupby` in {agreement:.0%} of the spots"
    if agreement < _REFUSED:
        raise ValueError(
            f"{said}; at least {_REFUSED:.0%} are needed. Measured expression does not tell these groups well, so what else counts "
            "and image share, such as cell density, would pass for a difference; use a pathologist's labels as they are, "
            "cross_fit=False"
        )
    if agreement < _WARNED:
        warnings.warn(
            f"{said}; below {_WARNED:.0%}, what else counts and image share, such as cell density, can pass for a difference: "
            "p-values may be too small",
            stacklevel=4,
        )
    logger.info("biomarkers: cross-fitted labels agree with those given in %.1f %% of the spots", 100 * agreement)
    return agreement


def cross_fitted_labels(
    pool: SpotData,
    features: pd.Index,
    measured: str | None,
    scale: Literal["counts", "log"],
    depth: np.ndarray | None = None,
) -> np.ndarray:
    """Label every spot by a classifier of measured expression fitted to the other samples (else sections), ``(n,)``.

    Multinomial regression on principal components, centred within sections and without what goes with depth there.
    """
    units = pool.samples if len(set(pool.samples)) > 1 else pool.units
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
    for section in set(pool.units):
        inside = pool.units == section
        values[inside] = _without(values[inside], None if depth is None else depth[inside])
    labels = np.empty(len(units), object)
    for name in names:
        held = units == name
        if len(set(pool.labels[~held])) < 2:
            raise ValueError(f"`cross_fit`: the sections other than {name!r} hold one label; at least 2 are needed")
        labels[held] = _classifier(values[~held], pool.labels[~held]).predict(values[held])
    return labels


def _without(values: np.ndarray, depth: np.ndarray | None) -> np.ndarray:
    """Values without their mean and their slope on depth."""
    values = values - values.mean(0)
    if depth is None or np.ptp(depth) < 1e-9:
        return values
    x = (depth - depth.mean()).astype(values.dtype)
    return values - np.outer(x, x @ values / (x @ x))


def _classifier(values: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(_COMPONENTS, *values.shape)
    model = make_pipeline(PCA(n, random_state=0), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(values, labels.astype(str))
