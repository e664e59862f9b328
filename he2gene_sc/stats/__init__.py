"""Accuracy metrics and differential tests. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._mixed import mixed_model
from ._ppi import PredictionPowered, prediction_powered_mean
from ._pseudobulk import SampleTest, paired_moderated_t, squeeze_variance, t_test, trigamma_inverse
from ._ranking import ranking_agreement
from ._spatial_test import SpatialTest, spatial_test, wilcoxon_test

__all__ = [
    "TARGET_SUM",
    "PredictionPowered",
    "SampleTest",
    "SpatialTest",
    "log_normalise",
    "mixed_model",
    "noise_ceiling",
    "paired_moderated_t",
    "pearson",
    "prediction_powered_mean",
    "ranking_agreement",
    "skill",
    "spatial_test",
    "squeeze_variance",
    "t_test",
    "trigamma_inverse",
    "wilcoxon_test",
]
