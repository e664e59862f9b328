"""Where :mod:`he2gene_sc._core.slide` stood; imports of it move over."""

from ._core.elements import find_table
from ._core.images import check_image, find_image, pyramid_of
from ._core.slide import Slide, resolve

__all__ = ["Slide", "check_image", "find_image", "find_table", "pyramid_of", "resolve"]
