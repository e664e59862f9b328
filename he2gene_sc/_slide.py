"""``resolve``: the one place that finds image, spots, table, coordinate system and µm per pixel of a slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._keys import MADE
from ._mpp import affine, check_mpp, resolve_mpp
from .image import Level, Pyramid, check_pixels

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

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
    regions = _find_shapes(sdata, shapes_key, table_key)
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


def find_table(sdata: SpatialData, table_key: str | None = None, shapes_key: str | None = None) -> str | None:
    """Name of the measured table; ``None`` where there is none.

    Raises
    ------
    ValueError
        If ``table_key`` is not there or annotates no shapes, or several tables could be meant.
    """
    if table_key is not None:
        if table_key not in sdata.tables:
            raise ValueError(f"`table_key` {table_key!r} not found, valid keys: {sorted(sdata.tables)}")
        if not regions_of(sdata[table_key], sdata):
            raise ValueError(f"`table_key` {table_key!r} annotates no shapes of this object: {sorted(sdata.shapes)}")
        return table_key
    found = [
        key
        for key, table in sdata.tables.items()
        if MADE not in table.uns
        and (regions := regions_of(table, sdata))
        and (shapes_key is None or shapes_key in regions)
    ]
    if len(found) > 1:
        raise ValueError(f"`table_key` is ambiguous, candidates: {sorted(found)}")
    return found[0] if found else None


def regions_of(table: AnnData, sdata: SpatialData) -> list[str]:
    """Shapes elements of ``sdata`` that a table annotates."""
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        return []
    region = attrs["region"]
    return [key for key in ([region] if isinstance(region, str) else list(region)) if key in sdata.shapes]


def _find_shapes(sdata: SpatialData, shapes_key: str | None, table_key: str | None) -> list[str]:
    if shapes_key is not None:
        if shapes_key not in sdata.shapes:
            raise ValueError(f"`shapes_key` {shapes_key!r} not found, valid keys: {sorted(sdata.shapes)}")
        if table_key is not None and shapes_key not in regions_of(sdata[table_key], sdata):
            raise ValueError(
                f"`table_key` {table_key!r} annotates {regions_of(sdata[table_key], sdata)}, not `shapes_key` {shapes_key!r}"
            )
        return [shapes_key]
    if table_key is not None:
        return regions_of(sdata[table_key], sdata)
    circles = [key for key, element in sdata.shapes.items() if "radius" in element.columns]
    if not circles:
        raise ValueError(
            "`sdata` holds no spots (circles in sdata.shapes); make pseudo-spots with hg.pp.tissue(sdata), hg.pp.grid(sdata)"
        )
    if len(circles) > 1:
        raise ValueError(f"`shapes_key` is ambiguous, candidates: {sorted(circles)}")
    return circles


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
    spot_ids, rows = _match_rows(sdata, shapes, shapes_key, table_key)
    xy, diameter = _geometry(shapes.loc[spot_ids], shapes_key)
    system, to_pixels = _spots_to_pixels(sdata, image_key, shapes_key, coordinate_system)
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


def find_image(
    sdata: SpatialData,
    shapes_key: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    coordinate_system: str | None = None,
) -> str:
    """Name of the image; where there are several, of the only one in a coordinate system of the spots.

    Raises
    ------
    ValueError
        If it is not there, or several could be meant.
    """
    from spatialdata.transformations import get_transformation

    if isinstance(image_key, Mapping):
        if shapes_key not in image_key:
            raise ValueError(f"`image_key` names no image for shapes {shapes_key!r}, it has {sorted(image_key)}")
        image_key = image_key[shapes_key]
    if image_key is not None:
        if image_key not in sdata.images:
            raise ValueError(f"`image_key` {image_key!r} not found, valid keys: {sorted(sdata.images)}")
        return image_key
    candidates = list(sdata.images)
    if shapes_key is not None and len(candidates) > 1:
        systems = set(get_transformation(sdata.shapes[shapes_key], get_all=True))
        if coordinate_system is not None:
            systems &= {coordinate_system}
        candidates = [k for k in candidates if systems & set(get_transformation(sdata.images[k], get_all=True))]
    if not candidates:
        raise ValueError(
            f"`image_key`: no image shares a coordinate system with shapes {shapes_key!r}; images: {sorted(sdata.images)}"
        )
    if len(candidates) > 1:
        raise ValueError(f"`image_key` is ambiguous, candidates: {sorted(candidates)}")
    return candidates[0]


def _spots_to_pixels(
    sdata: SpatialData, image_key: str, shapes_key: str, coordinate_system: str | None
) -> tuple[str, np.ndarray]:
    """Compose shapes → coordinate system → image, level 0."""
    from spatialdata.transformations import get_transformation

    image, shapes = sdata.images[image_key], sdata.shapes[shapes_key]
    of_shapes = set(get_transformation(shapes, get_all=True))
    shared = sorted(of_shapes & set(get_transformation(image, get_all=True)), key=lambda s: (s != "global", s))
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ValueError(
                f"`coordinate_system` {coordinate_system!r} is not shared by image {image_key!r} and shapes {shapes_key!r}, "
                f"valid: {shared}"
            )
        shared = [coordinate_system]
    if not shared:
        raise ValueError(
            f"`coordinate_system`: image {image_key!r} and shapes {shapes_key!r} share none; set one with "
            "spatialdata.transformations.set_transformation"
        )
    matrices = {}
    for system in shared:
        of_image = affine(image, system)
        if abs(np.linalg.det(of_image)) < 1e-12:
            raise ValueError(f"`coordinate_system` {system!r}: the transformation of image {image_key!r} is singular")
        matrices[system] = np.linalg.inv(of_image) @ affine(shapes, system)
    first = matrices[shared[0]]
    # Corners of the spots must land on the same pixel through every shared system, else the choice matters.
    left, top, right, bottom = shapes.total_bounds
    corners = np.array([[left, top, 1], [right, bottom, 1], [left, bottom, 1]]).T
    if any(np.abs((matrix - first) @ corners)[:2].max() > 0.5 for matrix in matrices.values()):
        raise ValueError(
            f"`coordinate_system` is ambiguous: image {image_key!r} and shapes {shapes_key!r} share {shared}, which put the "
            "spots on different pixels"
        )
    return shared[0], first


def _match_rows(
    sdata: SpatialData, shapes: GeoDataFrame, shapes_key: str, table_key: str | None
) -> tuple[pd.Index, np.ndarray | None]:
    """Ids of the spots in the order of the table's rows, and those rows."""
    if len(shapes) == 0:
        raise ValueError(f"`shapes_key` {shapes_key!r} holds no spots")
    if shapes.index.has_duplicates:
        raise ValueError(
            f"`shapes_key` {shapes_key!r} has duplicated ids: {_some(shapes.index[shapes.index.duplicated()])}"
        )
    if table_key is None:
        return shapes.index, None
    table = sdata[table_key]
    attrs = table.uns["spatialdata_attrs"]
    rows = np.flatnonzero((table.obs[attrs["region_key"]] == shapes_key).to_numpy())
    ids = pd.Index(table.obs[attrs["instance_key"]].iloc[rows])
    where = f"`table_key` {table_key!r} and `shapes_key` {shapes_key!r} do not match"
    if ids.has_duplicates:
        raise ValueError(f"{where}: duplicated ids in the table: {_some(ids[ids.duplicated()])}")
    extra, missing = ids.difference(shapes.index), shapes.index.difference(ids)
    if len(extra):
        hint = "" if ids.dtype == shapes.index.dtype else f" (ids are {ids.dtype} there, {shapes.index.dtype} here)"
        raise ValueError(f"{where}: {len(extra)} extra ids in the table that are no spots: {_some(extra)}{hint}")
    if len(missing):
        raise ValueError(
            f"{where}: {len(missing)} spots are missing from the table: {_some(missing)}. "
            "If the table was filtered, filter the shapes too: "
            f"sdata[{shapes_key!r}] = spatialdata.match_element_to_table(sdata, {shapes_key!r}, {table_key!r})[0][{shapes_key!r}]"
        )
    return ids, rows


