"""``hg.pp.tissue``: a tissue mask, by squidpy's detection or as what is not glass."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import logs, validate
from .._core.element_results import check_element_free, write_element
from .._core.images import find_image, pyramid_of
from .._core.logs import logger
from ..image import tissue_pixels

if TYPE_CHECKING:
    from spatialdata import SpatialData

_WORKING_PX = 1_500_000
#: Stains of H&E leave more red than green; ink of a pen does not. Sections of her2st have up to 2 % of such pixels.
_INK_STEP, _INK_SHARE = 12, 0.05
#: Red ink, by optical density over that of green: blue is high, which eosin's is not, and red low. Under 1 % of her2st.
_RED_INK, _RED_BLUE, _RED_RED = 0.6, 0.6, 0.3
METHODS = ("auto", "otsu", "felzenszwalb", "weka", "glass")
#: Share of what a mask leaves out that is stained structure, above which the image is mostly tissue: 0.32 at most on whole
#: slides, 0.57 and more on crops inside the tissue. And the share of all stained structure whose loss is said.
_MOSTLY_TISSUE, _MUCH_LOST = 0.5, 0.5
#: Shares of the image: what is worth a word, below which a piece of tissue is dust, and below which a hole is closed.
_PIECE, _DUST, _HOLE = 0.01, 1e-3, 1e-4


def tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    method: Literal["auto", "otsu", "felzenszwalb", "weka", "glass"] = "auto",
    key_added: str | None = None,
    **kwargs: Any,
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
        ``"otsu"``, ``"felzenszwalb"`` or ``"weka"``: that of squidpy's detection. ``"glass"``: everything that is not glass, the
        rule of ``obs["he2gene_tissue"]``; it finds pale tissue, such as fat, and dirt. ``"auto"``: Otsu, but ``"glass"`` where
        most of what Otsu leaves out is stained: on an image that is tissue from edge to edge its threshold parts dark
        tissue from pale.
    key_added
        Name of the labels; default ``"<image_key>_tissue"``.
    **kwargs
        Passed to :func:`squidpy.experimental.im.detect_tissue`; ``"auto"`` then is ``"otsu"``.

    Returns
    -------
    ``None``. Written: ``sdata.labels[key_added]``, 0 for background and 1, 2, … for the pieces of tissue, at reduced
    resolution, in the coordinate systems of the image. :func:`he2gene_sc.pl.tissue` shows it.

    Raises
    ------
    ValueError
        If the image is missing, ambiguous, blank or not RGB; or if ``key_added`` names an element that ``tissue`` did not make,
        or that was changed since.

    Warns
    -----
    UserWarning
        If half of what is stained and has structure is left out, or a part of what was found is green, blue or red ink.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.pp.tissue(sdata)
    >>> bool((sdata["he_tissue"] > 0).any())
    True
    """
    validate.arguments(tissue, locals())
    validate.one_of(method, METHODS, "method")
    if method == "glass" and kwargs:
        raise ValueError(f"`method` 'glass' takes no further arguments, given: {sorted(kwargs)}")
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import Scale, Sequence, get_transformation

    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_tissue" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.tissue", "labels", key_added)
    thumbnail, scale = read_thumbnail(sdata, image_key, _WORKING_PX)
    pixels = tissue_pixels(thumbnail)
    if not pixels[0].any():
        raise ValueError(
            f"`image_key` {image_key!r} is blank: white, black or transparent, so there is no tissue to mark. Name the image that "
            f"shows it, of {sorted(sdata.images)}"
        )
    mask, used = _detect(thumbnail, pixels, image_key, method, kwargs)
    _warn_of_ink(thumbnail, mask > 0, image_key)
    to_pixels = Scale([scale[0], scale[1]], axes=("y", "x"))
    labels = Labels2DModel.parse(
        mask.astype(np.uint16),
        dims=("y", "x"),
        transformations={
            system: Sequence([to_pixels, transformation])
            for system, transformation in get_transformation(sdata.images[image_key], get_all=True).items()
        },
    )
    write_element(sdata, "labels", key_added, labels)
    share = 100 * (mask > 0).mean()
    logger.info("tissue: %.0f %% of image %r by method %r, in labels %r", share, image_key, used, key_added)


