"""Sums of raw counts and of depth over the spots of a sample and group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, issparse

from ..._core.expression import summarize_values
from ..._core.keys import OWN_TABLE
from ..._core.matrix import in_memory, indexable_matrix, matrix_of, max_chunk_rows
from ..._core.names import check_spelling, clean_names
from ..._core.spots import SpotData
from ...stats import CountSums
from .design import Design

if TYPE_CHECKING:
    from anndata import AnnData


#: Fewest spots for a separate slope of a sample.
_MIN_SLOPE = 20
#: Largest share of spots without counts for which depth counts as known.
_MAX_EMPTY = 0.05


@dataclass(frozen=True)
class CountCells:
    """Sums of raw counts over the spots of every label in every sample, with the fields of :class:`~he2gene_sc.stats.CountSums`."""

    counts: np.ndarray
    squares: np.ndarray
    by_depth: np.ndarray
    depth: np.ndarray
    depth_squares: np.ndarray

    @classmethod
    def from_spots(
        cls, pool: SpotData, code: np.ndarray, shape: tuple[int, int], log_depth: np.ndarray | None = None
    ) -> CountCells:
        """Sum in one pass; ``code`` is the cell of each spot. ``log_depth`` is per spot; default: log of total counts."""
        n = shape[0] * shape[1]
        sums = np.zeros((3, n, len(pool.genes)))
        depth = np.zeros((2, n))
        start = 0
        for table, rows in zip(pool.tables, pool.rows, strict=True):
            values = indexable_matrix(table, pool.layer)
            columns = table.var_names.get_indexer(pool.genes)
            listed = np.flatnonzero(columns >= 0)
            step = max(512, max_chunk_rows(values))
            for first in range(0, len(rows), step):
                chosen = rows[first : first + step]
                block = in_memory(values[chosen])
                block = csr_array(block if issparse(block) else np.nan_to_num(block))
                block = block.astype(np.float64)
                block.data = np.nan_to_num(block.data)
                where = slice(start + first, start + first + len(chosen))
                total = np.asarray(block.sum(axis=1)).ravel() if log_depth is None else np.exp(log_depth[where])
                cell = code[where]
                ones = csr_array((np.ones(len(chosen)), (cell, np.arange(len(chosen)))), (n, len(chosen)))
                y = block[:, columns[listed]]
                totals = csr_array((total, (cell, np.arange(len(chosen)))), (n, len(chosen)))
                for out, part in zip(sums, (ones @ y, ones @ y.multiply(y), totals @ y), strict=True):
                    out[:, listed] += part.toarray()
                depth += np.array([ones @ total, ones @ np.square(total)])
            start += len(rows)
        return cls(*sums.reshape(3, *shape, -1), *depth.reshape(2, *shape))

    def pairs(self, sides: Sequence[np.ndarray], spots: np.ndarray, paired: np.ndarray) -> CountSums:
        """Return the sums of two sides (masks of labels) in the paired samples; ``spots`` is ``(2, samples)``."""
        parts = {
            field.name: np.array([getattr(self, field.name)[paired][:, side].sum(1) for side in sides])
            for field in fields(self)
        }
        return CountSums(spots=spots[:, paired], **parts)


@dataclass(frozen=True)
class DepthCells:
    """Sums of x (log depth of a spot), x², and x times log expression, over the spots of every label in every sample."""

    sums: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    @classmethod
    def from_spots(cls, pool: SpotData, depth: np.ndarray, code: np.ndarray, shape: tuple[int, int]) -> DepthCells:
        """Sum in one pass; ``depth`` is the log depth ``(n,)``."""
        n = shape[0] * shape[1]
        x = depth - depth.mean()
        products = np.zeros((n, len(pool.genes)))
        for where, values in pool.blocks():
            rows = np.arange(len(values))
            products += csr_array((x[where], (code[where], rows)), (n, len(values))) @ values
        sums, squares = (np.bincount(code, weights, n).reshape(shape) for weights in (x, np.square(x)))
        return cls(sums, squares, products.reshape(*shape, -1))

    def adjust(
        self, sides: Sequence[np.ndarray], spots: np.ndarray, sums: np.ndarray, paired: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Effect of depth on the difference of each paired sample ``(n, g)``, and on its variance ``(n,)``.

        Each sample has its own slope within groups, so the errors of the slopes are part of the variance between samples.
        """
        x, xx = (np.array([part[paired][:, side].sum(1) for side in sides]) for part in (self.sums, self.squares))
        xy = np.array([self.products[paired][:, side].sum(1) for side in sides])
        n, y = spots[:, paired], sums[:, paired]
        mean = x / n
        spread = (xx - mean * x).sum(0)
        shared = (xy - mean[..., None] * y).sum(0)
        gap = mean[0] - mean[1]
        varies = spread > 1e-9 * np.maximum(xx.sum(0), 1e-300)
        slope = np.where(varies[:, None], shared / np.where(varies, spread, 1)[:, None], 0)
        unknown = np.where(np.abs(gap) > 1e-9, np.inf, 0.0)
        return gap[:, None] * slope, np.where(varies, np.square(gap) / np.where(varies, spread, 1), unknown)

    def shift(self, sides: Sequence[np.ndarray], spots: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Effect of depth on each mean ``(2, samples, g)``, relative to the mean depth of all spots.

        A sample with fewer than 20 spots uses the common slope.
        """
        x, xx = (np.array([part[:, side].sum(1) for side in sides]) for part in (self.sums, self.squares))
        xy = np.array([self.products[:, side].sum(1) for side in sides])
        mean = x / np.maximum(spots, 1)
        spread = (xx - mean * x).sum(0)
        shared = (xy - mean[..., None] * sums).sum(0)
        own = (spread > 1e-9 * np.maximum(xx.sum(0), 1e-300)) & (spots.sum(0) >= _MIN_SLOPE)
        common = shared.sum(0) / spread.sum() if spread.sum() > 1e-9 * xx.sum() else np.zeros(shared.shape[1])
        slope = np.where(own[:, None], shared / np.where(own, spread, 1)[:, None], common)
        return mean[..., None] * slope


def depth_of(pool: SpotData, depth: str | None) -> np.ndarray | None:
    """Natural log of the depth of each spot ``(n,)``; ``None`` if it is not known.

    ``"auto"``: total counts of the layer if it holds counts, else of ``X``; otherwise a column of obs. Up to 5 % of the spots may
    have no counts; they get the median depth of their section.
    """
    if depth is None:
        return None
    layer = pool.layer if pool.scale == "counts" else None
    if depth != "auto":
        totals = pd.to_numeric(pool.obs(depth, "depth"), errors="coerce").to_numpy(float)
    elif any(_lacks_counts(t, layer) for t, rows in zip(pool.tables, pool.rows, strict=True) if len(rows)):
        return None
    else:
        totals = pool.totals(layer)
    known = np.isfinite(totals) & (totals > 0)
    if known.all():
        return np.log(totals)
    if depth == "auto":
        counted = pd.Series(np.where(known, totals, np.nan))
        filled = counted.fillna(counted.groupby(pool.units).transform("median"))
        return np.log(filled.to_numpy()) if known.mean() >= 1 - _MAX_EMPTY and filled.notna().all() else None
    raise ValueError(
        f"`depth` {depth!r} is not a number above 0 for {int((~known).sum())} spots; name a column of total counts, or pass "
        "design=hg.Design(depth=None) for no adjustment"
    )


def _lacks_counts(table: AnnData, layer: str | None) -> bool:
    return (layer is None and (OWN_TABLE in table.uns or table.X is None)) or summarize_values(
        matrix_of(table, layer)
    ).kind != "counts"


def pair_design(
    pool: SpotData, samples: np.ndarray, sides: tuple[np.ndarray, np.ndarray], design: Design
) -> tuple[np.ndarray, int]:
    """Design of the differences within samples ``(n, p)`` and the index of the tested column.

    Constants of a sample cancel. Interactions with the group are centred, so the effect is that of the average sample.
    """
    if not design.terms:
        return np.ones((len(samples), 1)), 0
    from patsy import PatsyError, dmatrix

    term = design.term or "group"
    rows = _rows(pool, samples, sides, design)
    try:
        matrix = dmatrix(f"group + {design.terms}", rows, NA_action="raise")
    except (PatsyError, NameError, SyntaxError, TypeError) as error:
        raise ValueError(f"`formula` {design.formula!r} is not valid: {str(error).splitlines()[0]}") from error
    info = matrix.design_info
    matrix = np.asarray(matrix, np.float64)
    change = matrix[: len(samples)] - matrix[len(samples) :]
    names, columns = ["group"], [np.ones(len(samples))]
    for part in info.terms:
        factors = [factor.name() for factor in part.factors]
        where = info.term_slices[part]
        if not factors or factors == ["group"]:
            continue
        parts = zip(info.column_names[where], change[:, where].T, matrix[:, where].T, strict=True)
        for name, column, values in parts:
            column = column - column.mean() if "group" in factors else column
            # Means of equal values over different spots differ by rounding.
            if np.abs(column).max() <= 1e-9 * np.abs(values).max():
                plain = re.sub(r"Q\('(.*?)'\)", r"\1", name)
                raise ValueError(
                    f"`{'covariates' if name.startswith('Q(') else 'formula'}`: {plain!r} is constant within samples and cancels, "
                    f"since groups are compared within samples; leave it out, or test its interaction: formula='group:{plain}'"
                )
            names.append(name)
            columns.append(column)
    if term not in names:
        raise ValueError(f"`term` {term!r} is not a term of the design, valid: {names}")
    matrix = np.column_stack(columns)
    if len(samples) <= matrix.shape[1] or np.linalg.matrix_rank(matrix / np.abs(matrix).max(0)) < matrix.shape[1]:
        raise ValueError(
            f"`formula`: the terms {names} cannot be estimated separately from {len(samples)} samples; leave some out"
        )
    return matrix, names.index(term)


def _rows(pool: SpotData, samples: np.ndarray, sides: tuple[np.ndarray, np.ndarray], design: Design) -> pd.DataFrame:
    """Variables of a formula, one row per sample in the group, then in the reference: means of numbers, and labels."""
    words = set(re.findall(r"\w+", design.formula or "")) - {"group"}
    known = [key for key in pool.tables[0].obs if key in words and all(key in table.obs for table in pool.tables)]
    rows: dict[str, Any] = {"group": np.repeat([0.5, -0.5], len(samples))}
    masks = [side & (pool.samples == sample) for side in sides for sample in samples]
    for key in dict.fromkeys([*design.covariates, *known]):
        values = pool.obs(key, "covariates")
        used = np.logical_or.reduce(masks)
        if values[used].isna().any():
            raise ValueError(f"`covariates` {key!r} is empty for {int(values[used].isna().sum())} spots")
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            check_finite(values[used], key)
            rows[key] = [float(values[mask].mean()) for mask in masks]
            continue
        texts = pd.Series(clean_names(values), dtype=object)
        check_spelling({"": texts[used].to_numpy(object)}, "covariates", key)
        found = [texts[mask].unique() for mask in masks]
        if several := [sample for sample, names in zip([*samples] * 2, found, strict=True) if len(names) > 1]:
            raise ValueError(
                f"`covariates` {key!r} has several values within sample {str(several[0])!r}; a number, or one label per sample and "
                "group, is needed"
            )
        rows[key] = [names[0] for names in found]
    return pd.DataFrame(rows)


def check_finite(values: pd.Series, key: str) -> None:
    """Raise if a covariate has infinite values."""
    if n := int(np.isinf(values.to_numpy(float)).sum()):
        raise ValueError(
            f"`covariates` {key!r} is infinite in {n} spots; set a finite number, or remove the labels of these spots"
        )


def keep_genes(sums: CountSums, genes: np.ndarray) -> CountSums:
    """Keep the genes of a mask ``(g,)``."""
    return replace(
        sums, counts=sums.counts[..., genes], squares=sums.squares[..., genes], by_depth=sums.by_depth[..., genes]
    )
