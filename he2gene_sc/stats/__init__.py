"""Accuracy metrics, and predictions corrected by measured spots. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._adapt import CANDIDATES, MIN_SPOTS, Adapted, adapt
from ._residual_quantiles import LEVELS, residual_quantiles

__all__ = [
    "CANDIDATES",
    "LEVELS",
    "MIN_SPOTS",
    "TARGET_SUM",
    "Adapted",
    "adapt",
    "log_normalise",
    "noise_ceiling",
    "pearson",
    "residual_quantiles",
    "skill",
]
