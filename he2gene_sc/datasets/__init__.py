"""Public sections and a synthetic toy, as SpatialData."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "breast_markers": "._markers",
        "her2st": "._her2st",
        "hbcis": "._hbcis",
        "toy": "._toy",
        "HER2ST_SECTIONS": "._her2st",
        "HE2GENE_SPLIT": "._split",
        "HER2ST_IN_HBCIS": "._split",
    },
)
