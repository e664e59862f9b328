"""Covariates of spots, and of sample × group means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.names import check_spelling, clean_names

if TYPE_CHECKING:
    from .contrast import Contrast


def spot_covariates(contrast: Contrast, chosen: np.ndarray) -> np.ndarray | None:
    """Return log depth and covariates of the chosen spots, ``(m, c)``; ``None`` if there are none."""
    columns = [] if contrast.depth is None else [contrast.depth[chosen]]
    for key in contrast.design.covariates:
        values, numbers = _read(contrast, key, chosen)
        columns += [values.to_numpy(float)] if numbers else _indicators(values)
    return np.column_stack(columns) if columns else None


def cell_covariates(contrast: Contrast, side: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Covariates of sample × group means: means of numbers; labels, which are one a sample, as indicators."""
    columns: list[Any] = []
    for key in contrast.design.covariates:
        values, numbers = _read(contrast, key)
        if numbers:
            masks = (contrast.inside, contrast.outside)
            of = [masks[i] & (contrast.pool.samples == contrast.samples[j]) for i, j in zip(side, sample, strict=True)]
            columns.append([float(values[mask].mean()) for mask in of])
            continue
        per_sample = values.groupby(contrast.pool.samples).agg(["nunique", "first"])
        if (per_sample["nunique"] > 1).any():
            raise ValueError(
                f"`covariates` {key!r} has several values within sample {per_sample.index[per_sample['nunique'] > 1][0]!r}; "
                "a number, or one label a sample is needed"
            )
        columns += _indicators(per_sample["first"].reindex(contrast.samples[sample]))
    return np.array(columns).reshape(len(columns), len(side)).T


def _read(contrast: Contrast, key: str, chosen: np.ndarray | slice = slice(None)) -> tuple[pd.Series, bool]:
    """Return the column, labels cleaned, and whether it is of numbers."""
    values = contrast.pool.obs(key, "covariates")[chosen]
    numbers = pd.api.types.is_numeric_dtype(values)
    values = values if numbers else pd.Series(clean_names(values), dtype=object)
    if values.isna().any():
        raise ValueError(
            f"`covariates` {key!r} is missing for {int(values.isna().sum())} spots; fill it, or leave it out"
        )
    if not numbers:
        check_spelling({"": values.to_numpy(object)}, "covariates", key)
    return values, numbers


def _indicators(labels: pd.Series) -> list[np.ndarray]:
    return list(pd.get_dummies(labels, drop_first=True).to_numpy(float).T)
