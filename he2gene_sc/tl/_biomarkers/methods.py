"""Tests of one contrast with a common interface, and their covariates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.names import check_spelling, clean_names
from .contrast import MIN_SPOTS, Contrast
from .depth_check import doubt_over_parts, doubt_over_samples, section_parts
from .sums import check_finite

if TYPE_CHECKING:
    from ...stats import CountSums, SampleTest
    from .design import Design

#: Largest weight of a sample, in units of the median weight.
_MAX_WEIGHT = 4.0
#: Share of genes left out in one direction above which library sizes are doubtful; it is 0.35 to 0.45 if 55 % of the genes change.
_MAX_LEFT_OUT = 1 / 3


@dataclass(frozen=True)
class Method:
    """Definition of a test of one contrast."""

    name: str
    run: Callable[[Contrast], SampleTest | Outcome]
    label: str
    samples: int  # fewest samples with both groups
    sample_mask: Callable[[Contrast], np.ndarray]
    caution: str = ""  # warning for the user
    min_detected: int = 0  # expected spots of the smaller group in which a tested gene is detected
    squares: bool = False  # uses the variance over spots
    scale: str | None = None
    depth: bool = False  # tests logarithms and adjusts for depth
    moderated: bool = False  # variances moderated over genes; takes a formula

    def takes_depth(self, design: Design) -> bool:
        """Whether the test uses the depth of the spots; sums of counts only use it if a column is named."""
        return self.depth or (self.name == "pseudobulk" and design.depth not in (None, "auto"))


@dataclass(frozen=True)
class Outcome:
    """A test, the differences in every paired sample ``(paired, g)`` and the log2 fold changes ``(g,)`` of the same contrast.

    ``known`` ``(paired, g)`` marks the samples in which a gene is tested; default: all. ``doubt`` is the reason why library
    sizes or the adjustment for depth are doubtful, and ``remedy`` is what to do about it.
    """

    test: SampleTest
    differences: np.ndarray
    logfoldchanges: np.ndarray
    known: np.ndarray | None = None
    doubt: str = ""
    remedy: str = ""


def run(method: Method, contrast: Contrast) -> Outcome:
    """Run a method on a contrast."""
    result = method.run(contrast)
    if isinstance(result, Outcome):
        return result
    return _logarithms(contrast, result, *(doubt_over_samples(contrast) if method.squares else ("", "")))


def _logarithms(contrast: Contrast, test: Any, doubt: str = "", remedy: str = "") -> Outcome:
    """Outcome of a test of logarithms."""
    return Outcome(test, contrast.differences, contrast.fold_changes(test.effect), doubt=doubt, remedy=remedy)


def _pseudobulk(contrast: Contrast) -> Outcome:
    from ...stats import count_differences, paired_moderated_t

    assert contrast.raw is not None
    found = count_differences(contrast.raw, normalise=contrast.depth is None)
    doubt = _doubt_about_libraries(contrast.raw) if contrast.depth is None else ""
    remedy = "Pass library sizes from spike-ins or unchanged genes as a column: hg.Design(depth=...)"
    known = np.isfinite(found.variances)
    weights = _cap_weights(np.where(known, 1 / np.where(known, found.variances, 1), 0))
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
    return Outcome(test, found.differences, test.effect / np.log(2), known, doubt, remedy)


def _doubt_about_libraries(sums: CountSums) -> str:
    """State if library sizes depend on few genes, or if many genes in one direction were left out."""
    from ...stats import MIN_LIBRARY, library_evidence

    n, share = library_evidence(sums.counts, sums.depth)
    if n < MIN_LIBRARY:
        return (
            f"library sizes are estimated from {n} genes with enough counts, but {MIN_LIBRARY} are needed: genes without a difference "
            "may appear different"
        )
    if abs(share) > _MAX_LEFT_OUT:
        return (
            f"library sizes are estimated without {abs(share):.0%} of the genes, which are {'higher' if share > 0 else 'lower'} in the "
            "group than the others: if these genes are the unchanged ones, all others appear different"
        )
    return ""


def _cap_weights(weights: np.ndarray) -> np.ndarray:
    """Limit the weights of samples ``(n, g)`` to four times their median, so that no sample dominates."""
    middle = np.nanmedian(np.where((weights > 0).any(0) & (weights <= 0), np.nan, weights), axis=0)
    return np.minimum(weights, _MAX_WEIGHT * middle)


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
    # A constant gene has no variance: give it a small one.
    minimum = max(1e-5 * float(np.median(contrast.spot_variance)), 1e-30)
    spot_variance = np.maximum(contrast.spot_variance, minimum)
    differences = contrast.differences
    sampling = (1 / contrast.counts[:, contrast.paired]).sum(0)
    if contrast.depth_variance is not None:
        sampling = sampling + contrast.depth_variance
    weights = None
    if len(np.unique(sampling)) > 1 and len(differences) > 2:
        between, factor = variance_components(
            differences / np.sqrt(spot_variance), np.broadcast_to(sampling[:, None], differences.shape)
        )
        weights = _cap_weights((1 / (between + factor * sampling))[:, None])
    matrix, column = contrast.matrix
    return paired_moderated_t(
        differences,
        alike=spot_variance if contrast.design.trend else None,
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
    samples = pd.Index(contrast.samples[contrast.paired])
    both = both[np.isin(both, samples)]
    only = ~samples.isin(known.samples)
    if len(both) < 3 or only.sum() < 2:
        raise ValueError(
            f"`method` 'ppi' needs at least 3 measured and 2 more predicted samples with both groups; found "
            f"{len(both)} and {int(only.sum())}"
        )
    if len(both) < MIN_PVALUES:
        warnings.warn(
            f"method 'ppi' has {len(both)} measured samples, but p-values need {MIN_PVALUES}: pvals are NaN; ci_low and ci_high are valid",
            UserWarning,
            stacklevel=5,
        )
    rows = pd.Index(known.samples[known.paired]).get_indexer(both)
    predicted = contrast.differences
    test = prediction_powered_mean(
        known.differences[rows],
        predicted[samples.get_indexer(both)],
        predicted[only],
        level=contrast.design.confidence_level,
    )
    # A patient with only one measured group is in neither part.
    used = np.broadcast_to((only | samples.isin(both))[:, None], predicted.shape)
    return Outcome(test, predicted, contrast.fold_changes(test.effect), used)


def _spatial(contrast: Contrast) -> Outcome:
    from ...stats import spatial_test

    if contrast.pool.xy is None:
        raise ValueError("`data` has no obsm['spatial'], but method 'spatial' needs spot centres")
    chosen = contrast.inside | contrast.outside
    sections = np.unique(contrast.pool.units[chosen].astype(str), return_inverse=True)[1]
    values, xy = contrast.pool.values(chosen, contrast.genes), contrast.pool.xy[chosen]
    test = spatial_test(
        values,
        contrast.inside[chosen],
        xy,
        sections if sections.max() else None,
        samples=contrast.pool.samples[chosen].astype(str),
        covariates=spot_covariates(contrast, chosen),
        level=contrast.design.confidence_level,
    )
    if contrast.depth is None:
        return _logarithms(contrast, test)
    parts = section_parts(contrast.inside[chosen], xy, sections)
    doubt = doubt_over_parts(values, contrast.inside[chosen], contrast.depth[chosen], parts, test)
    return _logarithms(contrast, test, *doubt)


def _wilcoxon(contrast: Contrast) -> SampleTest:
    from ...stats import SampleTest, wilcoxon_test

    chosen = contrast.inside | contrast.outside
    scores, pvalues = wilcoxon_test(contrast.pool.values(chosen, contrast.genes), contrast.inside[chosen])
    unknown = np.full(len(scores), np.nan)
    return SampleTest(contrast.pooled_means[0] - contrast.pooled_means[1], unknown, unknown, scores, pvalues, unknown)


def _paired_samples(contrast: Contrast) -> np.ndarray:
    return contrast.paired


def _samples_with_either(contrast: Contrast) -> np.ndarray:
    return np.any(contrast.counts >= MIN_SPOTS, axis=0)


def _all_samples(contrast: Contrast) -> np.ndarray:
    return np.any(contrast.counts > 0, axis=0)


METHODS = {
    method.name: method
    for method in (
        Method("pseudobulk", _pseudobulk, "pseudobulk", 2, _paired_samples, scale="counts", moderated=True),
        Method("deseq2", _deseq2, "deseq2", 2, _paired_samples, scale="counts"),
        Method("means", _means, "means", 2, _paired_samples, squares=True, scale="log", depth=True, moderated=True),
        Method("mixed", _mixed, "mixed", 2, _samples_with_either, squares=True, depth=True),
        Method("ppi", _ppi, "ppi", 5, _paired_samples),
        Method(
            "spatial",
            _spatial,
            "spatial",
            0,
            _all_samples,
            "method 'spatial' tests whether groups differ in these sections, given spatial autocorrelation; the result does not "
            "generalise to other patients",
            min_detected=3,
            depth=True,
        ),
        Method(
            "wilcoxon",
            _wilcoxon,
            "wilcoxon (naive)",
            0,
            _all_samples,
            "method 'wilcoxon' treats neighbouring spots as independent: its p-values are far too small. Use it only for comparison "
            "with scanpy",
        ),
    )
}


def spot_covariates(contrast: Contrast, chosen: np.ndarray) -> np.ndarray | None:
    """Return log depth and covariates of the chosen spots, ``(m, c)``; ``None`` if there are none."""
    columns = [] if contrast.depth is None else [contrast.depth[chosen]]
    for key in contrast.design.covariates:
        values, numbers = _read_covariate(contrast, key, chosen)
        columns += [values.to_numpy(float)] if numbers else _indicators(values)
    return np.column_stack(columns) if columns else None


def cell_covariates(contrast: Contrast, side: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Covariates of sample × group means: means of numbers, and indicators of labels (one label per sample)."""
    columns: list[Any] = []
    for key in contrast.design.covariates:
        values, numbers = _read_covariate(contrast, key)
        if numbers:
            masks = (contrast.inside, contrast.outside)
            cells = [
                masks[i] & (contrast.pool.samples == contrast.samples[j]) for i, j in zip(side, sample, strict=True)
            ]
            columns.append([float(values[cell].mean()) for cell in cells])
            continue
        per_sample = values.groupby(contrast.pool.samples).agg(["nunique", "first"])
        if (per_sample["nunique"] > 1).any():
            raise ValueError(
                f"`covariates` {key!r} has several values within sample {per_sample.index[per_sample['nunique'] > 1][0]!r}; "
                "a number, or one label per sample, is needed"
            )
        columns += _indicators(per_sample["first"].reindex(contrast.samples[sample]))
    return np.array(columns).reshape(len(columns), len(side)).T


def _read_covariate(contrast: Contrast, key: str, chosen: np.ndarray | slice = slice(None)) -> tuple[pd.Series, bool]:
    """Return the column, with cleaned labels, and whether it is numeric."""
    values = contrast.pool.obs(key, "covariates")[chosen]
    numbers = pd.api.types.is_numeric_dtype(values)
    values = values if numbers else pd.Series(clean_names(values), dtype=object)
    if values.isna().any():
        raise ValueError(
            f"`covariates` {key!r} has missing values in {int(values.isna().sum())} spots; fill them, or leave the covariate out"
        )
    if numbers:
        check_finite(values, key)
    else:
        check_spelling({"": values.to_numpy(object)}, "covariates", key)
    return values, numbers


def _indicators(labels: pd.Series) -> list[np.ndarray]:
    return list(pd.get_dummies(labels, drop_first=True).to_numpy(float).T)
