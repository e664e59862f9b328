"""Accuracy metrics and differential tests. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._spatial_test import SpatialTest, spatial_test, wilcoxon_test

__all__ = [
    "TARGET_SUM",
    "SpatialTest",
    "log_normalise",
    "noise_ceiling",
    "pearson",
    "skill",
    "spatial_test",
    "wilcoxon_test",
]
