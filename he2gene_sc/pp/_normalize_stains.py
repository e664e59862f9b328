"""``hg.pp.normalize_stains``: the stains of one image brought to those of another, by squidpy."""

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
    """Bring the stains of an image to those of a reference slide.

    Calls :func:`squidpy.experimental.im.fit_stain_reference` on the reference and
    :func:`squidpy.experimental.im.normalize_stains` on the image, with our tissue masks.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image and its tissue mask (:func:`he2gene_sc.pp.tissue`).
    reference
        Object whose image has the stains that are wanted, with its tissue mask.
    method
        ``"macenko"``, ``"vahadane"`` or ``"reinhard"``, see squidpy.
    image_key, reference_image_key
        Images; needed where there are several.
    tissue_key
        Tissue mask in ``sdata.labels``; default ``"<image_key>_tissue"``. That of the reference has its default name.
    key_added
        Name of the image; default ``"<image_key>_normalized"``.
    **kwargs
        ``method_params`` and ``preserve_background`` of :func:`squidpy.experimental.im.normalize_stains`. The latter is on for Reinhard,
        which tints glass, and off otherwise, since it needs a mask of full resolution in memory.

    Returns
    -------
    ``None``. Written: ``sdata.images[key_added]``, computed when it is read or saved, in the coordinate systems and with the levels of the
    image; and its µm per pixel. The image itself stays.

    Raises
    ------
    ValueError
        If an image or mask is missing, the stains cannot be told apart, or an element that is not ours has the name ``key_added``.

    Notes
    -----
    Name the image afterwards, since there are two: ``hg.tl.predict(sdata, image_key="he_normalized")``. The models of this package were
    trained on images as they were scanned, and whether normalisation improves a prediction was not measured: compare
    ``obs["he2gene_ood"]`` of both. Every reading of a region computes it anew: save the object before it is read several times.

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
    import squidpy as sq

    image_key = find_image(sdata, None, image_key)
    key_added = f"{image_key}_normalized" if key_added is None else key_added
    check_element_free(sdata, "hg.pp.normalize_stains", "images", key_added)
    source = _alone(sdata, image_key, tissue_key)
    wanted = find_image(reference, None, reference_image_key)
    options: dict[str, Any] = {"preserve_background": method == "reinhard", **kwargs}
    try:
        with logs.silence("spatialdata._logging"):
            fitted = sq.experimental.im.fit_stain_reference(
                _alone(reference, wanted, None),
                "image",
                method=method,
                method_params=options.get("method_params"),
            )
            sq.experimental.im.normalize_stains(source, "image", fitted, image_key_added="normalized", **options)
    except RuntimeError as error:
        raise ValueError(
            f"`sdata` or `reference`: the stains cannot be told apart by {method!r} ({error}); check that both images are H&E and look "
            "at their masks (hg.pl.tissue), or pass method='reinhard'"
        ) from error
    with replaced_element(sdata, "images", key_added, source.images["normalized"]):
        if image_key in (stated := sdata.attrs.get(ATTRS, {}).get("mpp", {})):
            sdata.attrs[ATTRS] = attrs_with_mpp(sdata, key_added, stated[image_key])


def _alone(sdata: SpatialData, image_key: str, tissue_key: str | None) -> SpatialData:
    """Return an object with one image and its mask: squidpy looks at nothing else of it, and puts nothing else into it."""
    from spatialdata import SpatialData
    from spatialdata.models import Labels2DModel

    mask = TissueMask.read(sdata, image_key, tissue_key).resample(pyramid_of(sdata, image_key))
    labels = Labels2DModel.parse(mask.astype(np.uint8), dims=("y", "x"))
    return SpatialData(images={"image": sdata.images[image_key]}, labels={"image_tissue": labels})
