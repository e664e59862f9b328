"""``hg.pp.qc``: sharpness and staining of tiles of the image, with squidpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._core import logs, validate
from .._core.element_results import check_element_free, write_element
from .._core.images import TissueMask, find_image, pyramid_of
from .._core.logs import logger
from .._core.mpp import known_mpp
from ._tissue import read_thumbnail

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Maximum number of pixels of the reduced image, and minimum side of a tile in pixels.
_WORKING_PX, _MIN_TILE_PX = 2**24, 16


def qc(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    tissue_key: str | None = None,
    tile_um: float = 200.0,
    mpp: float | None = None,
    key_added: str | None = None,
    **kwargs: Any,
) -> None:
    """Measure sharpness and staining of tiles of the image, before a prediction.

    Calls :func:`squidpy.experimental.im.qc_image` on the image, reduced to at most 17 million pixels, with our tissue mask.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image and its tissue mask (:func:`he2gene_sc.pp.tissue`).
    image_key
        Image; needed if there are several.
    tissue_key
        Tissue mask in ``sdata.labels``; default ``"<image_key>_tissue"``.
    tile_um
        Side of a tile, µm; at least 16 pixels of the reduced image.
    mpp
        µm per pixel of the full-resolution image. Default: from the metadata of the object.
    key_added
        Name of the shapes element; default ``"<image_key>_qc"``.
    **kwargs
        ``metrics``, names such as ``["tenengrad", "entropy"]``, and ``outlier_threshold`` of
        :func:`squidpy.experimental.im.qc_image`.

    Returns
    -------
    ``None``. Written: ``sdata.shapes[key_added]``, one square per tile in the coordinate systems of the image, with squidpy's columns
    ``qc_tenengrad`` and ``qc_var_of_laplacian`` (sharpness), ``qc_entropy``, ``qc_brightness_mean``, ``qc_hematoxylin_mean``,
    ``qc_eosin_mean``, ``unfocus_score``, ``qc_outlier`` and ``is_tissue`` (more than half of the tile). :func:`he2gene_sc.report`
    shows it.

    Raises
    ------
    ValueError
        If image or mask are missing, µm per pixel is unknown, or ``key_added`` is an element that ``qc`` did not make, or that
        was changed since.

    Notes
    -----
    ``qc_outlier`` marks the least sharp tenth of the tissue of *every* slide, also of a good one (``outlier_threshold``). Pale and fatty
    tissue has few edges and is marked first. Compare the numeric columns between slides with the same scanner settings. A whole
    slide is read at several µm per pixel. At this resolution folds, pen and stain are visible, but not a slight blur.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.pp.tissue(sdata)
    >>> hg.pp.qc(sdata)
    >>> bool(sdata["he_qc"]["is_tissue"].any())
    True
    """
    validate.arguments(qc, locals())
    validate.in_range(tile_um, "tile_um", above=0)
    validate.known_arguments(kwargs, ("metrics", "outlier_threshold"), "hg.pp.qc")
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
    from spatialdata.transformations import get_transformation

    sq = logs.import_squidpy()
    if kwargs.get("metrics") is not None:
        valid = {metric.value: metric for metric in sq.experimental.im.QCMetric}
        names = validate.names(kwargs["metrics"], "metrics", one=True)
        kwargs["metrics"] = [valid[validate.one_of(str(name), list(valid), "metrics")] for name in names]
    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_qc" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.qc", "shapes", key_added)
    mpp = known_mpp(sdata, image_key, mpp)
    mask = TissueMask.read(sdata, image_key, tissue_key)
    pixels, (down, across) = read_thumbnail(sdata, image_key, _WORKING_PX)
    tissue = mask.resample(pyramid_of(sdata, image_key), pixels.shape[1:])
    side = max(_MIN_TILE_PX, round(tile_um / (mpp * down)))
    # Use a new object, because squidpy writes to fixed names and replaces elements with these names.
    reduced = SpatialData(
        images={"image": Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        labels={"tissue": Labels2DModel.parse(tissue.astype(np.uint8), dims=("y", "x"))},
    )
    with logs.silence("spatialdata._logging"):
        sq.experimental.im.qc_image(
            reduced, "image", tile_size=(side, side), tissue_mask_key="tissue", progress=False, preview=False, **kwargs
        )
    table = reduced.tables["qc_img_image"]
    frame = table.to_df().assign(unfocus_score=table.obs["unfocus_score"].to_numpy(float))
    frame = frame.assign(**{name: (table.obs[name] == "True").to_numpy() for name in ("qc_outlier", "is_tissue")})
    tiles = reduced.shapes["qc_img_image_grid"].geometry.scale(across, down, origin=(0, 0))
    shapes = ShapesModel.parse(
        GeoDataFrame(frame, geometry=tiles.to_numpy()),
        transformations=get_transformation(sdata.images[image_key], get_all=True),
    )
    write_element(sdata, "shapes", key_added, shapes)
    logger.info(
        "qc: %d tiles of %.0f µm, %d on tissue, in shapes %r",
        len(shapes),
        side * mpp * down,
        frame["is_tissue"].sum(),
        key_added,
    )
