from ._hbcis import hbcis
from ._her2st import HER2ST_SECTIONS, her2st
from ._hest import hest
from ._markers import breast_markers, toy_diseases
from ._split import HE2GENE_SPLIT, HER2ST_IN_HBCIS
from ._toy import toy

__all__ = [
    "HE2GENE_SPLIT",
    "HER2ST_IN_HBCIS",
    "HER2ST_SECTIONS",
    "breast_markers",
    "hbcis",
    "her2st",
    "hest",
    "toy",
    "toy_diseases",
]
