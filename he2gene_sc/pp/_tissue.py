"""``hg.pp.tissue``: tissue mask by squidpy's detection, or as the complement of glass."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import logs, validate
from .._core.element_results import check_element_free, write_element
from .._core.images import check_image, find_image, pyramid_of
from .._core.logs import logger, warn
from .._core.rasters import systems_of
from ..image import read_reduced, tissue_pixels

if TYPE_CHECKING:
    from spatialdata import SpatialData

_WORKING_PX = 1_500_000
#: Green or blue ink: green exceeds red by this step, unlike in H&E. Up to 2 % of the pixels of her2st sections are so.
_INK_STEP, _INK_SHARE = 12, 0.05
#: Red ink: minimum optical density of green, and relative to it high blue (low for eosin) and low red. Under 1 % of her2st.
_RED_INK, _RED_BLUE, _RED_RED = 0.6, 0.6, 0.3
METHODS = ("auto", "otsu", "felzenszwalb", "weka", "glass")
#: An image is mostly tissue if more of the area outside the mask is stained structure: at most 0.32 on whole slides, at least
#: 0.57 on crops inside the tissue. Second: warn if the mask leaves out more of all stained structure.
_MOSTLY_TISSUE, _MUCH_LOST = 0.5, 0.5
#: Shares of the image: least loss for a warning, largest piece that is dust, largest hole that is closed.
_PIECE, _DUST, _HOLE = 0.01, 1e-3, 1e-4


def tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    method: Literal["auto", "otsu", "felzenszwalb", "weka", "glass"] = "auto",
    key_added: str | None = None,
    **kwargs: Any,
) -> None:
    """Create a tissue mask of an image.

    First, a black or transparent background is painted white. Otherwise the mask would be inverted, because detection treats the
    corners as background.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image.
    image_key
        Image; needed if there are several.
    method
        ``"otsu"``, ``"felzenszwalb"`` or ``"weka"``: method of squidpy's detection. ``"glass"``: everything except glass, as for
        ``obs["he2gene_tissue"]``; it finds pale tissue, such as fat, and also dirt. ``"auto"``: Otsu, or ``"glass"`` if most of the
        area outside Otsu's mask is stained: if tissue fills the image, Otsu's threshold separates dark from pale tissue.
    key_added
        Name of the labels element; default ``"<image_key>_tissue"``.
    **kwargs
        Passed to :func:`squidpy.experimental.im.detect_tissue`; ``"auto"`` then means ``"otsu"``.

    Returns
    -------
    ``None``. Written: ``sdata.labels[key_added]``, 0 for background and 1, 2, … for the pieces of tissue, at reduced
    resolution, in the coordinate systems of the image. :func:`he2gene_sc.pl.tissue` shows it.

    Raises
    ------
    ValueError
        If the image is missing, ambiguous, blank or not RGB; or if ``key_added`` is an element that ``tissue`` did not make,
        or that was changed since.

    Warns
    -----
    UserWarning
        If the mask leaves out half of the stained structure, or part of the mask is green, blue or red ink.

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
    from spatialdata.transformations import Scale, Sequence

    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_tissue" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.tissue", "labels", key_added)
    thumbnail, scale = read_thumbnail(sdata, image_key, _WORKING_PX)
    pixels = tissue_pixels(thumbnail)
    if not pixels[0].any():
        raise ValueError(
            f"`image_key` {image_key!r} is blank (white, black or transparent) and shows no tissue. Pass the name of the image that "
            f"shows tissue, of {sorted(sdata.images)}"
        )
    mask, used = _detect(thumbnail, pixels, image_key, method, kwargs)
    _warn_of_ink(thumbnail, mask > 0, image_key)
    to_pixels = Scale([scale[0], scale[1]], axes=("y", "x"))
    labels = Labels2DModel.parse(
        mask.astype(np.uint16),
        dims=("y", "x"),
        transformations={
            system: Sequence([to_pixels, transformation])
            for system, transformation in systems_of(sdata.images[image_key]).items()
        },
    )
    write_element(sdata, "labels", key_added, labels)
    share = 100 * (mask > 0).mean()
    logger.info("tissue: %.0f %% of image %r by method %r, in labels %r", share, image_key, used, key_added)


