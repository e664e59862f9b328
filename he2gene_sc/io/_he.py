"""``hg.io.read_he``: read an H&E image as SpatialData."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._core import validate
from .._core.hints import mpp_hint, use_mpp_hint
from .._core.keys import ATTRS, IMAGE, check_key
from .._core.logs import logger, warn
from .._core.mpp import attrs_with_mpp, check_mpp
from ._decode import decode
from ._raster import image_element

if TYPE_CHECKING:
    from spatialdata import SpatialData


def read_he(path: str | Path, *, mpp: float | None = None, image_key: str = IMAGE) -> SpatialData:
    """Read an H&E image.

    Tiled TIFF files (OME-TIFF, pyramidal TIFF, svs, ndpi, scn) are read by region, with their levels. If a file holds
    several images, the largest RGB image is read. JPEG, PNG and stripped TIFF cannot be read by region: they are decoded
    once, into memory, and downscaled to a pyramid. An image that is stored mirrored or rotated (EXIF, TIFF orientation) is
    turned upright with a warning; spots have to be in that frame. Ink (CMYK) and palettes are converted to RGB.

    Parameters
    ----------
    path
        jpg, png, tif, OME-TIFF, pyramidal tif, svs, ndpi or scn. A file that is read by region has to stay where it is.
    mpp
        µm per pixel. Default: the value in the file (OME, Aperio, metric resolution tags). Without one, pass ``mpp`` to
        :func:`he2gene_sc.pp.grid` or :func:`he2gene_sc.tl.predict`.
    image_key
        Name of the image.

    Returns
    -------
    spatialdata.SpatialData
        Image ``image_key`` (uint8, c y x) in the coordinate system ``"global"``, whose unit is one pixel of level 0;
        µm per pixel, if known, in ``attrs["he2gene"]["mpp"][image_key]``. No spots: see :func:`he2gene_sc.pp.grid`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If the file is damaged, or its compression is unknown. A damaged tile inside a slide may only be found when it is
        read.
    ValueError
        If the file is not an RGB H&E image, or ``mpp`` is not positive.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.io.read_he("slide.tif", mpp=2.0)
    >>> hg.pp.tissue(sdata)
    >>> hg.pp.grid(sdata)
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    """
    validate.arguments(read_he, locals())
    from spatialdata import SpatialData

    check_key(image_key, "image_key")
    check_mpp(mpp)
    decoded = decode(validate.folder_or_file(path, "path"))
    found = mpp if mpp is not None else decoded.mpp
    if decoded.orientation != 1:
        warn(
            f"image {image_key!r} is stored mirrored or rotated (orientation {decoded.orientation}) and was turned upright: "
            "spots that refer to the stored pixels are misplaced"
        )
    sdata = SpatialData(images={image_key: image_element(decoded.levels)})
    if found is not None:
        sdata.attrs[ATTRS] = attrs_with_mpp(sdata, image_key, found)
        logger.info("image %r: %.4g µm/px (%s)", image_key, found, "argument" if mpp is not None else "file")
    else:
        with use_mpp_hint("pass mpp= to hg.io.read_he, hg.pp.grid or hg.tl.predict"):
            logger.warning("image %r has no µm/px: %s", image_key, mpp_hint(image_key))
    return sdata
