"""Run one method on every group: choose the method, find the groups that can be tested, and collect the tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from ..._core import validate
from ..._core.logs import logger, warn
from ..._core.names import clean_name_argument
from ..._core.spots import SpotData
from ..._core.validate import format_list
from .contrast import MIN_SPOTS, Cells, Contrast, sum_sides
from .design import Design
from .methods import METHODS, Method, Outcome, import_pydeseq2, run

#: Counts that a gene needs for a test of counts: about the counts of the rarer group, or half of all counts in equal groups.
MIN_INFORMATION = 5.0

#: Warning if means of logarithms are compared without adjustment for depth.
NO_DEPTH = (
    "the test is not adjusted for the depth of the spots: if one group is sequenced deeper or has denser cells, genes differ for that "
    "reason alone. Put raw counts of every spot into X"
)
#: Difference between the shares of a group and of its reference in the sections of a sample from which both are confounded.
_MAX_SECTION_GAP = 0.25
#: Squared differences up to this share of the squared values are rounding errors of single precision.
_ROUNDING = 1e-12


def compare(
    spots: SpotData,
    *,
    chosen: Method,
    groups: Sequence[str] | None,
    reference: str,
    design: Design,
    measured: SpotData | None = None,
    depth: np.ndarray | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run a method on every group: unadjusted tests (one row per group and gene), and sample differences (one column per gene).

    ``depth`` is that of the measured spots, if given. ``attrs["doubts"]`` of the tests are the doubts about library sizes and
    depth, by group.
    """
    cells = Cells.from_spots(
        spots,
        squares=chosen.squares,
        detected=chosen.min_detected > 0,
        raw=chosen.scale == "counts",
        depth=depth if chosen.takes_depth(design) else None,
    )
    measured_cells = None if measured is None else Cells.from_spots(measured, depth=depth)
    tests, differences, faults = [], [], []
    doubtful: dict[str, Outcome] = {}
    confounded: dict[str, str] = {}
    sections = (
        pd.crosstab([spots.samples.astype(str), spots.units], spots.labels.astype(str)) if chosen.samples else None
    )
    for group in _groups(cells, groups, reference, chosen):
        known = None if measured_cells is None else Contrast.from_cells(measured_cells, group, reference, design)
        contrast = Contrast.from_cells(cells, group, reference, design, known)
        used = chosen.samples_in(contrast)
        kept, fault = _testable_genes(contrast, chosen, used, group, reference, cells)
        if fault:
            faults.append(fault)
            continue
        _log_left_out(contrast, used, group, reference)
        contrast = contrast.keep(kept)
        outcome = run(chosen, contrast)
        test = outcome.test
        if outcome.doubt:
            doubtful[group] = outcome
        samples, sides = contrast.samples[used & contrast.paired], cells.sides(group, reference)
        if sections is not None and (gap := _section_gap(sections, samples, sides)) > _MAX_SECTION_GAP:
            confounded[group] = (
                f"the sections of a sample differ in their shares of {group!r} and {reference!r} (by {gap:.0%})"
            )
        n: list[Any] = [int(used.sum()), *contrast.counts[:, used].sum(1).tolist()]
        if outcome.known is not None:
            n = [outcome.known.sum(0), *(contrast.counts[:, contrast.paired] @ outcome.known.astype(int))]
        tests.append(
            pd.DataFrame(
                {
                    "group": group,
                    "names": contrast.genes.astype(str).to_numpy(object),
                    "logfoldchanges": outcome.logfoldchanges,
                    "logfoldchanges_pooled": contrast.pooled_fold_changes,
                    "effect_size": test.effect,
                    "ci_low": test.ci_low,
                    "ci_high": test.ci_high,
                    "scores": test.scores,
                    "pvals": test.pvalues,
                    **dict(zip(("n_samples", "n_spots", "n_spots_reference"), n, strict=True)),
                }
            )
        )
        differences.append(_differences(contrast, outcome, group))
    if faults and (groups is not None or not tests):
        raise ValueError(faults[0])
    if faults:
        warn(f"groups are left out: {'; '.join(faults)}")
    every = pd.concat(tests, ignore_index=True)
    every.attrs["doubts"] = [f"{group!r}: {outcome.doubt}" for group, outcome in doubtful.items()]
    every.attrs["doubts"] += [f"{group!r}: {found}" for group, found in confounded.items()]
    if confounded:
        first, *others = confounded
        like = f"; similarly for {format_list(map(repr, others))}" if others else ""
        warn(
            f"groups and sections are confounded: {confounded[first]}{like}. Differences between sections, as in staining, appear as "
            "differences between groups. Use one section of each sample that has both groups, or only sections with similar shares"
        )
    if doubtful:
        warn(_describe_doubts(doubtful))
    return every, pd.concat(differences)


