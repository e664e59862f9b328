"""Spots with both predicted expression, of any model, and measured expression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .._core.duplicates import warn_of_copied_spots
from .._core.expression import Scale
from .._core.keys import PATIENT, SECTION
from .._core.labelled import labelled_spots, measured_part
from .._core.logs import warn
from .._core.matrix import layer_label
from .._core.predictions import bundled_model, record_of_layer, source_layer
from .._core.provenance import known_training_sections
from .._core.spots import SpotData, read_spots

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
    """Return predicted and measured expression of the same spots and genes."""
    if layer == measured:
        raise ValueError(
            f"`layer` and `measured` are both {layer!r}; name a layer of predicted and one of measured expression"
        )
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
        # Sections of different patients or objects may share a name.
        names_shared = len(set(spots.units)) > len(set(spots.sections))
        spots = replace(spots, samples=spots.units if names_shared else spots.sections)
    if any(source_layer(table, layer)[1] for table in spots.tables):
        raise ValueError(
            f"`layer` {layer!r} was fitted by hg.tl.adapt to spots that are measured here; pass the layer that it was adapted from"
        )
    warn_of_training_sections(spots, parameter, "its errors are too small there")
    spots = labelled_spots(spots, None, layer_scale=layer_scale)
    truth, has_counts = measured_part(spots, measured, measured_scale, "counts")
    if not has_counts.any():
        raise ValueError(
            f"`measured`: {layer_label(measured)} holds no counts at any spot that has a prediction; "
            "pass the layer of measured counts"
        )
    pair = spots.take(has_counts), replace(truth, genes=spots.genes)
    warn_of_copied_spots(*pair)
    return pair


def warn_of_training_sections(spots: SpotData, parameter: str, consequence: str) -> None:
    """Warn of sections that a model was trained on, if known."""
    if trained := sections_trained_on(spots):
        models = ", ".join(sorted(set(trained.values())))
        warn(
            f"`{parameter}`: sections {sorted(trained)} are in the training set of {models}, so {consequence}; leave these sections out"
        )


def sections_trained_on(spots: SpotData) -> dict[str, str]:
    """Return the sections that one of our models was trained on, if known, with the name of the model."""
    trained: dict[str, str] = {}
    for i, table in enumerate(spots.tables):
        if record := record_of_layer(table, spots.layer):
            own = set(spots.sections[spots.objects == i])
            sections = known_training_sections(record, bundled_model(record), own)
            trained |= dict.fromkeys(sections, str(record.get("model")))
    return trained
