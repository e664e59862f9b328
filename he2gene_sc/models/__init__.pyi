from ._card import ModelCard
from ._encoders.load import load_encoder
from ._encoders.registry import ENCODERS, EncoderSpec, encoders
from ._load import BUNDLED, load
from ._model import HE2Gene
from ._paper import from_checkpoint

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
