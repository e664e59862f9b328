"""Training: closed-form heads on frozen features, and whole networks by gradient. Arrays in, arrays out."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Facts": "._build",
        "Fitted": "._fit",
        "HeldOut": "._validate",
        "Heads": "._closed_form",
        "PRESETS": "._presets",
        "PatchSet": "._patches",
        "Preset": "._presets",
        "TrainingSet": "._validate",
        "build_model": "._build",
        "cross_validate": "._validate",
        "fit_basis": "._closed_form",
        "fit_network": "._fit",
        "grouped_folds": "._folds",
        "neighbour_table": "._neighbours",
        "panels": "._validate",
        "train_network": "._gradient",
        "warn_of_unit": "._folds",
    },
)
