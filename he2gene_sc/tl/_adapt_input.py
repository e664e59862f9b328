"""Check the input of ``hg.tl.adapt``: genes, mask or layer of measured values, and sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale, log_expression
from .._core.genes import columns_of as named_columns
from .._core.logs import warn
from .._core.matrix import layer_names, values_of
from .._core.predictions import record_of_layer, symbols_of

if TYPE_CHECKING:
    from anndata import AnnData


def columns_of(table: AnnData, predicted: np.ndarray, layer: str, genes: Sequence[str] | None) -> np.ndarray:
    """Return the positions of the genes to adapt."""
    known = np.any(np.isfinite(predicted), axis=0)
    if genes is None:
        if not known.any():
            raise ValueError(f"`layer` {layer!r} predicts no gene of the table; run hg.tl.predict for this table")
        return np.flatnonzero(known)
    if isinstance(genes, str):
        raise ValueError(f"`genes` is {genes!r}; a list of genes is needed")
    genes = list(dict.fromkeys(validate.names(genes, "genes")))
    columns = named_columns(table, genes, symbols_of(table, record_of_layer(table, layer), None))
    missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0 or not known[column]]
    if missing or not genes:
        raise ValueError(
            f"`genes`: {len(missing)} of {len(genes)} are not predicted in layer {layer!r}: {missing[:5]}; hg.get.genes(data) lists "
            f"the predicted genes, {int(known.sum())} in all"
        )
    return pd.unique(columns)


def measured_of(
    table: AnnData,
    measured: str | np.ndarray | pd.Series,
    counts: str | None,
    scale: Scale,
    columns: np.ndarray,
) -> np.ndarray:
    """Return measured expression ``(n_obs, genes)`` as logarithms, NaN where nothing was measured."""
    is_layer = isinstance(measured, str) and measured in table.layers
    if is_layer and measured in table.obs:
        raise ValueError(f"`measured` {measured!r} is the name of a layer and of a column of obs; rename one of them")
    if is_layer and counts is not None:
        raise ValueError(
            f"`counts` is {counts!r}, but `measured` {measured!r} is already a layer; pass only one of them"
        )
    mask = np.ones(table.n_obs, bool) if is_layer else _mask(table, measured)
    source = measured if isinstance(measured, str) and is_layer else counts
    parameter = "measured" if is_layer else "counts"
    values = values_of(table, source, parameter)
    n_partial = 0
    if not hasattr(values, "toarray") or np.isnan(values.data).any():
        values = values.toarray() if hasattr(values, "toarray") else values
        missing = np.isnan(values)
        mask &= ~missing.all(1)
        n_partial = int((missing.any(1) & mask).sum())
        if n_partial and scale != "log":
            raise ValueError(
                f"`{parameter}`: {n_partial} spots have some genes measured and others not (NaN): their totals are unknown, so "
                "counts cannot be normalised; pass natural logarithms of (1 + counts per 10,000) and measured_scale='log'"
            )
    if is_layer and (not mask.any() or (mask.all() and not n_partial)):
        where = "everywhere" if not mask.any() else "nowhere"
        raise ValueError(
            f"`measured`: layer {measured!r} is NaN {where}; set it to NaN only where a gene of a spot was not measured"
        )
    truth = log_expression(
        table, source, genes=columns, scale=scale, expected="counts", parameter=parameter, unmeasured_spots=True
    )
    empty = mask & (np.asarray(np.nan_to_num(values.sum(axis=1), nan=1)).ravel() == 0)
    if empty.any():
        warn(f"{int(empty.sum())} measured spots have no counts and are treated as not measured")
    truth[~mask | empty] = np.nan
    return truth


def _mask(table: AnnData, measured: Any) -> np.ndarray:
    values = measured
    if isinstance(measured, str):
        if measured not in table.obs:
            valid = [key for key in table.obs if isinstance(_booleans(table.obs[key]), np.ndarray)]
            raise ValueError(
                f"`measured` {measured!r} is neither a column of obs nor a layer; boolean columns: {valid}, layers: "
                f"{sorted(layer_names(table))}"
            )
        values = table.obs[measured]
    elif isinstance(measured, pd.Series):
        missing = ~table.obs_names.isin(measured.index)
        if missing.any() or measured.index.has_duplicates:
            raise ValueError(
                f"`measured`: a Series indexed by the spots is needed; {int(missing.sum())} of {table.n_obs} spots are not "
                f"in its index{', which has duplicates' if measured.index.has_duplicates else ''}"
            )
        values = measured.reindex(table.obs_names)
    if values is None:
        raise ValueError("`measured` is None; a mask of the spots, a boolean column of obs, or a layer is needed")
    mask = _booleans(values)
    if isinstance(mask, str):
        name = f" {measured!r}" if isinstance(measured, str) else ""
        raise ValueError(f"`measured`{name} {mask}")
    if mask.shape != (table.n_obs,):
        raise ValueError(f"`measured` has shape {mask.shape}; shape ({table.n_obs},) is needed, one value per spot")
    if not mask.any():
        raise ValueError(f"`measured` is False for all {len(mask)} spots; set it to True at measured spots")
    if mask.all():
        raise ValueError(f"`measured` is True for all {len(mask)} spots; no spot is left to correct")
    return mask


def _booleans(data: Any) -> np.ndarray | str:
    """Return the booleans of an array, list or column of any dtype, or a text with the reason why they are invalid."""
    if isinstance(data, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        values = np.asarray(data.astype(object))
    elif isinstance(data, list | tuple):
        values = np.array(data, object)
    elif isinstance(data, np.ndarray):
        values = data
    else:
        return f"is a {type(data).__name__}; an array of True and False, a column of obs or a layer is needed"
    if values.dtype == bool:
        return values.copy()
    if not values.size:
        return "is empty; True or False for each spot is needed"
    if values.dtype != object and values.dtype.kind not in "UT":
        return f"holds {values.dtype}; True and False are needed"
    missing = np.asarray(pd.isna(values))
    if missing.all():
        return "is NA for all spots; True or False for each is needed"
    given = values[~missing].tolist()
    if other := [value for value in given if not isinstance(value, bool | np.bool_) and value not in ("True", "False")]:
        return f"holds {', '.join(list(dict.fromkeys(map(repr, other)))[:3])}; True and False are needed"
    if missing.any():
        return f"is NA for {int(missing.sum())} of {missing.size} spots; set each to True or False, for example with .fillna(False)"
    return np.isin(values.astype(str), "True")


def rows_of(truth: np.ndarray, sections: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each section that has measured spots."""
    from ..stats import MIN_SPOTS

    rows, too_few, unmeasured = {}, [], []
    spots = np.isfinite(truth).any(1)
    for name in dict.fromkeys(sections):
        own = sections == name
        n = int((spots & own).sum())
        if n >= MIN_SPOTS:
            rows[name] = np.flatnonzero(own & inside)
        elif n:
            too_few.append(f"{name!r} ({n})")
        else:
            unmeasured.append(str(name))
    if too_few:
        raise ValueError(
            f"`measured`: too few spots with a prediction are measured in {', '.join(too_few)}; measure at least {MIN_SPOTS} spots of "
            "a section, or none"
        )
    if not rows:
        raise ValueError(
            "`measured`: no predicted gene is measured at a spot that has a prediction; measure other spots or genes"
        )
    if unmeasured:
        warn(f"section(s) {unmeasured} have no measured spots and get NaN")
    return rows