def _section_gap(sections: pd.DataFrame, samples: np.ndarray, sides: np.ndarray) -> float:
    """Difference between the shares of a group and of its reference in each section; mean over samples.

    ``sections`` has numbers of spots by (sample, section) and label, ``sides`` ``(2, labels)`` are masks of the labels of both
    groups. 0 if both have the same shares in each section, 1 if they are in two different ones. Noise of few spots is subtracted.
    """
    gaps = []
    for sample in samples:
        counts = sections.loc[sample].to_numpy() @ sides.T
        n = counts.sum(0)
        share = counts.sum(1) / n.sum()
        noise = (share * (1 - share)).sum() * (1 / n).sum()
        gaps.append(np.sqrt(max(np.square(np.diff(counts / n)).sum() - noise, 0) / 2))
    return float(np.mean(gaps)) if gaps else 0.0


def _describe_doubts(doubtful: Mapping[str, Outcome]) -> str:
    """Join the doubts by remedy: the first of each in full, then the groups with a similar one."""
    sentences = []
    for remedy in dict.fromkeys(outcome.remedy for outcome in doubtful.values()):
        first, *others = [group for group, outcome in doubtful.items() if outcome.remedy == remedy]
        like = f"; similarly in {format_list(map(repr, others))}" if others else ""
        sentences.append(f"{first!r}: {doubtful[first].doubt}{like}. {remedy}")
    return ". ".join(sentences)


def _testable_genes(
    contrast: Contrast, chosen: Method, used: np.ndarray, group: str, reference: str, cells: Cells
) -> tuple[np.ndarray, str]:
    """Mask of genes that pass the filters of mean and detection, and the reason if none does.

    If spots are the unit, the mean is over all spots: a mean of means would favour genes that are high in the small group.
    """
    if contrast.spot_variance is not None:
        within, between = (np.nanmax(x) for x in (contrast.spot_variance, np.square(np.diff(contrast.means, axis=0))))
        if max(within, between) <= _ROUNDING * np.nanmax(np.square(contrast.means)):
            return np.zeros(len(contrast.genes), bool), (
                f"`layer` {contrast.pool.layer!r} is the same at all spots of {group!r} and {reference!r} in a sample, so no difference "
                "can be tested; name a layer that varies over the spots"
            )
    with np.errstate(invalid="ignore"):
        mean = np.nanmean(contrast.means[:, used], axis=(0, 1)) if chosen.samples else contrast.mean
    enough = mean > contrast.design.min_mean
    if contrast.raw is not None:
        # Expected counts in both groups under the null hypothesis.
        depth = contrast.raw.depth
        share = depth[0] * depth[1] / np.maximum(depth.sum(0), 1e-300) ** 2
        enough &= (contrast.raw.counts.sum(0) * share[:, None]).sum(0) >= MIN_INFORMATION
        alone = enough & (contrast.raw.counts >= (1 - 1e-9) * depth[..., None]).all((0, 1))
        if contrast.depth is None and alone.any():
            return ~alone, (
                f"`data` has counts of one gene only, {contrast.genes[alone][0]!r}: the library sizes are its own counts, so a difference "
                "cannot be tested. Keep the other genes in `data`, or pass total counts as a column: method='pseudobulk', "
                "design=hg.Design(depth=...)"
            )
    if not enough.any():
        return (
            enough,
            f"`min_mean` is {contrast.design.min_mean}, and no gene has a higher mean in {group!r} and {reference!r}",
        )
    if cells.detected is None:
        return enough, ""
    spots = sum_sides(cells.detected, cells.sides(group, reference)).sum((0, 1))
    n = contrast.counts.sum(1)
    seen = enough & (spots * n.min() >= chosen.min_detected * n.sum())
    if not seen.any():
        return seen, (
            f"`groups`: the smaller of {group!r} and {reference!r} has {n.min()} spots; no gene above `min_mean` is expected to be "
            f"detected in {chosen.min_detected} of them. Label more spots"
        )
    if lost := int(enough.sum() - seen.sum()):
        logger.warning(
            "biomarkers: %d of %d genes are not tested in %r: they are expected to be detected in fewer than %d of the %d spots of "
            "the smaller group",
            *(lost, enough.sum(), group, chosen.min_detected, n.min()),
        )
    return seen, ""


