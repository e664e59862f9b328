"""Check the scale of expression matrices, and read them as natural logarithms, by blocks of rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse

from ..stats import TARGET_SUM
from . import validate
from .logs import warn
from .matrix import blocks_of, dense, in_memory, layer_label, layer_names, matrix_of

if TYPE_CHECKING:
    from anndata import AnnData

Scale = Literal["auto", "counts", "log"]
SCALES = ("auto", "counts", "log")

#: Values of log-normalised data stay below this: ln(1 + 10,000) is 9.2.
MAX_LOG = 30.0
#: Totals this close to 10,000 (as a fraction) count as 10,000: some genes may have been removed since.
_SAME_TOTAL = 0.01
#: Totals that differ by less (as a fraction) are equal up to rounding, in single and in half precision.
_ROUNDING, _HALF_ROUNDING = 1e-4, 5e-3
#: Spots that are used to find the base of a logarithm.
_BASE_SPOTS = 100
_KIND_WORDS = {"counts": "raw counts", "log": "log-transformed values", "other": "neither counts nor logarithms"}
_EXPECTED_WORDS = {"counts": "raw counts", "log": "natural logarithms of (1 + counts per 10,000)"}
_LAYER_WORDS = {"counts": "layer of raw counts", "log": "layer of logarithms"}
_NORMALISE_CALL = "sc.pp.normalize_total(adata, target_sum=1e4), then sc.pp.log1p(adata)"


@dataclass(frozen=True)
class ValueSummary:
    """Summary of the values of a matrix."""

    n_nan: int = 0
    n_nan_spots: int = 0  # spots with NaN for some gene
    n_empty_spots: int = 0  # spots with NaN for all genes
    n_infinite: int = 0
    n_negative: int = 0
    n_fractions: int = 0
    low: float = 0.0  # least finite value
    high: float = 0.0  # largest finite value

    @property
    def kind(self) -> Literal["counts", "log", "other"]:
        """Raw counts (whole numbers from 0), logarithms (small fractions), or neither (for example scaled values)."""
        if not self.n_negative and not self.n_fractions:
            return "counts"
        return "log" if not self.n_negative and self.high <= MAX_LOG else "other"

    @property
    def problem(self) -> str:
        """Reason why the values are not raw counts, or an empty text."""
        if self.n_nan or self.n_infinite:
            return f"{self.n_nan} NaN and {self.n_infinite} infinite values"
        if self.n_negative:
            return f"{self.n_negative} negative values, down to {self.low:.3g}"
        if self.n_fractions:
            like = ", as log-normalised values are" if self.high < 20 else ""
            return f"{self.n_fractions} fractions, up to {self.high:.3g}{like}"
        return ""


def summarize_values(values: Any) -> ValueSummary:
    """Summarise all values of a matrix, by blocks of rows."""
    n: Counter[str] = Counter()
    low, high = np.inf, -np.inf
    for _, block in blocks_of(values):
        numbers = block
        if scipy.sparse.issparse(block):
            numbers, low = block.data, min(low, 0.0)
        finite = np.isfinite(numbers)
        if not finite.all():
            nan = np.isnan(numbers)
            row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr)) if nan.ndim == 1 else None
            of_spot = nan.sum(axis=1) if row is None else np.bincount(row[nan], minlength=block.shape[0])
            n["n_nan"] += nan.sum()
            n["n_nan_spots"] += (of_spot > 0).sum()
            n["n_empty_spots"] += (of_spot == block.shape[1]).sum()
            n["n_infinite"] += (~finite & ~nan).sum()
            numbers = numbers[finite]
        if numbers.size:
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
            n["n_negative"] += (numbers < 0).sum() if low < 0 else 0
            n["n_fractions"] += (numbers % 1 != 0).sum() if numbers.dtype.kind == "f" else 0
    low, high = (low, high) if np.isfinite(high) else (0.0, 0.0)
    return ValueSummary(**{name: int(count) for name, count in n.items()}, low=low, high=high)


def scale_problem(values: Any) -> str:
    """Describe logarithms that are not natural ones of (1 + counts per 10,000); empty if they are or may be.

    ``expm1`` of all genes of a spot sums to 10,000. For a gene panel the sum is smaller and differs between spots. So a sum
    above 10,000, or the same sum below it in all spots, means another total. Without the logarithm, the values of a spot
    are multiples of the smallest, which shows the base even if genes are missing. Whole numbers in nearly all spots were
    never normalised. Genes whose maxima are all 1 were scaled.
    """
    totals = np.zeros(values.shape[0])
    for rows, block in blocks_of(values):
        linear = block.astype(np.float64)
        numbers = linear.data if scipy.sparse.issparse(linear) else linear
        with np.errstate(over="ignore"):
            np.expm1(numbers, out=numbers)
        numbers[np.isnan(numbers)] = 0
        totals[rows] = np.ravel(linear.sum(axis=1))
    totals = totals[totals > 0]
    if not len(totals):
        return ""
    low, typical, high = np.quantile(totals, (0.05, 0.5, 0.95))
    if abs(typical / TARGET_SUM - 1) <= _SAME_TOTAL and high <= TARGET_SUM * (1 + _SAME_TOTAL):
        return ""
    if base := _base_of(values):
        return f"they are logarithms to base {base}"
    if problem := _not_normalised(values):
        return problem
    above = high > TARGET_SUM * (1 + _SAME_TOTAL)
    rounding = _HALF_ROUNDING if values.dtype == np.float16 else _ROUNDING
    if above or (len(totals) > 2 and high - low <= rounding * typical):
        return f"expm1 of a spot sums to {typical if not above else max(typical, high):,.0f}, not to 10,000"
    return ""


def count_totals(values: Any) -> np.ndarray:
    """Return the sum of the counts of each spot, ``(n,)`` float64."""
    totals = np.zeros(values.shape[0])
    for rows, block in blocks_of(values):
        totals[rows] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    return totals


def _base_of(values: Any) -> int | None:
    """Return 2 or 10 if that base, and not e, gives multiples of a smallest count; else ``None``."""
    votes = {math.e: 0, 2: 0, 10: 0}
    for row in np.asarray(dense(values[:_BASE_SPOTS]), np.float64):
        row = row[np.isfinite(row) & (row > 0)]
        if len(np.unique(row)) < 3:
            continue
        for base in votes:
            multiples = np.expm1(row * np.log(base)) / np.expm1(row.min() * np.log(base))
            # Rounding makes large multiples whole by chance.
            multiples = multiples[(multiples > 1.2) & (multiples < 20)]
            votes[base] += len(multiples) > 1 and bool((abs(multiples - np.rint(multiples)) < 0.03).all())
    best = max(votes, key=votes.__getitem__)
    return int(best) if best != math.e and votes[best] > 2 * votes[math.e] + 2 else None


def _not_normalised(values: Any) -> str:
    """Describe logarithms of raw counts, or genes that were scaled to 0..1; empty if neither."""
    first = np.nan_to_num(np.asarray(dense(values[:_BASE_SPOTS]), np.float64))
    linear = np.expm1(first)
    # Large counts, above all in half precision, look whole whether they are or not.
    known = (first > 0) & (linear < 300)
    whole = (abs(linear - np.rint(linear)) < 0.01) | ~known
    testable = known.sum(1) > 2
    if testable.sum() > 2 and whole[testable].all(1).mean() > 0.9:
        return "they are logarithms of whole numbers (raw counts, or counts as SCTransform corrects them)"
    high = np.zeros(values.shape[1])
    for _, block in blocks_of(values):
        largest = (
            block.max(axis=0).toarray().ravel() if scipy.sparse.issparse(block) else np.nanmax(block, axis=0, initial=0)
        )
        high = np.maximum(high, largest)
    varying = high[high > 0]
    if len(varying) > 2 and (abs(varying - 1) < 1e-3).all():
        return "each gene was scaled to values from 0 to 1"
    return ""


def as_logs(values: Any, kind: Literal["counts", "log"], genes: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return natural logarithms of (1 + counts per 10,000), ``(n, g)`` float32, of a checked matrix.

    Counts are normalised by the totals of all columns; logarithms are returned unchanged, with NaN.
    """
    n_columns = len(np.arange(values.shape[1])[genes])
    result = np.empty((values.shape[0], n_columns), np.float32)
    for rows, block in blocks_of(values):
        chosen = block[:, genes]
        chosen = chosen.toarray() if scipy.sparse.issparse(chosen) else chosen
        if kind == "log":
            result[rows] = chosen
            continue
        total = np.asarray(block.sum(axis=1, dtype=np.float64)).reshape(-1, 1)
        # A total of NaN gives NaN for the whole spot; a total of 0 gives 0.
        result[rows] = np.log1p(TARGET_SUM / np.where(total == 0, 1, total) * np.asarray(chosen, np.float64))
    return result


