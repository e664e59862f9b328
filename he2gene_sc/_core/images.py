"""Images of a SpatialData object: which one is meant, its pyramid, and the way from spots to its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..image import Level, Pyramid, check_channel_names, check_pixels
from .mpp import affine

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray


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


def spots_to_pixels(
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


def pyramid_of(sdata: SpatialData, image_key: str) -> Pyramid:
    """Wrap an image of the object, single or multiscale, finest level first."""
    element = sdata.images[image_key]
    nodes = [node["image"] for node in element.values()] if hasattr(element, "children") else [element]
    arrays = sorted(
        (_in_rgb_order(node.transpose("c", "y", "x"), image_key) for node in nodes), key=lambda a: -a.sizes["x"]
    )
    full = arrays[0]
    levels = []
    for array in arrays:
        scale = float(np.sqrt(full.sizes["y"] / array.sizes["y"] * full.sizes["x"] / array.sizes["x"]))
        # Reduced by whole numbers, odd borders are cut off: the ratio of the sizes is off by that much.
        levels.append(Level(array.data, round(scale) if abs(scale - round(scale)) < 0.02 * scale else scale))
    levels[0] = Level(levels[0].array, 1.0)
    return Pyramid(tuple(levels))


def _in_rgb_order(array: DataArray, image_key: str) -> DataArray:
    """Bring channels that are named red, green and blue into that order, alpha last."""
    order = check_channel_names(array.coords["c"].to_numpy().tolist(), image_key) if "c" in array.coords else None
    return array if order is None or order == list(range(len(order))) else array.isel(c=order)


def check_image(pyramid: Pyramid, image_key: str, centres: np.ndarray | None = None) -> float:
    """Check that an image is RGB H&E and return what brings its pixels to 0..255.

    Float images and those with alpha are sampled around some of the ``centres``, or everywhere on their coarsest level.
    """
    array = pyramid.levels[0].array
    sample = None
    if np.dtype(array.dtype).kind == "f" or array.shape[0] == 4:
        if centres is not None and len(centres):
            chosen = centres[np.linspace(0, len(centres) - 1, min(16, len(centres))).astype(int)].astype(int)
            blocks = [array[:, max(0, y - 64) : y + 64, max(0, x - 64) : x + 64] for x, y in chosen]
            sample = np.concatenate([np.asarray(block).reshape(array.shape[0], -1) for block in blocks], axis=1)
        else:
            sample = np.asarray(pyramid.levels[-1].array)
    return check_pixels(int(array.shape[0]), array.dtype, sample, image_key)
