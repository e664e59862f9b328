"""``hg.pp.grid``: pseudo-spots over the tissue of an image without spots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.element_results import check_element_free, write_element
from .._core.elements import regions_of
from .._core.images import TissueMask, find_image, pyramid_of
from .._core.keys import SPOTS
from .._core.logs import logger
from .._core.mpp import attrs_with_mpp, known_mpp
from .._core.rasters import systems_of

if TYPE_CHECKING:
    from spatialdata import SpatialData


def grid(
    sdata: SpatialData,
    *,
    diameter_um: float = 100.0,
    pitch_um: float = 100.0,
    mpp: float | None = None,
    image_key: str | None = None,
    tissue_key: str | None = None,
    min_tissue: float = 0.5,
    key_added: str = SPOTS,
) -> None:
    """Create a square grid of pseudo-spots over the tissue.

    Parameters
    ----------
    sdata
        Object with an image and its tissue mask (:func:`he2gene_sc.pp.tissue`).
    diameter_um, pitch_um
        Diameter of the spots and distance between their centres, µm.
    mpp
        µm per pixel of the full-resolution image. Default: from the metadata of the object.
    image_key
        Image; needed if there are several.
    tissue_key
        Tissue mask in ``sdata.labels``; default ``"<image_key>_tissue"``.
    min_tissue
        Least share of a spot (of its bounding square) that is tissue, above 0, at most 1.
    key_added
        Name of the shapes element.

    Returns
    -------
    ``None``. Written: ``sdata.shapes[key_added]``, circles in the coordinate systems of the image; and µm per pixel
    in ``sdata.attrs["he2gene"]``, for the prediction.

    Raises
    ------
    ValueError
        If µm per pixel is unknown, the mask is missing or shares no coordinate system with the image, a size is not positive, the
        name belongs to an element that ``grid`` did not make, that was changed since or that a table annotates, or no spot is on
        tissue.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.pp.tissue(sdata)
    >>> hg.pp.grid(sdata, diameter_um=100, key_added="bins")
    >>> len(sdata["bins"]) > 0
    True
    """
    validate.arguments(grid, locals())
    from scipy.ndimage import uniform_filter
    from spatialdata.models import ShapesModel

    image_key = find_image(sdata, None, image_key)
    check_element_free(sdata, "hg.pp.grid", "shapes", key_added)
    validate.in_range(diameter_um, "diameter_um", above=0)
    validate.in_range(pitch_um, "pitch_um", above=0)
    validate.in_range(min_tissue, "min_tissue", above=0, most=1, what="a share")
    mpp = known_mpp(sdata, image_key, mpp)
    pyramid = pyramid_of(sdata, image_key)
    diameter, pitch = diameter_um / mpp, pitch_um / mpp
    if diameter < 8:
        raise ValueError(
            f"`diameter_um` {diameter_um:g} is {diameter:.3g} px at {mpp:.4g} µm/px; at least 8 px are needed"
        )
    mask = TissueMask.read(sdata, image_key, tissue_key)
    # Pixels of the mask per pixel of the image, along y and x.
    scale = np.linalg.norm(mask.to_mask[:2, :2], axis=1)[::-1]
    share = uniform_filter(
        mask.values.astype(np.float32), np.maximum(1, np.rint(diameter * scale)).astype(int), mode="constant"
    )
    y, x = np.meshgrid(
        np.arange(pitch / 2, pyramid.height, pitch), np.arange(pitch / 2, pyramid.width, pitch), indexing="ij"
    )
    on_tissue = mask.sample(x, y, share) >= min_tissue - 1e-6
    if not on_tissue.any():
        raise ValueError(
            f"`tissue_key`: no spot of {diameter_um:g} µm is on tissue; check the mask with hg.pl.tissue(sdata)"
        )
    i, j = np.nonzero(on_tissue)
    shapes = ShapesModel.parse(
        np.column_stack([x[on_tissue], y[on_tissue]]),
        geometry=0,
        radius=diameter / 2,
        index=pd.Index([f"{b}x{a}" for a, b in zip(i, j, strict=True)]),
        transformations=systems_of(sdata.images[image_key]),
    )
    if key_added in sdata.shapes and any(key_added in regions_of(table, sdata) for table in sdata.tables.values()):
        before = sdata.shapes[key_added]
        if not (before.index.equals(shapes.index) and before.geom_equals(shapes, align=False).all()):
            raise ValueError(
                f"`key_added` {key_added!r} is a shapes element with other spots, which a table annotates; delete that table or "
                "choose another key"
            )
    write_element(sdata, "shapes", key_added, shapes, attrs_with_mpp(sdata, image_key, mpp))
    logger.info("grid: %d spots of %g µm, %g µm apart", len(shapes), diameter_um, pitch_um)
