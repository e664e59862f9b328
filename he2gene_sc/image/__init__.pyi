from ._fingerprint import pixels_sha256
from ._geometry import ReadPlan, WindowPlan, plan_windows
from ._pixels import check_channel_names, check_pixels, reflect_index, to_rgb_uint8
from ._pyramid import Level, Pyramid, direct
from ._quality import FAULTS, MIN_TISSUE, faults, tissue_pixels, tissue_share
from ._reader import PatchBatch, PatchReader
from ._reduced import Darkness, read_darkness, read_reduced

__all__ = [
    "Darkness",
    "FAULTS",
    "Level",
    "MIN_TISSUE",
    "PatchBatch",
    "PatchReader",
    "Pyramid",
    "ReadPlan",
    "WindowPlan",
    "check_channel_names",
    "check_pixels",
    "direct",
    "faults",
    "pixels_sha256",
    "plan_windows",
    "read_darkness",
    "read_reduced",
    "reflect_index",
    "tissue_pixels",
    "tissue_share",
    "to_rgb_uint8",
]