def _detect(
    thumbnail: np.ndarray, pixels: tuple[np.ndarray, np.ndarray], image_key: str, method: str, kwargs: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Return the mask of the pieces of tissue, ``(h, w)``, and its method; ``pixels`` is the result of :func:`tissue_pixels`."""
    not_glass, structure = pixels
    if method == "glass":
        return _clean_pieces(not_glass), method
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    sq = logs.import_squidpy()
    used = "otsu" if method == "auto" else method
    reduced = SpatialData(images={"image": Image2DModel.parse(thumbnail, dims=("c", "y", "x"))})
    # The background of H&E is bright. Do not let squidpy infer it from the corners, which may show an inset or tissue.
    options = {"corners_are_background": used == "weka", **kwargs}
    with logs.silence("spatialdata._logging"), warnings.catch_warnings():
        # squidpy calls scikit-image by an old name; users cannot change that.
        warnings.filterwarnings("ignore", "Parameter `area_threshold` is deprecated", FutureWarning)
        mask = np.asarray(
            sq.experimental.im.detect_tissue(
                reduced, "image", method=used, channel_format="rgb", inplace=False, **options
            )
        )
    left_out = mask == 0
    if method == "auto" and not kwargs and left_out.any() and structure[left_out].mean() > _MOSTLY_TISSUE:
        return _clean_pieces(not_glass), "glass"
    n_lost = structure[left_out].sum()
    lost = n_lost / max(1, structure.sum())
    if lost > _MUCH_LOST and n_lost > _PIECE * mask.size:
        warn(
            f"method {used!r} leaves out {100 * lost:.0f} % of the stained structure on image {image_key!r}: pale tissue, such as fat, "
            "would get no spots. Check the mask with hg.pl.tissue(sdata). If tissue is missing, run "
            "hg.pp.tissue(sdata, method='glass')"
        )
    return mask, used


def _clean_pieces(tissue: np.ndarray) -> np.ndarray:
    """Return the mask with numbered pieces, without dust and holes."""
    from skimage.measure import label

    return np.asarray(label(_without_small(~_without_small(~tissue, _HOLE), _DUST), connectivity=2))


def _without_small(mask: np.ndarray, share: float) -> np.ndarray:
    """Remove the pieces of a mask that are smaller than a share of the image."""
    from skimage.measure import label

    pieces = np.asarray(label(mask, connectivity=2))
    large = np.bincount(pieces.ravel()) >= share * mask.size
    large[0] = False
    return large[pieces]


def _warn_of_ink(thumbnail: np.ndarray, mask: np.ndarray, image_key: str) -> None:
    """Warn if part of the mask has the colour of ink."""
    red, green, blue = -np.log((thumbnail.astype(np.float32) + 1) / 256)
    inks = {
        "green or blue, like ink and unlike H&E": thumbnail[1] > thumbnail[0].astype(int) + _INK_STEP,
        "red without violet, like ink or blood": (green > _RED_INK)
        & (blue > _RED_BLUE * green)
        & (red < _RED_RED * green),
    }
    for colour, ink in inks.items():
        share = (ink & mask).sum() / max(1, mask.sum())
        if share > _INK_SHARE:
            warn(
                f"{100 * share:.0f} % of the tissue mask of image {image_key!r} is {colour}: spots there would be predicted from "
                "ink. Check the mask with hg.pl.tissue(sdata) and remove these areas"
            )


def read_thumbnail(sdata: SpatialData, image_key: str, max_pixels: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Read an image reduced to ``max_pixels``, ``(3, h, w)`` uint8, with black and transparent background painted white.

    Also return the number of pixels of level 0 per pixel, along y and x.
    """
    pyramid = pyramid_of(sdata, image_key)
    reduced = read_reduced(pyramid, max_pixels, check_image(pyramid, image_key))
    return reduced, (pyramid.height / reduced.shape[1], pyramid.width / reduced.shape[2])
