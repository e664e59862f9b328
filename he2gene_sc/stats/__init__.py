"""Statistics: accuracy metrics, baselines, intervals, domain scores, differential tests. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._adapt import CANDIDATES, MIN_SPOTS, Adapted, adapt
from ._classification import N_BINS, ClassScores, calibration_error, class_scores
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
from ._correlation import sd_ratio, slope, spearman
from ._domains import AGREEMENT, agreement, chaos, enrichment_agreement, match, pas, silhouette
from ._mixed import mixed_model
from ._ppi import PredictionPowered, prediction_powered_mean
from ._pseudobulk import SampleTest, paired_moderated_t, squeeze_variance, t_test, trigamma_inverse
from ._ranking import ranking_agreement
from ._residual_quantiles import RESIDUAL_LEVELS, residual_quantiles
from ._shift_test import MIN_OVERLAP, ShiftTest, admissible_shifts, shift_test
from ._spatial_metrics import moran, neighbour_weights, ssim_on_grid
from ._spatial_test import SpatialTest, spatial_test, wilcoxon_test

__all__ = [
    "AGREEMENT",
    "CANDIDATES",
    "LEVELS",
    "MAX_COVERAGE",
    "MIN_GROUPS",
    "MIN_OVERLAP",
    "MIN_SPOTS",
    "N_BINS",
    "RESIDUAL_LEVELS",
    "TARGET_SUM",
    "Adapted",
    "ClassScores",
    "PredictionPowered",
    "SampleTest",
    "ShiftTest",
    "SpatialTest",
    "adapt",
    "admissible_shifts",
    "agreement",
    "calibration_error",
    "chaos",
    "class_scores",
    "enrichment_agreement",
    "fit_spread",
    "grouped_quantiles",
    "half_scores",
    "hierarchical_level",
    "interpolated",
    "log_normalise",
    "match",
    "mixed_model",
    "moran",
    "neighbour_weights",
    "noise_ceiling",
    "paired_moderated_t",
    "pas",
    "pearson",
    "prediction_powered_mean",
    "ranking_agreement",
    "residual_quantiles",
    "rounded_up",
    "sd_ratio",
    "shift_test",
    "silhouette",
    "skill",
    "slope",
    "spatial_test",
    "spearman",
    "spread_of",
    "squeeze_variance",
    "ssim_on_grid",
    "t_test",
    "trigamma_inverse",
    "wilcoxon_test",
]
