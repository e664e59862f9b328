"""The tests of one contrast, all of one shape, and the covariates that they adjust for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.names import check_spelling, clean_names
from .contrast import MIN_SPOTS, Contrast
from .sums import check_finite

if TYPE_CHECKING:
    from ...stats import CountSums, SampleTest
    from .design import Design

#: The largest weight of a sample, in units of their median.
_MOST_WEIGHT = 4.0
#: Share of genes that are left out on one side from which library sizes are doubted: where 55 % of the genes change, it is 0.35 to 0.45.
_MOST_APART = 1 / 3
#: Share of the adjustment for depth that the groups must show, and its square over that of the standard error from which it matters.
_LEAST_FOLLOWED, _MATTERS = 0.5, 1.0


@dataclass(frozen=True)
class Method:
    """A test of one contrast."""

    name: str
    run: Callable[[Contrast], SampleTest | Outcome]
    label: str
    samples: int  # with both groups that it needs
    uses: Callable[[Contrast], np.ndarray]
    caution: str = ""  # what its user must know
    detecting: int = 0  # spots of the smaller group expected to show a tested gene
    squares: bool = False  # uses the variance of spots, to weigh or to judge the adjustment for depth
    scale: str | None = None
    depth: bool = False  # takes logarithms of counts and adjusts for depth
    moderated: bool = False  # over genes; takes a formula

    def takes_depth(self, design: Design) -> bool:
        """Whether the depth of the spots enters: sums of counts have their own, unless a column is named."""
        return self.depth or (self.name == "pseudobulk" and design.depth not in (None, "auto"))


@dataclass(frozen=True)
class Outcome:
    """A test, the differences in every paired sample ``(paired, g)`` and the log2 fold changes ``(g,)`` of the same contrast.

    ``known`` ``(paired, g)`` tells which samples a gene is tested in; default: all. ``doubt`` says what is doubtful of library sizes
    or depth.
    """

    test: SampleTest
    differences: np.ndarray
    logfoldchanges: np.ndarray
    known: np.ndarray | None = None
    doubt: str = ""


def run(method: Method, contrast: Contrast) -> Outcome:
    """Run a method."""
    found = method.run(contrast)
    if isinstance(found, Outcome):
        return found
    doubt = _check_depth(contrast) if method.squares else ""
    return Outcome(found, contrast.differences, contrast.fold_changes(found.effect), doubt=doubt)


def _check_depth(contrast: Contrast) -> str:
    """Warn where groups do not differ with depth as spots within them do; return what is doubtful."""
    from ...stats import depth_followed

    if contrast.adjustment is None or contrast.spot_variance is None:
        return ""
    raw = contrast.differences + contrast.adjustment
    followed, size = depth_followed(raw, contrast.adjustment, contrast.spot_variance)
    if not (followed < _LEAST_FOLLOWED and size > _MATTERS):
        return ""
    doubt = (
        "depth is adjusted for by its slope within the groups, but the difference between them is "
        f"{max(followed, 0):.0%} of what this slope says: genes that do not differ may seem to"
    )
    warnings.warn(
        f"{doubt}. Believe only genes that are significant with design=hg.Design(depth=None) too",
        UserWarning,
        stacklevel=5,
    )
    return doubt


def _pseudobulk(contrast: Contrast) -> Outcome:
    from ...stats import count_differences, paired_moderated_t

    assert contrast.raw is not None
    found = count_differences(contrast.raw, normalise=contrast.depth is None)
    doubt = _check_libraries(contrast.raw) if contrast.depth is None else ""
    known = np.isfinite(found.variances)
    weights = _capped(np.where(known, 1 / np.where(known, found.variances, 1), 0))
    expected = known.sum(0) / np.maximum(weights.sum(0), 1e-300)
    matrix, column = contrast.matrix
    test = paired_moderated_t(
        found.differences,
        alike=np.maximum(expected, 1e-30) if contrast.design.trend else None,
        weights=weights,
        design=matrix,
        column=column,
        level=contrast.design.confidence_level,
        robust=contrast.design.robust,
        minimum=contrast.design.lfc * np.log(2),
        reliable=found.reliable,
        least=found.least,
    )
    return Outcome(test, found.differences, test.effect / np.log(2), known, doubt)


def _check_libraries(sums: CountSums) -> str:
    """Warn where library sizes rest on few genes, or on genes that differ in one direction; return what is doubtful."""
    from ...stats import MIN_LIBRARY, library_evidence

    n, share = library_evidence(sums.counts, sums.depth)
    doubt = ""
    if n < MIN_LIBRARY:
        doubt = f"library sizes rest on {n} genes with enough counts, {MIN_LIBRARY} are needed: genes that do not differ may seem to"
    elif abs(share) > _MOST_APART:
        doubt = (
            f"library sizes leave out {abs(share):.0%} of the genes, which are {'higher' if share > 0 else 'lower'} in the group than "
            "the others: if these are the ones that do not differ, the others seem to"
        )
    if doubt:
        warnings.warn(
            f"{doubt}. Pass sizes from spike-ins, or from genes that do not change, as a column: hg.Design(depth=...)",
            UserWarning,
            stacklevel=6,
        )
    return doubt


def _capped(weights: np.ndarray) -> np.ndarray:
    """Weights of samples ``(n, g)``, at most four times their median, so that no sample outweighs the others."""
    middle = np.nanmedian(np.where((weights > 0).any(0) & (weights <= 0), np.nan, weights), axis=0)
    return np.minimum(weights, _MOST_WEIGHT * middle)


def _deseq2(contrast: Contrast) -> Outcome:
    from ...stats import count_differences
    from .deseq2 import deseq2

    assert contrast.raw is not None
    test = deseq2(contrast.raw, level=contrast.design.confidence_level, lfc=contrast.design.lfc)
    found = count_differences(contrast.raw)
    return Outcome(test, found.differences, test.effect / np.log(2), np.isfinite(found.variances))


def _means(contrast: Contrast) -> SampleTest:
    from ...stats import paired_moderated_t, variance_components

    assert contrast.spot_variance is not None
    # A gene of one value everywhere has no variance to go with.
    least = max(1e-5 * float(np.median(contrast.spot_variance)), 1e-30)
    within = np.maximum(contrast.spot_variance, least)
    differences = contrast.differences
    sampling = (1 / contrast.counts[:, contrast.paired]).sum(0)
    if contrast.depth_variance is not None:
        sampling = sampling + contrast.depth_variance
    weights = None
    if len(np.unique(sampling)) > 1 and len(differences) > 2:
        between, factor = variance_components(
            differences / np.sqrt(within), np.broadcast_to(sampling[:, None], differences.shape)
        )
        weights = _capped((1 / (between + factor * sampling))[:, None])
    matrix, column = contrast.matrix
    return paired_moderated_t(
        differences,
        alike=within if contrast.design.trend else None,
        weights=weights,
        design=matrix,
        column=column,
        level=contrast.design.confidence_level,
        robust=contrast.design.robust,
        minimum=contrast.design.lfc * np.log(2),
    )


def _mixed(contrast: Contrast) -> SampleTest:
    from ...stats import mixed_model

    side, sample = np.nonzero(contrast.counts >= MIN_SPOTS)
    table = cell_covariates(contrast, side, sample) if contrast.design.covariates else None
    means = contrast.means if contrast.shift is None else contrast.means - contrast.shift
    return mixed_model(means[side, sample], side == 0, sample, table, level=contrast.design.confidence_level)


def _ppi(contrast: Contrast) -> Outcome:
    from ...stats import MIN_PVALUES, prediction_powered_mean

    known = contrast.measured
    assert known is not None
    both = known.samples[known.paired]
    at = pd.Index(contrast.samples[contrast.paired])
    both = both[np.isin(both, at)]
    only = ~at.isin(known.samples)
    if len(both) < 3 or only.sum() < 2:
        raise ValueError(
            f"`method` 'ppi' needs at least 3 measured and 2 more predicted samples that have both groups; there are "
            f"{len(both)} and {int(only.sum())}"
        )
    if len(both) < MIN_PVALUES:
        warnings.warn(
            f"method 'ppi' has {len(both)} measured samples: pvals are NaN, since they need {MIN_PVALUES}; ci_low and ci_high hold",
            UserWarning,
            stacklevel=5,
        )
    rows = pd.Index(known.samples[known.paired]).get_indexer(both)
    predicted = contrast.differences
    test = prediction_powered_mean(
        known.differences[rows],
        predicted[at.get_indexer(both)],
        predicted[only],
        level=contrast.design.confidence_level,
    )
    # A patient of whom one group was measured is in neither part.
    entered = np.broadcast_to((only | at.isin(both))[:, None], predicted.shape)
    return Outcome(test, predicted, contrast.fold_changes(test.effect), entered)


def _spatial(contrast: Contrast) -> Any:
    from ...stats import spatial_test

    if contrast.pool.xy is None:
        raise ValueError("`data` has no obsm['spatial']; method 'spatial' needs spot centres")
    chosen = contrast.inside | contrast.outside
    sections = np.unique(contrast.pool.units[chosen].astype(str), return_inverse=True)[1]
    return spatial_test(
        contrast.pool.values(chosen, contrast.genes),
        contrast.inside[chosen],
        contrast.pool.xy[chosen],
        sections if sections.max() else None,
        samples=contrast.pool.samples[chosen].astype(str),
        covariates=spot_covariates(contrast, chosen),
        level=contrast.design.confidence_level,
    )


def _wilcoxon(contrast: Contrast) -> SampleTest:
    from ...stats import SampleTest, wilcoxon_test

    chosen = contrast.inside | contrast.outside
    scores, pvalues = wilcoxon_test(contrast.pool.values(chosen, contrast.genes), contrast.inside[chosen])
    unknown = np.full(len(scores), np.nan)
    return SampleTest(contrast.pooled_means[0] - contrast.pooled_means[1], unknown, unknown, scores, pvalues, unknown)


def _with_both(contrast: Contrast) -> np.ndarray:
    return contrast.paired


def _with_either(contrast: Contrast) -> np.ndarray:
    return np.any(contrast.counts >= MIN_SPOTS, axis=0)


def _all(contrast: Contrast) -> np.ndarray:
    return np.any(contrast.counts > 0, axis=0)


METHODS = {
    method.name: method
    for method in (
        Method("pseudobulk", _pseudobulk, "pseudobulk", 2, _with_both, scale="counts", moderated=True),
        Method("deseq2", _deseq2, "deseq2", 2, _with_both, scale="counts"),
        Method("means", _means, "means", 2, _with_both, squares=True, scale="log", depth=True, moderated=True),
        Method("mixed", _mixed, "mixed", 2, _with_either, squares=True, depth=True),
        Method("ppi", _ppi, "ppi", 5, _with_both),
        Method(
            "spatial",
            _spatial,
            "spatial",
            0,
            _all,
            "method 'spatial' says whether groups differ in these sections beyond what neighbouring spots share; it does not "
            "generalise to other patients",
            detecting=3,
            depth=True,
        ),
        Method(
            "wilcoxon",
            _wilcoxon,
            "wilcoxon (naive)",
            0,
            _all,
            "method 'wilcoxon' takes spots as independent, which neighbours are not: its p-values are far too small, and it is "
            "there for comparison with scanpy alone",
        ),
    )
}


def spot_covariates(contrast: Contrast, chosen: np.ndarray) -> np.ndarray | None:
    """Return log depth and covariates of the chosen spots, ``(m, c)``; ``None`` if there are none."""
    columns = [] if contrast.depth is None else [contrast.depth[chosen]]
    for key in contrast.design.covariates:
        values, numbers = _read(contrast, key, chosen)
        columns += [values.to_numpy(float)] if numbers else _indicators(values)
    return np.column_stack(columns) if columns else None


def cell_covariates(contrast: Contrast, side: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Covariates of sample × group means: means of numbers; labels, which are one a sample, as indicators."""
    columns: list[Any] = []
    for key in contrast.design.covariates:
        values, numbers = _read(contrast, key)
        if numbers:
            masks = (contrast.inside, contrast.outside)
            of = [masks[i] & (contrast.pool.samples == contrast.samples[j]) for i, j in zip(side, sample, strict=True)]
            columns.append([float(values[mask].mean()) for mask in of])
            continue
        per_sample = values.groupby(contrast.pool.samples).agg(["nunique", "first"])
        if (per_sample["nunique"] > 1).any():
            raise ValueError(
                f"`covariates` {key!r} has several values within sample {per_sample.index[per_sample['nunique'] > 1][0]!r}; "
                "a number, or one label a sample is needed"
            )
        columns += _indicators(per_sample["first"].reindex(contrast.samples[sample]))
    return np.array(columns).reshape(len(columns), len(side)).T


def _read(contrast: Contrast, key: str, chosen: np.ndarray | slice = slice(None)) -> tuple[pd.Series, bool]:
    """Return the column, labels cleaned, and whether it is of numbers."""
    values = contrast.pool.obs(key, "covariates")[chosen]
    numbers = pd.api.types.is_numeric_dtype(values)
    values = values if numbers else pd.Series(clean_names(values), dtype=object)
    if values.isna().any():
        raise ValueError(
            f"`covariates` {key!r} is missing for {int(values.isna().sum())} spots; fill it, or leave it out"
        )
    if numbers:
        check_finite(values, key)
    else:
        check_spelling({"": values.to_numpy(object)}, "covariates", key)
    return values, numbers


def _indicators(labels: pd.Series) -> list[np.ndarray]:
    return list(pd.get_dummies(labels, drop_first=True).to_numpy(float).T)
