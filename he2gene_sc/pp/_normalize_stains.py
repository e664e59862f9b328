"""``hg.pp.normalize_stains``: normalise the stains of an image to those of another, with squidpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._core import logs, validate
from .._core.element_results import check_element_free, replaced_element
from .._core.elements import check_spatialdata
from .._core.images import TissueMask, find_image, pyramid_of
from .._core.keys import ATTRS
from .._core.mpp import attrs_with_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData


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
            fitted = sq.experimental.im.fit_stain_reference(
                _only_image(reference, reference_key, None),
                "image",
                method=method,
                method_params=options.get("method_params"),
            )
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
