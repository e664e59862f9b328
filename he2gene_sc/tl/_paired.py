"""Spots that were both predicted, by whatever model, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .._core.duplicates import warn_of_copied_spots
from .._core.expression import Scale
from .._core.keys import PATIENT, SECTION
from .._core.matrix import layer_label
from .._core.ownership import is_prediction
from .._core.predictions import prediction_of, source_layer
from .._core.spots import SpotData, read_spots
from ._biomarkers.pool import labelled_spots
from ._biomarkers.provenance import measured_part
from ._evaluate.genes import model_of
from ._known import trained_on

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def paired_spots(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    layer: str,
    layer_scale: Scale,
    measured: str | None,
    measured_scale: Scale,
    *,
    sample_key: str,
    section_key: str,
    table_key: str | None,
    parameter: str = "data",
) -> tuple[SpotData, SpotData]:
    """Return what was predicted and what was measured at the same spots, of the same genes."""
    if layer == measured:
        raise ValueError(f"`layer` and `measured` are both {layer!r}; a predicted and a measured one are needed")
    by_section = sample_key in (SECTION, section_key)
    spots = read_spots(
        data,
        None,
        "data",
        layer=layer,
        table_key=table_key,
        sample_key=PATIENT if by_section else sample_key,
        section_key=section_key,
        samples_needed=not by_section,
    )
    if by_section:
        # Sections of one name in several patients or objects are several.
        alike = len(set(spots.units)) > len(set(spots.sections))
        spots = replace(spots, samples=spots.units if alike else spots.sections)
    if any(source_layer(table, layer)[1] for table in spots.tables):
        raise ValueError(
            f"`layer` {layer!r} was fitted by hg.tl.adapt to spots that are measured here; name the layer that it was adapted "
            "from"
        )
    if trained := sections_trained_on(spots):
        warnings.warn(
            f"`{parameter}`: sections {sorted(trained)} are in the training set of {', '.join(sorted(set(trained.values())))}, whose errors are "
            "too small there; leave them out",
            UserWarning,
            stacklevel=3,
        )
    spots = labelled_spots(spots, None, layer_scale=layer_scale)
    known, seen = measured_part(spots, measured, measured_scale, "counts")
    if not seen.any():
        raise ValueError(
            f"`measured`: {layer_label(measured)} holds no counts at any spot that has a prediction; "
            "name the layer of measured counts"
        )
    pair = spots.take(seen), replace(known, genes=spots.genes)
    warn_of_copied_spots(*pair, stacklevel=4)
    return pair


def sections_trained_on(spots: SpotData) -> dict[str, str]:
    """Sections that a model of ours was trained on, where that can be told, and its name."""
    seen: dict[str, str] = {}
    for i, table in enumerate(spots.tables):
        record = table.uns.get(prediction_of(table, spots.layer), {})
        model = model_of(record, None)
        if is_prediction(record):
            found = trained_on(record, model, set(spots.sections[spots.objects == i]))
            seen |= dict.fromkeys(found, str(record.get("model")))
    return seen
