"""Colour of each spot, for the baseline that sees nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys
from .._slide import resolve

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Pixels across a spot that are enough to average its colour.
_PX = 32


def spot_colours(sdata: SpatialData, table: AnnData, table_key: str, keys: Keys) -> np.ndarray:
    """Mean and SD of the optical density of three channels in a square as wide as a spot, ``(n_obs, 6)``.

    Image, resolution and coordinate system are those that the prediction was made from. NaN outside the image.

    Raises
    ------
    ValueError
        If the image is not there any more.
    """
    from ..image import PatchReader

    record = table.uns[keys.uns]
    one = isinstance(record["shapes"], str)
    slides = resolve(
        sdata,
        image_key=record["image"],
        shapes_key=record["shapes"] if one else None,
        table_key=table_key,
        coordinate_system=record["coordinate_system"] if one else None,
        mpp=record["mpp"],
    )
    colours = np.full((table.n_obs, 6), np.nan)
    for slide in slides:
        reader = PatchReader(
            slide.pyramid,
            slide.centres[slide.inside],
            slide.mpp,
            windows_um=(slide.diameter_um,),
            input_px=_PX,
            factor=slide.pixel_factor,
        )
        rows = slide.rows[slide.inside]
        for batch in reader:
            density = -np.log((batch.patches[0].reshape(len(batch.index), 3, -1) + 1.0) / 256)
            colours[rows[batch.index]] = np.hstack([density.mean(2), density.std(2)])
    return colours
