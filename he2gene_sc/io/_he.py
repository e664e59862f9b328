"""``hg.io.read_he``: a bare H&E image as SpatialData."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._core.mpp import check_mpp
from .._keys import ATTRS, IMAGE, check_key
from ._decode import decode
from ._raster import image_element

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")


def read_he(path: str | Path, *, mpp: float | None = None, image_key: str = IMAGE) -> SpatialData:
    """Read an H&E image.

    Tiled TIFF files (OME-TIFF, pyramidal TIFF; svs, ndpi and scn through the optional tiffslide) are opened lazily,
    with the levels they have. JPEG, PNG and stripped TIFF cannot be read by region: they are decoded once, into
    memory, and halved into a pyramid. Orientation tags of photographs are not applied.

    Parameters
    ----------
    path
        jpg, png, tif, OME-TIFF, pyramidal tif; svs, ndpi, scn with ``pip install 'he2gene_sc[svs]'``.
    mpp
        µm per pixel. Default: what the file states (OME, Aperio, metric resolution tags); where it states nothing,
        ``mpp`` has to be given to :func:`he2gene_sc.pp.grid` or :func:`he2gene_sc.tl.predict`.
    image_key
        Name of the image.

    Returns
    -------
    spatialdata.SpatialData
        Image ``image_key`` (uint8, c y x) in the coordinate system ``"global"``, whose unit is one pixel of level 0;
        µm per pixel in ``attrs["he2gene"]["mpp"][image_key]`` where known. No spots: see :func:`he2gene_sc.pp.grid`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no RGB H&E image, or ``mpp`` is not positive.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.io.read_he("slide.tif", mpp=0.5)  # doctest: +SKIP
    >>> hg.pp.tissue(sdata)
    ... hg.pp.grid(sdata)
    ... hg.tl.predict(sdata)  # doctest: +SKIP
    """
    from spatialdata import SpatialData

    check_key(image_key, "image_key")
    check_mpp(mpp)
    decoded = decode(Path(path).expanduser())
    found = mpp if mpp is not None else decoded.mpp
    sdata = SpatialData(images={image_key: image_element(decoded.levels)})
    if found is not None and np.isfinite(found) and found > 0:
        sdata.attrs[ATTRS] = {"mpp": {image_key: float(found)}}
        logger.info("image %r: %.4g µm/px (%s)", image_key, found, "argument" if mpp is not None else "file")
    else:
        logger.warning("image %r states no µm/px: pass mpp= to hg.io.read_he, hg.pp.grid or hg.tl.predict", image_key)
    return sdata
