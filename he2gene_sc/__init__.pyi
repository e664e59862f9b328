from . import cohort, datasets, get, io, models, pl, pp, tl
from ._report.report import report
from ._settings import settings
from .inference._lazyslide import LazySlideModel
from .tl._biomarkers.design import Design
from .tl._calibrate import Calibration
from .tl._train.options import CardText, Classes, DefaultRecipe, GeneSelection, PaperRecipe, SectionKeys

__version__: str

__all__ = [
    "Calibration",
    "CardText",
    "Classes",
    "DefaultRecipe",
    "Design",
    "GeneSelection",
    "LazySlideModel",
    "PaperRecipe",
    "SectionKeys",
    "__version__",
    "cohort",
    "datasets",
    "get",
    "io",
    "models",
    "pl",
    "pp",
    "report",
    "settings",
    "tl",
]
