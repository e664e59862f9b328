"""``hg.tl.biomarkers``: genes that differ between groups of spots, tested over patients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .._keys import MADE, Keys, check_key
from .._tables import Scale, check_free, column_of, log_expression, write_result
from ._contrast import METHODS, MIN_SPOTS, Cells, Contrast, Method
from ._pooled import Pool, is_circular, pool, prediction_key, tables_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Of the results, in their order.
COLUMNS = (
    *("group", "names", "logfoldchanges", "effect_size", "ci_low", "ci_high", "scores", "pvals", "pvals_adj"),
    *("n_samples", "n_spots", "n_spots_reference", "method", "reliable", "circular"),
)


def biomarkers(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    groupby: str,
    *,
    groups: str | Sequence[str] | None = None,
    reference: str = "rest",
    layer: str | None = "he2gene",
    layer_scale: Scale = "auto",
    sample_key: str | None = None,
    section_key: str | None = None,
    method: Literal["auto", "pseudobulk", "mixed", "ppi", "spatial", "wilcoxon"] = "auto",
    reliable_only: bool = True,
    covariates: str | Sequence[str] | None = None,
    cross_fit: bool = False,
    measured: str | None = None,
    measured_scale: Scale = "auto",
    min_mean: float = 0.05,
    join: Literal["inner", "outer"] = "inner",
    level: float = 0.95,
    table_key: str | None = None,
    key_added: str = "he2gene_biomarkers",
) -> pd.DataFrame | None:
    """Test which genes differ between groups of spots, with the patient as the statistical unit.

    Parameters
    ----------
    data
        One object or table, several, or one with a sample column. Genes are matched by name.
    groupby
        Column of ``obs`` with the groups; spots without one are left out.
    groups
        Groups to test; default: all that can be, the others are named in a warning.
    reference
        Group to compare with; ``"rest"``: all other labelled spots.
    layer
        Predicted or other logarithms, natural log of (1 + counts per 10,000); ``None``: the raw counts in ``X``.
    layer_scale
        ``"counts"`` or ``"log"``, where the layer does not hold what is expected of it.
    sample_key
        Column of ``obs`` that tells the patients apart; default ``"patient"``. One object without it is one sample.
    section_key
        Column of ``obs`` that tells the sections apart; default: the shapes element, or ``"section"``. The sections of a
        patient are one sample: their spots are pooled.
    method
        - ``"pseudobulk"``: mean of the logarithms per sample and group, paired by sample, moderated t;
        - ``"mixed"``: linear mixed model of these means, with covariates; minutes for thousands of genes;
        - ``"ppi"``: prediction-powered, where some samples were measured and more were predicted;
        - ``"spatial"``: spots of one or two sections, with the effective number of independent ones;
        - ``"wilcoxon"``: spots as if they were independent, for comparison with scanpy alone;
        - ``"auto"``: pseudobulk with three or more samples, else spatial.
    reliable_only
        Test only the genes that the model's card calls reliable. Measured values are not subject to it.
    covariates
        Columns of ``obs`` for ``"mixed"``: numbers, averaged per sample and group, or labels, one a sample.
    cross_fit
        Replace the labels of each sample (of each section, in one patient) by those of a classifier of *measured*
        expression fitted on the others and their labels, so that they owe nothing to the image that the genes were
        predicted from. Genes are tested in two halves; the labels for one are read from genes outside it. Sound if the
        model that predicted the genes was not trained on these sections.
    measured, measured_scale
        Measured values for ``"ppi"`` and ``cross_fit``: layer, ``None`` is ``X``, and its scale. A sample counts as
        measured if any of its spots has counts there and its table is not one that predict made.
    min_mean
        Genes are tested if the mean of the two group means is above this, in the unit of the layer.
    join
        ``"inner"``: genes of every object. ``"outer"``: of any; in raw counts a gene that a table does not name is 0.
    level
        Of the intervals.
    table_key
        Table, where an object holds several.
    key_added
        Where in ``uns`` it is written.

    Returns
    -------
    ``None`` for one object, the results for several. Written to the table, or to the table of every object:

    ``.uns["he2gene_biomarkers"]``
        ``"results"``: DataFrame, a row a group and gene, see :func:`he2gene_sc.get.biomarkers`; ``"samples"``, ``"genes"``
        and ``"sample_effects"``: spots and difference in every sample; ``"params"``.

    Raises
    ------
    TypeError
        If ``data`` holds something else.
    ValueError
        If an argument or the object does not fit: a missing column or group, one level, fewer than three spots, a group
        in one sample only, groups that never share a sample, values on another scale, spots or patients given twice.
        Nothing has been changed then.

    Notes
    -----
    Labels that were predicted from the image that the genes were predicted from share its errors: the p-values do not
    hold, the result is marked ``circular``. Assumptions, formulas and error rates of every method: ``docs/statistics.md``.

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
    check_key(key_added, "key_added")
    covariates = (covariates,) if isinstance(covariates, str) else tuple(covariates or ())
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level!r}; a number between 0 and 1 is needed")
    tables, several = tables_of(data, layer, table_key)
    for table in tables:
        check_free(table, "biomarkers", key_added)
        for key in covariates:
            column_of(table, key, "covariates")
    spots = pool(
        tables,
        groupby,
        layer=layer,
        layer_scale=layer_scale,
        sample_key=sample_key,
        section_key=section_key,
        join=join,
        reliable_only=reliable_only,
    )
    chosen = method_for(method, spots, covariates)
    options = {"covariates": covariates, "level": level}
    run = {"chosen": chosen, "groups": groups, "reference": reference, "min_mean": min_mean, "options": options}
    if cross_fit:
        halves = _halves(spots, measured, measured_scale)
        parts = [compare(half, **run) for half in halves]
    else:
        known = measured_part(spots, measured, measured_scale)[0] if chosen.name == "ppi" else None
        parts = [compare(spots, measured=known, **run)]
    circular = is_circular(tables, groupby, layer) and not cross_fit
    results = _finish([frame for frame, _ in parts], chosen, reliable_genes(tables, layer), circular)
    _caution(chosen, circular, groupby)
    effects = pd.concat([frame for _, frame in parts], axis=1)
    params = {
        "groupby": groupby,
        "reference": reference,
        "layer": "X" if layer is None else layer,
        "sample_key": sample_key,
        "method": chosen.name,
        "reliable_only": reliable_only,
        "covariates": list(covariates) or None,
        "cross_fit": cross_fit,
        "min_mean": min_mean,
        "join": join,
        "level": level,
    }
    facts = {
        "results": results,
        "samples": effects.index.to_frame(index=False),
        "genes": effects.columns.to_numpy(object),
        "sample_effects": effects.to_numpy(np.float32),
    }
    for table in tables:
        write_result(table, "biomarkers", key_added, params=params, facts=facts)
    return results.copy() if several else None


