"""Statistical model of ``hg.tl.biomarkers``: covariates, formula and thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from patsy import PatsyError, dmatrix

from ..._core import validate
from ..._core.names import check_spelling, clean_names
from ..._core.spots import SpotData


@dataclass(frozen=True)
class Design(validate.Checked):
    """Covariates, terms and thresholds of :func:`he2gene_sc.tl.biomarkers`.

    Parameters
    ----------
    covariates
        Columns of ``obs``. ``"spatial"``: numbers or labels of the spots. ``"mixed"``: numbers, averaged per sample and group,
        or labels, one per sample and group. ``"pseudobulk"`` and ``"means"``: the same, if they differ within samples;
        covariates that are constant within a sample cancel in the pairs.
    formula
        More terms of the design of ``"pseudobulk"`` and ``"means"``, for patsy: columns of ``obs`` and ``group`` (1/2 in the
        group, -1/2 in the reference). ``"~ group:age"`` tests whether the difference depends on age. The sample is a block.
    term
        Term of the design to test; default: the group.
    depth
        Adjustment for the log depth of the spots in ``"means"``, ``"mixed"`` and ``"spatial"``; over patients each patient has
        its own slope. ``"auto"``: total counts of the layer or of ``X``, if 95 % of the spots have counts; or a column of total
        counts in ``obs``. Without depth, a difference in depth appears as a difference in genes, and there is a warning. ``None``: no
        adjustment. A warning says if the groups differ more or less with depth than the spots within them. Then pass a column of
        counts averaged over neighbouring spots, or compare with ``None``. ``"pseudobulk"``: column of ``obs`` with library sizes,
        instead of total counts and TMM. ``"ppi"``: depth of the measured spots. With ``"deseq2"`` and ``"wilcoxon"`` a column is an error, unless ``cross_fit`` uses it for the labels.
    lfc
        Smallest effect of interest of ``"pseudobulk"``, ``"deseq2"`` and ``"means"``, as log2 of a ratio: effects up to this
        size are part of the null (TREAT).
    trend
        For ``"pseudobulk"`` and ``"means"``: the prior variance of a gene depends on the variance expected from its counts and
        spots (as ``trend`` of limma's ``eBayes``); ``False``: one prior for all genes (Smyth 2004).
    robust
        For ``"pseudobulk"`` and ``"means"``: hypervariable genes get a separate prior (from 20 genes on).
    min_mean
        Test genes with a mean above this, in the unit of the layer. ``"spatial"`` and ``"wilcoxon"``: mean over all spots of
        both groups; else the mean of the two group means, averaged over samples. ``"spatial"`` also leaves out genes that are
        expected to be detected in fewer than three spots of the smaller group, given their share of detection in all spots.
    adjust_over
        Adjust p-values within each ``"group"``, or over ``"all"`` groups together.
    join
        ``"inner"``: genes that every object has. ``"outer"``: genes that any object has; only for raw counts, where a gene
        that a table does not list counts as 0.
    confidence_level
        Level of the intervals.

    Raises
    ------
    ValueError
        If a value is not valid.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> hg.Design(formula="~ group:age", term="group:age").lfc
    0.0
    """

    covariates: str | Sequence[str] = ()
    formula: str | None = None
    term: str | None = None
    depth: str | None = "auto"
    lfc: float = 0.0
    trend: bool = True
    robust: bool = True
    min_mean: float = 0.05
    adjust_over: Literal["group", "all"] = "group"
    join: Literal["inner", "outer"] = "inner"
    confidence_level: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        named = (self.covariates,) if isinstance(self.covariates, str) else self.covariates or ()
        for name, value in (("formula", self.formula), ("term", self.term)):
            if value is not None and not value.strip(" ~"):
                raise ValueError(f"`{name}` is {value!r}; it must be a text, for example 'group:age'")
        if self.depth is not None:
            validate.name(self.depth, "depth")
        validate.in_range(self.lfc, "lfc", least=0, what="a number, log2 of the smallest ratio of interest,")
        self.set(
            covariates=tuple(validate.names(named, "covariates")),
            lfc=float(self.lfc),
            trend=bool(self.trend),
            robust=bool(self.robust),
        )
        validate.one_of(self.adjust_over, ("group", "all"), "adjust_over")
        validate.one_of(self.join, ("inner", "outer"), "join")
        validate.in_range(self.confidence_level, "confidence_level", above=0, below=1)

    @property
    def terms(self) -> str:
        """Terms besides the group, for patsy; empty without covariates and formula."""
        more = [self.formula.lstrip(" ~")] if self.formula is not None else []
        return " + ".join([*(f"Q({name!r})" for name in self.covariates), *more])

    @property
    def params(self) -> dict[str, Any]:
        """Parameters to record in ``uns``."""
        return asdict(self) | {"covariates": list(self.covariates) or None}


def as_design(design: Any) -> Design:
    """Make a Design from a Design, a formula that begins with ``~``, or a list of covariates."""
    if design is None or isinstance(design, Design):
        return design or Design()
    if isinstance(design, str) and design.lstrip().startswith("~"):
        return Design(formula=design)
    if isinstance(design, list | tuple):
        return Design(covariates=design)
    raise ValueError(
        f"`design` is {design!r}; pass a formula that begins with '~' ('~ group + age'), a list of covariates (['age']), or "
        "hg.Design(covariates=..., depth=..., ...)"
    )


def pair_design(
    pool: SpotData, samples: np.ndarray, sides: tuple[np.ndarray, np.ndarray], design: Design
) -> tuple[np.ndarray, int]:
    """Design of the differences within samples ``(n, p)`` and the index of the tested column.

    Constants of a sample cancel. Interactions with the group are centred, so the effect is that of the average sample.
    """
    if not design.terms:
        return np.ones((len(samples), 1)), 0
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
    cells = [side & (pool.samples == sample) for side in sides for sample in samples]
    for key in dict.fromkeys([*design.covariates, *known]):
        rows[key] = read_cells(pool, key, cells, flags_as_labels=True)
    return pd.DataFrame(rows)


def read_cells(pool: SpotData, key: str, cells: list[np.ndarray], *, flags_as_labels: bool = False) -> list[Any]:
    """Return a covariate of each cell, the mask ``(n,)`` of a group in a sample: the mean of numbers, or the label as text."""
    values, numbers = read_covariate(pool, key, np.logical_or.reduce(cells))
    if numbers and not (flags_as_labels and pd.api.types.is_bool_dtype(values)):
        return [float(values[cell].mean()) for cell in cells]
    found = [values[cell].unique() for cell in cells]
    if several := [cell for cell, names in zip(cells, found, strict=True) if len(names) > 1]:
        raise ValueError(
            f"`covariates` {key!r} has several values within sample {str(pool.samples[several[0]][0])!r}; a number, or one label per "
            "sample and group, is needed"
        )
    return [str(names[0]) for names in found]


def read_covariate(pool: SpotData, key: str, used: np.ndarray) -> tuple[pd.Series, bool]:
    """Return a column at all spots, with cleaned labels, and whether it is numeric; raise if it is not valid at the used spots."""
    values = pool.obs(key, "covariates")
    numbers = pd.api.types.is_numeric_dtype(values)
    values = values if numbers else pd.Series(clean_names(values), dtype=object)
    if missing := int(values[used].isna().sum()):
        raise ValueError(
            f"`covariates` {key!r} has missing values in {missing} spots; fill them, or leave the covariate out"
        )
    if not numbers:
        check_spelling({"": values[used].to_numpy(object)}, "covariates", key)
    elif infinite := int(np.isinf(values[used].to_numpy(float)).sum()):
        raise ValueError(
            f"`covariates` {key!r} is infinite in {infinite} spots; set a finite number, or remove the labels of these spots"
        )
    return values, numbers
