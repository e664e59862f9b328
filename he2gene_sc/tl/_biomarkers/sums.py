"""What is summed over the spots of a sample and group beside the logarithms: raw counts, and depth."""

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


#: Spots from which a sample has a slope of its own.
_MIN_SLOPE = 20
#: Share of the spots that may be without counts where depth is known.
_MAX_EMPTY = 0.05


@dataclass(frozen=True)
class CountCells:
    """Sums of raw counts over the spots of every label in every sample, as :class:`~he2gene_sc.stats.CountSums` has them."""

    counts: np.ndarray
    squares: np.ndarray
    by_depth: np.ndarray
    depth: np.ndarray
    depth_squares: np.ndarray

    @classmethod
    def of(
        cls, pool: SpotData, code: np.ndarray, shape: tuple[int, int], depth_of_spots: np.ndarray | None = None
    ) -> CountCells:
        """Sum in one reading; ``code`` is the cell of each spot. ``depth_of_spots`` is the log depth, default total counts."""
        n = shape[0] * shape[1]
        sums = np.zeros((3, n, len(pool.genes)))
        depth = np.zeros((2, n))
        start = 0
        for table, rows in zip(pool.tables, pool.rows, strict=True):
            values = indexable_matrix(table, pool.layer)
            columns = table.var_names.get_indexer(pool.genes)
            named = np.flatnonzero(columns >= 0)
            step = max(512, max_chunk_rows(values))
            for first in range(0, len(rows), step):
                chosen = rows[first : first + step]
                block = in_memory(values[chosen])
                block = csr_array(block if issparse(block) else np.nan_to_num(block))
                block = block.astype(np.float64)
                block.data = np.nan_to_num(block.data)
                where = slice(start + first, start + first + len(chosen))
                own = np.asarray(block.sum(axis=1)).ravel()
                total = own if depth_of_spots is None else np.exp(depth_of_spots[where])
                at = code[where]
                ones = csr_array((np.ones(len(chosen)), (at, np.arange(len(chosen)))), (n, len(chosen)))
                y = block[:, columns[named]]
                deep = csr_array((total, (at, np.arange(len(chosen)))), (n, len(chosen)))
                for out, part in zip(sums, (ones @ y, ones @ y.multiply(y), deep @ y), strict=True):
                    out[:, named] += part.toarray()
                depth += np.array([ones @ total, ones @ np.square(total)])
            start += len(rows)
        return cls(*sums.reshape(3, *shape, -1), *depth.reshape(2, *shape))

    def pairs(self, sides: Sequence[np.ndarray], spots: np.ndarray, paired: np.ndarray) -> CountSums:
        """Return the sums of two sides, masks of labels, in the paired samples; ``spots`` is ``(2, samples)``."""
        parts = {
            field.name: np.array([getattr(self, field.name)[paired][:, side].sum(1) for side in sides])
            for field in fields(self)
        }
        return CountSums(spots=spots[:, paired], **parts)