def compare(
    spots: Pool,
    *,
    chosen: Method,
    groups: str | Sequence[str] | None,
    reference: str,
    min_mean: float,
    options: dict[str, object],
    measured: Pool | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run a method on every group.

    Returns
    -------
    tuple
        The tests, a row a group and gene, without adjustment; the differences, a row a group and sample, a column a gene.
    """
    cells = Cells.of(spots)
    of_measured = None if measured is None else Cells.of(measured)
    tests, differences = [], []
    for group in _groups(cells, groups, reference, chosen):
        contrast = Contrast.of(spots, cells, spots.genes, group, reference, **options)
        if of_measured is not None:
            contrast = replace(
                contrast, measured=Contrast.of(measured, of_measured, spots.genes, group, reference, **options)
            )
        used = chosen.uses(contrast)
        with np.errstate(invalid="ignore"):
            mean = np.nanmean(contrast.means[:, used], axis=(0, 1)) if chosen.samples else contrast.pooled_means.mean(0)
        contrast = contrast.keep(mean > min_mean)
        if not len(contrast.genes):
            raise ValueError(f"`min_mean` is {min_mean}; no gene has a mean above it in {group!r} and {reference!r}")
        test = chosen.run(contrast)
        tests.append(
            pd.DataFrame(
                {
                    "group": group,
                    "names": contrast.genes.astype(str).to_numpy(object),
                    "logfoldchanges": contrast.logfoldchanges,
                    "effect_size": test.effect,
                    "ci_low": test.ci_low,
                    "ci_high": test.ci_high,
                    "scores": test.scores,
                    "pvals": test.pvalues,
                    "n_samples": int(used.sum()),
                    "n_spots": int(contrast.counts[0, used].sum()),
                    "n_spots_reference": int(contrast.counts[1, used].sum()),
                }
            )
        )
        differences.append(_differences(contrast, group))
    return pd.concat(tests, ignore_index=True), pd.concat(differences)


def method_for(method: str, spots: Pool, covariates: Sequence[str]) -> Method:
    """Choose the method by the number of samples, or check the one that was named."""
    if method not in ("auto", *METHODS):
        raise ValueError(f"`method` {method!r} is unknown, valid: {['auto', *METHODS]}")
    n = len(set(spots.samples))
    name = ("pseudobulk" if n >= 3 else "spatial") if method == "auto" else method
    if covariates and name != "mixed":
        raise ValueError(f"`covariates` enter method='mixed' alone, the method is {name!r}")
    if n < METHODS[name].samples:
        raise ValueError(
            f"`method` {name!r} compares samples and needs at least {METHODS[name].samples}, there are {n}; name the patients "
            "by `sample_key`, or use method='spatial'"
        )
    return METHODS[name]


def _groups(cells: Cells, groups: str | Sequence[str] | None, reference: str, chosen: Method) -> list[str]:
    """Names of the groups to test; what cannot be tested is an error if it was named, else left out with a warning."""
    labels = cells.labels.tolist()
    if len(labels) < 2:
        raise ValueError(f"`groupby` has one level, {labels}; at least 2 are needed")
    if reference != "rest" and reference not in labels:
        raise ValueError(f"`reference` {reference!r} is no group, valid: {['rest', *labels]}")
    named = [groups] if isinstance(groups, str) else groups
    if named is not None and (unknown := [group for group in named if group not in labels]):
        raise ValueError(f"`groups` {unknown} are no groups, valid: {labels}")
    if named is not None and reference in named:
        raise ValueError(f"`groups` holds the reference {reference!r}; leave it out")
    wanted = [label for label in labels if label != reference] if named is None else list(dict.fromkeys(named))
    faults = {group: _fault(cells, group, reference, chosen) for group in wanted}
    bad = {group: fault for group, fault in faults.items() if fault}
    if bad and (named is not None or len(bad) == len(wanted)):
        raise ValueError(f"`{'groups' if named is not None else 'groupby'}`: {next(iter(bad.values()))}")
    if bad:
        warnings.warn(f"groups are left out: {'; '.join(bad.values())}", UserWarning, stacklevel=4)
    return [group for group in wanted if not faults[group]]


def _fault(cells: Cells, group: str, reference: str, chosen: Method) -> str:
    """Say what keeps a group from being tested; empty if nothing does."""
    others = [label for label in cells.labels if label != group] if reference == "rest" else [reference]
    counts = {group: cells.side([group])[1], reference: cells.side(others)[1]}
    for name, count in counts.items():
        if count.sum() < MIN_SPOTS:
            return f"{name!r} has {count.sum()} spots, at least {MIN_SPOTS} are needed"
    if not chosen.samples:
        return ""
    enough = {name: count >= MIN_SPOTS for name, count in counts.items()}
    for name, there in enough.items():
        if there.sum() < 2:
            return (
                f"{name!r} has {MIN_SPOTS} or more spots in too few samples, {cells.samples[there].tolist()}; method "
                f"{chosen.name!r} compares at least 2"
            )
    both = (enough[group] & enough[reference]).sum()
    if both < 2:
        return (
            f"{group!r} and {reference!r} meet in {both} of the samples, with {MIN_SPOTS} or more spots of each; at least 2 "
            "are needed: groups that do not meet within samples cannot be told from the samples"
        )
    return ""


def _differences(contrast: Contrast, group: str) -> pd.DataFrame:
    """Difference in every sample that has both, with the numbers of spots in the index."""
    index = pd.MultiIndex.from_arrays(
        [
            [group] * int(contrast.paired.sum()),
            contrast.samples[contrast.paired],
            contrast.counts[0, contrast.paired],
            contrast.counts[1, contrast.paired],
        ],
        names=["group", "sample", "n_spots", "n_spots_reference"],
    )
    return pd.DataFrame(contrast.differences.astype(np.float32), index=index, columns=contrast.genes.astype(str))


def adjusted(tests: pd.DataFrame) -> pd.DataFrame:
    """Add Benjamini and Hochberg's p-values within each group; a gene without p-value gets none."""
    from statsmodels.stats.multitest import multipletests

    tests = tests.assign(pvals_adj=np.nan)
    for _, part in tests[tests["pvals"].notna()].groupby("group", sort=False):
        tests.loc[part.index, "pvals_adj"] = multipletests(part["pvals"], method="fdr_bh")[1]
    return tests


def _finish(frames: Sequence[pd.DataFrame], chosen: Method, reliable: pd.Series | None, circular: bool) -> pd.DataFrame:
    """Adjust and say what the result is worth; best score of each group first."""
    results = adjusted(pd.concat(frames, ignore_index=True))
    results["method"] = chosen.label
    results["reliable"] = True if reliable is None else reliable.reindex(results["names"]).to_numpy(bool)
    results["circular"] = circular
    order = {name: i for i, name in enumerate(dict.fromkeys(results["group"]))}
    results = results.assign(order=results["group"].map(order)).sort_values(
        ["order", "scores"], ascending=[True, False], kind="stable"
    )
    return results[list(COLUMNS)].reset_index(drop=True)


def reliable_genes(tables: Sequence[AnnData], layer: str | None) -> pd.Series | None:
    """Whether the cards call a gene reliable in every table; ``None`` for measured values, which are."""
    out = None
    for table in tables:
        key = prediction_key(table, layer)
        if key is None:
            continue
        name = Keys(key).reliable
        flags = table.var[name].astype(bool) if name in table.var else pd.Series(False, index=table.var_names)
        out = flags if out is None else out & flags.reindex(out.index, fill_value=False)
    return None if out is None else out.rename(index=str)


def _caution(chosen: Method, circular: bool, groupby: str) -> None:
    if chosen.caution:
        warnings.warn(chosen.caution, UserWarning, stacklevel=3)
    if circular:
        warnings.warn(
            f"obs[{groupby!r}] was predicted from the image that the genes were predicted from: labels and genes share its "
            "errors, the p-values do not hold and the result is marked circular. Sound are a pathologist's labels, labels "
            "carried over from another section, or cross_fit=True where several sections were measured",
            UserWarning,
            stacklevel=3,
        )


def measured_part(spots: Pool, measured: str | None, scale: Scale) -> tuple[Pool, np.ndarray]:
    """Spots of the samples that were measured, with what was measured, and which they are, ``(n,)`` bool."""
    seen = np.zeros(len(spots.labels), bool)
    start = 0
    for table, rows in zip(spots.tables, spots.rows, strict=True):
        end = start + len(rows)
        if MADE not in table.uns and len(rows):
            values = table.X if measured is None else table.layers.get(measured)
            if values is None:
                raise ValueError(f"`measured` {measured!r} is no layer, valid: {sorted(table.layers)} (None: X)")
            total = np.asarray(values.sum(axis=1), float).ravel()
            seen[start:end] = np.nan_to_num(total[rows]) > 0
        start = end
    kept = np.isin(spots.samples, np.unique(spots.samples[seen].astype(str)))
    expected = "counts" if measured is None else "log"
    chosen = spots.take(kept)
    for table, rows in zip(chosen.tables, chosen.rows, strict=True):
        if len(rows):
            log_expression(
                table[rows],
                measured,
                genes=np.zeros(0, int),
                scale=scale,
                expected=expected,
                parameter="measured",
                scale_parameter="measured_scale",
            )
    return replace(chosen, layer=measured, scale=expected if scale == "auto" else scale), kept


def _halves(spots: Pool, measured: str | None, scale: Scale) -> list[Pool]:
    """Two halves of the genes, each with labels that were read from measured genes outside it."""
    from ._cross_fit import cross_fitted_labels

    known, _ = measured_part(spots, measured, scale)
    halves = []
    common = spots.tables[0].var_names
    for table in spots.tables[1:]:
        common = common[common.isin(table.var_names)]
    for i in (0, 1):
        genes = spots.genes[i::2]
        labels = cross_fitted_labels(spots, common[~common.isin(genes)], known.layer, known.scale)
        halves.append(replace(spots, genes=genes, labels=labels))
    return halves
