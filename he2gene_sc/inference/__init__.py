"""The batched engine: patches to predictions. Arrays and tensors in, arrays out."""

from ._device import resolve_device, resolve_dtype
from ._engine import Predictions, encode, predict

__all__ = ["Predictions", "encode", "predict", "resolve_device", "resolve_dtype"]
