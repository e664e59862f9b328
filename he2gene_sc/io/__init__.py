"""Legacy ST sections and plain H&E images to SpatialData; saving without losing."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "read_he": "._he",
        "read_st": "._st",
        "save": "._save",
    },
)
