"""Accuracy metrics. Arrays in, arrays out."""

from ._accuracy import TARGET_SUM, log_normalise, noise_ceiling, pearson, skill

__all__ = ["TARGET_SUM", "log_normalise", "noise_ceiling", "pearson", "skill"]
