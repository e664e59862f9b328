"""What ``hg.tl.adapt`` is given: genes, mask or layer of what was measured, sections, all checked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale, log_expression
from .._core.genes import columns_of as named_columns
from .._core.matrix import layer_names, values_of
from .._core.predictions import prediction_of, symbols_of

if TYPE_CHECKING:
    from anndata import AnnData


def columns_of(table: AnnData, predicted: np.ndarray, layer: str, genes: Sequence[str] | None) -> np.ndarray:
    """Positions of the genes to adapt."""
    known = np.any(np.isfinite(predicted), axis=0)
    if genes is None:
        if not known.any():
            raise ValueError(f"`layer` {layer!r} predicts no gene of the table")
        return np.flatnonzero(known)
    if isinstance(genes, str):
        raise ValueError(f"`genes` is {genes!r}; a list of genes is needed")
    genes = list(dict.fromkeys(validate.names(genes, "genes")))
    key = prediction_of(table, layer)
    at = named_columns(table, genes, symbols_of(table, table.uns.get(key, {}), None))
    missing = [gene for gene, i in zip(genes, at, strict=True) if i < 0 or not known[i]]
    if missing or not genes:
        raise ValueError(
            f"`genes`: {len(missing)} of {len(genes)} are not predicted in layer {layer!r}: {missing[:5]}; those that are: "
            f"hg.get.genes(data), {int(known.sum())} in all"
        )
    return pd.unique(at)


def measured_of(
    table: AnnData,
    measured: str | np.ndarray | pd.Series,
    counts: str | None,
    scale: Scale,
    columns: np.ndarray,
    layer: str,
) -> np.ndarray:
    """Measured expression ``(n_obs, genes)`` as logarithms, NaN where nothing was measured."""
    is_layer = isinstance(measured, str) and measured in table.layers
    if is_layer and measured in table.obs:
        raise ValueError(f"`measured` {measured!r} is a layer and a column of obs: rename one")
    if is_layer and measured == layer:
        raise ValueError(
            f"`measured` {measured!r} is the prediction itself; a mask or a layer of measured values is needed"
        )
    if is_layer and counts is not None:
        raise ValueError(f"`counts` is {counts!r}, but `measured` {measured!r} is a layer already: give one of them")
    mask = np.ones(table.n_obs, bool) if is_layer else _mask(table, measured)
    source = measured if isinstance(measured, str) and is_layer else counts
    parameter = "measured" if is_layer else "counts"
    values = values_of(table, source, parameter)
    partly = 0
    if not hasattr(values, "toarray") or np.isnan(values.data).any():
        values = values.toarray() if hasattr(values, "toarray") else values
        missing = np.isnan(values)
        mask &= ~missing.all(1)
        partly = int((missing.any(1) & mask).sum())
        if partly and scale != "log":
            raise ValueError(
                f"`{parameter}`: {partly} spots have some genes measured and others not (NaN): their total is not known, so "
                "counts cannot be normalised; give natural logarithms of (1 + counts per 10,000) and measured_scale='log'"
            )
    if is_layer and (not mask.any() or (mask.all() and not partly)):
        what = "everywhere" if not mask.any() else "nowhere"
        raise ValueError(
            f"`measured`: layer {measured!r} is NaN {what}; NaN where a gene of a spot was not measured is needed"
        )
    truth = log_expression(
        table, source, genes=columns, scale=scale, expected="counts", parameter=parameter, unmeasured_spots=True
    )
    empty = mask & (np.asarray(np.nan_to_num(values.sum(axis=1), nan=1)).ravel() == 0)
    if empty.any():
        warnings.warn(f"{int(empty.sum())} measured spots have no counts: taken as not measured", stacklevel=3)
    truth[~mask | empty] = np.nan
    return truth


def _mask(table: AnnData, measured: Any) -> np.ndarray:
    """Boolean mask of the measured spots, checked."""
    found = measured
    if isinstance(measured, str):
        if measured not in table.obs:
            valid = [key for key in table.obs if isinstance(_booleans(table.obs[key]), np.ndarray)]
            raise ValueError(
                f"`measured` {measured!r} is no column of obs and no layer, columns of True and False: {valid}, layers: "
                f"{sorted(layer_names(table))}"
            )
        found = table.obs[measured]
    elif isinstance(measured, pd.Series):
        missing = ~table.obs_names.isin(measured.index)
        if missing.any() or measured.index.has_duplicates:
            raise ValueError(
                f"`measured`: a Series indexed by the spots is needed; {int(missing.sum())} of {table.n_obs} spots are not "
                f"in its index{', which has duplicates' if measured.index.has_duplicates else ''}"
            )
        found = measured.reindex(table.obs_names)
    if found is None:
        raise ValueError(
            "`measured` is None; a mask of the spots, a column of True and False in obs, or a layer is needed"
        )
    mask = _booleans(found)
    if isinstance(mask, str):
        name = f" {measured!r}" if isinstance(measured, str) else ""
        raise ValueError(f"`measured`{name} {mask}")
    if mask.shape != (table.n_obs,):
        raise ValueError(f"`measured` has shape {mask.shape}; ({table.n_obs},), one a spot, is needed")
    if not mask.any():
        raise ValueError(f"`measured` is False for all {len(mask)} spots: there is nothing to learn from")
    if mask.all():
        raise ValueError(f"`measured` is True for all {len(mask)} spots: there is nothing left to predict")
    return mask


def _booleans(found: Any) -> np.ndarray | str:
    """Read True and False from an array, list or column, whatever they are kept as; else say what is wrong with them."""
    if isinstance(found, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        values = np.asarray(found.astype(object))
    elif isinstance(found, list | tuple):
        values = np.array(found, object)
    elif isinstance(found, np.ndarray):
        values = found
    else:
        return f"is a {type(found).__name__}; an array of True and False, a column of obs or a layer is needed"
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
        return (
            f"is NA for {int(missing.sum())} of {missing.size} spots; say of each whether it was measured, with .fillna(False) "
            "for example"
        )
    return np.isin(values.astype(str), "True")


def rows_of(truth: np.ndarray, sections: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each section that something was measured of."""
    from ..stats import MIN_SPOTS

    rows, few, none = {}, [], []
    spots = np.isfinite(truth).any(1)
    for name in dict.fromkeys(sections):
        here = sections == name
        n = int((spots & here).sum())
        if n >= MIN_SPOTS:
            rows[name] = np.flatnonzero(here & inside)
        elif n:
            few.append(f"{name!r} ({n})")
        else:
            none.append(str(name))
    if few:
        raise ValueError(
            f"`measured`: too few spots with a prediction are measured in {', '.join(few)}; at least {MIN_SPOTS} are needed, "
            "or none of a section"
        )
    if not rows:
        raise ValueError("`measured`: no predicted gene is measured at a spot that has a prediction")
    if none:
        warnings.warn(f"nothing was measured of section(s) {none}: they get NaN", stacklevel=3)
    return rows
