"""``hg.tl.biomarkers``: genes that differ between groups of spots, tested over patients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.elements import is_object
from ..._core.expression import Scale
from ..._core.keys import check_key
from ..._core.labelled import check_replicates, depth_of, labelled_spots, measured_part, values_outside_halves
from ..._core.logs import warn
from ..._core.names import column_of
from ..._core.ownership import check_free
from ..._core.provenance import are_reliable, circularity
from ..._core.results import write_result
from ..._core.spots import read_spots
from ...stats import MIN_LIBRARY
from .compare import NO_DEPTH, adjust_pvalues, compare, group_names, method_for
from .cross_fit import CLASSIFIER_GENES, cross_fitted_halves
from .design import Design, as_design
from .methods import METHODS, Method

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: With so few samples and fewer genes, hypervariable genes are not always recognised.
_FEW_SAMPLES, _FEW_GENES = 3, 300
#: Columns of the results, in this order.
COLUMNS = (
    *("group", "names", "logfoldchanges", "logfoldchanges_pooled", "effect_size", "ci_low", "ci_high"),
    *("scores", "pvals", "pvals_adj"),
    *("n_samples", "n_spots", "n_spots_reference", "method", "reliable", "circular"),
)


def biomarkers(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    groupby: str,
    *,
    groups: str | Sequence[str] | None = None,
    reference: str | float = "rest",
    layer: str | None = "he2gene",
    layer_scale: Scale = "auto",
    sample_key: str = "patient",
    section_key: str = "section",
    method: Literal["auto", "pseudobulk", "deseq2", "means", "mixed", "ppi", "spatial", "wilcoxon"] = "auto",
    reliable_only: bool = True,
    cross_fit: bool = False,
    measured: str | None = None,
    measured_scale: Scale = "auto",
    design: str | Sequence[str] | Design | None = None,
    table_key: str | None = None,
    key_added: str = "he2gene_biomarkers",
) -> pd.DataFrame | None:
    """Test which genes differ between groups of spots, with the patient as the statistical unit.

    Parameters
    ----------
    data
        One object or table, several, or one with a sample column. Genes are matched by name.
    groupby
        Column of ``obs`` with the groups. Spots without a group are left out.
    groups
        Groups to test. Default: all groups that can be tested; a warning names the others.
    reference
        Group to compare with; ``"rest"``: all other labelled spots.
    layer
        Layer with logarithms, for example predictions: natural log of (1 + counts per 10,000). ``None``: the raw counts in ``X``.
    layer_scale
        ``"counts"`` or ``"log"``: scale of the layer, if it is not the expected one.
    sample_key
        Column of ``obs`` with the patient, the statistical unit. One table without the default column counts as one patient.
    section_key
        Column of ``obs`` with the section. Without the default column the shapes elements are the sections. The sections of a
        patient are one sample: their spots are pooled. This assumes that the labels have similar shares in all of them; a
        warning follows if they do not.
    method
        - ``"pseudobulk"``: raw counts summed per sample and group, TMM library sizes, paired by sample, precision weights by
          counts and spots, moderated t. For logarithms, ``"means"`` is used instead;
        - ``"deseq2"``: PyDESeq2 on the same sums (optional: ``pip install "he2gene_sc[deseq2]"``);
        - ``"means"``: mean of logarithms per sample and group, for predicted layers; adjusted for depth, weights by spots,
          paired by sample, moderated t;
        - ``"mixed"``: linear mixed model of the means of logarithms, adjusted for depth; minutes for thousands of genes;
        - ``"ppi"``: prediction-powered inference, if some samples were measured and more were predicted. P-values need eight
          measured samples; with fewer, only intervals are given;
        - ``"spatial"``: spots of one or two sections, with the effective number of independent spots, adjusted for depth;
        - ``"wilcoxon"``: treats spots as independent; only for comparison with scanpy;
        - ``"auto"``: pseudobulk (means for logarithms) with three or more samples, else spatial.
    reliable_only
        Test only the genes that the model card calls reliable. Does not apply to measured values.
    cross_fit
        Replace the labels of each sample (of each section, with one patient) by those of a classifier of *measured*
        expression. It is fitted on the other samples and their labels, so the new labels do not depend on the image that
        the genes were predicted from. Genes are tested in two halves; the labels for one half come from genes outside it.
        Effects of depth are removed first. The test is valid if the model was not trained on these sections and if
        the new labels agree with the given ones: below 95 % of the spots there is a warning, below 85 % an error.
        ``params["cross_fit_agreement"]`` holds the share.
    measured, measured_scale
        Measured values for ``"ppi"`` and ``cross_fit``: layer, ``None`` is ``X``, and its scale. A spot counts as
        measured if it has counts there and its table was not made by predict; a sample, if its measured spots
        contain the groups.
    design
        Covariates, formula, depth, smallest effect and thresholds: a formula (``"~ group:age"``), covariates (``["age"]``), or
        :class:`he2gene_sc.Design`.
    table_key
        Table to use if an object holds several.
    key_added
        Key in ``uns`` for the results.

    Returns
    -------
    ``None`` for one object, the results for several. Written to the table, or to the table of every object:

    ``.uns["he2gene_biomarkers"]``
        ``"results"``: DataFrame, one row per group and gene, see :func:`he2gene_sc.get.biomarkers`; ``"samples"``, ``"genes"``
        and ``"sample_effects"``: spots and difference in every sample; ``"params"``, whose ``"doubts"`` name the groups
        for which library sizes, the adjustment for depth or the sections are doubtful, and the reason.

    Raises
    ------
    TypeError
        If ``data`` holds something else.
    ValueError
        If an argument or the object is not valid: a missing column or group, only one level, fewer than three spots, a group
        in one sample only, groups that never share a sample, values on another scale, duplicated spots or patients.
        The objects are not changed then.

    Notes
    -----
    Labels that were predicted from the same image as the genes share its errors. Clusters of genes
    (``hg.tl.domain_preservation``) share the noise of these genes. In both cases the p-values are not valid and the result is
    marked ``circular``, also for renamed or merged levels of such labels.

    P-values are also too small if half of the genes or more change in one direction, if differences of many patients are skewed in one
    direction, or if a layer depends on depth otherwise between groups than within them (a warning). Assumptions and formulas of every
    method: ``docs/statistics/methods.md``, error rates: ``docs/statistics/validation.md``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((6, 6), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    >>> result = hg.tl.biomarkers(slides, "pathologist", layer=None)
    >>> bool(result.query("group == 'tumour' and names == 'ERBB2'")["pvals_adj"].item() < 0.05)
    True
    """
    validate.arguments(biomarkers, locals())
    check_key(key_added, "key_added")
    design = as_design(design)
    groups, reference = group_names(groups, reference)
    if cross_fit and method == "ppi":
        raise ValueError(
            "`cross_fit` keeps only measured samples, but method 'ppi' also needs samples that were only predicted; name another "
            "method, or pass cross_fit=False"
        )
    spots = read_spots(
        data, groupby, "groupby", layer=layer, table_key=table_key, sample_key=sample_key, section_key=section_key
    )
    tables = spots.tables
    for table in tables:
        check_free(table, "biomarkers", key_added)
        for key in design.covariates:
            column_of(table, key, "covariates")
    # "auto" chooses a method that takes a column; cross_fit uses the column before the test.
    named = METHODS.get(method)
    if design.depth not in (None, "auto") and named and not (named.takes_depth(design) or cross_fit or method == "ppi"):
        raise ValueError(
            f"`depth` is {design.depth!r}, which method={method!r} does not use (only 'pseudobulk', 'means', 'mixed', 'spatial' and "
            "'ppi' do); leave it out of hg.Design, or name another method"
        )
    spots = labelled_spots(spots, groupby, layer_scale=layer_scale, join=design.join, reliable_only=reliable_only)
    circular = "" if cross_fit else circularity(tables, groupby, layer)
    reliable = are_reliable(spots.genes, tables, layer)
    known = known_depth = None
    outside: list[np.ndarray] = []
    if cross_fit or method == "ppi":
        known, seen = measured_part(spots, measured, measured_scale)
        if cross_fit and (lacking := sorted(set(spots.units) - set(known.units))):
            raise ValueError(
                f"`cross_fit`: {lacking[0]} has no measured counts, so its labels cannot be independent of its image. Use a "
                "pathologist's labels there, or leave it out"
            )
        if not seen.any():
            raise ValueError("`measured` holds no counts at any labelled spot; method 'ppi' needs measured samples")
        known_depth = depth_of(known, design.depth)
        if cross_fit:
            spots = spots.take(seen)
            outside = values_outside_halves(known, spots.genes, CLASSIFIER_GENES)
    chosen = method_for(method, spots, design)
    run: dict[str, Any] = {"chosen": chosen, "groups": groups, "reference": reference, "design": design}
    halves, agreement = [spots], None
    if cross_fit and known is not None:
        halves, agreement = cross_fitted_halves(spots, known, outside, known_depth, groups=groups, reference=reference)
    if chosen.samples:
        check_replicates(spots, sample_key)
    depth = depth_of(spots, design.depth) if chosen.takes_depth(design) else None
    if method == "ppi":
        # Depth of the measured spots corrects the predictions too, whatever depth effect they contain.
        run |= {"measured": known}
        depth = known_depth
    parts = [compare(half, depth=depth, **run) for half in halves]
    results = adjust_pvalues(pd.concat([frame for frame, _ in parts], ignore_index=True), design.adjust_over)
    results.attrs.clear()
    results["method"] = chosen.label
    results["reliable"] = reliable[spots.genes.astype(str).get_indexer(results["names"])]
    results["circular"] = bool(circular)
    # Groups in their order, the best score first.
    results["order"] = pd.factorize(results["group"])[0]
    results = results.sort_values(["order", "scores"], ascending=[True, False], kind="stable")
    results = results[list(COLUMNS)].reset_index(drop=True)
    _warn_of_limits(results, chosen, circular, _depth_limit(tables, chosen, design, depth))
    # The two halves of cross_fit have different labels: record the smaller number of spots of each patient.
    rows = pd.concat([frame.index.to_frame(index=False) for _, frame in parts])
    samples = rows.groupby(["group", "sample"], sort=False).min()
    effects = pd.concat([frame.droplevel([2, 3]) for _, frame in parts], axis=1).reindex(samples.index)
    params = {
        "groupby": groupby,
        "reference": reference,
        "layer": "X" if layer is None else layer,
        "sample_key": sample_key,
        "method": chosen.name,
        "reliable_only": reliable_only,
        **design.params,
        "depth": design.depth if depth is not None else None,
        **({} if chosen.moderated else {"trend": None, "robust": None}),
        "cross_fit": cross_fit,
        "cross_fit_agreement": agreement,
        "doubts": [doubt for frame, _ in parts for doubt in frame.attrs["doubts"]] or None,
    }
    facts = {
        "results": results,
        "samples": samples.reset_index(),
        "genes": effects.columns.to_numpy(object),
        "sample_effects": effects.to_numpy(np.float32),
    }
    write_result(tables, "biomarkers", key_added, params=params, facts=facts)
    return None if is_object(data) else results.copy()


def _depth_limit(tables: Sequence[AnnData], chosen: Method, design: Design, depth: np.ndarray | None) -> str:
    """State if logarithms are not adjusted for depth, or for the total of few genes; empty if neither."""
    if not (chosen.depth or chosen.name == "ppi"):
        return ""
    if depth is None:
        return f"{NO_DEPTH}, or pass hg.Design(depth=...) with a column of total counts"
    n = min(table.n_vars for table in tables)
    if design.depth != "auto" or n >= MIN_LIBRARY:
        return ""
    return (
        f"the depth of the spots is the total of {n} genes, but {MIN_LIBRARY} are needed: each gene is a large part of it, so genes without a "
        "difference may appear different. Pass a column with total counts of all genes: hg.Design(depth=...)"
    )


def _warn_of_limits(results: pd.DataFrame, chosen: Method, circular: str, depth_limit: str) -> None:
    messages = [depth_limit] if depth_limit else []
    if chosen.caution:
        messages.append(chosen.caution)
    if circular:
        messages.append(
            f"{circular}. The p-values are not valid and the result is marked circular. Use a pathologist's labels, "
            "labels transferred from another section, or cross_fit=True if several sections were measured"
        )
    if chosen.name != "ppi" and results["pvals"].isna().all():
        messages.append(
            f"pvals are NaN in all {len(results)} tests: no gene varies, or the design leaves no degrees of freedom. Remove covariates "
            "or terms, or pass more samples"
        )
    if lost := int(results["logfoldchanges"].isna().sum()):
        messages.append(
            f"logfoldchanges are NaN for {lost} tests: the mean of the logarithms is below 0, for example in scaled values, and no "
            "fold change is defined. Use effect_size, which is in the unit of the layer"
        )
    n, genes = results["n_samples"].max(), results["names"].nunique()
    if chosen.moderated and n <= _FEW_SAMPLES and genes < _FEW_GENES and (results["pvals_adj"] < 0.05).any():
        messages.append(
            f"with {n} samples and {genes} genes, more than 5 % of the genes with pvals_adj < 0.05 can be false (about 9 % with 3 samples, "
            "14 % with 2), if some genes vary much more between samples than others. Add samples: it is 5 to 6 % with 4"
        )
    for message in messages:
        warn(message)
