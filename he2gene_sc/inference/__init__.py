"""The batched engine: patches to predictions. Arrays and tensors in, arrays out."""

from ._cache import cached_features
from ._device import resolve_device, resolve_dtype
from ._engine import Predictions, encode, predict

__all__ = ["Predictions", "cached_features", "encode", "predict", "resolve_device", "resolve_dtype"]
