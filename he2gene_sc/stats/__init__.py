"""Statistics: accuracy metrics, baselines, intervals, domain scores, differential tests. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._classification import N_BINS, ClassScores, calibration_error, class_scores
from ._correlation import sd_ratio, slope, spearman
from ._domains import AGREEMENT, agreement, chaos, enrichment_agreement, match, pas, silhouette
from ._shift_test import MIN_OVERLAP, ShiftTest, admissible_shifts, shift_test
from ._spatial_metrics import moran, neighbour_weights, ssim_on_grid

__all__ = [
    "AGREEMENT",
    "MIN_OVERLAP",
    "N_BINS",
    "TARGET_SUM",
    "ClassScores",
    "ShiftTest",
    "admissible_shifts",
    "agreement",
    "calibration_error",
    "chaos",
    "class_scores",
    "enrichment_agreement",
    "log_normalise",
    "match",
    "moran",
    "neighbour_weights",
    "noise_ceiling",
    "pas",
    "pearson",
    "sd_ratio",
    "shift_test",
    "silhouette",
    "skill",
    "slope",
    "spearman",
    "ssim_on_grid",
]
