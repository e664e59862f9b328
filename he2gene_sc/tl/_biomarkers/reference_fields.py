"""Gene-independent references for a model: effects predicted from the depth, colour and position of the spots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.elements import objects_in
from ..._core.labelled import depth_of
from ..._core.slide import mean_colours
from ..._core.spots import SpotData

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

DEPTH, COLOUR, COORDINATES = "depth", "mean colour", "coordinates"


def fields(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    tables: tuple[AnnData, ...],
    measured: SpotData,
    layer: str,
) -> dict[str, np.ndarray]:
    """Depth (log total counts) and colour (darkness) of every spot, standardised within sections; only fields that all spots have."""
    depth = depth_of(measured, "auto")
    found = {} if depth is None else {DEPTH: depth}
    colours = [mean_colours(item, table, layer) for item, table in zip(objects_in(data), tables, strict=True)]
    known = [c for c in colours if c is not None]
    if len(known) == len(colours):
        rgb = np.concatenate([c[rows] for c, rows in zip(known, measured.rows, strict=True)])
        found[COLOUR] = -rgb.mean(1)
    return {name: standardise_in_sections(values, measured) for name, values in found.items()}


def standardise_in_sections(values: np.ndarray, spots: SpotData) -> np.ndarray:
    """Subtract the mean of the section and divide by its SD; 0 if the SD is 0, and for missing values."""
    column = pd.Series(values)
    sections = column.groupby(spots.units)
    spread = sections.transform("std", ddof=0)
    return ((column - sections.transform("mean")) / spread.where(spread > 0)).fillna(0).to_numpy()


def effects(spots: SpotData, by_spot: dict[str, np.ndarray], groups: Iterable[str], reference: str) -> pd.DataFrame:
    """Mean difference of each field between a group and its reference over samples: one row per field, one column per group."""
    rows: dict[str, dict[str, float]] = {name: {} for name in by_spot}
    if spots.xy is not None:
        rows[COORDINATES] = {}
    for group in groups:
        inside = spots.labels == group
        outside = (spots.labels == reference) if reference != "rest" else ~inside
        masks = [spots.samples == sample for sample in pd.unique(pd.Series(spots.samples))]
        pairs = [(np.flatnonzero(inside & mask), np.flatnonzero(outside & mask)) for mask in masks]
        pairs = [(a, b) for a, b in pairs if len(a) and len(b)]
        for name in rows:
            if name == COORDINATES:
                gaps = [_position_gap(spots, a, b) for a, b in pairs]
            else:
                gaps = [by_spot[name][a].mean() - by_spot[name][b].mean() for a, b in pairs]
            rows[name][group] = float(np.mean(gaps)) if gaps else np.nan
    return pd.DataFrame(rows).T


def _position_gap(spots: SpotData, a: np.ndarray, b: np.ndarray) -> float:
    """Distance between the centres of two groups, in SD of the spots along the line between them."""
    assert spots.xy is not None
    xy = spots.xy[np.concatenate([a, b])]
    gap = spots.xy[a].mean(0) - spots.xy[b].mean(0)
    along = (xy - xy.mean(0)) @ gap
    return float(gap @ gap / along.std()) if along.std() > 0 else 0.0


def mean_expression(measured: SpotData) -> pd.Series:
    """Mean measured expression of each gene over all spots."""
    total = measured.sums(np.zeros(len(measured.labels), int), 1, lambda values: values)[0, 0]
    return pd.Series(total / max(len(measured.labels), 1), index=measured.genes.astype(str))
