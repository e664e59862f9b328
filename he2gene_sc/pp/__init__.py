"""Preprocessing of images: tissue mask, quality, stain normalisation, and pseudo-spots."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