def _log_left_out(contrast: Contrast, used: np.ndarray, group: str, reference: str) -> None:
    """Log the samples that have too few labelled spots for a test."""
    if used.all():
        return
    lacking = [
        f"{str(sample)!r} ({a} of {group!r}, {b} of {reference!r})"
        for sample, (a, b) in zip(contrast.samples[~used], contrast.counts[:, ~used].T, strict=True)
    ]
    logger.warning(
        "biomarkers: %r against %r is tested in %d of %d samples; the others have fewer than %d labelled spots of one of them: %s",
        *(group, reference, used.sum(), len(used), MIN_SPOTS, format_list(lacking)),
    )


def group_names(groups: Any, reference: object) -> tuple[list[str] | None, str]:
    """Return groups and reference as texts, like the labels; a numeric column has numbers as names."""
    if groups is not None:
        several = isinstance(groups, Iterable) and not isinstance(groups, str)
        groups = [clean_name_argument(group, "groups") for group in (groups if several else [groups])]
    return groups, clean_name_argument(reference, "reference")


def method_for(method: str, spots: SpotData, design: Design) -> Method:
    """Choose the method by the number of samples, or check the named method; check that it can use the design."""
    validate.one_of(method, ("auto", *METHODS), "method")
    n = len(set(spots.samples))
    bulk = "pseudobulk" if spots.scale == "counts" else "means"
    name = (bulk if n >= 3 else "spatial") if method == "auto" else method
    # Logarithms cannot be summed like counts, so their means are compared.
    name = "means" if name == "pseudobulk" and bulk == "means" else name
    if METHODS[name].scale not in (None, spots.scale):
        raise ValueError(
            f"`method` {name!r} needs {'raw counts' if name == 'deseq2' else 'logarithms'}, but the layer holds "
            f"{'logarithms' if name == 'deseq2' else 'raw counts'}; use method={bulk!r}"
        )
    moderated = METHODS[name].moderated
    for parameter, asked in (("trend", not design.trend), ("formula", design.formula), ("term", design.term)):
        if asked and not moderated:
            raise ValueError(f"`{parameter}` is only for method='pseudobulk' and 'means', the method is {name!r}")
    if design.lfc and not moderated and name != "deseq2":
        raise ValueError(f"`lfc` is only for method='pseudobulk', 'deseq2' and 'means', the method is {name!r}")
    if design.covariates and not moderated and name not in ("mixed", "spatial"):
        raise ValueError(
            f"`covariates` are only for method='pseudobulk', 'means', 'mixed' and 'spatial', the method is {name!r}"
        )
    if name == "deseq2":
        import_pydeseq2()
    if n < METHODS[name].samples:
        raise ValueError(
            f"`method` {name!r} compares samples and needs at least {METHODS[name].samples}, found {n}; name the column of patients "
            "in `sample_key`, or use method='spatial'"
        )
    return METHODS[name]


