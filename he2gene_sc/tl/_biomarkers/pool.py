"""Spots of one or several objects under one roof, for the tests of groups: labels, samples, genes, values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from ..._core.expression import Scale, as_logs, count_totals, log_expression
from ..._core.genes import find_genes
from ..._core.keys import MADE, PATIENT, SECTION, Keys
from ..._core.matrix import matrix_of, values_of
from ..._core.predictions import prediction_of
from ..._core.spots import check_spelling, column_of, has_samples, labels_of, samples_of, sections_of, with_text_names
from ..._core.tables import get_table
from .duplicates import check_twins

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

#: Values that are dense at a time.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Pool:
    """Labelled spots of all tables, in their order.

    ``rows[i]`` are the rows of ``tables[i]``; ``labels``, ``samples`` and ``sections`` are ``(n,)``, ``xy`` is ``(n, 2)`` or
    missing. Values are read when they are asked for, a block at a time.
    """

    tables: tuple[AnnData, ...]
    rows: tuple[np.ndarray, ...]
    layer: str | None
    scale: Literal["counts", "log"]
    genes: pd.Index
    labels: np.ndarray
    samples: np.ndarray
    sections: np.ndarray
    xy: np.ndarray | None

    def blocks(self, genes: pd.Index | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Logarithms of some spots at a time, ``(b, g)`` float32, and where these spots stand."""
        asked = self.genes if genes is None else genes
        start = 0
        for table, rows in zip(self.tables, self.rows, strict=True):
            columns = find_genes(asked, table.var_names)
            missing = columns < 0
            step = max(1, _BLOCK // table.n_vars)
            for first in range(0, len(rows), step):
                chosen = rows[first : first + step]
                block = as_logs(values_of(table[chosen], self.layer), self.scale, columns)
                # Only where join="outer": a gene that a table of counts does not name was not seen.
                block[:, missing] = 0
                yield slice(start + first, start + first + len(chosen)), block
            start += len(rows)

    def sums(self, codes: np.ndarray, n: int, *of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Sum over the spots of each of ``n`` codes, ``(len(of), n, g)`` float64; a code below 0 is left out.

        ``of`` says what is summed, from the logarithms of some spots ``(b, g)``; all are made in one reading.
        """
        from scipy.sparse import csr_array

        out = np.zeros((len(of), n, len(self.genes)))
        for where, values in self.blocks():
            code = codes[where]
            kept = code >= 0
            ones = csr_array((np.ones(kept.sum()), (code[kept], np.flatnonzero(kept))), (n, len(code)))
            for total, make in zip(out, of, strict=True):
                total += ones @ make(values)
        return out

    def values(self, chosen: np.ndarray, genes: pd.Index) -> np.ndarray:
        """Logarithms of the chosen spots, ``(m, g)`` float32; ``chosen`` is ``(n,)`` bool."""
        out = np.empty((int(chosen.sum()), len(genes)), np.float32)
        place = np.cumsum(chosen) - 1
        for where, block in self.blocks(genes):
            kept = chosen[where]
            out[place[where][kept]] = block[kept]
        return out

    def obs(self, key: str, parameter: str) -> pd.Series:
        """Return a column of ``obs`` at the spots."""
        parts = [column_of(t, key, parameter).iloc[rows] for t, rows in zip(self.tables, self.rows, strict=True)]
        return pd.concat([part.astype(object) for part in parts], ignore_index=True).infer_objects()

    def take(self, kept: np.ndarray) -> Pool:
        """Return the pool without some spots; ``kept`` is ``(n,)`` bool."""
        ends = np.cumsum([len(rows) for rows in self.rows])
        masks = np.split(kept, ends[:-1])
        return replace(
            self,
            rows=tuple(rows[mask] for rows, mask in zip(self.rows, masks, strict=True)),
            labels=self.labels[kept],
            samples=self.samples[kept],
            sections=self.sections[kept],
            xy=None if self.xy is None else self.xy[kept],
        )


def tables_of(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData], layer: str | None, table_key: str | None
) -> tuple[tuple[AnnData, ...], bool]:
    """Return the table of each object that holds the layer (``None``: the measured one), and whether several came in.

    Raises
    ------
    ValueError
        If there is none, or several could be meant.
    """
    several = not (hasattr(data, "tables") or hasattr(data, "obs_names"))
    if several and (isinstance(data, str | Mapping) or not isinstance(data, Iterable)):
        raise TypeError(f"`data` is a {type(data).__name__}; SpatialData or AnnData objects are needed")
    objects = list(data) if several else [data]
    if not objects:
        raise ValueError("`data` is empty; at least one object is needed")
    return tuple(_table(item, layer, table_key) for item in objects), several


def _table(data: SpatialData | AnnData, layer: str | None, table_key: str | None) -> AnnData:
    if not hasattr(data, "tables") or layer is None or table_key is not None:
        return get_table(data, table_key, key_added=None)
    found = [key for key, table in data.tables.items() if layer in table.layers]
    candidates = [key for key in found if MADE not in data[key].uns] or found
    if not candidates:
        raise ValueError(
            f"`layer` {layer!r} is in no table of `data`; run hg.tl.predict first, or pass layer=None for measured counts"
        )
    if len(candidates) > 1:
        raise ValueError(f"`table_key` is ambiguous, candidates: {sorted(candidates)}")
    return with_text_names(data[candidates[0]])


def pool(
    tables: Sequence[AnnData],
    groupby: str,
    *,
    layer: str | None,
    layer_scale: Scale = "auto",
    sample_key: str = PATIENT,
    section_key: str = SECTION,
    join: Literal["inner", "outer"] = "inner",
    reliable_only: bool = False,
) -> Pool:
    """Pool the labelled spots of tables; everything that can be wrong with them is an error here.

    Raises
    ------
    ValueError
        If a column or layer is missing, values are not on the scale expected, there is no gene in common, or spots stand
        twice.
    """
    for table in tables:
        if table.var_names.has_duplicates:
            double = table.var_names[table.var_names.duplicated()][:3].tolist()
            raise ValueError(f"`data`: genes stand twice in var_names, for example {double}")
        values = values_of(table, layer)
        if isinstance(values, np.ndarray) and values.size and np.isnan(values).all():
            raise ValueError(f"`layer` {layer!r} is NaN for every gene and spot")
        # Looks at all values once; with no genes it returns none.
        log_expression(
            table,
            layer,
            genes=np.zeros(0, int),
            scale=layer_scale,
            expected=_expected(layer),
            predicted=prediction_of(table, layer) is not None,
        )
    labels = [labels_of(table, groupby, "groupby") for table in tables]
    _check_spelling(tables, labels, "groupby", groupby, "labels")
    samples = _samples(tables, sample_key)
    sections = [
        _section_names(i, sections_of(table, section_key), named)
        for i, (table, named) in enumerate(zip(tables, samples, strict=True))
    ]
    kind = _expected(layer) if layer_scale == "auto" else layer_scale
    if kind == "counts":
        labels = _counted(tables, layer, labels)
    rows = tuple(np.flatnonzero(pd.notna(found)) for found in labels)
    places = all("spatial" in table.obsm for table in tables)

    def at(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(part)[r] for part, r in zip(parts, rows, strict=True)])

    pooled = Pool(
        tables=tuple(tables),
        rows=rows,
        layer=layer,
        scale=kind,
        genes=_genes(tables, layer, join, layer_scale, reliable_only),
        labels=at(labels),
        samples=at(samples),
        sections=at(sections),
        xy=at([np.asarray(table.obsm["spatial"], float)[:, :2] for table in tables]) if places else None,
    )
    if not len(pooled.labels):
        raise ValueError(f"`groupby` {groupby!r} is empty for every spot")
    unlabelled = sorted(set(np.concatenate(samples)) - set(pooled.samples))
    if unlabelled:
        logger.warning("biomarkers: samples without a labelled spot are left out: %s", unlabelled)
    _check_places(pooled, [np.asarray(table.obs_names) for table in tables])
    return _inspected(pooled)


def _section_names(i: int, sections: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Names under which no two sections meet: those of several samples in one table may be called alike, or not at all."""
    pairs = zip(sections, samples, strict=True)
    return np.array([f"section {section!r} of sample {sample!r} (object {i})" for section, sample in pairs], object)


def _expected(layer: str | None) -> Literal["counts", "log"]:
    return "counts" if layer is None else "log"


def _counted(tables: Sequence[AnnData], layer: str | None, labels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Labels without those of spots on which nothing was counted, which have no expression."""
    kept = []
    for table, found in zip(tables, labels, strict=True):
        empty = pd.notna(found) & (count_totals(matrix_of(table, layer)) == 0)
        if empty.any():
            logger.warning(
                "biomarkers: %d labelled spots have no counts and are left out, for example %r",
                *(empty.sum(), table.obs_names[empty][0]),
            )
        kept.append(np.where(empty, np.array(None), found))
    return kept


def _check_spelling(
    tables: Sequence[AnnData], names: Sequence[np.ndarray], parameter: str, key: str, what: str
) -> None:
    """Refuse names that differ only in case from one object to another."""
    places = [f"object {i}" for i in range(len(tables))]
    rows = {place: table.obs_names for place, table in zip(places, tables, strict=True)}
    check_spelling(dict(zip(places, names, strict=True)), parameter, key, what=what, rows=rows)


def _samples(tables: Sequence[AnnData], sample_key: str) -> list[np.ndarray]:
    lacking = [i for i, table in enumerate(tables) if not has_samples(table, sample_key)]
    if lacking and len(tables) > 1:
        raise ValueError(
            f"`sample_key`: object {lacking[0]} has no obs[{sample_key!r}]; name the column that tells the patients apart, of "
            f"{list(tables[lacking[0]].obs.columns)}"
        )
    samples = [samples_of(table, sample_key) for table in tables]
    _check_spelling(tables, samples, "sample_key", sample_key, "samples")
    return samples


def _genes(
    tables: Sequence[AnnData], layer: str | None, join: str, layer_scale: Scale, reliable_only: bool
) -> pd.Index:
    if join == "outer" and len(tables) > 1 and not (layer is None or layer_scale == "counts"):
        raise ValueError("`join` is 'outer', which is for raw counts: a gene that was not predicted is unknown, not 0")
    genes = tables[0].var_names
    for table in tables[1:]:
        if join == "inner":
            genes = genes[find_genes(genes, table.var_names) >= 0]
        else:
            genes = genes.append(table.var_names[find_genes(table.var_names, genes) < 0])
    if not len(genes):
        raise ValueError(
            f"`data`: the objects have no gene in common, for example {tables[0].var_names[0]!r} and "
            f"{tables[-1].var_names[0]!r}"
        )
    if len(tables) > 1:
        most = max(table.n_vars for table in tables)
        level = logging.INFO if len(genes) > most / 2 else logging.WARNING
        logger.log(level, "biomarkers: %d genes are in %s object, of at most %d", len(genes), _every(join), most)
    if not reliable_only:
        return genes
    for table in tables:
        key = prediction_of(table, layer)
        if key is None:
            continue
        name = Keys(key).reliable
        if name not in table.var:
            raise ValueError(
                f"`reliable_only`: var has no {name!r} (anndata.concat drops it unless merge='same'); restore it, or pass "
                "reliable_only=False"
            )
        good = table.var_names[table.var[name].astype(bool)]
        genes = genes[find_genes(genes, good) >= 0]
    if not len(genes):
        raise ValueError(
            "`reliable_only`: no gene is reliable by the model's own figures; reliable_only=False tests all"
        )
    return genes


def _every(join: str) -> str:
    return "every" if join == "inner" else "some"


def _check_places(pooled: Pool, names: Sequence[np.ndarray]) -> None:
    """Refuse spots that stand twice in a section."""
    if pooled.xy is not None:
        places, how = [tuple(row) for row in pooled.xy.tolist()], "at the same place"
    else:
        places = list(np.concatenate([n[rows] for n, rows in zip(names, pooled.rows, strict=True)]))
        how = "under the same name"
    keys = Counter(zip(pooled.sections, places, strict=True))
    double = [key for key, count in keys.items() if count > 1]
    if double:
        section, place = double[0]
        raise ValueError(
            f"`data`: {len(double)} spots stand twice {how}, for example {place} in {section}; drop duplicates, or tell "
            "sections apart by `section_key`"
        )


def _inspected(pooled: Pool) -> Pool:
    """Leave out spots that were not predicted and genes that are NaN in others, and refuse the same spots given twice."""
    lost = np.zeros(len(pooled.labels), bool)
    unknown = np.zeros(len(pooled.genes), int)
    for where, block in pooled.blocks():
        nan = np.isnan(block)
        lost[where] = nan.all(axis=1)
        unknown += nan[~lost[where]].sum(axis=0)
    if lost.all():
        raise ValueError(f"`layer` {pooled.layer!r} is NaN for every gene and labelled spot")
    check_twins(pooled)
    if lost.any():
        logger.warning("biomarkers: %d labelled spots have no values and are left out", lost.sum())
        pooled = pooled.take(~lost)
    if (unknown == 0).all():
        return pooled
    known = pooled.genes[unknown == 0]
    if not len(known):
        raise ValueError(f"`layer` {pooled.layer!r} holds NaN in every gene; only spots without values may")
    logger.warning("biomarkers: %d genes hold NaN and are left out, %d remain", (unknown > 0).sum(), len(known))
    return replace(pooled, genes=known)
