"""Pictures of what the verbs wrote."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "annotation": "._annotation",
        "domains": "._domains",
        "biomarkers": "._biomarkers",
        "concordance": "._concordance",
        "calibration": "._calibration",
        "predictability": "._predictability",
        "spatial": "._spatial",
    },
)
