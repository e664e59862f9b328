"""Gene expression and pathology annotation from H&E images, at the spots of a SpatialData object.

Usage: ``import he2gene_sc as hg``, then ``hg.tl.predict(sdata)``. Namespaces are loaded on first use; what they offer stands in
the ``.pyi`` file beside each ``__init__.py``, which type checkers read too.
"""

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    return _attribute(name)
