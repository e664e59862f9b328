from ._grid import grid
from ._quality import normalize_stains, qc
from ._tissue import tissue

__all__ = ["grid", "normalize_stains", "qc", "tissue"]
