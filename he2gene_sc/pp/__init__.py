"""Before the prediction: tissue mask, quality and stain of an image, and pseudo-spots where it has none."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
