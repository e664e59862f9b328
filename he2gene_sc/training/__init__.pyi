from ._build import Facts, build_model, folds_of
from ._closed_form import Recipe, feature_weights, fit_basis, fit_sums
from ._fit import Fitted, fit_network
from ._folds import grouped_folds, warn_of_unit
from ._gradient import patch_set, train_network
from ._neighbours import neighbour_table
from ._patches import PatchSet
from ._presets import PRESETS, Preset
from ._sections import Section, log_targets
from ._validate import cross_validate

__all__ = [
    "Facts",
    "Fitted",
    "PRESETS",
    "PatchSet",
    "Preset",
    "Recipe",
    "Section",
    "build_model",
    "cross_validate",
    "feature_weights",
    "fit_basis",
    "fit_network",
    "fit_sums",
    "folds_of",
    "grouped_folds",
    "log_targets",
    "neighbour_table",
    "patch_set",
    "train_network",
    "warn_of_unit",
]
