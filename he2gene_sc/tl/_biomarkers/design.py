"""Statistical model of ``hg.tl.biomarkers``: covariates, formula and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from ..._core import validate


@dataclass(frozen=True)
class Design:
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
        For ``"pseudobulk"`` and ``"means"``: hypervariable genes get a separate prior.
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
        named = (self.covariates,) if isinstance(self.covariates, str) else self.covariates or ()
        object.__setattr__(self, "covariates", tuple(validate.names(named, "covariates")))
        for name in ("formula", "term"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip(" ~")):
                raise ValueError(f"`{name}` is {value!r}; it must be a text, for example 'group:age'")
        if self.depth is not None:
            validate.name(self.depth, "depth")
        if isinstance(self.lfc, bool) or not isinstance(self.lfc, Real) or not 0 <= float(self.lfc) < np.inf:
            raise ValueError(
                f"`lfc` is {self.lfc!r}; it must be a number of at least 0, log2 of the smallest ratio of interest"
            )
        for name in ("trend", "robust"):
            object.__setattr__(self, name, validate.flag(getattr(self, name), name))
        minimum = self.min_mean
        if isinstance(minimum, bool) or not isinstance(minimum, Real) or np.isnan(float(minimum)):
            raise ValueError(f"`min_mean` is {minimum!r}; it must be a number, in the unit of the layer")
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
        return asdict(self) | {"lfc": float(self.lfc), "covariates": list(self.covariates) or None}


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
