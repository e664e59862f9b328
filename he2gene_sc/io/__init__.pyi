from ._he import read_he
from ._save import save
from ._st import read_st

__all__ = [
    "read_he",
    "read_st",
    "save",
]
