"""What hg.tl.evaluate compares: spots and genes that were both predicted and measured, read and checked."""

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
from ..._core.matrix import matrix_of, values_of
from ..._core.names import annotation_target, column_of, names_of
from ..._core.predictions import source_layer, symbols_of
from ..._core.spots import has_samples, pitch_of, sections_of, spots_of, unique_section_names
from .._known import trained_on
from .genes import genes_in_common, known_of, model_of
from .layer import JudgedLayer, fitted_on, judged_layer

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ...models import HE2Gene

#: A section with fewer spots is not judged.
MIN_SPOTS = 10
#: Under this name labels are counted that are no class of the model.
UNKNOWN_LABELS = "labels that the model does not know"
#: And under this one spots that an adapted layer was fitted on.
FITTED = "spots that hg.tl.adapt was fitted on"


@dataclass(frozen=True, eq=False)
class Judged:
    """Spots ``n`` and genes ``g`` that can be judged, aligned."""

    genes: pd.Index
    columns: np.ndarray  # of the predicted table, (g,)
    rows: np.ndarray  # of the predicted table, (n,)
    predicted: np.ndarray  # (n, g) float32, natural log of (1 + counts per 10,000)
    measured: np.ndarray
    counts: Any  # raw counts of all measured genes (n, G); None where logarithms were given
    count_columns: np.ndarray  # where genes stand in them
    source: AnnData  # the measured table
    partner: np.ndarray  # its rows, (n,)
    xy: np.ndarray  # centres, (n, 2)
    row: np.ndarray  # on the array, (n,)
    column: np.ndarray
    sections: dict[str, np.ndarray]  # name to positions of its spots
    pitches: dict[str, float]  # distance of neighbouring spots, in the unit of xy
    mean: np.ndarray  # of each gene in training; NaN where it is not known
    panels: dict[str, np.ndarray]  # name to mask of genes
    trained_on: list[str]  # sections that the model was trained on, as far as that is known
    n_left_out: dict[str, int]
    predictor: str  # what the tables call the layer that is judged
    n_fitted: int | None  # spots that it was adapted to, all left out; None where that is not known

    @property
    def depth(self) -> np.ndarray | None:
        """Natural log of the total counts of each spot; ``None`` where there are none."""
        return None if self.counts is None else np.log(np.asarray(self.counts.sum(axis=1), np.float64).ravel())

    def labels(self, key: str, parameter: str) -> pd.Series:
        """Names in a column of ``obs``, cleaned, ``(n,)``; ``None`` where there is none."""
        what = "samples" if parameter == "sample_key" else "labels"
        names = names_of(self.source, key, parameter, what=what)[self.partner]
        return pd.Series(names, index=self.source.obs_names[self.partner], dtype=object)


