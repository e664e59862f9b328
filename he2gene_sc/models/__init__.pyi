from ._card import ModelCard
from ._catalogue import encoders
from ._encoders import load_encoder
from ._folder import BUNDLED, load
from ._model import HE2Gene
from ._paper import from_checkpoint
from ._registry import ENCODERS, EncoderSpec

__all__ = [
    "BUNDLED",
    "ENCODERS",
    "EncoderSpec",
    "HE2Gene",
    "ModelCard",
    "encoders",
    "from_checkpoint",
    "load",
    "load_encoder",
]
