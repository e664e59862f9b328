"""The verbs."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "evaluate": "._evaluate",
        "domain_preservation": "._domain_preservation",
        "adapt": "._adapt",
        "biomarkers": "._biomarkers",
        "concordance": "._concordance",
        "enrichment": "._enrichment",
        "intervals": "._intervals",
        "predict": "._predict",
        "train": "._train",
    },
)
