from ._annotation import annotation
from ._biomarkers import biomarkers
from ._calibration import calibration
from ._concordance import concordance
from ._domains import domains
from ._predictability import predictability
from ._spatial import spatial
from ._tissue import tissue

__all__ = [
    "annotation",
    "biomarkers",
    "calibration",
    "concordance",
    "domains",
    "predictability",
    "spatial",
    "tissue",
]
