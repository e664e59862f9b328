"""Read tables: find the table, names and positions of spots, and their values by blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, issparse

from . import validate
from .elements import find_table, objects_in
from .expression import as_logs
from .genes import find_genes
from .keys import OWN_TABLE, PATIENT, SECTION
from .logs import warn
from .matrix import blocks_of, matrix_of, values_of
from .names import (
    UNNAMED,
    annotation_target,
    check_spelling,
    check_text_names,
    clean_name,
    clean_names,
    clean_samples,
    column_of,
    names_of,
)
from .predictions import predicted_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Values per dense block.
_BLOCK = 4_000_000


def get_table(
    data: SpatialData | AnnData,
    table_key: str | None = None,
    *,
    prediction_key: str | None = None,
    layer: str | None = None,
) -> AnnData:
    """Return a table as it is, or find one in an object: with a prediction, else with a layer, else the measured one."""
    if not hasattr(data, "tables"):
        if not hasattr(data, "obs_names"):
            raise TypeError(f"`data` is a {type(data).__name__}; a SpatialData or AnnData object is needed")
        return check_text_names(data)
    key = table_key
    if prediction_key is not None:
        key = predicted_table(data, prediction_key, table_key)
    elif layer is not None and table_key is None:
        found = [key for key, table in data.tables.items() if layer in table.layers]
        candidates = [key for key in found if OWN_TABLE not in data[key].uns] or found
        if not candidates:
            raise ValueError(
                f"`layer` {layer!r} is not in any table of `data`, which holds no prediction {layer!r}: run hg.tl.predict "
                "first, or pass layer=None for measured counts"
            )
        validate.not_ambiguous(candidates, "table_key")
        key = candidates[0]
    elif table_key is None and len(data.tables) == 1:
        (key,) = data.tables
    elif table_key not in data.tables:
        key = find_table(data, table_key)
    if key is None:
        raise ValueError(f"`data` has no measured table, tables: {sorted(data.tables)}; name one by `table_key`")
    return check_text_names(data[key])


def has_samples(table: AnnData, sample_key: str = PATIENT) -> bool:
    """Whether a table names its samples: not if the default column is missing or empty."""
    return sample_key != PATIENT or (PATIENT in table.obs and bool(pd.notna(clean_samples(table.obs[PATIENT])).any()))


def samples_of(table: AnnData, sample_key: str = PATIENT) -> np.ndarray:
    """Return the sample (patient) of each spot, ``(n,)`` objects; one sample if the default column is missing or empty."""
    if not has_samples(table, sample_key):
        return np.full(table.n_obs, "sample", object)
    return names_of(table, sample_key, "sample_key", what="samples", required=True)


def unique_section_names(sections: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return names of sections, ``(n,)`` objects, made unique if sections of different samples share a name."""
    frame = pd.DataFrame({"sample": samples, "section": sections})
    if frame.groupby("section")["sample"].nunique().max() < 2:
        return sections
    if frame["section"].nunique() == 1:
        return samples
    names = samples + "_" + sections
    if len(set(names)) == len(frame.drop_duplicates()):
        return names
    # Sample "a" with section "b_c", and sample "a_b" with section "c".
    return np.array([f"{section!r} of {sample!r}" for sample, section in zip(samples, sections, strict=True)], object)


def sections_of(table: AnnData, section_key: str = SECTION) -> np.ndarray:
    """Return the section (slide) of each spot, ``(n,)`` objects.

    If the default column is missing, empty or constant, the section is the shapes element of the row; else all is one.
    """
    if section_key != SECTION:
        return names_of(table, section_key, "section_key", what="sections", required=True)
    attrs = annotation_target(table)
    columns = [attrs["region_key"]] if attrs is not None and attrs["region_key"] in table.obs else []
    if SECTION in table.obs and pd.notna(clean_names(table.obs[SECTION])).any():
        columns.append(SECTION)
    varying = [key for key in columns if table.obs[key].nunique(dropna=False) > 1]
    if not varying:
        name = clean_name(table.obs[columns[-1]].iloc[0]) if columns and len(table) else None
        return np.full(table.n_obs, name or SECTION, object)
    return names_of(table, varying[-1], "section_key", what="sections", required=True)


def spots_of(table: AnnData) -> np.ndarray:
    """Return spot centres ``(n, 2)``, in the unit of ``obsm["spatial"]``."""
    if "spatial" not in table.obsm:
        raise ValueError("`data` has no obsm['spatial']; spot centres are needed there, as in scanpy and squidpy")
    xy = _centres(table)
    if not np.isfinite(xy).all():
        raise ValueError(f"obsm['spatial'] is NaN or infinite for {int((~np.isfinite(xy).all(1)).sum())} spots")
    return xy