@dataclass(frozen=True)
class Asked:
    """What of a prediction is compared with what: arguments of hg.tl.evaluate.

    ``is_other``: another model than ours predicted the layer, which holds what ``layer_scale`` says.
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


def read(data: SpatialData | AnnData, table: AnnData, keys: Keys, asked: Asked) -> Judged:
    """Align what was predicted with what was measured."""
    layer, measured = asked.layer, asked.measured
    every = None
    if asked.is_other:
        steps = source_layer(table, layer)[1]
        chosen = JudgedLayer(layer, layer, bool(steps), fitted_on(table, steps))
        every = log_expression(table, layer, scale=asked.layer_scale, expected="log")
        is_predicted, record, model = np.asarray(np.isfinite(every).any(axis=0)), {}, None
    else:
        if keys.predicted not in table.var:
            raise ValueError(
                f"`prediction_key`: `data` holds no prediction {keys.key_added!r}; run hg.tl.predict first"
            )
        chosen = judged_layer(table, keys, layer)
        layer = chosen.name
        is_predicted, record = table.var[keys.predicted].to_numpy(bool), table.uns[keys.uns]
        model = model_of(record, asked.model)
    other, rows, partner = _measured(data, table, layer, measured)
    gene_symbols = symbols_of(other, record, asked.gene_symbols)
    columns, count_columns = genes_in_common(table, other, is_predicted, asked.genes, gene_symbols)
    values = as_logs(matrix_of(table, layer), "log", columns) if every is None else every[:, columns]
    given = log_expression(
        other, measured, genes=count_columns, scale=asked.scale, expected="counts", parameter="measured"
    )
    counts = None if asked.scale == "log" else values_of(other, measured, "measured")
    predicted_spot = np.asarray(np.isfinite(values).any(axis=1))[rows]
    filled = np.any(np.isfinite(given), axis=1) if counts is None else np.asarray(counts.sum(axis=1)).ravel() > 0
    measured_spot = filled[partner]
    section = _sections(other, asked.section_key, asked.sample_key)[partner]
    both = predicted_spot & measured_spot
    fitted = both & (False if chosen.fitted_on is None else chosen.fitted_on[rows])
    used = both & ~fitted
    if fitted.any() and not used.any():
        raise ValueError(
            f"`layer` {layer!r} was adapted to all {int(fitted.sum())} spots that were predicted and measured: none is left "
            "to judge it by"
        )
    if chosen.fitted_on is None:
        warnings.warn(
            f"layer {layer!r} was adapted by an older version, the spots that it was fitted on are not known and are judged "
            "with the others: its figures are too good; run hg.tl.adapt again",
            stacklevel=3,
        )
    names, sizes = np.unique(section[used].astype(str), return_counts=True)
    names = names.astype(object)
    small = names[sizes < MIN_SPOTS]
    if len(small) == len(names):
        raise ValueError(
            f"`data`: {int(used.sum())} spots were both predicted and measured{', and not used by hg.tl.adapt' * chosen.adapted}"
            f", by section: {validate.format_list(f'{s!r} {n}' for s, n in zip(names, sizes, strict=True))}; at least {MIN_SPOTS} "
            "spots of a section are needed"
        )
    if len(small):
        warnings.warn(
            f"sections [{validate.format_list(map(repr, small))}] have fewer than {MIN_SPOTS} spots and are left out",
            stacklevel=3,
        )
    left_out = {
        "spots not predicted (outside the image)": int((~predicted_spot).sum()),
        "spots without any counts": int((predicted_spot & ~measured_spot).sum()),
        f"spots of sections under {MIN_SPOTS} spots": int(np.isin(section[used].astype(str), small).sum()),
        **({FITTED: int(fitted.sum())} if chosen.adapted and chosen.fitted_on is not None else {}),
        "genes not predicted": other.n_vars - len(columns) if asked.genes is None else 0,
    }
    # Distances are those of the array, which has holes where spots are left out.
    pitches = {name: pitch_of(spots_of(table[rows[both & (section == name)]])) for name in names if name not in small}
    kept = np.flatnonzero(used & ~np.isin(section.astype(str), small))
    rows, partner, section = rows[kept], partner[kept], section[kept]
    xy = spots_of(table[rows])
    sections = {str(name): np.flatnonzero(section == name) for name in pd.unique(section)}
    pitches = {name: pitches[name] for name in sections}
    if shared := [name for name, pitch in pitches.items() if not pitch > 0]:
        raise ValueError(
            f"obsm['spatial']: most spots of sections {validate.format_list(shared)} lie on top of each other"
        )
    row, column = _cells(other.obs.iloc[partner], xy, sections, pitches)
    seen = trained_on(record, model, sections)
    if seen:
        warnings.warn(
            f"sections {seen} are in the training set of {record.get('model')}: their figures are too good",
            stacklevel=3,
        )
    mean, panels = np.full(len(columns), np.nan), {"all genes": np.ones(len(columns), bool)}
    if not asked.is_other:
        mean, panels = known_of(table, columns, keys, model, gene_symbols)
    return Judged(
        genes=table.var_names[columns],
        columns=columns,
        rows=rows,
        predicted=values[rows],
        measured=given[partner],
        counts=None if counts is None else counts[partner],
        count_columns=count_columns,
        source=other,
        partner=partner,
        xy=xy,
        row=row,
        column=column,
        sections=sections,
        pitches=pitches,
        mean=mean,
        panels=panels,
        trained_on=seen,
        n_left_out=left_out,
        predictor=chosen.predictor,
        n_fitted=None if chosen.fitted_on is None else int(fitted.sum()),
    )


def _sections(table: AnnData, section_key: str, sample_key: str) -> np.ndarray:
    """Name of the section of each spot; sections of one name in several samples are several.

    A few spots of another sample in a section are a mistake in the column: that section is left whole.
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


