"""Encoders, the network, model folders and their cards."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BUNDLED": "._folder",
        "ENCODERS": "._registry",
        "EncoderSpec": "._registry",
        "HE2Gene": "._model",
        "ModelCard": "._card",
        "encoders": "._catalogue",
        "from_checkpoint": "._paper",
        "load": "._folder",
        "load_encoder": "._encoders",
    },
)
