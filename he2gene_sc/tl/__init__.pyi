from ._adapt import adapt
from ._biomarkers.biomarkers import biomarkers
from ._biomarkers.concordance import concordance
from ._biomarkers.enrichment import enrichment
from ._calibrate import calibrate
from ._compare import compare
from ._domains.domain_preservation import domain_preservation
from ._embed import embed
from ._evaluate.evaluate import evaluate
from ._intervals import intervals
from ._predict import predict
from ._programmes import programmes
from ._train.train import train

__all__ = [
    "adapt",
    "biomarkers",
    "calibrate",
    "compare",
    "concordance",
    "domain_preservation",
    "embed",
    "enrichment",
    "evaluate",
    "intervals",
    "predict",
    "programmes",
    "train",
]
