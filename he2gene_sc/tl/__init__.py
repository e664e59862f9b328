"""The verbs."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "intervals": "._intervals",
        "predict": "._predict",
        "train": "._train",
    },
)
