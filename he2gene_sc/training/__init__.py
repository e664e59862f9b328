"""Training: grouped folds and the closed-form heads. Arrays in, arrays out."""

from ._build import Facts, build_model
from ._closed_form import Heads, fit_basis
from ._validate import HeldOut, TrainingSet, cross_validate, panels

__all__ = ["Facts", "HeldOut", "Heads", "TrainingSet", "build_model", "cross_validate", "fit_basis", "panels"]