def log_expression(
    table: AnnData,
    layer: str | None,
    *,
    genes: np.ndarray | slice = slice(None),
    scale: Scale = "auto",
    expected: Literal["counts", "log"],
    parameter: str = "layer",
    predicted: bool = False,
    unmeasured_spots: bool = False,
) -> np.ndarray:
    """Check a matrix, and return it as natural logarithms of (1 + counts per 10,000), ``(n, g)`` float32.

    Counts are normalised by the totals of all columns, not only of ``genes``. For the other parameters see :func:`check_scale`.
    """
    kind = check_scale(table, layer, scale, expected, parameter, predicted=predicted, unmeasured_spots=unmeasured_spots)
    return as_logs(matrix_of(table, layer, parameter), kind, genes)


def check_scale(
    table: AnnData,
    layer: str | None,
    scale: Scale,
    expected: Literal["counts", "log"],
    parameter: str = "layer",
    *,
    predicted: bool = False,
    unmeasured_spots: bool = False,
) -> Literal["counts", "log"]:
    """Return whether a matrix holds counts or logarithms; raise if its values are not valid.

    With ``scale="auto"``, values on another scale than ``expected`` raise. Values that a model ``predicted`` need not sum to
    10,000. With ``unmeasured_spots``, counts may be NaN for all genes of a spot.
    """
    values, where = matrix_of(table, layer, parameter), layer_label(layer)
    scale_parameter = "layer_scale" if parameter == "layer" else "measured_scale"
    validate.one_of(scale, SCALES, scale_parameter)
    found = summarize_values(values)
    if found.n_infinite:
        raise ValueError(f"`{parameter}`: {where} holds {found.n_infinite} infinite value(s); finite ones are needed")
    if scale == "auto" and found.kind != expected and not (predicted and found.high == 0):
        stated = f"{scale_parameter}={'log' if found.kind == 'other' else found.kind!r}"
        raise ValueError(
            f"`{parameter}`: {where} looks like {_KIND_WORDS[found.kind]}, {_EXPECTED_WORDS[expected]} are expected; name a "
            f"{_LAYER_WORDS[expected]}, or pass {stated} to use the values as they are"
        )
    if scale == "counts" and found.kind != "counts":
        raise ValueError(f"`{scale_parameter}` is 'counts', but {where} holds fractions or negative values")
    kind = expected if scale == "auto" else scale
    if predicted:
        return kind
    if kind == "counts":
        if found.n_nan_spots > found.n_empty_spots or (found.n_nan and not unmeasured_spots):
            raise ValueError(
                f"`{parameter}`: {where} holds {found.n_nan} NaN, in {found.n_nan_spots} spots: their total is unknown, so "
                "counts cannot be normalised; remove these spots or genes, or set counts that were not detected to 0"
            )
        if not found.high > 0:
            raise ValueError(f"`{parameter}`: {where} is 0 for every gene and spot; counts are needed")
    elif found.kind == "counts" and found.high > 0:
        raise ValueError(
            f"`{scale_parameter}` is 'log', but {where} looks like raw counts: whole numbers, up to {found.high:,.0f}; "
            f"pass {scale_parameter}='counts'"
        )
    elif found.n_negative or found.high > MAX_LOG:
        warn(
            f"`{parameter}`: {where} ranges from {found.low:.3g} to {found.high:.3g}: scaled or not log-transformed. It is "
            "taken as natural logarithms of (1 + counts per 10,000), so differences and fold changes have no unit"
        )
    elif problem := scale_problem(values):
        warn(
            f"`{parameter}`: {where} does not hold natural logarithms of (1 + counts per 10,000): {problem}. Levels, fold "
            f"changes and spread are on another scale than predictions. Normalise the counts again: {_NORMALISE_CALL}"
        )
    return kind


def raw_counts(table: AnnData, layer: str | None) -> scipy.sparse.csr_array:
    """Return a layer in memory, for training; raise unless it holds raw counts."""
    matrix = matrix_of(table, layer)
    problem = summarize_values(matrix).problem
    if problem:
        raw = [name for name in layer_names(table) if not summarize_values(matrix_of(table, name)).problem]
        hint = f"layer {raw[0]!r} does:" if raw else "put raw counts into a layer and"
        raise ValueError(
            f"`layer`: {layer_label(layer)} does not hold raw counts (whole numbers from 0) but {problem}; {hint} pass "
            f"keys=hg.SectionKeys(layer={repr(raw[0]) if raw else '...'})"
        )
    return scipy.sparse.csr_array(in_memory(matrix))
