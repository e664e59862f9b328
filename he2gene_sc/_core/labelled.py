"""Choose the labelled, measured spots and the genes of a test, and read their values and the depth of the spots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy.sparse import issparse

from . import validate
from .duplicates import check_duplicate_sections, check_duplicate_spots
from .expression import Scale, check_scale, count_totals, log_expression, summarize_values
from .genes import columns_of, find_genes
from .keys import OWN_TABLE, Keys
from .logs import logger, warn
from .matrix import blocks_of, matrix_of
from .names import clean_samples
from .predictions import IF_NONE_RELIABLE, prediction_of, symbols_of
from .spots import SpotData

if TYPE_CHECKING:
    from anndata import AnnData

#: Usual names of ``obs`` columns with patients.
_PATIENT_COLUMNS = ("patient", "patient_id", "donor", "donor_id", "subject", "subject_id", "individual")
#: Largest share of spots without counts for which depth counts as known.
_MAX_EMPTY = 0.05
#: Fewest spots of a domain in a section; smaller domains are left out there.
MIN_DOMAIN_SPOTS = 3
#: Number of genes of highest variance if no prediction marks reliable genes.
_N_VARIABLE = 2000


def labelled_spots(
    spots: SpotData,
    label_key: str | None,
    *,
    layer_scale: Scale = "auto",
    join: Literal["inner", "outer"] = "inner",
    reliable_only: bool = False,
) -> SpotData:
    """Keep the labelled spots that have values, and raise if the values are not valid."""
    layer = spots.layer
    for table in spots.tables:
        validate.all_different(table.var_names, "data", "genes of var_names")
        blocks = blocks_of(matrix_of(table, layer))
        if table.n_obs * table.n_vars and all(not issparse(block) and np.isnan(block).all() for _, block in blocks):
            raise ValueError(f"`layer` {layer!r} is NaN for every gene and spot")
        check_scale(table, layer, layer_scale, spots.scale, predicted=prediction_of(table, layer) is not None)
    spots = replace(
        spots,
        scale=spots.scale if layer_scale == "auto" else layer_scale,
        genes=_genes(spots, join, layer_scale, reliable_only),
    )
    labelled = pd.notna(spots.labels)
    if spots.scale == "counts":
        labelled &= _has_counts(spots)
    if not labelled.any():
        raise ValueError(f"`groupby` {label_key!r} is empty for every spot")
    pooled = spots.take(labelled)
    if unlabelled := sorted(set(spots.samples) - set(pooled.samples)):
        logger.warning("samples without a labelled spot are left out: %s", unlabelled)
    check_duplicate_spots(pooled)
    return _drop_missing(pooled)


def _has_counts(spots: SpotData) -> np.ndarray:
    """Mask ``(n,)`` of spots with counts; a spot without counts has no expression."""
    total = np.concatenate([count_totals(matrix_of(table, spots.layer)) for table in spots.tables])
    for i, table in enumerate(spots.tables):
        own = spots.objects == i
        empty = pd.notna(spots.labels[own]) & (total[own] == 0)
        if empty.any():
            logger.warning(
                "biomarkers: %d labelled spots have no counts and are left out, for example %r",
                *(empty.sum(), table.obs_names[empty][0]),
            )
    return total > 0


def _genes(spots: SpotData, join: str, layer_scale: Scale, reliable_only: bool) -> pd.Index:
    tables, layer = list(spots.tables), spots.layer
    if join == "outer" and len(tables) > 1 and not (layer is None or layer_scale == "counts"):
        raise ValueError(
            "`join` 'outer' is only for raw counts: a gene that was not predicted is unknown, not 0; use join='inner'"
        )
    genes = spots.shared_genes() if join == "inner" else spots.genes
    if join == "outer":
        for table in tables[1:]:
            genes = genes.append(table.var_names[find_genes(table.var_names, genes) < 0])
    if not len(genes):
        if without := [i for i, table in enumerate(tables) if not table.n_vars]:
            raise ValueError(f"`data`: object {without[0]} has no genes; check how it was subset")
        raise ValueError(
            f"`data`: the objects have no gene in common, for example {tables[0].var_names[0]!r} and "
            f"{tables[-1].var_names[0]!r}; use the same gene names in all"
        )
    if len(tables) > 1:
        most = max(table.n_vars for table in tables)
        level = logging.INFO if len(genes) > most / 2 else logging.WARNING
        logger.log(
            level,
            "biomarkers: %d genes are in %s object, of at most %d",
            len(genes),
            "every" if join == "inner" else "some",
            most,
        )
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
            f"`reliable_only`: no gene is reliable on every slide by the model card. You can {IF_NONE_RELIABLE}; or pass "
            "reliable_only=False to test all genes"
        )
    return genes


def _drop_missing(pooled: SpotData) -> SpotData:
    """Leave out spots without values and genes that are NaN in other spots; raise if spots are duplicated."""
    lost = np.zeros(len(pooled.labels), bool)
    unknown = np.zeros(len(pooled.genes), int)
    for where, block in pooled.blocks():
        nan = np.isnan(block)
        lost[where] = nan.all(axis=1)
        unknown += nan[~lost[where]].sum(axis=0)
    if lost.all():
        raise ValueError(f"`layer` {pooled.layer!r} is NaN for every gene and labelled spot")
    check_duplicate_sections(pooled)
    if lost.any():
        logger.warning("%d labelled spots have no values and are left out", lost.sum())
        pooled = pooled.take(~lost)
    if (unknown == 0).all():
        return pooled
    known = pooled.genes[unknown == 0]
    if not len(known):
        raise ValueError(
            f"`layer` {pooled.layer!r} contains NaN in every gene; only spots without any values may be NaN"
        )
    logger.warning("%d genes contain NaN and are left out, %d remain", (unknown > 0).sum(), len(known))
    return replace(pooled, genes=known)


def check_replicates(spots: SpotData, sample_key: str) -> None:
    """Warn if several samples are of one patient by another column of ``obs``: sections may have been used as patients."""
    for key in _PATIENT_COLUMNS:
        if key == sample_key or not all(key in table.obs for table in spots.tables):
            continue
        parts = [table.obs[key].iloc[rows] for table, rows in zip(spots.tables, spots.rows, strict=True)]
        patients = pd.Series(np.concatenate([clean_samples(part) for part in parts]))
        n, n_patients = len(set(spots.samples)), patients.nunique()
        # Otherwise samples are not parts of patients, but for example the halves of a plate.
        nested = patients.groupby(spots.samples).nunique().max() == 1
        if nested and patients.notna().all() and n_patients < n:
            warn(
                f"`sample_key` {sample_key!r}: the {n} samples are of {n_patients} patient{'s' * (n_patients != 1)} by obs[{key!r}]. "
                f"Samples of one patient are not replicates: p-values are too small. Use sample_key={key!r}"
            )
            return


def measured_part(
    spots: SpotData, measured: str | None, scale: Scale, expected: Literal["counts", "log"] | None = None
) -> tuple[SpotData, np.ndarray]:
    """Spots with measured values, and their mask ``(n,)``; spots without counts were not measured."""
    made = np.array([OWN_TABLE in table.uns for table in spots.tables])[spots.objects]
    seen = ~made
    seen[~made] = spots.take(~made).totals(measured, "measured") > 0
    expected = expected or ("counts" if measured is None else "log")
    chosen = spots.take(seen)
    for table, rows in zip(chosen.tables, chosen.rows, strict=True):
        if len(rows):
            check_scale(table[rows], measured, scale, expected, "measured")
    return replace(chosen, layer=measured, scale=expected if scale == "auto" else scale), seen


def values_outside_halves(known: SpotData, tested: pd.Index, n_genes: int) -> list[np.ndarray]:
    """Log expression ``(n, g)`` of the genes of highest mean outside each half of the tested genes; NaN become 0."""
    every = np.ones(len(known.labels), bool)
    known = replace(known, genes=known.shared_genes())
    total = known.sums(np.zeros(len(every), int), 1, np.nan_to_num)[0, 0]
    found = []
    for i in (0, 1):
        outside = np.flatnonzero(~known.genes.isin(tested[i::2]))
        top = np.sort(outside[np.argsort(-total[outside], kind="stable")[:n_genes]])
        found.append(np.nan_to_num(known.values(every, known.genes[top])))
    return found


def depth_of(spots: SpotData, depth: str | None) -> np.ndarray | None:
    """Natural log of the depth of each spot ``(n,)``; ``None`` if it is not known.

    ``"auto"``: total counts of the layer if it holds counts, else of ``X``; otherwise a column of obs. Up to 5 % of the spots may
    have no counts; they get the median depth of their section.
    """
    if depth is None:
        return None
    layer = spots.layer if spots.scale == "counts" else None
    if depth != "auto":
        totals = pd.to_numeric(spots.obs(depth, "depth"), errors="coerce").to_numpy(float)
    elif any(_lacks_counts(t, layer) for t, rows in zip(spots.tables, spots.rows, strict=True) if len(rows)):
        return None
    else:
        totals = spots.totals(layer)
    known = np.isfinite(totals) & (totals > 0)
    if known.all():
        return np.log(totals)
    if depth == "auto":
        counted = pd.Series(np.where(known, totals, np.nan))
        filled = counted.fillna(counted.groupby(spots.units).transform("median"))
        return np.log(filled.to_numpy()) if known.mean() >= 1 - _MAX_EMPTY and filled.notna().all() else None
    raise ValueError(
        f"`depth` {depth!r} is not a number above 0 for {int((~known).sum())} spots; name a column of total counts, or pass "
        "design=hg.Design(depth=None) for no adjustment"
    )


def _lacks_counts(table: AnnData, layer: str | None) -> bool:
    return (layer is None and (OWN_TABLE in table.uns or table.X is None)) or summarize_values(
        matrix_of(table, layer)
    ).kind != "counts"


def paired_layers(
    spots: SpotData,
    given: Sequence[str] | None,
    measured: str | None,
    *,
    layer_scale: Scale,
    measured_scale: Scale,
    has_measured: bool,
) -> tuple[list[str], np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Names of the genes of one table, their predicted and measured log expression ``(n, g)``, and the log depth ``(n, 1)``.

    ``None`` if not available. Without ``given`` genes: those that the model card calls reliable, else those of highest variance.
    """
    (table,), layer = spots.tables, spots.layer
    validate.all_different(table.var_names, "data", "genes of var_names")
    key = prediction_of(table, layer)
    reliable = "" if layer is None else Keys(key or layer).reliable
    columns = np.arange(table.n_vars)
    if given is not None:
        columns = _given_genes(table, given, key)
    elif reliable in table.var:
        columns = np.flatnonzero(table.var[reliable].astype(bool))
        if len(columns) < 2:
            raise ValueError(
                f"`genes`: {len(columns)} genes are reliable, at least 2 are needed; pass genes=[...] to use unreliable ones"
            )
    names = table.var_names[columns]
    predicted = measured_values = depth = None
    if layer is not None:
        predicted = log_expression(
            table, layer, genes=columns, scale=layer_scale, expected="log", predicted=key is not None
        )
    if has_measured:
        measured_values = log_expression(
            table, measured, genes=columns, scale=measured_scale, expected="counts", parameter="measured"
        )
    if measured_values is not None and measured_scale != "log":
        totals = count_totals(matrix_of(table, measured, "measured"))
        empty = totals == 0
        measured_values[empty] = np.nan
        depth = np.log(np.where(empty, np.nan, totals))[:, None]
        if empty.any():
            warn(f"{int(empty.sum())} spots have no counts and are left out, for example {table.obs_names[empty][0]!r}")
    known = np.ones(len(names), bool)
    available = [values for values in (predicted, measured_values) if values is not None]
    for values in available:
        finite = np.isfinite(values)
        # Drop a gene that some sections lack rather than their spots; spots without any gene are outside the image.
        known &= finite.any(axis=0) if given is not None else finite[finite.any(axis=1)].all(axis=0) & finite.any()
    if given is not None and not known.all():
        raise ValueError(f"`genes`: {names[~known][:5].tolist()} are NaN at every spot")
    if given is None and reliable not in table.var and known.sum() > _N_VARIABLE:
        spread = np.nanvar(available[-1], axis=0)
        known[np.argsort(-np.where(known, spread, -1), kind="stable")[_N_VARIABLE:]] = False
    if known.sum() < 2:
        raise ValueError(f"`genes`: {int(known.sum())} genes have values; at least 2 are needed")
    predicted, measured_values = (None if v is None else v[:, known] for v in (predicted, measured_values))
    return names[known].tolist(), predicted, measured_values, depth


def _given_genes(table: AnnData, given: Sequence[str], key: str | None) -> np.ndarray:
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
    return columns


def domain_codes(spots: SpotData, domain_key: str, where: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
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
        small = np.flatnonzero((size > 0) & (size < MIN_DOMAIN_SPOTS))
        small_domains += [f"{names[code]!r} ({size[code]} in {section})" for code in small]
        codes[rows[np.isin(codes[rows], small)]] = -1
        enough |= bool(np.count_nonzero(size >= MIN_DOMAIN_SPOTS) > 1)
    if not enough:
        raise ValueError(
            f"`domain_key` {domain_key!r}: no section has two domains of at least {MIN_DOMAIN_SPOTS} spots; found "
            f"{ {name: int((values == name).sum()) for name in names} }"
        )
    if small_domains:
        warn(
            f"domains with fewer than {MIN_DOMAIN_SPOTS} spots in a section are left out there: {', '.join(small_domains)}"
        )
    return codes, names
