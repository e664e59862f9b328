"""Align predicted and measured expression for ``hg.tl.evaluate``: the same spots and genes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse

from ..._core import validate
from ..._core.elements import find_table
from ..._core.expression import Scale, as_logs, log_expression
from ..._core.keys import OWN_TABLE, PATIENT, SECTION, Keys
from ..._core.logs import warn
from ..._core.matrix import take, values_of
from ..._core.names import annotation_target, column_of, names_of
from ..._core.predictions import symbols_of
from ..._core.provenance import known_training_sections
from ..._core.spots import has_samples, sections_of, spots_of, unique_section_names
from ...stats import neighbour_weights, pitch_of
from .layer import EvaluatedLayer, find_layer, genes_in_common, other_layer, training_facts

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ...models import HE2Gene

#: Sections with fewer spots are left out.
MIN_SPOTS = 10
#: Row of the table ``left_out`` for spots with labels that are not classes of the model.
UNKNOWN_LABELS = "labels that the model does not know"
#: Row of the table ``left_out`` for spots that an adapted layer was fitted on.
FITTED_SPOTS = "spots that hg.tl.adapt was fitted on"


@dataclass(frozen=True, eq=False)
class AlignedExpression:
    """Predicted and measured expression of ``g`` genes at the same ``n`` spots."""

    table: AnnData  # with the prediction
    keys: Keys  # of the prediction
    columns: np.ndarray  # of the predicted table, (g,)
    rows: np.ndarray  # of the predicted table, (n,)
    predicted: np.ndarray  # (n, g) float32, natural log of (1 + counts per 10,000)
    measured: np.ndarray
    counts: Any  # raw counts of all measured genes (n, G); None if logarithms were given
    count_columns: np.ndarray  # columns of the g genes in `counts`
    source: AnnData  # the measured table
    source_rows: np.ndarray  # of the measured table, (n,)
    xy: np.ndarray  # spot centres, (n, 2)
    sections: dict[str, np.ndarray]  # positions of the spots of each section
    pitches: dict[str, float]  # median distance of neighbouring spots by section, in the unit of xy
    mean: np.ndarray  # of each gene in training; NaN if unknown
    panels: dict[str, np.ndarray]  # mask of the genes of each panel
    trained_on: list[str]  # sections that the model was trained on, if known
    n_left_out: dict[str, int]
    predictor: str  # name of the evaluated layer in the tables
    n_fitted: int | None  # spots that the layer was adapted to, all left out; None if unknown

    @cached_property
    def depth(self) -> np.ndarray | None:
        """Natural log of the total counts of each spot, or ``None`` without counts."""
        return None if self.counts is None else np.log(np.asarray(self.counts.sum(axis=1), np.float64).ravel())

    @cached_property
    def weights(self) -> dict[str, scipy.sparse.csr_array]:
        """Neighbour weights of the spots of each section."""
        return {name: neighbour_weights(self.xy[spots], self.pitches[name]) for name, spots in self.sections.items()}

    @cached_property
    def array_positions(self) -> np.ndarray:
        """Row and column of each spot on the array ``(2, n)``, from ``obs`` or else from the spot centres."""
        obs = self.source.obs.iloc[self.source_rows]
        if {"array_row", "array_col"} <= set(obs):
            positions = obs[["array_row", "array_col"]].to_numpy(float)
            if np.isfinite(positions).all():
                return np.rint(positions).astype(int).T
        cells = np.empty(self.xy.shape, int)
        for name, spots in self.sections.items():
            cells[spots] = np.rint((self.xy[spots] - self.xy[spots].min(0)) / self.pitches[name]).astype(int)
        return cells.T[::-1]

    def labels(self, key: str, parameter: str) -> pd.Series:
        """Return the cleaned names in a column of ``obs``, ``(n,)``; ``None`` for spots without a name."""
        what = "samples" if parameter == "sample_key" else "labels"
        names = names_of(self.source, key, parameter, what=what)[self.source_rows]
        return pd.Series(names, index=self.source.obs_names[self.source_rows], dtype=object)


def align_expression(
    data: SpatialData | AnnData,
    table: AnnData,
    keys: Keys,
    name: str,
    measured: str | None,
    measured_scale: Scale,
    *,
    other_scale: Scale | None = None,
    genes: Sequence[str] | None = None,
    sample_key: str = PATIENT,
    section_key: str = SECTION,
    model: str | Path | HE2Gene | None = None,
    gene_symbols: str | None = None,
) -> AlignedExpression:
    """Align layer ``name`` and measured expression: the same genes, and spots that have both.

    ``other_scale``: scale of a layer that another model predicted; ``None`` for layers of the prediction of ``keys``.
    """
    layer = find_layer(table, keys, name, model) if other_scale is None else other_layer(table, name, other_scale)
    source, rows, source_rows = _measured_table(data, table, layer.name, measured)
    gene_symbols = symbols_of(source, layer.record, gene_symbols)
    columns, source_columns = genes_in_common(table, source, layer.is_predicted, genes, gene_symbols)
    predicted = as_logs(layer.values, "log", columns) if other_scale is None else take(layer.values.T, columns).T
    truth = log_expression(
        source, measured, genes=source_columns, scale=measured_scale, expected="counts", parameter="measured"
    )
    counts = None if measured_scale == "log" else values_of(source, measured, "measured")
    if counts is None:
        has_counts = np.any(np.isfinite(truth), axis=1)[source_rows]
    else:
        has_counts = (np.asarray(counts.sum(axis=1)).ravel() > 0)[source_rows]
    has_prediction = np.any(np.isfinite(predicted), axis=1)[rows]
    section = _sections(source, section_key, sample_key)[source_rows]
    fitted = np.zeros(len(rows), bool) if layer.fitted_on is None else layer.fitted_on[rows]
    kept, n_left_out = _select_spots(layer, section, has_prediction, has_counts, fitted)
    n_left_out["genes not predicted"] = source.n_vars - len(columns) if genes is None else 0
    # The pitch is that of the array: spots that are left out would leave holes.
    on_array = has_prediction & has_counts
    rows_of = {name: rows[on_array & (section == name)] for name in pd.unique(section[kept])}
    pitches = {str(name): pitch_of(spots_of(table[own])) for name, own in rows_of.items()}
    if overlapping := [name for name, pitch in pitches.items() if not pitch > 0]:
        raise ValueError(
            f"obsm['spatial']: most spots of sections {validate.format_list(overlapping)} lie on top of each other"
        )
    sections = {str(name): np.flatnonzero(section[kept] == name) for name in rows_of}
    rows, source_rows = rows[kept], source_rows[kept]
    trained_on = known_training_sections(layer.record, layer.model, sections)
    if trained_on:
        warn(
            f"sections {trained_on} are in the training set of {layer.record.get('model')}: their metrics are optimistic"
        )
    mean, panels = np.full(len(columns), np.nan), {"all genes": np.ones(len(columns), bool)}
    if other_scale is None:
        mean, panels = training_facts(table, columns, keys, layer.model, gene_symbols)
    return AlignedExpression(
        table=table,
        keys=keys,
        columns=columns,
        rows=rows,
        predicted=take(predicted, rows),
        measured=take(truth, source_rows),
        counts=None if counts is None else take(counts, source_rows),
        count_columns=source_columns,
        source=source,
        source_rows=source_rows,
        xy=spots_of(table[rows]),
        sections=sections,
        pitches=pitches,
        mean=mean,
        panels=panels,
        trained_on=trained_on,
        n_left_out=n_left_out,
        predictor=layer.predictor,
        n_fitted=n_left_out.get(FITTED_SPOTS, 0) if layer.fitted_on is not None else None,
    )


def _select_spots(
    layer: EvaluatedLayer, section: np.ndarray, has_prediction: np.ndarray, has_counts: np.ndarray, fitted: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Return spots with both values that the layer was not fitted on, in large sections; and the number of others."""
    both = has_prediction & has_counts
    fitted, used = both & fitted, both & ~fitted
    if fitted.any() and not used.any():
        raise ValueError(
            f"`layer` {layer.name!r} was adapted to all {int(fitted.sum())} spots that were predicted and measured; no spot is "
            "left for the comparison"
        )
    if layer.fitted_on is None:
        warn(
            f"layer {layer.name!r} was adapted by an older version that did not record the fitted spots. They are included in the "
            "comparison, so the metrics are optimistic; run hg.tl.adapt again"
        )
    sizes = pd.Series(section[used].astype(str)).value_counts().sort_index()
    small = sizes.index[sizes < MIN_SPOTS]
    if len(small) == len(sizes):
        found = validate.format_list(f"{name!r} {n}" for name, n in sizes.items())
        raise ValueError(
            f"`data`: no section has at least {MIN_SPOTS} spots that were both predicted and measured"
            f"{' and not used by hg.tl.adapt' * layer.adapted}; found {int(used.sum())} spots, by section: {found}"
        )
    if len(small):
        warn(f"sections [{validate.format_list(map(repr, small))}] have fewer than {MIN_SPOTS} spots and are left out")
    in_small = np.isin(section.astype(str), small)
    n_left_out = {
        "spots not predicted (outside the image)": int((~has_prediction).sum()),
        "spots without any counts": int((has_prediction & ~has_counts).sum()),
        f"spots of sections under {MIN_SPOTS} spots": int((used & in_small).sum()),
        **({FITTED_SPOTS: int(fitted.sum())} if layer.adapted and layer.fitted_on is not None else {}),
    }
    return np.flatnonzero(used & ~in_small), n_left_out


