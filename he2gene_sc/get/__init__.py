"""Tidy tables of what the verbs wrote."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "evaluation": "._evaluation",
        "domains": "._domains",
        "biomarkers": "._biomarkers",
        "concordance": "._concordance",
        "enrichment": "._enrichment",
        "genes": "._genes",
    },
)
