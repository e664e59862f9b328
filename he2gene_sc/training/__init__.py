"""Training: grouped folds, closed-form heads, and whole networks by gradient. Arrays in, arrays out."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Facts": "._build",
        "Recipe": "._closed_form",
        "Section": "._sections",
        "build_model": "._build",
        "feature_weights": "._closed_form",
        "folds_of": "._build",
        "log_targets": "._sections",
    },
)