@dataclass(frozen=True)
class DepthCells:
    """Sums over the spots of every label in every sample of x, the log depth of a spot, of x², and of x times the logarithms."""

    sums: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, pool: SpotData, depth: np.ndarray, code: np.ndarray, shape: tuple[int, int]) -> DepthCells:
        """Sum in one reading; ``depth`` is ``(n,)``."""
        n = shape[0] * shape[1]
        x = depth - depth.mean()
        products = np.zeros((n, len(pool.genes)))
        for where, values in pool.blocks():
            at = np.arange(len(values))
            products += csr_array((x[where], (code[where], at)), (n, len(values))) @ values
        sums, squares = (np.bincount(code, of, n).reshape(shape) for of in (x, np.square(x)))
        return cls(sums, squares, products.reshape(*shape, -1))

    def adjust(
        self, sides: Sequence[np.ndarray], spots: np.ndarray, sums: np.ndarray, paired: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what depth adds to the difference of each paired sample ``(n, g)``, and to its variance ``(n,)``.

        Each sample has its own slope within groups, so errors of slopes are part of how samples differ.
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
        """Return what depth adds to each mean ``(2, samples, g)``, against the mean depth of all spots.

        A sample of few spots has the slope of all.
        """
        x, xx = (np.array([part[:, side].sum(1) for side in sides]) for part in (self.sums, self.squares))
        xy = np.array([self.products[:, side].sum(1) for side in sides])
        mean = x / np.maximum(spots, 1)
        spread = (xx - mean * x).sum(0)
        shared = (xy - mean[..., None] * sums).sum(0)
        own = (spread > 1e-9 * np.maximum(xx.sum(0), 1e-300)) & (spots.sum(0) >= _MIN_SLOPE)
        of_all = shared.sum(0) / spread.sum() if spread.sum() > 1e-9 * xx.sum() else np.zeros(shared.shape[1])
        slope = np.where(own[:, None], shared / np.where(own, spread, 1)[:, None], of_all)
        return mean[..., None] * slope


def depth_of(pool: SpotData, depth: str | None) -> np.ndarray | None:
    """Natural log of the depth of each spot ``(n,)``; ``None`` where it is not known.

    ``"auto"``: total counts of the layer, if it holds counts, or of ``X``; else a column of obs. Up to a twentieth of the
    spots may be without counts: they get the median depth of their section.
    """
    if depth is None:
        return None
    layer = pool.layer if pool.scale == "counts" else None
    if depth != "auto":
        found = pd.to_numeric(pool.obs(depth, "depth"), errors="coerce").to_numpy(float)
    elif any(_without_counts(t, layer) for t, rows in zip(pool.tables, pool.rows, strict=True) if len(rows)):
        return None
    else:
        found = pool.totals(layer)
    known = np.isfinite(found) & (found > 0)
    if known.all():
        return np.log(found)
    if depth == "auto":
        counted = pd.Series(np.where(known, found, np.nan))
        filled = counted.fillna(counted.groupby(pool.units).transform("median"))
        return np.log(filled.to_numpy()) if known.mean() >= 1 - _MAX_EMPTY and filled.notna().all() else None
    raise ValueError(
        f"`depth` {depth!r} is not a number above 0 for {int((~known).sum())} spots; name a column of total counts, or pass "
        "design=hg.Design(depth=None) to leave it out"
    )


def _without_counts(table: AnnData, layer: str | None) -> bool:
    return (layer is None and (OWN_TABLE in table.uns or table.X is None)) or summarize_values(
        matrix_of(table, layer)
    ).kind != "counts"


def pair_design(
    pool: SpotData, samples: np.ndarray, sides: tuple[np.ndarray, np.ndarray], design: Design
) -> tuple[np.ndarray, int]:
    """Design of the differences within samples ``(n, p)``, and the column that is tested.

    Constants of a sample cancel. Columns that go with the group are centred: the effect is that of the average sample.
    """
    if not design.terms:
        return np.ones((len(samples), 1)), 0
    from patsy import PatsyError, dmatrix

    term = design.term or "group"
    rows = _rows(pool, samples, sides, design)
    try:
        matrix = dmatrix(f"group + {design.terms}", rows, NA_action="raise")
    except (PatsyError, NameError, SyntaxError, TypeError) as error:
        raise ValueError(f"`formula` {design.formula!r} cannot be read: {str(error).splitlines()[0]}") from error
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
            # Means of one value over different spots differ by rounding.
            if np.abs(column).max() <= 1e-9 * np.abs(values).max():
                plain = re.sub(r"Q\('(.*?)'\)", r"\1", name)
                raise ValueError(
                    f"`{'covariates' if name.startswith('Q(') else 'formula'}`: {plain!r} does not differ within samples, "
                    f"which are compared with themselves; leave it out, or name its interaction, as in formula='group:{plain}'"
                )
            names.append(name)
            columns.append(column)
    if term not in names:
        raise ValueError(f"`term` {term!r} is not a term of the design, valid: {names}")
    matrix = np.column_stack(columns)
    if len(samples) <= matrix.shape[1] or np.linalg.matrix_rank(matrix / np.abs(matrix).max(0)) < matrix.shape[1]:
        raise ValueError(f"`formula`: {len(samples)} samples do not tell the terms {names} apart; leave some out")
    return matrix, names.index(term)


def _rows(pool: SpotData, samples: np.ndarray, sides: tuple[np.ndarray, np.ndarray], design: Design) -> pd.DataFrame:
    """Variables of a formula, a row a sample in the group, then in the reference: means of numbers, labels as they are."""
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
                f"`covariates` {key!r} has several values within sample {str(several[0])!r}; a number, or one label a sample "
                "and group is needed"
            )
        rows[key] = [names[0] for names in found]
    return pd.DataFrame(rows)


def check_finite(values: pd.Series, key: str) -> None:
    """Refuse infinite numbers of a covariate."""
    if n := int(np.isinf(values.to_numpy(float)).sum()):
        raise ValueError(
            f"`covariates` {key!r} is infinite for {n} spots; give them a number, or leave their labels empty"
        )


def keep_genes(sums: CountSums, genes: np.ndarray) -> CountSums:
    """Leave out genes."""
    return replace(
        sums, counts=sums.counts[..., genes], squares=sums.squares[..., genes], by_depth=sums.by_depth[..., genes]
    )
