from ._coverage import coverage
from ._prediction import expression, genes, predicted
from ._results import biomarkers, concordance, domains, enrichment, evaluation, programmes

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
