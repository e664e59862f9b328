"""Accuracy metrics and baselines. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._classification import N_BINS, ClassScores, calibration_error, class_scores
from ._correlation import sd_ratio, slope, spearman
from ._spatial_metrics import moran, neighbour_weights, ssim_on_grid

__all__ = [
    "N_BINS",
    "TARGET_SUM",
    "ClassScores",
    "calibration_error",
    "class_scores",
    "log_normalise",
    "moran",
    "neighbour_weights",
    "noise_ceiling",
    "pearson",
    "sd_ratio",
    "skill",
    "slope",
    "spearman",
    "ssim_on_grid",
]