def _groups(cells: Cells, groups: Sequence[str] | None, reference: str, chosen: Method) -> list[str]:
    """Names of the groups to test. A group that cannot be tested is an error if it was named, else a warning."""
    labels = cells.labels.tolist()
    if len(labels) < 2:
        raise ValueError(f"`groupby` has one level, {labels}; at least 2 are needed")
    if reference == "rest" and "rest" in labels:
        raise ValueError(
            "`reference` 'rest' means all other spots, but `groupby` has a level of this name too; rename the level"
        )
    validate.key_in(reference, ["rest", *labels], "reference", what="a group")
    if groups is not None:
        if not groups:
            raise ValueError(f"`groups` is empty; name some of {labels}, or None for all")
        validate.all_in(groups, labels, "groups", "are not groups")
        if reference in groups:
            raise ValueError(f"`groups` holds the reference {reference!r}; leave it out")
    wanted = [label for label in labels if label != reference] if groups is None else list(dict.fromkeys(groups))
    faults = {group: _find_fault(cells, group, reference, chosen) for group in wanted}
    bad = [fault for fault in faults.values() if fault]
    if bad and (groups is not None or len(bad) == len(wanted)):
        raise ValueError(f"`{'groupby' if groups is None else 'groups'}`: {bad[0]}")
    if bad:
        warn(f"groups are left out: {'; '.join(bad)}")
    return [group for group in wanted if not faults[group]]


def _find_fault(cells: Cells, group: str, reference: str, chosen: Method) -> str:
    """Reason why a group cannot be tested, or an empty text."""
    counts = dict(zip((group, reference), sum_sides(cells.counts, cells.sides(group, reference)), strict=True))
    for name, count in counts.items():
        if count.sum() < MIN_SPOTS:
            return f"{name!r} has {count.sum()} spots, at least {MIN_SPOTS} are needed"
    if not chosen.samples:
        return ""
    enough = {name: count >= MIN_SPOTS for name, count in counts.items()}
    for name, there in enough.items():
        if there.sum() < 2:
            return (
                f"{name!r} has {MIN_SPOTS} or more spots only in samples {cells.samples[there].tolist()}; method {chosen.name!r} "
                "needs at least 2 such samples"
            )
    both = (enough[group] & enough[reference]).sum()
    if both < 2:
        return (
            f"{both} of the samples have {MIN_SPOTS} or more spots of both {group!r} and {reference!r}; at least 2 are needed, since "
            "otherwise a difference between groups cannot be separated from a difference between samples"
        )
    return ""


def _differences(contrast: Contrast, outcome: Outcome, group: str) -> pd.DataFrame:
    """Difference in every sample that has both groups, with the numbers of spots in the index."""
    samples = contrast.samples[contrast.paired]
    index = pd.MultiIndex.from_arrays(
        [[group] * len(samples), samples, *contrast.counts[:, contrast.paired]],
        names=["group", "sample", "n_spots", "n_spots_reference"],
    )
    return pd.DataFrame(outcome.differences.astype(np.float32), index=index, columns=contrast.genes.astype(str))


def adjust_pvalues(tests: pd.DataFrame, over: str = "group") -> pd.DataFrame:
    """Add p-values adjusted by Benjamini and Hochberg within each group or over all; NaN p-values stay NaN."""
    tests = tests.assign(pvals_adj=np.nan)
    known = tests[tests["pvals"].notna()]
    for _, part in known.groupby(known["group"] if over == "group" else np.zeros(len(known)), sort=False):
        tests.loc[part.index, "pvals_adj"] = multipletests(part["pvals"], method="fdr_bh")[1]
    return tests
