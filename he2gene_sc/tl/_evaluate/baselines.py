"""Baselines of ``hg.tl.evaluate``, and what they read at each spot: class, depth, colour, coordinates or neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.logs import logger
from ..._core.slide import colours_of, slides_of
from ...stats import _baselines as statistics
from .aligned import AlignedExpression
from .layer import MODEL

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Data that each predictor has seen, also of the slide that it is compared on.
SEEN = {
    MODEL: "the image; expression of its training sections",
    "training mean": "expression of the model's training sections; nothing of this slide",
    "class mean": "labels of this slide; expression of its other spots",
    "total counts": "total counts of every spot of this slide; expression of its other spots",
    "mean colour": "colour of every spot of this slide; expression of the spots of its other parts",
    "coordinates": "place of every spot of this slide; expression of the spots of its other parts",
    "nearest spots": "expression of the neighbouring spots of this slide",
}
BASELINES = tuple(name for name in SEEN if name != MODEL)
#: Predicts measured values ``(n, g)`` of spots of a section, from its name, the positions of the spots and the values.
Predictor = Callable[[str, np.ndarray, np.ndarray], statistics.Baseline]


def baseline_predictors(
    data: SpatialData | AnnData, aligned: AlignedExpression, chosen: Sequence[str] | None, annotation_key: str | None
) -> tuple[dict[str, Predictor | None], dict[str, str]]:
    """Return each baseline (``None``: the training mean), and the reason why each other one is left out."""
    predictors: dict[str, Predictor | None] = {}
    skipped = {}
    for name in BASELINES:
        if chosen is not None and name not in chosen:
            skipped[name] = "not asked for"
            continue
        try:
            predictors[name] = _predictor(name, data, aligned, annotation_key)
        except ValueError as error:
            if chosen is not None:
                raise ValueError(f"`baselines`: {name!r} cannot be computed: {error}") from error
            skipped[name] = str(error)
            logger.info("baseline %r is left out: %s", name, error)
    return predictors, skipped


def _predictor(
    name: str, data: SpatialData | AnnData, aligned: AlignedExpression, annotation_key: str | None
) -> Predictor | None:
    """Return a baseline, ``None`` for the training mean; raise if its input is missing."""
    if name == "training mean":
        if np.isnan(aligned.mean).all():
            raise ValueError("the training means of the genes are unknown")
        return None
    if name == "class mean":
        if annotation_key is None:
            raise ValueError("no `annotation_key` is given")
        codes = pd.factorize(aligned.labels(annotation_key, "annotation_key"))[0]
        return lambda _, spots, measured: statistics.class_mean(measured, codes[spots])
    if name == "total counts":
        depth = aligned.depth
        if depth is None:
            raise ValueError("no counts are given, only logarithms")
        return lambda _, spots, measured: statistics.line(measured, depth[spots])
    if name == "nearest spots":
        return lambda section, _, measured: statistics.neighbours_mean(measured, aligned.weights[section])
    if name == "mean colour":
        if not hasattr(data, "tables"):
            raise ValueError("a SpatialData object with the image is needed; `data` is a table")
        slides = slides_of(data, aligned.table, aligned.keys.uns)
        features = colours_of(slides, aligned.table, _optical_density, 6)[aligned.rows]
    else:
        features = np.empty((len(aligned.xy), 3))
        for spots in aligned.sections.values():
            features[spots] = statistics.position(aligned.xy[spots])
    folds = {s: statistics.tissue_parts(aligned.xy[spots], aligned.pitches[s]) for s, spots in aligned.sections.items()}
    return lambda section, spots, measured: statistics.ridge(measured, features[spots], folds[section])


def _optical_density(patches: np.ndarray) -> np.ndarray:
    """Return mean and SD of the optical density of the three channels, ``(b, 6)``."""
    density = -np.log((patches.reshape(len(patches), 3, -1) + 1.0) / 256)
    return np.hstack([density.mean(2), density.std(2)])
