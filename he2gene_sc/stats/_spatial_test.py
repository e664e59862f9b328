"""Tests of genes between groups of spots in one or a few sections, with and without spatial autocorrelation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from threadpoolctl import threadpool_limits

from ._covariance import Blocks, correlations, make_blocks
from ._pseudobulk import SampleTest, t_test
from ._spatial_fit import covariance_of
from ._spatial_moments import Design, Moments, gene_chunks

#: If the p-value of the randomisation is at most this, it confirms the test, and the p-value is not changed.
_CHECK_LEVEL = 0.05


@dataclass(frozen=True)
class SpatialTest(SampleTest):
    """A :class:`SampleTest` of the mean difference within sections; NaN for genes that are constant within groups or not finite."""

    n_effective: np.ndarray  # effective number of independent spots, at most the number of spots
    pvalues_check: np.ndarray  # by spectral randomisation; NaN for genes without this check


def spatial_test(
    values: np.ndarray,
    group: np.ndarray,
    xy: np.ndarray,
    sections: np.ndarray | None = None,
    *,
    samples: np.ndarray | None = None,
    covariates: np.ndarray | None = None,
    level: float = 0.95,
    check_top: int = 100,
    n_perms: int = 999,
    seed: int = 0,
) -> SpatialTest:
    """Test the mean difference between a group of spots and the others, given autocorrelation of genes and labels.

    A modified t test (Clifford, Richardson & Hémon 1989; Dutilleul 1993): the variance of the difference is computed
    under the gene's own spatial covariance. It is averaged over a fixed grid of covariances (exponential, Matérn 3/2 and
    Gaussian, isotropic and stretched in four directions, with white noise), weighted by restricted likelihood
    (Patterson & Thompson 1971); a correlogram is biased towards zero when the correlation range is comparable to the tissue
    size. The grid includes 15 ratios of the groups' SDs, with the largest prior weight for equal SDs. The variation over the
    grid determines the degrees of freedom. See docs/statistics/methods.md.

    The SD of a few spots cannot be estimated well: if it is twice the SD of the others, three scattered spots still reject too
    often (docs/statistics/validation.md). Fields of different sections are independent, except for sections of one sample in
    ``samples`` ``(n,)``, which may be serial and are treated as one field. Labels are fixed under the null: the test is about these
    sections, not about other patients. The ``check_top`` genes with the smallest p-values are checked by ``n_perms`` Moran
    spectral randomisations (Wagner & Dray 2015, triplets); if this p-value is above 0.05, the larger one is reported. The effect is
    at equal ``covariates`` ``(n, c)``.
    """
    values, group = np.asarray(values), np.asarray(group)
    xy, codes = _check_arguments(values, group, xy, sections, level, check_top, n_perms)
    design = _make_design(group, codes, covariates)
    owners = None if samples is None else _sample_codes(codes, np.asarray(samples))
    # Threads do not speed up small matrices, and on a busy machine they wait for each other for minutes.
    with threadpool_limits(1, user_api="blas"):
        blocks = make_blocks(xy, codes, group)
        moments = Moments(values, group, blocks, design)
        variance, spread, total = covariance_of(moments, blocks, owners)
        # A normal with uncertain variance is approximated by a t of equal variance and kurtosis; without a field it is Student's t.
        df = np.minimum(4 + 2 / spread, moments.n_free)
        error = np.sqrt(variance * moments.n_free / (moments.n_free - 2) * (df - 2) / df)
        test = t_test(moments.effect, error, df, level)
        n_effective = np.minimum(1 + total / (variance * moments.size), len(values))
        checked = np.full(values.shape[1], np.nan)
        top = np.argsort(test.pvalues, kind="stable")[:check_top]
        top = top[np.isfinite(test.pvalues[top])]
        if len(top):
            checked[top] = _randomise(values[:, top], design, moments, blocks, n_perms, seed)
    pvalues = np.where(checked > _CHECK_LEVEL, np.maximum(test.pvalues, checked), test.pvalues)
    return SpatialTest(**vars(replace(test, pvalues=pvalues)), n_effective=n_effective, pvalues_check=checked)


def wilcoxon_test(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank-sum scores and p-values ``(g,)`` of each gene for independent spots, with the correction for ties.

    Equal to scanpy's ``rank_genes_groups(method="wilcoxon", tie_correct=True)``. P-values are far too small, since
    neighbouring spots are correlated; use it only for comparison. NaN for a constant gene.
    """
    values, group = np.asarray(values), np.asarray(group, bool)
    n, g = values.shape
    inside = int(group.sum())
    scores = np.empty(g)
    for part in gene_chunks(n, g):
        ranks = stats.rankdata(values[:, part], axis=0) - (n + 1) / 2
        # the variance of the ranks includes the correction for ties
        variance = np.square(ranks).sum(0) * inside * (n - inside) / (n * (n - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[part] = np.where(variance > 0, ranks[group].sum(0) / np.sqrt(variance), np.nan)
    return scores, 2 * stats.norm.sf(np.abs(scores))


def _randomise(
    values: np.ndarray, design: Design, moments: Moments, blocks: Blocks, n_perms: int, seed: int
) -> np.ndarray:
    """P-values ``(g,)`` of values ``(n, g)`` by randomisation within triplets of Moran eigenvectors."""
    sections = moments.sections
    centring = np.eye(len(sections)) - sections @ sections.T
    vectors = np.linalg.eigh(centring @ next(correlations(blocks)) @ centring)[1][:, ::-1]
    # the last ones are the section means
    vectors = vectors[:, : vectors.shape[1] - sections.shape[1]]
    triplets = np.arange(vectors.shape[1]) // 3
    chosen = blocks.project(design.residuals(values.astype(np.float64)))
    share = np.bincount(triplets, np.square(vectors.T @ moments.label))
    power = np.stack([np.bincount(triplets, column) for column in np.square(vectors.T @ chosen).T], axis=1)
    # a random rotation of a triplet preserves its energy and draws the cosine of its angle with the triplet of the label
    dimension = np.bincount(triplets)
    directions = np.random.default_rng(seed).standard_normal((n_perms, len(dimension), 3))
    directions[:, -1, dimension[-1] :] = 0
    cosine = directions[:, :, 0] / np.linalg.norm(directions, axis=2)
    drawn = np.abs(cosine @ np.sqrt(share[:, None] * power))
    observed = np.abs(moments.label @ chosen)
    return (1 + (drawn >= observed).sum(0)) / (n_perms + 1)


def _sample_codes(codes: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Code of the sample of each section, ``(s,)``."""
    if samples.shape != codes.shape:
        raise ValueError(f"`samples` must be one name for each of {len(codes)} spots, found shape {samples.shape}")
    names = np.unique(samples, return_inverse=True)[1]
    sections, first = np.unique(codes, return_index=True)
    if (names != names[first][np.searchsorted(sections, codes)]).any():
        raise ValueError("`samples`: a section has spots of several samples; each section must be of one sample")
    return names[first]


def _make_design(group: np.ndarray, codes: np.ndarray, covariates: np.ndarray | None) -> Design:
    """Return the design of label and covariates, or raise if they are not valid."""
    n = len(group)
    if covariates is not None and (
        np.ndim(covariates) != 2 or len(covariates) != n or not np.isfinite(covariates).all()
    ):
        raise ValueError(f"`covariates` must be ({n}, c) finite numbers, found shape {np.shape(covariates)}")
    design, plain = Design(group, codes, covariates), Design(group, codes)
    for parameter, found, hint in (("sections", plain, ""), ("covariates", design, "; leave some out")):
        if found.n_free < 3:
            raise ValueError(
                f"`{parameter}`: {n} spots in {n - plain.n_free} groups of a section leave {found.n_free} degrees of freedom, at least "
                f"3 are needed{hint}"
            )
    if design.label @ design.label < 1e-6 * (plain.label @ plain.label):
        raise ValueError(
            "`covariates` (or the depth of the spots) separate the group from the reference completely; leave them out (depth=None)"
        )
    return design


def _check_arguments(
    values: np.ndarray,
    group: np.ndarray,
    xy: np.ndarray,
    sections: np.ndarray | None,
    level: float,
    check_top: int,
    n_perms: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions as float and sections as integer codes, or raise if an argument is not valid."""
    if values.ndim != 2:
        raise ValueError(f"`values` must be (spots, genes), found {values.ndim} dimension(s)")
    n = len(values)
    if group.shape != (n,) or group.dtype != bool:
        raise ValueError(f"`group` must be {n} booleans, found shape {group.shape} of {group.dtype}")
    xy = np.asarray(xy, np.float64)
    if xy.shape != (n, 2) or not np.isfinite(xy).all():
        raise ValueError(f"`xy` must be ({n}, 2) finite positions, found shape {xy.shape}")
    if sections is not None and np.shape(sections) != (n,):
        raise ValueError(f"`sections` must be one code for each of {n} spots, found shape {np.shape(sections)}")
    if min(group.sum(), n - group.sum()) < 3:
        raise ValueError(f"`group` needs 3 spots inside and outside, found {group.sum()} and {n - group.sum()}")
    codes = np.zeros(n, int) if sections is None else np.unique(np.asarray(sections), return_inverse=True)[1]
    if not any(0 < group[codes == code].sum() < (codes == code).sum() for code in np.unique(codes)):
        raise ValueError(
            "`sections`: no section has spots of both the group and the reference; at least one such section is needed"
        )
    if len(np.unique(np.column_stack([codes, xy]), axis=0)) < n:
        raise ValueError("`xy` has spots of one section at the same position; each position may occur once")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, found {level}")
    if check_top < 0 or n_perms < 1:
        raise ValueError(f"`check_top` must be at least 0 and `n_perms` 1, found {check_top} and {n_perms}")
    return xy, codes
