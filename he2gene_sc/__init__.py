"""Gene expression and pathology annotation from H&E images, at the spots of a SpatialData object.

Usage: ``import he2gene_sc as hg``, then ``hg.tl.predict(sdata)``. Everything below is loaded on first use, so that
importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._settings import settings

if TYPE_CHECKING:
    from . import datasets, get, io, models, pl, pp, tl

__all__ = ["__version__", "datasets", "get", "io", "models", "pl", "pp", "settings", "tl"]

_NAMESPACES = {"datasets", "get", "io", "models", "pl", "pp", "tl"}


def __getattr__(name: str):
    if name in _NAMESPACES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version("he2gene_sc")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
