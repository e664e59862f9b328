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
from ._counts import CountDifferences, CountSums, count_differences, library_factors, variance_components
from ._domains import AGREEMENT, agreement, chaos, enrichment_agreement, match, pas, silhouette
from ._mixed import mixed_model
from ._ppi import MIN_PVALUES, PredictionPowered, prediction_powered_mean
from ._prior import VariancePrior, hypervariable_prior
from ._pseudobulk import (
    SampleTest,
    paired_moderated_t,
    predictive_t,
    squeeze_variance,
    t_test,
    trigamma_inverse,
    weighted_fit,
)
from ._ranking import ranking_agreement
from ._residual_quantiles import RESIDUAL_LEVELS, residual_quantiles
from ._shift_test import MIN_OVERLAP, ShiftTest, admissible_shifts, shift_test
from ._spatial_metrics import ceiling_of_neighbours, moran, neighbour_weights, ssim_on_grid
from ._spatial_test import SpatialTest, spatial_test, wilcoxon_test

__all__ = [
    "moran",
    "ceiling_of_neighbours",
    "chaos",
    "prediction_powered_mean",
    "ranking_agreement",
    "ssim_on_grid",
    "VariancePrior",
    "log_normalise",
    "MIN_OVERLAP",
    "MIN_PVALUES",
    "interpolated",
    "count_differences",
    "pearson",
    "rounded_up",
    "class_scores",
    "admissible_shifts",
    "squeeze_variance",
    "AGREEMENT",
    "trigamma_inverse",
    "calibration_error",
    "neighbour_weights",
    "noise_ceiling",
    "spread_of",
    "hypervariable_prior",
    "library_factors",
    "agreement",
    "LEVELS",
    "weighted_fit",
    "grouped_quantiles",
    "MIN_SPOTS",
    "match",
    "spearman",
    "ShiftTest",
    "CANDIDATES",
    "MIN_GROUPS",
    "hierarchical_level",
    "t_test",
    "N_BINS",
    "Adapted",
    "CountSums",
    "SpatialTest",
    "half_scores",
    "MAX_COVERAGE",
    "sd_ratio",
    "predictive_t",
    "shift_test",
    "skill",
    "residual_quantiles",
    "silhouette",
    "enrichment_agreement",
    "PredictionPowered",
    "adapt",
    "spatial_test",
    "paired_moderated_t",
    "fit_spread",
    "pas",
    "variance_components",
    "ClassScores",
    "TARGET_SUM",
    "wilcoxon_test",
    "RESIDUAL_LEVELS",
    "SampleTest",
    "slope",
    "CountDifferences",
    "mixed_model",
]
