"""``resolve``: the one place that finds image, spots, table, coordinate system and µm per pixel of a slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..image import Pyramid
from .elements import find_shapes, find_table, match_rows, spot_geometry
from .images import check_image, find_image, pyramid_of, spots_to_pixels
from .mpp import check_mpp, resolve_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData

_MIN_SPOT_PX = 8


@dataclass(frozen=True, eq=False)
class Slide:
    """One image with the spots on it.

    Attributes
    ----------
    image_key, shapes_key, table_key, coordinate_system
        Where things are; ``table_key`` is ``None`` for a slide without a table.
    pyramid
        The image.
    pixel_factor
        What brings its pixels to 0..255.
    mpp, mpp_source
        µm per pixel of level 0, and where that was found.
    spot_ids
        Index of the shapes, ``(n,)``, in the order of the table's rows, or of the shapes where there is no table.
    rows
        Positions of the spots in the table, ``(n,)``; ``None`` without a table.
    centres
        ``(n, 2)``: x and y in pixels of level 0.
    inside
        ``(n,)``: whether the centre lies inside the image.
    diameter_um
        Median diameter of the spots, µm.
    """

    image_key: str
    shapes_key: str
    table_key: str | None
    coordinate_system: str
    pyramid: Pyramid
    pixel_factor: float
    mpp: float
    mpp_source: str
    spot_ids: pd.Index
    rows: np.ndarray | None
    centres: np.ndarray
    inside: np.ndarray
    diameter_um: float


def resolve(
    sdata: SpatialData,
    *,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
) -> tuple[Slide, ...]:
    """Find what has to be predicted.

    One candidate is taken; several raise an error that lists them. A table that annotates several shapes elements
    gives one slide for each.

    Parameters
    ----------
    sdata
        The object.
    image_key
        Image; or a mapping from shapes element to image, where a table annotates several.
    shapes_key
        Spots. Default: those that the table annotates, or the only circles.
    table_key
        Table that annotates the spots. Tables that ``he2gene_sc`` made are no candidates.
    coordinate_system
        System that image and spots share.
    mpp
        µm per pixel of level 0; or a mapping from shapes element to it. Default: the object's own metadata, a coordinate system in µm, or the pitch of a
        known assay, in this order.

    Returns
    -------
    tuple of Slide
        One a shapes element.

    Raises
    ------
    TypeError
        If ``sdata`` is no SpatialData.
    ValueError
        If something is missing, ambiguous, or does not fit together; the message names the parameter.
    """
    from spatialdata import SpatialData

    if not isinstance(sdata, SpatialData):
        raise TypeError(
            f"`sdata` is a {type(sdata).__name__}; a SpatialData object is needed (for an image file: hg.io.read_he)"
        )
    for value in mpp.values() if isinstance(mpp, Mapping) else (mpp,):
        check_mpp(value)
    if not sdata.images:
        raise ValueError("`sdata` holds no image; read one with hg.io.read_he or add it to sdata.images")
    table_key = find_table(sdata, table_key, shapes_key)
    regions = find_shapes(sdata, shapes_key, table_key)
    if isinstance(mpp, Mapping) and (unnamed := [region for region in regions if region not in mpp]):
        raise ValueError(f"`mpp` names no value for shapes {unnamed}, it has {sorted(mpp)}")
    return tuple(
        _resolve_one(
            sdata,
            region,
            table_key,
            image_key,
            coordinate_system,
            mpp[region] if isinstance(mpp, Mapping) else mpp,
        )
        for region in regions
    )


def _resolve_one(
    sdata: SpatialData,
    shapes_key: str,
    table_key: str | None,
    image_key: str | Mapping[str, str] | None,
    coordinate_system: str | None,
    mpp: float | None,
) -> Slide:
    shapes = sdata.shapes[shapes_key]
    image_key = find_image(sdata, shapes_key, image_key, coordinate_system)
    spot_ids, rows = match_rows(sdata, shapes, shapes_key, table_key)
    xy, diameter = spot_geometry(shapes.loc[spot_ids], shapes_key)
    system, to_pixels = spots_to_pixels(sdata, image_key, shapes_key, coordinate_system)
    centres = xy @ to_pixels[:2, :2].T + to_pixels[:2, 2]
    diameter_px = diameter * np.sqrt(abs(np.linalg.det(to_pixels[:2, :2])))
    pyramid = pyramid_of(sdata, image_key)
    mpp, source = resolve_mpp(sdata, image_key, mpp, centres, diameter_px, measured=table_key is not None)
    shortest = min(pyramid.height, pyramid.width)
    if not _MIN_SPOT_PX <= diameter_px <= shortest / 2:
        raise ValueError(
            f"`shapes_key` {shapes_key!r}: a spot is {diameter_px:.3g} px wide on image {image_key!r} "
            f"({pyramid.width} × {pyramid.height}); {_MIN_SPOT_PX} to {shortest // 2} px make sense. "
            "Check the transformations, `coordinate_system` and which image is meant"
        )
    inside = (centres >= 0).all(1) & (centres[:, 0] <= pyramid.width) & (centres[:, 1] <= pyramid.height)
    return Slide(
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=system,
        pyramid=pyramid,
        pixel_factor=check_image(pyramid, image_key, centres[inside]),
        mpp=mpp,
        mpp_source=source,
        spot_ids=spot_ids,
        rows=rows,
        centres=centres,
        inside=inside,
        diameter_um=float(diameter_px * mpp),
    )
