"""Make image elements of SpatialData from arrays of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from .._core.keys import COORDINATE_SYSTEM

if TYPE_CHECKING:
    from xarray import DataArray, DataTree

CHUNK = 1024
#: Least side of the chunks of an image that is read by region, which keeps the dask graph of a whole slide small.
_LAZY_CHUNK = 2048
_MIN_SIDE = 512


def build_levels(image: np.ndarray) -> list[np.ndarray]:
    """Make a pyramid by halving an image ``(3, h, w)`` uint8 in memory until its shorter side is below 1,024 px."""
    from ..image._reader import halve

    levels = [image]
    while min(levels[-1].shape[1:]) >= 2 * _MIN_SIDE:
        levels.append(halve(levels[-1]))
    return levels


def image_element(levels: Sequence[Any]) -> DataArray | DataTree:
    """Make an image element from levels, finest first, in coordinate system ``"global"`` (unit: pixel of level 0).

    Numpy arrays are chunked by 1,024 pixels; images that are read by region by whole tiles, at least 2,048 pixels.
    """
    import dask.array as da
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity, Scale, Sequence
    from xarray import Dataset, DataTree

    from_array: Any = da.from_array  # dask types chunks as text
    full = levels[0].shape
    nodes = {}
    for i, array in enumerate(levels):
        if getattr(array, "reads_regions", False):
            rows, columns = (n * -(-_LAZY_CHUNK // n) for n in array.chunks[1:])
            array = from_array(array, chunks=(3, rows, columns), meta=np.empty((0, 0, 0), np.uint8))
        elif not isinstance(array, da.Array):
            array = _chunked(array)
        y, x = full[1] / array.shape[1], full[2] / array.shape[2]
        transformation = Identity() if i == 0 else Sequence([Scale([y, x], axes=("y", "x")), Identity()])
        level = Image2DModel.parse(
            array,
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={COORDINATE_SYSTEM: transformation},
        )
        level = level.assign_coords(
            y=(np.arange(array.shape[1]) + 0.5) * y,
            x=(np.arange(array.shape[2]) + 0.5) * x,
        )
        nodes[f"scale{i}"] = level
    if len(nodes) == 1:
        return nodes["scale0"]
    tree = DataTree.from_dict({name: Dataset({"image": node}) for name, node in nodes.items()})
    Image2DModel().validate(tree)
    return tree


def _chunked(array: np.ndarray) -> Any:
    """Make a dask array of views of an array that nobody else has: ``dask.array.from_array`` would copy it."""
    import dask.array as da
    from dask.array.core import normalize_chunks, slices_from_chunks

    chunks = normalize_chunks((3, CHUNK, CHUNK), array.shape)
    # Named by us: hashing the pixels for a name would cost more than reading them.
    name = f"he2gene-image-{uuid4().hex}"
    keys = product([name], *(range(len(sizes)) for sizes in chunks))
    views = dict(zip(keys, map(array.__getitem__, slices_from_chunks(chunks)), strict=True))
    make: Any = da.Array  # pyright misreads its constructor
    return make(views, name, chunks=chunks, dtype=array.dtype)
