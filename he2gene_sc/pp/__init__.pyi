from ._grid import grid
from ._tissue import tissue

__all__ = ["grid", "tissue"]
