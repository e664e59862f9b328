"""Accuracy metrics and conformal intervals. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._conformal import (
    LEVELS,
    MAX_COVERAGE,
    MIN_GROUPS,
    fit_spread,
    grouped_quantiles,
    half_scores,
    hierarchical_level,
    interpolated,
    rounded_up,
    spread_of,
)

__all__ = [
    "LEVELS",
    "MAX_COVERAGE",
    "MIN_GROUPS",
    "TARGET_SUM",
    "fit_spread",
    "grouped_quantiles",
    "half_scores",
    "hierarchical_level",
    "interpolated",
    "log_normalise",
    "noise_ceiling",
    "pearson",
    "rounded_up",
    "skill",
    "spread_of",
]