def _centres(table: AnnData) -> np.ndarray:
    xy = np.asarray(table.obsm["spatial"], float)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(f"obsm['spatial'] has shape {xy.shape}; a row (x, y) for each spot is needed")
    return xy[:, :2]


@dataclass(frozen=True)
class SpotData:
    """Spots of one or several tables, in their order. Values are read on request, by blocks."""

    tables: tuple[AnnData, ...]
    rows: tuple[np.ndarray, ...]  # rows of each table
    labels: np.ndarray  # names, (n,) objects; None if missing
    samples: np.ndarray
    sections: np.ndarray
    objects: np.ndarray  # index of the table of each spot
    xy: np.ndarray | None  # centres in the unit of obsm["spatial"]; None if a table has none
    layer: str | None
    scale: Literal["counts", "log"]
    genes: pd.Index

    @cached_property
    def units(self) -> np.ndarray:
        """Unique names of sections, ``(n,)``. Sections of different samples or tables may share a name."""
        spots = zip(self.sections, self.samples, self.objects, strict=True)
        return np.array(
            [f"section {section!r} of sample {sample!r} (object {i})" for section, sample, i in spots], object
        )

    def chunks(self) -> Iterator[tuple[int, slice, AnnData]]:
        """Yield blocks of spots: the index of their table, their positions, and the table of only these spots."""
        start = 0
        for i, (table, rows) in enumerate(zip(self.tables, self.rows, strict=True)):
            values = matrix_of(table, self.layer)
            # A chunk of a dask array is computed as a whole.
            chunks = values.chunks[0] if hasattr(values, "dask") else ()
            step = max(1, _BLOCK // table.n_vars, *chunks)
            for first in range(0, len(rows), step):
                chosen = rows[first : first + step]
                yield i, slice(start, start + len(chosen)), table[chosen]
                start += len(chosen)

    def shared_genes(self) -> pd.Index:
        """Return the genes that all tables list, by the names of the first table."""
        genes = self.tables[0].var_names
        for table in self.tables[1:]:
            genes = genes[find_genes(genes, table.var_names) >= 0]
        return genes

    def blocks(self, genes: pd.Index | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks of logarithms, ``(b, g)`` float32, with the positions of their spots."""
        names = self.genes if genes is None else genes
        columns = [find_genes(names, table.var_names) for table in self.tables]
        for i, where, table in self.chunks():
            block = as_logs(values_of(table, self.layer), self.scale, columns[i])
            # Only with join="outer": genes that a table of counts does not list were not detected.
            block[:, columns[i] < 0] = 0
            yield where, block

    def sums(
        self,
        codes: np.ndarray,
        n: int,
        *transforms: Callable[[np.ndarray], np.ndarray],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return sums of transformed logarithms ``(b, g)`` over the spots of each code, ``(len(transforms), n, g)``.

        Spots with a code below 0 are left out. With ``weights`` ``(n,)``, the sum of the logarithms times the weights is added at the
        end. All sums are computed in one pass.
        """
        out = np.zeros((len(transforms) + (weights is not None), n, len(self.genes)))
        for where, values in self.blocks():
            code = codes[where]
            kept = code >= 0
            places, shape = (code[kept], np.flatnonzero(kept)), (n, len(code))
            ones = csr_array((np.ones(kept.sum()), places), shape)
            for total, transform in zip(out[: len(transforms)], transforms, strict=True):
                total += ones @ transform(values)
            if weights is not None:
                out[-1] += csr_array((weights[where][kept], places), shape) @ values
        return out

    def count_sums(
        self, codes: np.ndarray, n: int, log_depth: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return sums over the spots of each code, in one pass over the raw counts.

        ``(3, n, g)``: counts, their squares, counts times depth; ``(2, n)``: depth and its square. ``log_depth`` is per spot;
        default: log of total counts. NaN counts as 0, and so do genes that a table does not list.
        """
        sums = np.zeros((3, n, len(self.genes)))
        depth = np.zeros((2, n))
        columns = [find_genes(self.genes, table.var_names) for table in self.tables]
        for i, where, table in self.chunks():
            values = values_of(table, self.layer)
            block = csr_array(values if issparse(values) else np.nan_to_num(values)).astype(np.float64)
            block.data = np.nan_to_num(block.data)
            listed = np.flatnonzero(columns[i] >= 0)
            total = np.asarray(block.sum(axis=1)).ravel() if log_depth is None else np.exp(log_depth[where])
            places = (codes[where], np.arange(len(total)))
            ones, totals = (csr_array((x, places), (n, len(total))) for x in (np.ones(len(total)), total))
            y = block[:, columns[i][listed]]
            for out, part in zip(sums, (ones @ y, ones @ y.multiply(y), totals @ y), strict=True):
                out[:, listed] += part.toarray()
            depth += np.array([ones @ total, ones @ np.square(total)])
        return sums, depth

    def values(self, chosen: np.ndarray, genes: pd.Index) -> np.ndarray:
        """Return logarithms of the chosen spots, ``(m, g)`` float32; ``chosen`` is ``(n,)`` bool."""
        out = np.empty((int(chosen.sum()), len(genes)), np.float32)
        place = np.cumsum(chosen) - 1
        for where, block in self.blocks(genes):
            kept = chosen[where]
            out[place[where][kept]] = block[kept]
        return out

    def obs(self, key: str, parameter: str) -> pd.Series:
        """Return a column of ``obs`` at the spots."""
        used = [(table, rows) for table, rows in zip(self.tables, self.rows, strict=True) if len(rows)]
        parts = [column_of(table, key, parameter).iloc[rows] for table, rows in used]
        if not parts:
            return pd.Series(dtype=object)
        return pd.concat([part.astype(object) for part in parts], ignore_index=True).infer_objects()

    def totals(self, layer: str | None, parameter: str = "layer") -> np.ndarray:
        """Return the sum of the absolute values of a layer at each spot ``(n,)``, without NaN."""
        parts = [np.zeros(0)]
        for table, rows in zip(self.tables, self.rows, strict=True):
            if not len(rows):
                continue
            total = np.zeros(table.n_obs)
            for where, block in blocks_of(matrix_of(table, layer, parameter)):
                sizes = abs(block)
                total[where] = np.ravel(sizes.sum(axis=1) if issparse(sizes) else np.nansum(sizes, axis=1))
            parts.append(np.nan_to_num(total[rows]))
        return np.concatenate(parts)

    def take(self, kept: np.ndarray) -> SpotData:
        """Return a subset of the spots; ``kept`` is ``(n,)`` bool."""
        ends = np.cumsum([len(rows) for rows in self.rows])
        masks = np.split(kept, ends[:-1])
        rows = tuple(rows[mask] for rows, mask in zip(self.rows, masks, strict=True))
        by_spot = {name: getattr(self, name)[kept] for name in ("labels", "samples", "sections", "objects")}
        return replace(self, rows=rows, xy=None if self.xy is None else self.xy[kept], **by_spot)


def read_spots(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    label_key: str | None,
    parameter: str,
    *,
    layer: str | None = None,
    table_key: str | None = None,
    sample_key: str = PATIENT,
    section_key: str = SECTION,
    samples_needed: bool = True,
) -> SpotData:
    """Read names and positions of the spots of one or several objects or tables.

    ``parameter`` is the public name of ``label_key``. With ``samples_needed``, each of several objects has to name its samples.
    """
    tables = [get_table(item, table_key, layer=layer) for item in objects_in(data)]
    lacking = [i for i, table in enumerate(tables) if not has_samples(table, sample_key)]
    if samples_needed and lacking and len(tables) > 1:
        raise ValueError(
            f"`sample_key`: object {lacking[0]} has no obs[{sample_key!r}]; name the column of the patients, one of "
            f"{list(tables[lacking[0]].obs.columns)}"
        )
    if label_key is None:
        labels = [np.full(table.n_obs, "all", object) for table in tables]
    else:
        labels = [names_of(table, label_key, parameter) for table in tables]
    samples = [samples_of(table, sample_key) for table in tables]
    rows = {f"object {i}": table.obs_names for i, table in enumerate(tables)}
    check_spelling(dict(zip(rows, labels, strict=True)), parameter, label_key or "", rows=rows)
    check_spelling(dict(zip(rows, samples, strict=True)), "sample_key", sample_key, what="samples", rows=rows)
    named_samples = pd.unique(np.concatenate(samples))
    unnamed = [name for name in named_samples if name.casefold() in UNNAMED]
    if unnamed and max(len(named_samples), len(tables)) > 1:
        warn(
            f"`sample_key` {sample_key!r}: {unnamed[0]!r} counts as one of {len(named_samples)} samples. If it stands for "
            "several samples, or for one of the others, name them or remove its spots"
        )
    places = all("spatial" in table.obsm for table in tables)
    return SpotData(
        tables=tuple(tables),
        rows=tuple(np.arange(table.n_obs) for table in tables),
        labels=np.concatenate(labels),
        samples=np.concatenate(samples),
        sections=np.concatenate([sections_of(table, section_key) for table in tables]),
        objects=np.repeat(np.arange(len(tables)), [table.n_obs for table in tables]),
        xy=np.concatenate([_centres(table) for table in tables]) if places else None,
        layer=layer,
        scale="counts" if layer is None else "log",
        genes=tables[0].var_names,
    )
