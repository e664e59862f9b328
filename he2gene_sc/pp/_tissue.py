"""``hg.pp.tissue``: a tissue mask, by squidpy's detection."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._core import validate
from .._core.element_results import check_element_free, write_element
from .._core.images import find_image, pyramid_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

_WORKING_PX = 1_500_000
#: Stains of H&E leave more red than green; ink of a pen does not. Sections of her2st have up to 2 % of such pixels.
_INK_STEP, _INK_SHARE = 12, 0.05


def tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    method: Literal["otsu", "felzenszwalb", "weka"] = "otsu",
    key_added: str | None = None,
    **kwargs,
) -> None:
    """Mark where the tissue is.

    A black or transparent background is painted white first: detection takes the corners for background, and with
    black ones the mask would come out inverted.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image.
    image_key
        Image; needed where there are several.
    method
        Method of squidpy's detection.
    key_added
        Name of the labels; default ``"<image_key>_tissue"``.
    **kwargs
        Passed to :func:`squidpy.experimental.im.detect_tissue`.

    Returns
    -------
    ``None``. Written: ``sdata.labels[key_added]``, 0 for background and 1, 2, … for the pieces of tissue, at reduced
    resolution, in the coordinate systems of the image.

    Raises
    ------
    ValueError
        If the image is missing, ambiguous or not RGB; or if ``key_added`` names an element that ``tissue`` did not make,
        or that was changed since.
    """
    validate.arguments(tissue, locals())
    validate.one_of(method, ("otsu", "felzenszwalb", "weka"), "method")
    import squidpy as sq
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel
    from spatialdata.transformations import Scale, Sequence, get_transformation

    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_tissue" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.tissue", "labels", key_added)
    thumbnail, scale = read_thumbnail(sdata, image_key, _WORKING_PX)
    reduced = SpatialData(images={"image": Image2DModel.parse(thumbnail, dims=("c", "y", "x"))})
    # H&E has a bright background; squidpy then needs no corners to tell, which an inset or a full slide would mislead.
    kwargs.setdefault("corners_are_background", method == "weka")
    mask = sq.experimental.im.detect_tissue(
        reduced, "image", method=method, channel_format="rgb", inplace=False, **kwargs
    )
    _warn_of_ink(thumbnail, np.asarray(mask) > 0, image_key)
    to_pixels = Scale([scale[0], scale[1]], axes=("y", "x"))
    labels = Labels2DModel.parse(
        np.asarray(mask).astype(np.uint16),
        dims=("y", "x"),
        transformations={
            system: Sequence([to_pixels, transformation])
            for system, transformation in get_transformation(sdata.images[image_key], get_all=True).items()
        },
    )
    write_element(sdata, "labels", key_added, labels)
    logger.info("tissue: %.0f %% of image %r, in labels %r", 100 * (np.asarray(mask) > 0).mean(), image_key, key_added)


def _warn_of_ink(thumbnail: np.ndarray, mask: np.ndarray, image_key: str) -> None:
    """Say that a part of what was found is green or blue."""
    ink = mask & (thumbnail[1] > thumbnail[0].astype(int) + _INK_STEP)
    share = ink.sum() / max(1, mask.sum())
    if share > _INK_SHARE:
        warnings.warn(
            f"{100 * share:.0f} % of the tissue found on image {image_key!r} is green or blue, as pen is and H&E is not: spots "
            "there would be predicted from ink. Look at the mask and take them out",
            UserWarning,
            stacklevel=3,
        )


def read_thumbnail(sdata: SpatialData, image_key: str, max_pixels: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Read an image whole, averaged down to at most ``max_pixels``, black and transparent background painted white.

    Returns
    -------
    numpy.ndarray
        ``(3, h, w)`` uint8.
    tuple of float
        Pixels of level 0 per pixel of it, along y and x.
    """
    from .._core.images import check_image
    from ..image import read_reduced

    pyramid = pyramid_of(sdata, image_key)
    reduced = read_reduced(pyramid, max_pixels, check_image(pyramid, image_key))
    return reduced, (pyramid.height / reduced.shape[1], pyramid.width / reduced.shape[2])