def _sections(table: AnnData, section_key: str, sample_key: str) -> np.ndarray:
    """Return the section of each spot; sections of several samples may share a name.

    Do not split sections if one has only a few spots of another sample: the column is probably wrong.
    """
    sections = sections_of(table, section_key)
    sample_key = PATIENT if sample_key == SECTION else sample_key
    if not has_samples(table, sample_key):
        return sections
    samples = names_of(table, sample_key, "sample_key", what="samples")
    if pd.isna(samples).any():
        return sections
    if len(set(sections)) == 1:
        return unique_section_names(sections, samples)
    sizes = pd.DataFrame({"section": sections, "sample": samples}).value_counts()
    shared = sizes[sizes.index.get_level_values("section").duplicated(keep=False)]
    return sections if (shared < MIN_SPOTS).any() else unique_section_names(sections, samples)


def _measured_table(
    data: SpatialData | AnnData, table: AnnData, layer: str, measured: str | None
) -> tuple[AnnData, np.ndarray, np.ndarray]:
    """Return the measured table, and the rows of the predicted and of the measured table that are the same spots."""
    if measured is not None and measured == layer:
        raise ValueError(f"`measured` {measured!r} is the prediction itself; name a layer of measured counts (None: X)")
    all_rows = np.arange(table.n_obs)
    if OWN_TABLE not in table.uns:
        return table, all_rows, all_rows
    name = find_table(data) if hasattr(data, "tables") else None
    if name is None:
        raise ValueError(
            "`measured`: hg.tl.predict made the table, so nothing was measured in it, and `data` has no measured table; pass "
            "the SpatialData object with both tables"
        )
    source = data[name]
    source_rows = _spot_ids(source, name).get_indexer(_spot_ids(table, "of the prediction"))
    rows = np.flatnonzero(source_rows >= 0)
    return source, rows, source_rows[rows]