def _detect(
    thumbnail: np.ndarray, pixels: tuple[np.ndarray, np.ndarray], image_key: str, method: str, kwargs: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Mask of the pieces of tissue, ``(h, w)``, and the method that made it; ``pixels`` are those of :func:`tissue_pixels`."""
    anything, certain = pixels
    if method == "glass":
        return _not_glass(anything), method
    used = "otsu" if method == "auto" else method
    mask = _by_squidpy(thumbnail, used, kwargs)
    left_out = mask == 0
    if method == "auto" and not kwargs and left_out.any() and certain[left_out].mean() > _MOSTLY_TISSUE:
        return _not_glass(anything), "glass"
    n_lost = certain[left_out].sum()
    lost = n_lost / max(1, certain.sum())
    if lost > _MUCH_LOST and n_lost > _PIECE * mask.size:
        warnings.warn(
            f"method {used!r} leaves out {100 * lost:.0f} % of what is stained and has structure on image {image_key!r}: pale "
            "tissue, such as fat, would get no spots. Look at the mask by hg.pl.tissue(sdata). If tissue is missing: "
            "hg.pp.tissue(sdata, method='glass')",
            stacklevel=3,
        )
    return mask, used


def _by_squidpy(thumbnail: np.ndarray, method: str, kwargs: dict[str, Any]) -> np.ndarray:
    import squidpy as sq
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    reduced = SpatialData(images={"image": Image2DModel.parse(thumbnail, dims=("c", "y", "x"))})
    # H&E has a bright background; squidpy then needs no corners to tell, which an inset or a full slide would mislead.
    kwargs = {"corners_are_background": method == "weka", **kwargs}
    with logs.silence("spatialdata._logging"), warnings.catch_warnings():
        # squidpy calls scikit-image by an old name; users cannot change that.
        warnings.filterwarnings("ignore", "Parameter `area_threshold` is deprecated", FutureWarning)
        found = sq.experimental.im.detect_tissue(
            reduced, "image", method=method, channel_format="rgb", inplace=False, **kwargs
        )
    return np.asarray(found)


def _not_glass(tissue: np.ndarray) -> np.ndarray:
    """Mask with numbered pieces, without dust and holes."""
    from skimage.measure import label

    pieces = label(_without_small(~_without_small(~tissue, _HOLE), _DUST), connectivity=2)
    return np.asarray(pieces)


def _without_small(mask: np.ndarray, share: float) -> np.ndarray:
    """Leave out the pieces of a mask that are smaller than a share of the image."""
    from skimage.measure import label

    pieces = np.asarray(label(mask, connectivity=2))
    large = np.bincount(pieces.ravel()) >= share * mask.size
    large[0] = False
    return large[pieces]


def _warn_of_ink(thumbnail: np.ndarray, mask: np.ndarray, image_key: str) -> None:
    """Say that a part of what was found has the colour of a pen."""
    red, green, blue = -np.log((thumbnail.astype(np.float32) + 1) / 256)
    inks = {
        "green or blue, as pen is and H&E is not": thumbnail[1] > thumbnail[0].astype(int) + _INK_STEP,
        "red without violet, as pen and blood are": (green > _RED_INK)
        & (blue > _RED_BLUE * green)
        & (red < _RED_RED * green),
    }
    for colour, ink in inks.items():
        share = (ink & mask).sum() / max(1, mask.sum())
        if share > _INK_SHARE:
            warnings.warn(
                f"{100 * share:.0f} % of the tissue found on image {image_key!r} is {colour}: spots there would be predicted "
                "from ink. Look at the mask and take them out",
                stacklevel=3,
            )


def read_thumbnail(sdata: SpatialData, image_key: str, max_pixels: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Read an image averaged down to ``max_pixels``, black and transparent painted white: ``(3, h, w)`` uint8.

    Also pixels of level 0 per pixel of it, along y and x.
    """
    from .._core.images import check_image
    from ..image import read_reduced

    pyramid = pyramid_of(sdata, image_key)
    reduced = read_reduced(pyramid, max_pixels, check_image(pyramid, image_key))
    return reduced, (pyramid.height / reduced.shape[1], pyramid.width / reduced.shape[2])
