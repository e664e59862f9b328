"""Detect duplicated data: spots at one place, one patient under two names, a section given twice, a copy as prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..stats import spearman
from .logs import warn
from .matrix import dense, subsample, values_of

if TYPE_CHECKING:
    from .spots import SpotData

#: Least number of genes that identify a spot.
_MIN_GENES = 10
#: Two spots at one place are the same spot above this correlation over genes (each relative to the median of its section).
_SAME_SPOT_R = 0.99
#: Differences from the typical spot of a section up to this share of its values are rounding errors.
_ROUNDING = 1e-5
#: Spots and genes that are compared to detect a copy of the measured values, and the rank correlation of a copy.
_SPOTS, _GENES, _COPY_R = 300, 200, 0.9999


def check_duplicate_spots(pooled: SpotData) -> None:
    """Raise if a section holds a spot twice."""
    if pooled.xy is not None:
        places, how = [tuple(row) for row in pooled.xy.tolist()], "at the same place"
    else:
        places = list(np.concatenate([t.obs_names[rows] for t, rows in zip(pooled.tables, pooled.rows, strict=True)]))
        how = "under the same name"
    keys = Counter(zip(pooled.units, places, strict=True))
    if double := [key for key, count in keys.items() if count > 1]:
        section, place = double[0]
        raise ValueError(
            f"`data`: {len(double)} spots are duplicated {how}, for example {place} in {section}; drop duplicates, or "
            "name the column of the sections by `section_key` or `sample_key`"
        )


def check_duplicate_sections(pooled: SpotData) -> None:
    """Raise if two samples, or two sections of one sample, share half of their spots.

    Spots are the same if all values are equal, or if values at the same place are nearly equal. Raw values of the genes
    that all tables have are compared, since a copy may lack some genes.
    """
    units, unit = np.unique(pooled.units.astype(str), return_inverse=True)
    genes = pooled.tables[0].var_names
    for table in pooled.tables[1:]:
        genes = genes[genes.isin(table.var_names)]
    if len(units) < 2 or len(genes) < _MIN_GENES:
        return
    prints, sketch = _fingerprints(pooled, genes)
    found: dict[int, set[int]] = {}
    for value, i in zip(prints.tolist(), unit.tolist(), strict=True):
        if value:
            found.setdefault(value, set()).add(i)
    shared = Counter(tuple(sorted(members)) for members in found.values() if len(members) > 1)
    sizes = np.bincount(unit)
    for members, count in shared.items():
        if count >= 3 and 2 * count >= sizes[list(members)].min():
            _raise_duplicate_section(pooled, unit, members[:2], f"{count} spots are the same, value by value,")
    if pooled.xy is None:
        return
    at = [np.flatnonzero((unit == i) & (prints != 0)) for i in range(len(units))]
    places = [{tuple(row): j for row, j in zip(pooled.xy[rows].tolist(), rows, strict=True)} for rows in at]
    norms = np.zeros(len(unit))
    for rows in at:
        if not len(rows):
            continue
        # The median: spots with the same values are at 0, also if a few differ.
        middle = np.median(sketch[rows], axis=0)
        sketch[rows] -= middle
        size = np.linalg.norm(sketch[rows], axis=1)
        norms[rows] = np.where(size > _ROUNDING * np.linalg.norm(middle), size, 0)
    for a in range(len(units)):
        for b in range(a):
            both = places[a].keys() & places[b].keys()
            one, other = (np.array([place[xy] for xy in both], int) for place in (places[a], places[b]))
            scale = norms[one] * norms[other]
            if (scale > 0).sum() < 3 or 2 * (scale > 0).sum() < sizes[[a, b]].min():
                continue
            r = (sketch[one] * sketch[other]).sum(axis=1)[scale > 0] / scale[scale > 0]
            if np.median(r) > _SAME_SPOT_R:
                _raise_duplicate_section(
                    pooled, unit, (b, a), f"{len(both)} spots at the same places have nearly the same values"
                )


def warn_of_copy(predicted: np.ndarray, measured: np.ndarray, layer: str | None) -> None:
    """Warn if a predicted layer ``(n, g)`` is a copy of the measured values, on the same scale or another."""
    rows, genes = (subsample(np.arange(n), most) for n, most in zip(predicted.shape, (_SPOTS, _GENES), strict=True))
    pair = [values[np.ix_(rows, genes)] for values in (predicted, measured)]
    there = np.isfinite(pair[0]).any(axis=1) & np.isfinite(pair[1]).any(axis=1)
    if there.sum() < _MIN_GENES:
        return
    r = spearman(pair[0][there], pair[1][there])
    r = r[np.isfinite(r)]
    if len(r) and (r > _COPY_R).mean() > 0.5:
        warn(
            f"`layer` {layer!r} is a copy of the measured values, not a prediction: agreement, intervals and reliability "
            "computed with it hold for no model; name the predicted layer"
        )


def warn_of_copied_spots(predicted: SpotData, measured: SpotData) -> None:
    """Warn if the predicted layer is a copy of the values measured at the same spots."""
    chosen = np.zeros(len(predicted.labels), bool)
    chosen[subsample(np.arange(len(chosen)), _SPOTS)] = True
    genes = subsample(predicted.genes, _GENES)
    warn_of_copy(predicted.values(chosen, genes), measured.values(chosen, genes), predicted.layer)


def _fingerprints(pooled: SpotData, genes: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of the raw values of each spot (0 for constant rows), and a random projection of them ``(n, 32)``."""
    prints = np.zeros(len(pooled.labels), np.int64)
    projection = np.random.default_rng(0).standard_normal((len(genes), 32)).astype(np.float32)
    sketch = np.zeros((len(prints), projection.shape[1]), np.float32)
    columns = [table.var_names.get_indexer(genes) for table in pooled.tables]
    for i, where, table in pooled.chunks():
        values = np.ascontiguousarray(dense(values_of(table, pooled.layer)[:, columns[i]]), np.float32)
        # Constant rows, such as spots without counts, are equal without being the same spot.
        varied = np.nanmax(values, axis=1, initial=-np.inf) > np.nanmin(values, axis=1, initial=np.inf)
        prints[where] = [hash(row.tobytes()) if v else 0 for row, v in zip(values, varied, strict=True)]
        values = np.nan_to_num(values)
        sketch[where] = (np.log1p(values) if pooled.scale == "counts" else values) @ projection
    return prints, sketch


def _raise_duplicate_section(pooled: SpotData, unit: np.ndarray, members: Sequence[int], what: str) -> None:
    a, b = (pooled.samples[np.argmax(unit == i)] for i in members)
    if a == b:
        raise ValueError(f"`data`: {what} in two sections of sample {a!r}; pass each section once")
    raise ValueError(
        f"`sample_key`: {what} in samples {a!r} and {b!r}: a patient with two names would count twice; use one name, and "
        "pass the section once"
    )