def _spot_ids(table: AnnData, name: str) -> pd.MultiIndex:
    """Identify the spots of a table by their shapes element and instance."""
    attrs = annotation_target(table)
    if attrs is None:
        raise ValueError(
            f"`data`: table {name} does not annotate spots; link it with sdata.set_table_annotates_spatialelement"
        )
    keys = [column_of(table, attrs[key], key).astype(str) for key in ("region_key", "instance_key")]
    spots = pd.MultiIndex.from_arrays(keys)
    validate.all_different(spots.tolist(), "data", f"spots of table {name}")
    return spots


def class_probabilities(aligned: AlignedExpression, annotation_key: str) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Return class probabilities, the class code of each spot's label (-1: none), and the number of unknown labels."""
    labels = aligned.labels(annotation_key, "annotation_key")
    keys, obsm = aligned.keys, aligned.table.obsm
    if keys.proba not in obsm:
        raise ValueError(
            f"`annotation_key`: prediction {keys.key_added!r} has no annotation, because its model has no classes; leave it out"
        )
    proba = obsm[keys.proba].iloc[aligned.rows]
    codes = pd.Index(proba.columns.astype(str)).get_indexer(labels)
    unknown = labels[codes < 0].value_counts()
    if not (codes >= 0).any():
        raise ValueError(
            f"`annotation_key` {annotation_key!r} has no label that is a class of the model {list(proba.columns)}; found "
            f"{unknown.index[:10].tolist()}"
        )
    if len(unknown):
        counts = validate.format_list(f"{label!r}: {n}" for label, n in unknown.items())
        warn(f"spots with labels that are not classes of the model are left out: {{{counts}}}")
    return proba, codes, int(unknown.sum())
