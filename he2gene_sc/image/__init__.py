"""Pixels of images: choice of a level, geometry in µm, and patches read block by block. Arrays in, arrays out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
