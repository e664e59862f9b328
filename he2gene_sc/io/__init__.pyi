from ._geojson import read_geojson, to_geojson
from ._he import read_he
from ._save import save
from ._st import read_st
from ._wsidata import from_wsidata

__all__ = [
    "from_wsidata",
    "read_geojson",
    "read_he",
    "read_st",
    "save",
    "to_geojson",
]
