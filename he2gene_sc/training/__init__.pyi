from ._closed_form.build import build_model, folds_of
from ._closed_form.heads import Recipe, feature_weights, fit_basis, fit_sums
from ._closed_form.validate import cross_validate
from ._folds import grouped_folds, warn_of_unit
from ._gradient.fit import Fitted, fit_network
from ._gradient.patches import PatchSet, neighbour_table
from ._gradient.presets import PRESETS, Preset
from ._gradient.run_options import RunOptions
from ._gradient.train_network import patch_set, train_network
from ._metadata import ModelMetadata, Programmes
from ._scratch import check_room, spill
from ._sections import Section, log_targets

__all__ = [
    "ModelMetadata",
    "Fitted",
    "PRESETS",
    "PatchSet",
    "Preset",
    "Programmes",
    "Recipe",
    "RunOptions",
    "Section",
    "build_model",
    "check_room",
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
    "spill",
    "train_network",
    "warn_of_unit",
]
