"""Predict many slides: each is read, predicted and saved in its own task."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
