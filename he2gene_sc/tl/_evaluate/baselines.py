"""What the baselines of hg.tl.evaluate read of each spot: class, depth, colour."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.keys import Keys
from ..._core.slide import resolve
from .aligned import Judged
from .metrics import BASELINES

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

#: Pixels across a spot that are enough to average its colour.
_PX = 32


def readings(
    data: SpatialData | AnnData,
    table: AnnData,
    judged: Judged,
    asked: Sequence[str] | None,
    annotation_key: str | None,
    keys: Keys,
) -> tuple[dict[str, np.ndarray | None], dict[str, str]]:
    """Gather what each baseline reads of the spots, and why others are left out.

    Raises
    ------
    ValueError
        If one that was asked for cannot be computed.
    """
    reads: dict[str, np.ndarray | None] = {}
    skipped = {}
    for name in BASELINES:
        if asked is not None and name not in asked:
            skipped[name] = "not asked for"
            continue
        try:
            reads[name] = _reads(name, data, table, judged, annotation_key, keys)
        except ValueError as error:
            if asked is not None:
                raise ValueError(f"`baselines`: {name!r} cannot be computed: {error}") from error
            skipped[name] = str(error)
            logger.info("baseline %r is left out: %s", name, error)
    return reads, skipped


def _reads(
    name: str, data: SpatialData | AnnData, table: AnnData, judged: Judged, annotation_key: str | None, keys: Keys
) -> np.ndarray | None:
    if name == "class mean":
        if annotation_key is None:
            raise ValueError("no `annotation_key` is given")
        return pd.factorize(judged.labels(annotation_key, "annotation_key"))[0]
    if name == "total counts":
        if judged.depth is None:
            raise ValueError("no counts are given, only logarithms")
        return judged.depth
    if name == "mean colour":
        if not hasattr(data, "tables"):
            raise ValueError("a SpatialData object with the image is needed, this is a table alone")
        table_key = next(key for key, value in data.tables.items() if value is table)
        return _colours(data, table, table_key, keys)[judged.rows]
    if name == "training mean" and np.isnan(judged.mean).all():
        raise ValueError("the training means are not known")
    return None


def _colours(sdata: SpatialData, table: AnnData, table_key: str, keys: Keys) -> np.ndarray:
    """Mean and SD of the optical density of three channels in a square as wide as a spot, ``(n_obs, 6)``.

    Image, resolution and coordinate system are those that the prediction was made from. NaN outside the image.

    Raises
    ------
    ValueError
        If the image is not there any more.
    """
    from ...image import PatchReader

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
