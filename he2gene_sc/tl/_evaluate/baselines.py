"""What the baselines of hg.tl.evaluate read of each spot: class, depth, colour, place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.keys import Keys
from ..._core.logs import logger
from ..._core.slide import colours_of, slides_of
from ...stats._baselines import position
from .aligned import Judged
from .metrics import BASELINES

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def readings(
    data: SpatialData | AnnData,
    table: AnnData,
    judged: Judged,
    asked: Sequence[str] | None,
    annotation_key: str | None,
    keys: Keys,
) -> tuple[dict[str, np.ndarray | None], dict[str, str]]:
    """Gather what each baseline reads of the spots, and why others are left out."""
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
        return colours_of(slides_of(data, table, keys.uns), table, _densities, 6)[judged.rows]
    if name == "coordinates":
        places = np.empty((len(judged.xy), 3))
        for where in judged.sections.values():
            places[where] = position(judged.xy[where])
        return places
    if name == "training mean" and np.isnan(judged.mean).all():
        raise ValueError("the training means are not known")
    return None


def _densities(patches: np.ndarray) -> np.ndarray:
    """Mean and SD of the optical density of three channels, ``(b, 6)``."""
    density = -np.log((patches.reshape(len(patches), 3, -1) + 1.0) / 256)
    return np.hstack([density.mean(2), density.std(2)])
