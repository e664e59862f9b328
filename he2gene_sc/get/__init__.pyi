from ._biomarkers import biomarkers
from ._concordance import concordance
from ._coverage import coverage
from ._domains import domains
from ._enrichment import enrichment
from ._evaluation import evaluation
from ._expression import expression
from ._genes import genes
from ._predicted import predicted
from ._programmes import programmes

__all__ = [
    "biomarkers",
    "concordance",
    "coverage",
    "domains",
    "enrichment",
    "evaluation",
    "expression",
    "genes",
    "predicted",
    "programmes",
]
