from ._grid import grid
from ._normalize_stains import normalize_stains
from ._qc import qc
from ._tissue import tissue

__all__ = ["grid", "normalize_stains", "qc", "tissue"]
