"""``hg.pp.qc`` and ``hg.pp.normalize_stains``: quality and stains of an image, with squidpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import logs, validate
from .._core.element_results import check_element_free, replaced_element, write_element
from .._core.elements import check_spatialdata
from .._core.images import TissueMask, find_image, pyramid_of
from .._core.keys import ATTRS
from .._core.logs import logger
from .._core.mpp import attrs_with_mpp, known_mpp
from .._core.rasters import systems_of
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
        transformations=systems_of(sdata.images[image_key]),
    )
    write_element(sdata, "shapes", key_added, shapes)
    sizes = len(shapes), side * mpp * down, frame["is_tissue"].sum()
    logger.info("qc: %d tiles of %.0f µm, %d on tissue, in shapes %r", *sizes, key_added)


def normalize_stains(
    sdata: SpatialData,
    reference: SpatialData,
    *,
    method: Literal["macenko", "vahadane", "reinhard"] = "macenko",
    image_key: str | None = None,
    reference_image_key: str | None = None,
    tissue_key: str | None = None,
    key_added: str | None = None,
    **kwargs: Any,
) -> None:
    """Normalise the stains of an image to those of a reference slide.

    Calls :func:`squidpy.experimental.im.fit_stain_reference` on the reference and
    :func:`squidpy.experimental.im.normalize_stains` on the image, with our tissue masks.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image and its tissue mask (:func:`he2gene_sc.pp.tissue`).
    reference
        Object with the reference image and its tissue mask.
    method
        ``"macenko"``, ``"vahadane"`` or ``"reinhard"``, see squidpy.
    image_key, reference_image_key
        Images; needed if there are several.
    tissue_key
        Tissue mask in ``sdata.labels``; default ``"<image_key>_tissue"``. The mask of the reference must have its default name.
    key_added
        Name of the new image; default ``"<image_key>_normalized"``.
    **kwargs
        ``method_params`` and ``preserve_background`` of :func:`squidpy.experimental.im.normalize_stains`. The latter defaults to
        ``True`` for Reinhard, which tints glass, else to ``False``, because it needs a full-resolution mask in memory.

    Returns
    -------
    ``None``. Written: ``sdata.images[key_added]``, computed when it is read or saved, in the coordinate systems and with the levels
    of the image; and its µm per pixel. The original image is not changed.

    Raises
    ------
    ValueError
        If an image or mask is missing, the stains cannot be separated, or another element has the name ``key_added``.

    Notes
    -----
    Afterwards there are two images, so pass the name: ``hg.tl.predict(sdata, image_key="he_normalized")``. The models of this package
    were trained on images as scanned. Whether normalisation improves a prediction was not measured: compare ``obs["he2gene_ood"]``
    of both. Each access to a region computes it again: save the object if it is read several times.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata, reference = hg.datasets.toy((4, 4)), hg.datasets.toy((4, 4), seed=1)
    >>> for slide in (sdata, reference):
    ...     hg.pp.tissue(slide)
    >>> hg.pp.normalize_stains(sdata, reference)
    >>> sorted(sdata.images)
    ['he', 'he_normalized']
    """
    validate.arguments(normalize_stains, locals())
    validate.one_of(method, ("macenko", "vahadane", "reinhard"), "method")
    check_spatialdata(reference, "reference")
    validate.known_arguments(kwargs, ("method_params", "preserve_background"), "hg.pp.normalize_stains")
    sq = logs.import_squidpy()

    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_normalized" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.normalize_stains", "images", key_added)
    source = _only_image(sdata, image_key, tissue_key)
    reference_key = find_image(reference, None, reference_image_key)
    options: dict[str, Any] = {"preserve_background": method == "reinhard", **kwargs}
    try:
        with logs.silence("spatialdata._logging"):
            target = _only_image(reference, reference_key, None)
            params = options.get("method_params")
            fitted = sq.experimental.im.fit_stain_reference(target, "image", method=method, method_params=params)
            sq.experimental.im.normalize_stains(source, "image", fitted, image_key_added="normalized", **options)
    except RuntimeError as error:
        raise ValueError(
            f"`sdata` or `reference`: method {method!r} cannot separate the stains ({error}); check that both images are H&E, and "
            "their masks (hg.pl.tissue), or pass method='reinhard'"
        ) from error
    with replaced_element(sdata, "images", key_added, source.images["normalized"]):
        if image_key in (recorded := sdata.attrs.get(ATTRS, {}).get("mpp", {})):
            sdata.attrs[ATTRS] = attrs_with_mpp(sdata, key_added, recorded[image_key])


def _only_image(sdata: SpatialData, image_key: str, tissue_key: str | None) -> SpatialData:
    """Return a new object with one image and its mask, so that squidpy does not read or write other elements."""
    from spatialdata import SpatialData
    from spatialdata.models import Labels2DModel

    mask = TissueMask.read(sdata, image_key, tissue_key).resample(pyramid_of(sdata, image_key))
    labels = Labels2DModel.parse(mask.astype(np.uint8), dims=("y", "x"))
    return SpatialData(images={"image": sdata.images[image_key]}, labels={"image_tissue": labels})
