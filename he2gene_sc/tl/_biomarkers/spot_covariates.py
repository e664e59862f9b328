"""Covariates of single spots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.names import check_spelling, clean_names

if TYPE_CHECKING:
    from .contrast import Contrast


def spot_covariates(contrast: Contrast, chosen: np.ndarray) -> np.ndarray | None:
    """Return log depth and covariates of the chosen spots, ``(m, c)``; ``None`` if there are none.

    Raises
    ------
    ValueError
        If a covariate is missing for a spot.
    """
    columns = [] if contrast.depth is None else [contrast.depth[chosen]]
    for key in contrast.design.covariates:
        values = contrast.pool.obs(key, "covariates")[chosen]
        numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        values = values if numbers else pd.Series(clean_names(values), dtype=object)
        if values.isna().any():
            raise ValueError(
                f"`covariates` {key!r} is missing for {int(values.isna().sum())} spots; fill it, or leave it out"
            )
        if numbers:
            columns.append(values.to_numpy(float))
            continue
        check_spelling({"": values.to_numpy(object)}, "covariates", key)
        columns += list(pd.get_dummies(values, drop_first=True).to_numpy(float).T)
    return np.column_stack(columns) if columns else None
