"""Statistics: accuracy metrics, baselines, intervals, domain scores, differential tests. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._adapt import CANDIDATES, MIN_SPOTS, Adapted, adapt
from ._classification import N_BINS, ClassScores, calibration_error, class_scores
from ._correlation import sd_ratio, slope, spearman
from ._domains import AGREEMENT, agreement, chaos, enrichment_agreement, match, pas, silhouette
from ._residual_quantiles import LEVELS, residual_quantiles
from ._shift_test import MIN_OVERLAP, ShiftTest, admissible_shifts, shift_test
from ._spatial_metrics import moran, neighbour_weights, ssim_on_grid

__all__ = [
    "AGREEMENT",
    "CANDIDATES",
    "LEVELS",
    "MIN_OVERLAP",
    "MIN_SPOTS",
    "N_BINS",
    "TARGET_SUM",
    "Adapted",
    "ClassScores",
    "ShiftTest",
    "adapt",
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
    "residual_quantiles",
    "sd_ratio",
    "shift_test",
    "silhouette",
    "skill",
    "slope",
    "spearman",
    "ssim_on_grid",
]