def _some(values: pd.Index) -> str:
    shown = ", ".join(repr(v) for v in values[:5].tolist())
    return shown + (f", … ({len(values)} in all)" if len(values) > 5 else "")


def _geometry(shapes: GeoDataFrame, shapes_key: str) -> tuple[np.ndarray, float]:
    """Centres ``(n, 2)`` and median diameter in the units of the element."""
    points = shapes.geometry.centroid
    xy = np.column_stack([points.x, points.y]).astype(float)
    bad = ~np.isfinite(xy).all(1)
    if bad.any():
        raise ValueError(
            f"`shapes_key` {shapes_key!r} has NaN or infinite coordinates in {int(bad.sum())} spots: {_some(shapes.index[bad])}"
        )
    if "radius" in shapes.columns:
        diameters = 2 * shapes["radius"].to_numpy(dtype=float)
    else:
        diameters = np.sqrt(shapes.geometry.area.to_numpy(dtype=float))
    diameter = float(np.median(diameters))
    if not (np.isfinite(diameter) and diameter > 0):
        raise ValueError(f"`shapes_key` {shapes_key!r}: the spots have a diameter of {diameter}; circles are needed")
    return xy, diameter


def pyramid_of(sdata: SpatialData, image_key: str) -> Pyramid:
    """Wrap an image of the object, single or multiscale, finest level first."""
    element = sdata.images[image_key]
    nodes = [node["image"] for node in element.values()] if hasattr(element, "children") else [element]
    arrays = sorted((_in_rgb_order(node.transpose("c", "y", "x")) for node in nodes), key=lambda a: -a.sizes["x"])
    full = arrays[0]
    levels = []
    for array in arrays:
        scale = float(np.sqrt(full.sizes["y"] / array.sizes["y"] * full.sizes["x"] / array.sizes["x"]))
        # Reduced by whole numbers, odd borders are cut off: the ratio of the sizes is off by that much.
        levels.append(Level(array.data, round(scale) if abs(scale - round(scale)) < 0.02 * scale else scale))
    levels[0] = Level(levels[0].array, 1.0)
    return Pyramid(tuple(levels))


