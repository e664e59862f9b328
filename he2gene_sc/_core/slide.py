"""``resolve``: find image, spots, table, coordinate system and µm per pixel of a slide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..image import PatchReader
from ..stats import pitch_of
from .elements import Slide, Spots, check_spatialdata, find_shapes, find_table, match_rows, spots_of_element
from .hints import STATE_MPP, use_mpp_hint
from .images import check_image, find_image, pyramid_of, spots_to_pixels
from .keys import OWN_TABLE
from .logs import logger
from .mpp import check_mpp, length_scale, resolve_mpp, transform_points
from .names import annotation_target, as_list
from .predictions import prediction_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Pixels across a spot from which its mean colour is computed.
_COLOUR_PX = 32
#: Least size of a spot on the image; cells and bins, narrower than ``_WIDE_UM``, may have fewer pixels.
_MIN_SPOT_PX, _WIDE_UM, _MIN_SPOT_UM = 8, 40.0, 4.0


def resolve(
    sdata: SpatialData,
    *,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
) -> tuple[Slide, ...]:
    """Find the slides of an object: one for each shapes element that the table annotates.

    A single candidate is used; several raise an error that lists them. ``image_key`` and ``mpp`` may be mappings from
    shapes element.
    """
    check_spatialdata(sdata)
    for value in mpp.values() if isinstance(mpp, Mapping) else (mpp,):
        check_mpp(value)
    if not sdata.images:
        raise ValueError("`sdata` has no image; read one with hg.io.read_he or add it to sdata.images")
    table_key = find_table(sdata, table_key, shapes_key)
    regions = find_shapes(sdata, shapes_key, table_key)
    stated = mpp if isinstance(mpp, Mapping) else dict.fromkeys(regions, mpp)
    if unnamed := [region for region in regions if region not in stated]:
        raise ValueError(f"`mpp` names no value for shapes {unnamed}, it has {sorted(stated)}")
    slides = []
    for key in regions:
        spots = spots_of_element(sdata, key)
        image = find_image(sdata, key, image_key, coordinate_system, spots)
        spot_ids, rows = match_rows(sdata, spots.ids, key, table_key)
        # Labels that the table does not list are not spots.
        order = spots.ids.get_indexer(spot_ids)
        spots = Spots(spot_ids, spots.centres[order], spots.diameters[order])
        system, to_pixels = spots_to_pixels(sdata, image, key, coordinate_system, spots)
        centres = transform_points(spots.centres, to_pixels)
        diameter_px = float(np.median(spots.diameters)) * length_scale(to_pixels)
        pyramid = pyramid_of(sdata, image)
        # In pixels, until µm per pixel are known.
        slide = Slide(
            image_key=image,
            shapes_key=key,
            table_key=table_key,
            coordinate_system=system,
            pyramid=pyramid,
            pixel_factor=1.0,
            mpp=1.0,
            mpp_source="",
            spot_ids=spot_ids,
            rows=rows,
            centres=centres,
            inside=(centres >= 0).all(1) & (centres[:, 0] <= pyramid.width) & (centres[:, 1] <= pyramid.height),
            diameter_um=diameter_px,
        )
        found, source = resolve_mpp(sdata, slide, stated[key], to_pixels)
        slide = replace(slide, mpp=found, mpp_source=source, diameter_um=float(diameter_px * found))
        _check_size(sdata, slide, diameter_px)
        slides.append(replace(slide, pixel_factor=check_image(pyramid, image, centres[slide.inside])))
    return tuple(slides)


def _check_size(sdata: SpatialData, slide: Slide, diameter_px: float) -> None:
    """Raise if spots are too small or too wide for the image."""
    shortest = min(slide.pyramid.height, slide.pyramid.width)
    found = (
        f"`shapes_key` {slide.shapes_key!r}: a spot is {diameter_px:.3g} px wide on image {slide.image_key!r} "
        f"({slide.pyramid.width} × {slide.pyramid.height})"
    )
    if diameter_px > shortest / 2:
        raise ValueError(
            f"{found}; at most {shortest // 2} px are possible. Check the transformations, `coordinate_system` and `image_key`"
        )
    circles = slide.shapes_key in sdata.shapes and "radius" in sdata.shapes[slide.shapes_key].columns
    # Cells and bins are far smaller than the window that is read around them, and which the image has to resolve.
    if slide.diameter_um < _WIDE_UM and (
        not circles or (len(slide.centres) > 1 and pitch_of(slide.centres) < 1.5 * diameter_px)
    ):
        return
    if slide.diameter_um < _MIN_SPOT_UM:
        raise ValueError(
            f"{found}, that is {slide.diameter_um:.3g} µm, smaller than a cell, and spots are not adjacent as bins and cells are. "
            "Check the transformations and `mpp`; for spots of 50 µm: hg.pp.tissue(sdata), "
            "hg.pp.grid(sdata, diameter_um=50, pitch_um=50, key_added='grid'), hg.tl.predict(sdata, shapes_key='grid')"
        )
    if diameter_px < _MIN_SPOT_PX:
        raise ValueError(
            f"{found}, which is too coarse at {slide.mpp:.3g} µm/px: at least {_MIN_SPOT_PX} px are needed, that is "
            f"{slide.diameter_um / _MIN_SPOT_PX:.2g} µm/px or finer. Use the full-resolution image, or check the transformations"
        )


def colours_of(
    slides: Iterable[Slide], table: AnnData, summary: Callable[[np.ndarray], np.ndarray], size: int
) -> np.ndarray:
    """Summarise the pixels ``(b, 3, h, w)`` of each spot, ``(n_obs, size)``; NaN outside the image."""
    attrs = table.uns["spatialdata_attrs"]
    found = np.full((table.n_obs, size), np.nan)
    for slide in slides:
        own = np.flatnonzero((table.obs[attrs["region_key"]] == slide.shapes_key).to_numpy())
        place = pd.Index(table.obs[attrs["instance_key"]].iloc[own]).get_indexer(slide.spot_ids)
        read = slide.inside & (place >= 0)
        if not read.any():
            continue
        reader = PatchReader(
            slide.pyramid,
            slide.centres[read],
            slide.mpp,
            windows_um=(slide.diameter_um,),
            input_px=_COLOUR_PX,
            factor=slide.pixel_factor,
        )
        rows = own[place[read]]
        for batch in reader:
            found[rows[batch.index]] = summary(batch.patches[0])
    return found


def mean_colours(sdata: SpatialData | AnnData, table: AnnData, layer: str | None) -> np.ndarray | None:
    """Return the mean RGB of each spot ``(n_obs, 3)``, from the image that a layer was predicted from; ``None`` if none is found."""
    if not getattr(sdata, "images", None):
        return None
    try:
        slides = slides_of(sdata, table, prediction_of(table, layer))
    except ValueError as error:
        logger.warning("mean colour is not used as a reference: %s", error)
        return None
    return colours_of(slides, table, lambda patches: patches.mean(axis=(2, 3)), 3).astype(np.float32)


def slides_of(sdata: SpatialData, table: AnnData, prediction: str | None = "he2gene") -> tuple[Slide, ...]:
    """Return the slides that a table annotates, one per region; use images that predict recorded, if any."""
    (table_key,) = [key for key, value in sdata.tables.items() if value is table]
    attrs = annotation_target(table)
    if attrs is None:
        raise ValueError(f"table {table_key!r} does not annotate shapes")
    record = table.uns.get(prediction) if prediction is not None else None
    record = record if isinstance(record, Mapping) else {}
    regions = as_list(attrs["region"])
    # Prefer the predicted regions: others may have no image.
    regions = [region for region in regions if region in as_list(record.get("shapes", regions))] or regions
    measured = None if OWN_TABLE in table.uns else table_key
    return tuple(recorded_slide(sdata, record, region, measured) for region in regions)


def recorded_slide(
    sdata: SpatialData,
    record: Mapping[str, Any],
    region: str,
    table_key: str | None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
) -> Slide:
    """Return the slide of a region, with the image, coordinate system and µm/px that predict recorded; arguments have priority."""
    image, system, mpp = (
        value.get(region) if isinstance(value, Mapping) else value
        for value in (record.get(name) for name in ("image", "coordinate_system", "mpp"))
    )
    with use_mpp_hint(STATE_MPP):
        (slide,) = resolve(
            sdata,
            image_key=image_key or image,
            shapes_key=region,
            table_key=table_key,
            coordinate_system=coordinate_system or system,
            mpp=None if mpp is None else float(mpp),
        )
    return slide
