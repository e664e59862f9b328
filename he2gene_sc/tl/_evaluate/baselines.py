"""Inputs of the baselines of ``hg.tl.evaluate`` at each spot: class, depth, colour or coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.keys import Keys
from ..._core.logs import logger
from ..._core.slide import colours_of, slides_of
from ...stats._baselines import position
from .aligned import AlignedExpression
from .metrics import BASELINES

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def baseline_inputs(
    data: SpatialData | AnnData,
    table: AnnData,
    aligned: AlignedExpression,
    chosen: Sequence[str] | None,
    annotation_key: str | None,
    keys: Keys,
) -> tuple[dict[str, np.ndarray | None], dict[str, str]]:
    """Return the input of each baseline, and the reason why each other baseline is left out."""
    inputs: dict[str, np.ndarray | None] = {}
    skipped = {}
    for name in BASELINES:
        if chosen is not None and name not in chosen:
            skipped[name] = "not asked for"
            continue
        try:
            inputs[name] = _input(name, data, table, aligned, annotation_key, keys)
        except ValueError as error:
            if chosen is not None:
                raise ValueError(f"`baselines`: {name!r} cannot be computed: {error}") from error
            skipped[name] = str(error)
            logger.info("baseline %r is left out: %s", name, error)
    return inputs, skipped


def _input(
    name: str,
    data: SpatialData | AnnData,
    table: AnnData,
    aligned: AlignedExpression,
    annotation_key: str | None,
    keys: Keys,
) -> np.ndarray | None:
    """Return the input of a baseline, ``None`` if it needs none; raise if the input is missing."""
    if name == "class mean":
        if annotation_key is None:
            raise ValueError("no `annotation_key` is given")
        return pd.factorize(aligned.labels(annotation_key, "annotation_key"))[0]
    if name == "total counts":
        if aligned.depth is None:
            raise ValueError("no counts are given, only logarithms")
        return aligned.depth
    if name == "mean colour":
        if not hasattr(data, "tables"):
            raise ValueError("a SpatialData object with the image is needed; `data` is a table")
        return colours_of(slides_of(data, table, keys.uns), table, _optical_density, 6)[aligned.rows]
    if name == "coordinates":
        coordinates = np.empty((len(aligned.xy), 3))
        for spots in aligned.sections.values():
            coordinates[spots] = position(aligned.xy[spots])
        return coordinates
    if name == "training mean" and np.isnan(aligned.mean).all():
        raise ValueError("the training means of the genes are unknown")
    return None


def _optical_density(patches: np.ndarray) -> np.ndarray:
    """Return mean and SD of the optical density of the three channels, ``(b, 6)``."""
    density = -np.log((patches.reshape(len(patches), 3, -1) + 1.0) / 256)
    return np.hstack([density.mean(2), density.std(2)])
