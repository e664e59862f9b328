from . import datasets, get, io, models, pl, pp, tl
from ._settings import settings

__version__: str

__all__ = ["__version__", "datasets", "get", "io", "models", "pl", "pp", "settings", "tl"]
