"""Tidy tables of results, and the predicted genes as a table for other tools."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