def _in_rgb_order(array: DataArray) -> DataArray:
    """Bring channels that are named red, green and blue into that order, alpha last."""
    names = [str(name).lower()[:1] for name in array.coords["c"].to_numpy()] if "c" in array.coords else []
    if sorted(names) not in (sorted("rgb"), sorted("rgba")) or names == list("rgba")[: len(names)]:
        return array
    return array.isel(c=[names.index(name) for name in "rgba"[: len(names)]])


def check_image(pyramid: Pyramid, image_key: str, centres: np.ndarray | None = None) -> float:
    """Check that an image is RGB H&E and return what brings its pixels to 0..255.

    Float images are sampled around some of the ``centres``, or everywhere on their coarsest level.
    """
    array = pyramid.levels[0].array
    sample = None
    if np.dtype(array.dtype).kind == "f":
        if centres is not None and len(centres):
            chosen = centres[np.linspace(0, len(centres) - 1, min(16, len(centres))).astype(int)].astype(int)
            blocks = [array[:, max(0, y - 64) : y + 64, max(0, x - 64) : x + 64] for x, y in chosen]
            sample = np.concatenate([np.asarray(block).reshape(array.shape[0], -1) for block in blocks], axis=1)
        else:
            sample = np.asarray(pyramid.levels[-1].array)
    return check_pixels(int(array.shape[0]), array.dtype, sample, image_key)
