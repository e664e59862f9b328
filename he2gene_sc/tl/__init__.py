"""The verbs."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "biomarkers": "._biomarkers",
        "concordance": "._concordance",
        "enrichment": "._enrichment",
        "predict": "._predict",
        "train": "._train",
    },
)
