"""Pictures of what the verbs wrote."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "annotation": "._annotation",
        "calibration": "._calibration",
        "predictability": "._predictability",
        "spatial": "._spatial",
    },
)
