"""Training: grouped folds, closed-form heads, and whole networks by gradient. Arrays in, arrays out."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Facts": "._build",
        "Fitted": "._fit",
        "PRESETS": "._presets",
        "PatchSet": "._patches",
        "Preset": "._presets",
        "Recipe": "._closed_form",
        "Section": "._sections",
        "build_model": "._build",
        "cross_validate": "._validate",
        "feature_weights": "._closed_form",
        "fit_basis": "._closed_form",
        "fit_network": "._fit",
        "fit_sums": "._closed_form",
        "folds_of": "._build",
        "grouped_folds": "._folds",
        "log_targets": "._sections",
        "neighbour_table": "._neighbours",
        "patch_set": "._gradient",
        "train_network": "._gradient",
        "warn_of_unit": "._folds",
    },
)
