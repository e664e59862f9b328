"""Predict gene expression and pathology annotation from H&E images, at the spots of a SpatialData object.

Usage: ``import he2gene_sc as hg``, then ``hg.tl.predict(sdata)``. Namespaces are loaded on first use; the ``.pyi`` file beside
each ``__init__.py`` lists their content, also for type checkers.
"""

import warnings

import lazy_loader

# Without ipywidgets, the first import of tqdm warns; the progress bar is then text, which is fine.
warnings.filterwarnings("ignore", message="IProgress not found")

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    return _attribute(name)
