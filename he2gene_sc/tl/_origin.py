"""Where values and labels come from: predicted or measured, reliable or not, both from one image or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._keys import MADE, Keys
from .._tables import Scale, labels_of, log_expression
from ._pooled import Pool, prediction_key

if TYPE_CHECKING:
    from anndata import AnnData


def is_circular(tables: Sequence[AnnData], groupby: str, layer: str | None) -> bool:
    """Whether the labels of a table were predicted, as its layer was: by name, or a copy of such a column."""
    for table in tables:
        if prediction_key(table, layer) is None:
            continue
        keys = [key for key, record in table.uns.items() if isinstance(record, Mapping) and "weights_sha256" in record]
        named = {Keys(key).annotation for key in [*keys, prediction_key(table, layer)]}
        if groupby in named:
            return True
        labels = labels_of(table, groupby, "groupby")
        for name in named & set(table.obs):
            if (pd.notna(labels) == table.obs[name].notna().to_numpy()).all() and (
                labels[pd.notna(labels)] == table.obs[name].dropna().astype(str).to_numpy(object)
            ).all():
                return True
    return False


def reliable_genes(tables: Sequence[AnnData], layer: str | None) -> pd.Series | None:
    """Whether the cards call a gene reliable in every table; ``None`` for measured values, which are."""
    out = None
    for table in tables:
        key = prediction_key(table, layer)
        if key is None:
            continue
        name = Keys(key).reliable
        flags = table.var[name].astype(bool) if name in table.var else pd.Series(False, index=table.var_names)
        out = flags if out is None else out & flags.reindex(out.index, fill_value=False)
    return None if out is None else out.rename(index=str)


def measured_part(spots: Pool, measured: str | None, scale: Scale) -> tuple[Pool, np.ndarray]:
    """Spots of the samples that were measured, with what was measured, and which they are, ``(n,)`` bool."""
    seen = np.zeros(len(spots.labels), bool)
    start = 0
    for table, rows in zip(spots.tables, spots.rows, strict=True):
        end = start + len(rows)
        if MADE not in table.uns and len(rows):
            values = table.X if measured is None else table.layers.get(measured)
            if values is None:
                raise ValueError(f"`measured` {measured!r} is no layer, valid: {sorted(table.layers)} (None: X)")
            total = np.asarray(values.sum(axis=1), float).ravel()
            seen[start:end] = np.nan_to_num(total[rows]) > 0
        start = end
    kept = np.isin(spots.samples, np.unique(spots.samples[seen].astype(str)))
    expected = "counts" if measured is None else "log"
    chosen = spots.take(kept)
    for table, rows in zip(chosen.tables, chosen.rows, strict=True):
        if len(rows):
            log_expression(
                table[rows],
                measured,
                genes=np.zeros(0, int),
                scale=scale,
                expected=expected,
                parameter="measured",
                scale_parameter="measured_scale",
            )
    return replace(chosen, layer=measured, scale=expected if scale == "auto" else scale), kept
