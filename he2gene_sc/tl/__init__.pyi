from ._adapt import adapt
from ._biomarkers import biomarkers
from ._concordance import concordance
from ._domain_preservation import domain_preservation
from ._enrichment import enrichment
from ._evaluate import evaluate
from ._intervals import intervals
from ._predict import predict
from ._train import train

__all__ = [
    "adapt",
    "biomarkers",
    "concordance",
    "domain_preservation",
    "enrichment",
    "evaluate",
    "intervals",
    "predict",
    "train",
]
