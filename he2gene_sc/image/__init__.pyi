from ._geometry import Level, Pyramid, ReadPlan, WindowPlan, direct, plan_windows
from ._overview import Darkness, pixels_sha256, read_darkness, read_reduced
from ._pixels import check_channel_names, check_pixels, reflect_index, to_rgb_uint8
from ._quality import FAULTS, MIN_TISSUE, faults, tissue_pixels, tissue_share
from ._reader import PatchBatch, PatchReader
from ._recolour import RecolouredReader, Recolouring

__all__ = [
    "Darkness",
    "FAULTS",
    "Level",
    "MIN_TISSUE",
    "PatchBatch",
    "PatchReader",
    "Pyramid",
    "ReadPlan",
    "RecolouredReader",
    "Recolouring",
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
