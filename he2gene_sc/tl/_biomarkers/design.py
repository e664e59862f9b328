"""The model of ``hg.tl.biomarkers``, beside groups, layer and method."""

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
        or labels, one a sample and group. ``"pseudobulk"`` and ``"means"``: the same, where they differ within samples; what
        does not, cancels in the pairs.
    formula
        More terms of the design of ``"pseudobulk"`` and ``"means"``, by patsy, of columns of ``obs`` and of ``group`` (1/2 in the
        group, -1/2 in the reference): ``"~ group:age"`` asks whether the difference goes with age. The sample is a block.
    term
        Term of the design that is tested; default: the group.
    depth
        Of ``"means"``, ``"mixed"`` and ``"spatial"``: the log depth of the spots is adjusted for, over patients by a slope for
        each. ``"auto"``: total counts of the layer or of ``X``, where 95 % of the spots have some; or a column of total counts in
        ``obs``. Without it differences of depth pass for differences of genes, which a warning says; ``None`` leaves it out.
        Of ``"pseudobulk"``: a column of ``obs`` has the library sizes, in place of total counts and TMM. Of ``"ppi"`` that of the
        measured spots. ``"deseq2"`` and ``"wilcoxon"`` take no column: it is refused, unless ``cross_fit`` takes it off the labels.
    lfc
        Smallest effect of interest of ``"pseudobulk"``, ``"deseq2"`` and ``"means"``, as log2 of a ratio: effects up to this
        size are part of the null (TREAT).
    trend
        Of ``"pseudobulk"`` and ``"means"``: the prior variance of a gene goes with the variance that its counts and spots tell
        (as limma's ``eBayes`` with that as its ``trend``); ``False``: one prior for all genes (Smyth 2004).
    robust
        Of the same: hypervariable genes get a prior of their own.
    min_mean
        Genes are tested if their mean is above this, in the unit of the layer: for ``"spatial"`` and ``"wilcoxon"`` that
        over all spots of both groups, else that of the two group means, averaged over samples. ``"spatial"`` also leaves out
        genes that are expected in fewer than three spots of the smaller group, from the share of all spots that have them.
    adjust_over
        P-values are adjusted within each ``"group"``, or over ``"all"`` groups together.
    join
        ``"inner"``: genes of every object. ``"outer"``: of any; in raw counts a gene that a table does not name is 0.
    confidence_level
        Of the intervals.

    Raises
    ------
    ValueError
        If a value is not what it should be.

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
                raise ValueError(f"`{name}` is {value!r}; a text is needed, for example 'group:age'")
        if self.depth is not None:
            validate.name(self.depth, "depth")
        if isinstance(self.lfc, bool) or not isinstance(self.lfc, Real) or not 0 <= float(self.lfc) < np.inf:
            raise ValueError(
                f"`lfc` is {self.lfc!r}; a number from 0 is needed, log2 of the smallest ratio of interest"
            )
        for name in ("trend", "robust"):
            object.__setattr__(self, name, validate.flag(getattr(self, name), name))
        least = self.min_mean
        if isinstance(least, bool) or not isinstance(least, Real) or np.isnan(float(least)):
            raise ValueError(f"`min_mean` is {least!r}; a number is needed, in the unit of the layer")
        validate.one_of(self.adjust_over, ("group", "all"), "adjust_over")
        validate.one_of(self.join, ("inner", "outer"), "join")
        validate.in_range(self.confidence_level, "confidence_level", above=0, below=1)

    @property
    def terms(self) -> str:
        """Terms beside the group, for patsy; empty without covariates and formula."""
        more = [self.formula.lstrip(" ~")] if self.formula is not None else []
        return " + ".join([*(f"Q({name!r})" for name in self.covariates), *more])

    @property
    def params(self) -> dict[str, Any]:
        """What ``uns`` records."""
        return asdict(self) | {"lfc": float(self.lfc), "covariates": list(self.covariates) or None}


def as_design(design: Any) -> Design:
    """Read a design: as it is, a formula that begins with ``~``, or a list of covariates."""
    if design is None or isinstance(design, Design):
        return design or Design()
    if isinstance(design, str) and design.lstrip().startswith("~"):
        return Design(formula=design)
    if isinstance(design, list | tuple):
        return Design(covariates=design)
    raise ValueError(
        f"`design` is {design!r}; a formula that begins with '~' is needed ('~ group + age'), a list of covariates (['age']), or "
        "hg.Design(covariates=..., depth=..., ...)"
    )
