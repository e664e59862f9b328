"""Accuracy metrics. Arrays in, arrays out."""

from ._accuracy import log_normalise, noise_ceiling, pearson, skill

__all__ = ["log_normalise", "noise_ceiling", "pearson", "skill"]
