from ._cache import Encoder, Part, cached_features
from ._device import allocator, n_readers, resolve_device, resolve_dtype
from ._engine import Predictions, encode, predict
from ._features import differences, read_features, read_pixels
from ._lattice import Interpolated, SpotFeatures, drop_idle_nodes, is_dense, lattice_of
from ._workers import Workers, send

__all__ = [
    "Encoder",
    "Interpolated",
    "Part",
    "Predictions",
    "SpotFeatures",
    "Workers",
    "allocator",
    "cached_features",
    "differences",
    "drop_idle_nodes",
    "encode",
    "is_dense",
    "lattice_of",
    "n_readers",
    "predict",
    "read_features",
    "read_pixels",
    "resolve_device",
    "resolve_dtype",
    "send",
]
