"""Validated inputs of ``hg.tl.domain_preservation``: sections, domains, genes and depth."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from ..._core import validate
from ..._core.duplicates import check_duplicate_spots
from ..._core.expression import Scale, count_totals, log_expression
from ..._core.genes import columns_of
from ..._core.keys import Keys
from ..._core.matrix import matrix_of
from ..._core.predictions import prediction_of, symbols_of
from ..._core.spots import SpotData, unique_section_names

#: Fewest spots of a domain in a section; smaller domains are left out there.
MIN_SPOTS = 3
#: Number of genes of highest variance if no prediction marks reliable genes.
N_VARIABLE = 2000


def sections(spots: SpotData) -> pd.DataFrame:
    """``sample`` and ``section`` of each spot; equal names of sections in two samples are made unique."""
    names = spots.tables[0].obs_names
    if not names.is_unique:
        raise ValueError(
            f"`data`: obs_names are not unique, {names[names.duplicated()][0]!r} occurs twice; give each spot once"
        )
    check_duplicate_spots(spots)
    return pd.DataFrame({"sample": spots.samples, "section": unique_section_names(spots.sections, spots.samples)})


def domains(spots: SpotData, domain_key: str, where: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Codes of the domains and their names; -1 without a domain, or if it has too few spots in its section."""
    values = pd.Series(spots.labels)
    column = spots.tables[0].obs[domain_key]
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = values.iloc[np.argsort(column.cat.codes, kind="stable")].dropna().unique().tolist()
    else:
        names = sorted(set(values.dropna()))
    codes = pd.Categorical(values, categories=names).codes.astype(np.int64)
    small_domains = []
    enough = False
    for (_, section), rows in where.groupby(["sample", "section"], sort=False).indices.items():
        size = np.bincount(codes[rows][codes[rows] >= 0], minlength=len(names))
        small = np.flatnonzero((size > 0) & (size < MIN_SPOTS))
        small_domains += [f"{names[code]!r} ({size[code]} in {section})" for code in small]
        codes[rows[np.isin(codes[rows], small)]] = -1
        enough |= bool(np.count_nonzero(size >= MIN_SPOTS) > 1)
    if not enough:
        raise ValueError(
            f"`domain_key` {domain_key!r}: no section has two domains of at least {MIN_SPOTS} spots; found "
            f"{ {name: int((values == name).sum()) for name in names} }"
        )
    if small_domains:
        warnings.warn(
            f"domains with fewer than {MIN_SPOTS} spots in a section are left out there: {', '.join(small_domains)}",
            stacklevel=3,
        )
    return codes, names


def genes(
    table: AnnData,
    given: Sequence[str] | None,
    layer: str | None,
    measured: str | None,
    *,
    layer_scale: Scale,
    measured_scale: Scale,
    has_measured: bool,
) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
    """Names of the genes, and their predicted and measured log expression (``None`` if not available)."""
    validate.unique(table.var_names, "data", "genes of var_names")
    key = prediction_of(table, layer)
    reliable = "" if layer is None else Keys(key or layer).reliable
    columns = np.arange(table.n_vars)
    if given is not None:
        given = validate.names(given, "genes", one=True)
        symbols = None if key is None else symbols_of(table, table.uns.get(key, {}), None)
        columns = columns_of(table, given, symbols)
        unknown = [name for name, column in zip(given, columns, strict=True) if column < 0]
        if unknown:
            raise ValueError(
                f"`genes`: {unknown[:5]} are not genes of the table (first of its {table.n_vars} genes: {list(table.var_names[:3])})"
            )
        if len(set(columns)) < len(given):
            raise ValueError(f"`genes`: {pd.Index(given)[pd.Index(columns).duplicated()][0]!r} is given twice")
    elif reliable in table.var:
        columns = np.flatnonzero(table.var[reliable].astype(bool))
        if len(columns) < 2:
            raise ValueError(
                f"`genes`: {len(columns)} genes are reliable, at least 2 are needed; pass genes=[...] to use unreliable ones"
            )
    names = table.var_names[columns]
    predicted = measured_values = None
    if layer is not None:
        predicted = log_expression(
            table,
            layer,
            genes=columns,
            scale=layer_scale,
            expected="log",
            predicted=key is not None,
        )
    if has_measured:
        measured_values = log_expression(
            table, measured, genes=columns, scale=measured_scale, expected="counts", parameter="measured"
        )
        if measured_scale != "log":
            empty = count_totals(matrix_of(table, measured, "measured")) == 0
            measured_values[empty] = np.nan
            if empty.any():
                warnings.warn(
                    f"{int(empty.sum())} spots have no counts and are left out, for example {table.obs_names[empty][0]!r}",
                    stacklevel=3,
                )
    known = np.ones(len(names), bool)
    available = [values for values in (predicted, measured_values) if values is not None]
    for values in available:
        finite = np.isfinite(values)
        # Drop a gene that some sections lack rather than their spots; spots without any gene are outside the image.
        known &= finite.any(axis=0) if given is not None else finite[finite.any(axis=1)].all(axis=0) & finite.any()
    if given is not None and not known.all():
        raise ValueError(f"`genes`: {names[~known][:5].tolist()} are NaN at every spot")
    if given is None and reliable not in table.var and known.sum() > N_VARIABLE:
        spread = np.nanvar(available[-1], axis=0)
        known[np.argsort(-np.where(known, spread, -1), kind="stable")[N_VARIABLE:]] = False
    if known.sum() < 2:
        raise ValueError(f"`genes`: {int(known.sum())} genes have values; at least 2 are needed")
    predicted, measured_values = (None if v is None else v[:, known] for v in (predicted, measured_values))
    return names[known].tolist(), predicted, measured_values


def depth(table: AnnData, measured: str | None, scale: Scale) -> np.ndarray | None:
    """Log of the total counts of each spot ``(n, 1)``, NaN without counts; ``None`` if only logarithms are known."""
    if scale == "log":
        return None
    total = np.asarray(count_totals(matrix_of(table, measured, "measured")), float).ravel()
    return np.log(np.where(total > 0, total, np.nan))[:, None]
