"""Accuracy metrics, domain scores and their test. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill
from ._domains import AGREEMENT, agreement, chaos, enrichment_agreement, match, pas, silhouette
from ._shift_test import MIN_OVERLAP, ShiftTest, admissible_shifts, shift_test

__all__ = [
    "AGREEMENT",
    "MIN_OVERLAP",
    "TARGET_SUM",
    "ShiftTest",
    "admissible_shifts",
    "agreement",
    "chaos",
    "enrichment_agreement",
    "log_normalise",
    "match",
    "noise_ceiling",
    "pas",
    "pearson",
    "shift_test",
    "silhouette",
    "skill",
]
