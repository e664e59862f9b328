"""Before the prediction: tissue mask and pseudo-spots for an image without spots."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "grid": "._grid",
        "tissue": "._tissue",
    },
)