def _measured(
    data: SpatialData | AnnData, table: AnnData, layer: str, measured: str | None
) -> tuple[AnnData, np.ndarray, np.ndarray]:
    """Table with what was measured, and pairs of rows: of the predicted table and of that one."""
    if measured is not None and measured == layer:
        raise ValueError(f"`measured` {measured!r} is the prediction itself; name a layer of measured counts (None: X)")
    every = np.arange(table.n_obs)
    if OWN_TABLE not in table.uns:
        return table, every, every
    found = find_table(data) if hasattr(data, "tables") else None
    if found is None:
        raise ValueError(
            "`measured`: the table was made by hg.tl.predict, nothing was measured in it, and there is no measured table "
            "beside it; pass the SpatialData object with both"
        )
    other = data[found]
    partner = _spots(other, found).get_indexer(_spots(table, "of the prediction"))
    rows = np.flatnonzero(partner >= 0)
    return other, rows, partner[rows]


def _spots(table: AnnData, name: str) -> pd.MultiIndex:
    attrs = annotation_target(table)
    if attrs is None:
        raise ValueError(
            f"`data`: table {name} annotates no spots; link it with sdata.set_table_annotates_spatialelement"
        )
    keys = [column_of(table, attrs[key], key).astype(str) for key in ("region_key", "instance_key")]
    spots = pd.MultiIndex.from_arrays(keys)
    validate.unique(spots.tolist(), "data", f"spots of table {name}")
    return spots


def _cells(
    obs: pd.DataFrame, xy: np.ndarray, sections: Mapping[str, np.ndarray], pitches: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column on the array of each spot: as ``obs`` states them, else read off the centres."""
    if {"array_row", "array_col"} <= set(obs):
        stated = obs[["array_row", "array_col"]].to_numpy(float)
        if np.isfinite(stated).all():
            return tuple(np.rint(stated).astype(int).T)
    cells = np.empty(xy.shape, int)
    for name, where in sections.items():
        cells[where] = np.rint((xy[where] - xy[where].min(0)) / pitches[name]).astype(int)
    return cells[:, 1], cells[:, 0]


def proba_of(judged: Judged, annotation_key: str, table: AnnData, keys: Keys) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Probabilities of the classes, the class of each spot's label (-1: none), and the number of unknown labels."""
    labels = judged.labels(annotation_key, "annotation_key")
    if keys.proba not in table.obsm:
        raise ValueError(
            f"`annotation_key`: prediction {keys.key_added!r} has no annotation, its model knows no classes"
        )
    frame = table.obsm[keys.proba].iloc[judged.rows]
    codes = pd.Index(frame.columns.astype(str)).get_indexer(labels)
    unknown = labels[codes < 0].value_counts()
    if not (codes >= 0).any():
        raise ValueError(
            f"`annotation_key` {annotation_key!r} holds none of the classes of the model {list(frame.columns)}, but "
            f"{unknown.index[:10].tolist()}"
        )
    if len(unknown):
        warnings.warn(
            f"classes that the model does not know are left out: {{{validate.format_list(f'{k!r}: {n}' for k, n in unknown.items())}}}",
            stacklevel=3,
        )
    return frame, codes, int(unknown.sum())
