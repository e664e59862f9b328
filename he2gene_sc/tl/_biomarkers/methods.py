"""Tests of one contrast with a common interface, and their covariates."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ... import stats
from ..._core.logs import warn
from .contrast import MIN_SPOTS, Contrast
from .depth_check import doubt_over_parts, doubt_over_samples, section_parts
from .design import Design, read_cells, read_covariate

#: Largest weight of a sample, in units of the median weight.
_MAX_WEIGHT = 4.0
#: Share of genes left out in one direction above which library sizes are doubtful; it is 0.35 to 0.45 if 55 % of the genes change.
_MAX_LEFT_OUT = 1 / 3


@dataclass(frozen=True)
class Method:
    """Definition of a test of one contrast."""

    name: str
    run: Callable[[Contrast], stats.SampleTest | Outcome]
    label: str
    samples: int  # fewest samples with both groups
    caution: str = ""  # warning for the user
    min_detected: int = 0  # expected spots of the smaller group in which a tested gene is detected
    squares: bool = False  # uses the variance over spots
    scale: str | None = None
    depth: bool = False  # tests logarithms and adjusts for depth
    moderated: bool = False  # variances moderated over genes; takes a formula
    unpaired: bool = False  # uses samples with one of the groups too

    def takes_depth(self, design: Design) -> bool:
        """Whether the test uses the depth of the spots; sums of counts only use it if a column is named."""
        return self.depth or (self.name == "pseudobulk" and design.depth not in (None, "auto"))

    def samples_in(self, contrast: Contrast) -> np.ndarray:
        """Mask of the samples that are used, ``(samples,)``."""
        enough = contrast.counts >= (MIN_SPOTS if self.samples else 1)
        either = self.unpaired or not self.samples
        return np.any(enough, axis=0) if either else np.all(enough, axis=0)


@dataclass(frozen=True)
class Outcome:
    """A test, the differences in every paired sample ``(paired, g)`` and the log2 fold changes ``(g,)`` of the same contrast.

    ``known`` ``(paired, g)`` marks the samples in which a gene is tested; default: all. ``doubt`` is the reason why library
    sizes or the adjustment for depth are doubtful, and ``remedy`` is what to do about it.
    """

    test: stats.SampleTest
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
    return _logarithms(contrast, result, *doubt_over_samples(contrast))


def _logarithms(contrast: Contrast, test: stats.SampleTest, doubt: str, remedy: str) -> Outcome:
    """Outcome of a test of logarithms."""
    return Outcome(test, contrast.differences, contrast.fold_changes(test.effect), doubt=doubt, remedy=remedy)


def _moderated_test(contrast: Contrast, differences: np.ndarray, alike: np.ndarray, **more: Any) -> stats.SampleTest:
    """Moderated t test of the differences of samples, with the terms and thresholds of the design."""
    design = contrast.design
    matrix, column = contrast.matrix
    return stats.paired_moderated_t(
        differences,
        alike=alike if design.trend else None,
        design=matrix,
        column=column,
        level=design.confidence_level,
        robust=design.robust,
        minimum=design.lfc * np.log(2),
        **more,
    )


def _pseudobulk(contrast: Contrast) -> Outcome:
    assert contrast.raw is not None
    found = stats.count_differences(contrast.raw, normalise=contrast.depth is None)
    doubt = _doubt_about_libraries(contrast.raw) if contrast.depth is None else ""
    remedy = "Pass library sizes from spike-ins or unchanged genes as a column: hg.Design(depth=...)"
    known = np.isfinite(found.variances)
    weights = _cap_weights(np.where(known, 1 / np.where(known, found.variances, 1), 0))
    expected = np.maximum(known.sum(0) / np.maximum(weights.sum(0), 1e-300), 1e-30)
    more = {"weights": weights, "reliable": found.reliable, "least": found.least}
    test = _moderated_test(contrast, found.differences, expected, **more)
    return Outcome(test, found.differences, test.effect / np.log(2), known, doubt, remedy)


def _doubt_about_libraries(sums: stats.CountSums) -> str:
    """State if library sizes depend on few genes, or if many genes in one direction were left out."""
    n, share = stats.library_evidence(sums.counts, sums.depth)
    if n < stats.MIN_LIBRARY:
        return (
            f"library sizes are estimated from {n} genes with enough counts, but {stats.MIN_LIBRARY} are needed: genes without a difference "
            "may appear different"
        )
    if abs(share) > _MAX_LEFT_OUT:
        return (
            f"library sizes ignore {abs(share):.0%} of the genes, which are {'higher' if share > 0 else 'lower'} in the group. If those "
            "genes did not change, every other gene will appear to"
        )
    return ""


def _cap_weights(weights: np.ndarray) -> np.ndarray:
    """Limit the weights of samples ``(n, g)`` to four times their median, so that no sample dominates."""
    middle = np.nanmedian(np.where((weights > 0).any(0) & (weights <= 0), np.nan, weights), axis=0)
    return np.minimum(weights, _MAX_WEIGHT * middle)


def _deseq2(contrast: Contrast) -> Outcome:
    """Run PyDESeq2 with the design ``~ sample + side``; effects are natural logarithms."""
    dds_class, stats_class = import_pydeseq2()
    assert contrast.raw is not None
    n, g = contrast.raw.counts.shape[1:]
    names = [f"{side}{i}" for side in ("group", "reference") for i in range(n)]
    rows = pd.DataFrame({"side": ["group"] * n + ["reference"] * n, "sample": [f"s{i}" for i in range(n)] * 2}, names)
    rounded = np.rint(contrast.raw.counts).astype(int).reshape(2 * n, g)
    counts = pd.DataFrame(rounded, names, [str(i) for i in range(g)])
    lfc = contrast.design.lfc
    null = {"alt_hypothesis": "greaterAbs", "lfc_null": lfc} if lfc else {}
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        fitted = dds_class(counts=counts, metadata=rows, design="~ sample + side", quiet=True, n_cpus=1)
        fitted.deseq2()
        tests = stats_class(
            fitted, contrast=["side", "group", "reference"], independent_filter=False, quiet=True, n_cpus=1, **null
        )
        tests.summary()
    table = tests.results_df.loc[counts.columns].astype(float)
    effect, error = (table[name].to_numpy() * np.log(2) for name in ("log2FoldChange", "lfcSE"))
    test = stats.t_test(effect, error, np.inf, contrast.design.confidence_level)
    test = replace(test, scores=table["stat"].to_numpy(), pvalues=table["pvalue"].to_numpy())
    found = stats.count_differences(contrast.raw)
    return Outcome(test, found.differences, effect / np.log(2), np.isfinite(found.variances))


def import_pydeseq2() -> tuple[type, type]:
    """Import PyDESeq2, an optional dependency."""
    try:
        from pydeseq2.dds import DeseqDataSet
        from pydeseq2.ds import DeseqStats
    except ImportError as error:
        raise ImportError(
            "`method` 'deseq2' needs PyDESeq2, which is not installed; pip install 'he2gene_sc[deseq2]'"
        ) from error
    return DeseqDataSet, DeseqStats


def _means(contrast: Contrast) -> stats.SampleTest:
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
        between, factor = stats.variance_components(
            differences / np.sqrt(spot_variance), np.broadcast_to(sampling[:, None], differences.shape)
        )
        weights = _cap_weights((1 / (between + factor * sampling))[:, None])
    return _moderated_test(contrast, differences, spot_variance, weights=weights)


def _mixed(contrast: Contrast) -> stats.SampleTest:
    side, sample = np.nonzero(contrast.counts >= MIN_SPOTS)
    table = cell_covariates(contrast, side, sample) if contrast.design.covariates else None
    means = contrast.means if contrast.shift is None else contrast.means - contrast.shift
    return stats.mixed_model(means[side, sample], side == 0, sample, table, level=contrast.design.confidence_level)


def _ppi(contrast: Contrast) -> Outcome:
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
    if len(both) < stats.MIN_PVALUES:
        warn(
            f"method 'ppi' has {len(both)} measured samples, but p-values need {stats.MIN_PVALUES}: pvals are NaN; ci_low and ci_high are valid"
        )
    rows = pd.Index(known.samples[known.paired]).get_indexer(both)
    predicted = contrast.differences
    test = stats.prediction_powered_mean(
        known.differences[rows],
        predicted[samples.get_indexer(both)],
        predicted[only],
        level=contrast.design.confidence_level,
    )
    # A patient with only one measured group is in neither part.
    used = np.broadcast_to((only | samples.isin(both))[:, None], predicted.shape)
    return Outcome(test, predicted, contrast.fold_changes(test.effect), used)


def _spatial(contrast: Contrast) -> stats.SampleTest | Outcome:
    if contrast.pool.xy is None:
        raise ValueError("`data` has no obsm['spatial'], but method 'spatial' needs spot centres")
    chosen = contrast.inside | contrast.outside
    sections = np.unique(contrast.pool.units[chosen].astype(str), return_inverse=True)[1]
    values, xy = contrast.pool.values(chosen, contrast.genes), contrast.pool.xy[chosen]
    test = stats.spatial_test(
        values,
        contrast.inside[chosen],
        xy,
        sections if sections.max() else None,
        samples=contrast.pool.samples[chosen].astype(str),
        covariates=spot_covariates(contrast, chosen),
        level=contrast.design.confidence_level,
    )
    if contrast.depth is None:
        return test
    parts = section_parts(contrast.inside[chosen], xy, sections)
    doubt = doubt_over_parts(values, contrast.inside[chosen], contrast.depth[chosen], parts, test)
    return _logarithms(contrast, test, *doubt)


def _wilcoxon(contrast: Contrast) -> stats.SampleTest:
    chosen = contrast.inside | contrast.outside
    scores, pvalues = stats.wilcoxon_test(contrast.pool.values(chosen, contrast.genes), contrast.inside[chosen])
    unknown = np.full(len(scores), np.nan)
    return stats.SampleTest(
        contrast.pooled_means[0] - contrast.pooled_means[1], unknown, unknown, scores, pvalues, unknown
    )


METHODS = {
    method.name: method
    for method in (
        Method("pseudobulk", _pseudobulk, "pseudobulk", 2, scale="counts", moderated=True),
        Method("deseq2", _deseq2, "deseq2", 2, scale="counts"),
        Method("means", _means, "means", 2, squares=True, scale="log", depth=True, moderated=True),
        Method("mixed", _mixed, "mixed", 2, squares=True, depth=True, unpaired=True),
        Method("ppi", _ppi, "ppi", 5),
        Method(
            "spatial",
            _spatial,
            "spatial",
            0,
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
            "method 'wilcoxon' treats neighbouring spots as independent: its p-values are far too small. Use it only for comparison "
            "with scanpy",
        ),
    )
}


def spot_covariates(contrast: Contrast, chosen: np.ndarray) -> np.ndarray | None:
    """Return log depth and covariates of the chosen spots, ``(m, c)``; ``None`` if there are none."""
    columns = [] if contrast.depth is None else [contrast.depth[chosen]]
    for key in contrast.design.covariates:
        columns += _columns(read_covariate(contrast.pool, key, chosen)[0][chosen])
    return np.column_stack(columns) if columns else None


def cell_covariates(contrast: Contrast, side: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Covariates of sample × group means: means of numbers, and indicators of labels."""
    masks = (contrast.inside, contrast.outside)
    cells = [masks[i] & (contrast.pool.samples == contrast.samples[j]) for i, j in zip(side, sample, strict=True)]
    columns: list[np.ndarray] = []
    for key in contrast.design.covariates:
        columns += _columns(pd.Series(read_cells(contrast.pool, key, cells)))
    return np.array(columns).reshape(len(columns), len(side)).T


def _columns(values: pd.Series) -> list[np.ndarray]:
    """Numbers as they are, or indicators of all labels but the first."""
    return list(pd.get_dummies(values.to_frame(), drop_first=True).to_numpy(float).T)
