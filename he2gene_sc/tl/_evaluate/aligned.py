"""Align predicted and measured expression for ``hg.tl.evaluate``: the same spots and genes, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.elements import find_table
from ..._core.expression import Scale, as_logs, log_expression
from ..._core.keys import OWN_TABLE, PATIENT, SECTION, Keys
from ..._core.matrix import matrix_of, take, values_of
from ..._core.names import annotation_target, column_of, names_of
from ..._core.predictions import source_layer, symbols_of
from ..._core.spots import has_samples, pitch_of, sections_of, spots_of, unique_section_names
from .._known import known_training_sections
from .genes import find_model, genes_in_common, training_facts
from .layer import EvaluatedLayer, adaptation_spots, find_layer

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

    genes: pd.Index
    columns: np.ndarray  # of the predicted table, (g,)
    rows: np.ndarray  # of the predicted table, (n,)
    predicted: np.ndarray  # (n, g) float32, natural log of (1 + counts per 10,000)
    measured: np.ndarray
    counts: Any  # raw counts of all measured genes (n, G); None if logarithms were given
    count_columns: np.ndarray  # columns of the g genes in `counts`
    source: AnnData  # the measured table
    source_rows: np.ndarray  # of the measured table, (n,)
    xy: np.ndarray  # spot centres, (n, 2)
    row: np.ndarray  # on the array, (n,)
    column: np.ndarray
    sections: dict[str, np.ndarray]  # positions of the spots of each section
    pitches: dict[str, float]  # median distance of neighbouring spots by section, in the unit of xy
    mean: np.ndarray  # of each gene in training; NaN if unknown
    panels: dict[str, np.ndarray]  # mask of the genes of each panel
    trained_on: list[str]  # sections that the model was trained on, if known
    n_left_out: dict[str, int]
    predictor: str  # name of the evaluated layer in the tables
    n_fitted: int | None  # spots that the layer was adapted to, all left out; None if unknown

    @property
    def depth(self) -> np.ndarray | None:
        """Natural log of the total counts of each spot, or ``None`` without counts."""
        return None if self.counts is None else np.log(np.asarray(self.counts.sum(axis=1), np.float64).ravel())

    def labels(self, key: str, parameter: str) -> pd.Series:
        """Return the cleaned names in a column of ``obs``, ``(n,)``; ``None`` for spots without a name."""
        what = "samples" if parameter == "sample_key" else "labels"
        names = names_of(self.source, key, parameter, what=what)[self.source_rows]
        return pd.Series(names, index=self.source.obs_names[self.source_rows], dtype=object)


@dataclass(frozen=True)
class AlignOptions:
    """Arguments of ``hg.tl.evaluate`` that choose layers, genes and sections.

    ``is_other``: another model predicted the layer, on the scale ``layer_scale``.
    """

    layer: str
    measured: str | None
    scale: Scale
    genes: Sequence[str] | None = None
    section_key: str = SECTION
    model: HE2Gene | None = None
    gene_symbols: str | None = None
    sample_key: str = PATIENT
    is_other: bool = False
    layer_scale: Scale = "auto"


@dataclass(frozen=True, eq=False)
class _Matrices:
    """Both matrices of the same genes, and the pairs of their rows that are the same spots."""

    layer: EvaluatedLayer
    record: Mapping[str, Any]  # of the prediction; empty for another model
    model: HE2Gene | None
    gene_symbols: str | None
    source: AnnData  # the measured table
    rows: np.ndarray  # of the predicted table, (m,)
    source_rows: np.ndarray  # of the measured table, (m,)
    columns: np.ndarray  # of the predicted table, (g,)
    source_columns: np.ndarray  # of the measured table, (g,)
    predicted: np.ndarray  # (n_obs, g)
    measured: np.ndarray  # (n_obs of the measured table, g)
    counts: Any


@dataclass(frozen=True, eq=False)
class _Selection:
    """Pairs of rows that are compared."""

    kept: np.ndarray  # positions among the pairs, (n,)
    section: np.ndarray  # of each kept spot, (n,)
    pitches: dict[str, float]
    n_left_out: dict[str, int]
    n_fitted: int | None


def align_expression(
    data: SpatialData | AnnData, table: AnnData, keys: Keys, options: AlignOptions
) -> AlignedExpression:
    """Align predicted and measured expression: the same genes, and spots that have both."""
    matrices = _read_matrices(data, table, keys, options)
    selection = _select_spots(matrices, table, options)
    source, model, columns = matrices.source, matrices.model, matrices.columns
    rows, source_rows = matrices.rows[selection.kept], matrices.source_rows[selection.kept]
    xy = spots_of(table[rows])
    sections = {str(name): np.flatnonzero(selection.section == name) for name in pd.unique(selection.section)}
    pitches = {name: selection.pitches[name] for name in sections}
    if overlapping := [name for name, pitch in pitches.items() if not pitch > 0]:
        raise ValueError(
            f"obsm['spatial']: most spots of sections {validate.format_list(overlapping)} lie on top of each other"
        )
    row, column = _array_positions(source.obs.iloc[source_rows], xy, sections, pitches)
    trained_on = known_training_sections(matrices.record, model, sections)
    if trained_on:
        warnings.warn(
            f"sections {trained_on} are in the training set of {matrices.record.get('model')}: their metrics are optimistic",
            stacklevel=3,
        )
    mean, panels = np.full(len(columns), np.nan), {"all genes": np.ones(len(columns), bool)}
    if not options.is_other:
        mean, panels = training_facts(table, columns, keys, model, matrices.gene_symbols)
    return AlignedExpression(
        genes=table.var_names[columns],
        columns=columns,
        rows=rows,
        predicted=take(matrices.predicted, rows),
        measured=take(matrices.measured, source_rows),
        counts=None if matrices.counts is None else take(matrices.counts, source_rows),
        count_columns=matrices.source_columns,
        source=source,
        source_rows=source_rows,
        xy=xy,
        row=row,
        column=column,
        sections=sections,
        pitches=pitches,
        mean=mean,
        panels=panels,
        trained_on=trained_on,
        n_left_out=selection.n_left_out,
        predictor=matrices.layer.predictor,
        n_fitted=selection.n_fitted,
    )


def _read_matrices(data: SpatialData | AnnData, table: AnnData, keys: Keys, options: AlignOptions) -> _Matrices:
    """Read the genes that both tables have, as logarithms, and pair the rows of the tables."""
    name, measured = options.layer, options.measured
    all_values = None
    if options.is_other:
        steps = source_layer(table, name)[1]
        layer = EvaluatedLayer(name, name, bool(steps), adaptation_spots(table, steps))
        all_values = log_expression(table, name, scale=options.layer_scale, expected="log")
        is_predicted, record, model = np.asarray(np.isfinite(all_values).any(axis=0)), {}, None
    else:
        if keys.predicted not in table.var:
            raise ValueError(
                f"`prediction_key`: `data` holds no prediction {keys.key_added!r}; run hg.tl.predict first"
            )
        layer = find_layer(table, keys, name)
        is_predicted, record = table.var[keys.predicted].to_numpy(bool), table.uns[keys.uns]
        model = find_model(record, options.model)
    source, rows, source_rows = _measured_table(data, table, layer.name, measured)
    gene_symbols = symbols_of(source, record, options.gene_symbols)
    columns, source_columns = genes_in_common(table, source, is_predicted, options.genes, gene_symbols)
    matrix = matrix_of(table, layer.name)
    predicted = as_logs(matrix, "log", columns) if all_values is None else take(all_values.T, columns).T
    logs = log_expression(
        source, measured, genes=source_columns, scale=options.scale, expected="counts", parameter="measured"
    )
    counts = None if options.scale == "log" else values_of(source, measured, "measured")
    return _Matrices(
        layer=layer,
        record=record,
        model=model,
        gene_symbols=gene_symbols,
        source=source,
        rows=rows,
        source_rows=source_rows,
        columns=columns,
        source_columns=source_columns,
        predicted=predicted,
        measured=logs,
        counts=counts,
    )


def _select_spots(matrices: _Matrices, table: AnnData, options: AlignOptions) -> _Selection:
    """Keep spots that have both values and that the layer was not fitted on, in sections that are large enough."""
    layer, rows, counts = matrices.layer, matrices.rows, matrices.counts
    has_prediction = np.asarray(np.isfinite(matrices.predicted).any(axis=1))[rows]
    if counts is None:
        has_counts = np.any(np.isfinite(matrices.measured), axis=1)[matrices.source_rows]
    else:
        has_counts = (np.asarray(counts.sum(axis=1)).ravel() > 0)[matrices.source_rows]
    section = _sections(matrices.source, options.section_key, options.sample_key)[matrices.source_rows]
    both = has_prediction & has_counts
    fitted = both & (False if layer.fitted_on is None else layer.fitted_on[rows])
    used = both & ~fitted
    if fitted.any() and not used.any():
        raise ValueError(
            f"`layer` {layer.name!r} was adapted to all {int(fitted.sum())} spots that were predicted and measured; no spot is "
            "left for the comparison"
        )
    if layer.fitted_on is None:
        warnings.warn(
            f"layer {layer.name!r} was adapted by an older version that did not record the fitted spots. They are included in the "
            "comparison, so the metrics are optimistic; run hg.tl.adapt again",
            stacklevel=4,
        )
    names, sizes = np.unique(section[used].astype(str), return_counts=True)
    names = names.astype(object)
    small = names[sizes < MIN_SPOTS]
    if len(small) == len(names):
        found = validate.format_list(f"{name!r} {n}" for name, n in zip(names, sizes, strict=True))
        raise ValueError(
            f"`data`: no section has at least {MIN_SPOTS} spots that were both predicted and measured"
            f"{' and not used by hg.tl.adapt' * layer.adapted}; found {int(used.sum())} spots, by section: {found}"
        )
    if len(small):
        warnings.warn(
            f"sections [{validate.format_list(map(repr, small))}] have fewer than {MIN_SPOTS} spots and are left out",
            stacklevel=4,
        )
    in_small = np.isin(section.astype(str), small)
    n_genes_lost = matrices.source.n_vars - len(matrices.columns)
    left_out = {
        "spots not predicted (outside the image)": int((~has_prediction).sum()),
        "spots without any counts": int((has_prediction & ~has_counts).sum()),
        f"spots of sections under {MIN_SPOTS} spots": int((used & in_small).sum()),
        **({FITTED_SPOTS: int(fitted.sum())} if layer.adapted and layer.fitted_on is not None else {}),
        "genes not predicted": n_genes_lost if options.genes is None else 0,
    }
    # The pitch is that of the array: spots that are left out would leave holes.
    pitches = {name: pitch_of(spots_of(table[rows[both & (section == name)]])) for name in names if name not in small}
    kept = np.flatnonzero(used & ~in_small)
    n_fitted = None if layer.fitted_on is None else int(fitted.sum())
    return _Selection(kept, section[kept], pitches, left_out, n_fitted)


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
    validate.unique(spots.tolist(), "data", f"spots of table {name}")
    return spots


def _array_positions(
    obs: pd.DataFrame, xy: np.ndarray, sections: Mapping[str, np.ndarray], pitches: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of each spot on the array, from ``obs`` or else from the spot centres."""
    if {"array_row", "array_col"} <= set(obs):
        positions = obs[["array_row", "array_col"]].to_numpy(float)
        if np.isfinite(positions).all():
            return tuple(np.rint(positions).astype(int).T)
    cells = np.empty(xy.shape, int)
    for name, spots in sections.items():
        cells[spots] = np.rint((xy[spots] - xy[spots].min(0)) / pitches[name]).astype(int)
    return cells[:, 1], cells[:, 0]


def class_probabilities(
    aligned: AlignedExpression, annotation_key: str, table: AnnData, keys: Keys
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Return class probabilities, the class code of each spot's label (-1: none), and the number of unknown labels."""
    labels = aligned.labels(annotation_key, "annotation_key")
    if keys.proba not in table.obsm:
        raise ValueError(
            f"`annotation_key`: prediction {keys.key_added!r} has no annotation, because its model has no classes; leave it out"
        )
    proba = table.obsm[keys.proba].iloc[aligned.rows]
    codes = pd.Index(proba.columns.astype(str)).get_indexer(labels)
    unknown = labels[codes < 0].value_counts()
    if not (codes >= 0).any():
        raise ValueError(
            f"`annotation_key` {annotation_key!r} has no label that is a class of the model {list(proba.columns)}; found "
            f"{unknown.index[:10].tolist()}"
        )
    if len(unknown):
        counts = validate.format_list(f"{label!r}: {n}" for label, n in unknown.items())
        warnings.warn(f"spots with labels that are not classes of the model are left out: {{{counts}}}", stacklevel=3)
    return proba, codes, int(unknown.sum())
