"""Is a gene different in a group of spots of one section: with, and without, regard to spots being neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._covariance import ODDS, Blocks, correlations, make_blocks

#: White noise that the fit adds to every gene, as a share of its variance (and takes off the result again).
_JITTER = 0.03
#: Genes that are worked on together.
_CHUNK = 1024
#: Below this the randomisation agrees with the test, and the p-value stays as it is.
_CHECK_LEVEL = 0.05


@dataclass(frozen=True)
class SpatialTest:
    """Result of :func:`spatial_test`, each of shape ``(g,)``."""

    effect: np.ndarray  #: mean difference group - reference, within sections
    scores: np.ndarray  #: effect over its standard error
    pvalues: (
        np.ndarray
    )  #: two-sided; NaN for a gene that does not vary within groups, or has values that are no numbers
    df: np.ndarray  #: degrees of freedom of `scores`
    ci_low: np.ndarray  #: interval of `effect`
    ci_high: np.ndarray
    n_effective: np.ndarray  #: independent spots that would tell as much
    pvalues_check: np.ndarray  #: by spectral randomisation, NaN where it was not done


def spatial_test(
    values: np.ndarray,
    group: np.ndarray,
    xy: np.ndarray,
    sections: np.ndarray | None = None,
    *,
    level: float = 0.95,
    check_top: int = 100,
    n_perms: int = 999,
    seed: int = 0,
) -> SpatialTest:
    """Test the mean difference between a group of spots and the others, genes and labels being autocorrelated.

    A modified t-test (Clifford, Richardson & Hémon 1989; Dutilleul 1993): the variance of the difference is that under
    the gene's own spatial covariance. That covariance is not read off a correlogram, which is biased towards none in a
    window that the range is no small part of, but averaged over a fixed grid of covariances (exponential, Matérn 3/2
    and Gaussian, isotropic and anisotropic, with white noise), each weighted by its restricted likelihood (Patterson &
    Thompson 1971). How much the grid disagrees makes the degrees of freedom. See docs/statistics.md.

    The null holds the labels fixed: it says something of this section (these sections), not of other patients.

    Parameters
    ----------
    values
        ``(n, g)`` log expression.
    group
        ``(n,)`` bool: in the group, or in the reference.
    xy
        ``(n, 2)`` spot centres in any unit; grids and irregular positions alike.
    sections
        ``(n,)`` codes; values and labels are compared within a section. ``None``: one section.
    level
        Of the interval.
    check_top
        So many genes of smallest p-value are checked by Moran spectral randomisation (Wagner & Dray 2015, triplets); where its p-value is above 0.05 the larger of both is reported.
    n_perms
        Randomisations.
    seed
        Of the randomisations.

    Returns
    -------
    SpatialTest

    Raises
    ------
    ValueError
        If shapes do not fit, a group has fewer than 3 spots, no section holds both groups, two spots lie on one
        another, or ``level``, ``check_top`` or ``n_perms`` is out of range.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> from he2gene_sc.stats import log_normalise, spatial_test
    >>> table = hg.datasets.toy()["table"]
    >>> left = table.obsm["spatial"][:, 0] < table.obsm["spatial"][:, 0].mean()
    >>> test = spatial_test(log_normalise(table.X), left, table.obsm["spatial"])
    >>> test.pvalues.shape == (table.n_vars,)
    True
    """
    values, group = np.asarray(values), np.asarray(group)
    xy, codes = _checked(values, group, xy, sections, level, check_top, n_perms)
    blocks = make_blocks(xy, codes, group)
    moments = _Moments.of(values, group, codes, blocks)
    variance, spread, total = _covariance_of(moments, blocks)

    from scipy import stats

    # a normal of uncertain variance looks like the t of that variance and that excess kurtosis: Student's without a field
    df = np.minimum(4 + 2 / spread, moments.n_free)
    error = np.sqrt(variance * moments.n_free / (moments.n_free - 2) * (df - 2) / df)
    scores = moments.effect / error
    reach = stats.t.ppf((1 + level) / 2, df) * error
    result = SpatialTest(
        effect=moments.effect,
        scores=scores,
        pvalues=2 * stats.t.sf(np.abs(scores), df),
        df=df,
        ci_low=moments.effect - reach,
        ci_high=moments.effect + reach,
        n_effective=1 + total / (variance * (moments.label @ moments.label)),
        pvalues_check=np.full(values.shape[1], np.nan),
    )
    return _check(result, moments, blocks, check_top, n_perms, seed)


def wilcoxon_test(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank-sum test of each gene as if spots were independent, with the correction for ties.

    Equal to scanpy's ``rank_genes_groups(method="wilcoxon", tie_correct=True)`` of the group against the others. Spots
    are neighbours, so its p-values are far too small; it is here to show by how much.

    Parameters
    ----------
    values
        ``(n, g)``.
    group
        ``(n,)`` bool.

    Returns
    -------
    scores, pvalues
        ``(g,)`` standardised rank sums and two-sided p-values; NaN for a constant gene.
    """
    from scipy import stats

    values, group = np.asarray(values), np.asarray(group, bool)
    n, g = values.shape
    inside = int(group.sum())
    scores = np.empty(g)
    for start in range(0, g, _CHUNK):
        ranks = stats.rankdata(values[:, start : start + _CHUNK], axis=0) - (n + 1) / 2
        # the variance of the ranks themselves holds the correction for ties
        variance = np.square(ranks).sum(0) * inside * (n - inside) / (n * (n - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[start : start + _CHUNK] = np.where(variance > 0, ranks[group].sum(0) / np.sqrt(variance), np.nan)
    return scores, 2 * stats.norm.sf(np.abs(scores))


@dataclass(frozen=True)
class _Moments:
    """What the test needs of all genes, in the basis of blocks."""

    effect: np.ndarray  # (g,)
    contrasts: np.ndarray  # (q, g) float32, residuals in the complement of sections and label, in units of `scale`
    inside: np.ndarray  # (g,) mean square of what blocks do not see, in units of `scale`
    scale: np.ndarray  # (g,) residual variance as if spots were independent; NaN where there is none
    label: np.ndarray  # (m,) label, centred within sections
    complement: np.ndarray  # (m, q)
    centred: np.ndarray  # (m, m) takes the section means off
    n_free: int  # residual degrees of freedom of the spots

    @classmethod
    def of(cls, values: np.ndarray, group: np.ndarray, codes: np.ndarray, blocks: Blocks) -> _Moments:
        from scipy import linalg

        n, g = values.shape
        sections = (codes[:, None] == np.unique(codes)).astype(float)
        means = sections / sections.sum(0)
        label = group - sections @ (means.T @ group)
        in_blocks = blocks.project(np.column_stack([sections / np.sqrt(sections.sum(0)), label]))
        complement = linalg.qr(in_blocks)[0][:, in_blocks.shape[1] :]
        n_free = n - in_blocks.shape[1]
        effect, scale, inside = np.empty(g), np.empty(g), np.zeros(g)
        contrasts = np.empty((complement.shape[1], g), np.float32)
        for start in range(0, g, _CHUNK):
            part = slice(start, start + _CHUNK)
            chunk = values[:, part].astype(np.float64)
            size = np.abs(chunk).max(0)
            chunk -= sections @ (means.T @ chunk)
            effect[part] = label @ chunk / (label @ label)
            chunk -= np.outer(label, effect[part])
            energy = np.einsum("ij,ij->j", chunk, chunk)
            varies = np.isfinite(energy) & (energy > (1e-7 * size) ** 2 * n)
            chunk[:, ~varies] = 0
            scale[part] = np.where(varies, energy, np.nan) / n_free
            chunk = complement.T @ blocks.project(chunk)
            unit = np.where(varies, np.sqrt(energy / n_free), 1)
            contrasts[:, part] = chunk / unit
            if n > len(blocks.size):
                rest = np.maximum(n_free - np.einsum("ij,ij->j", chunk / unit, chunk / unit), 0)
                inside[part] = rest / (n - len(blocks.size))
        return cls(effect, contrasts, inside, scale, in_blocks[:, -1], complement, _centring(in_blocks[:, :-1]), n_free)


def _centring(sections: np.ndarray) -> np.ndarray:
    return np.eye(len(sections)) - sections @ sections.T


def _covariance_of(moments: _Moments, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average over the grid of covariances, weighted by restricted likelihood.

    Returns
    -------
    variance, spread, total
        ``(g,)``: variance of the effect, squared coefficient of variation of that variance, and the expected sum of
        squares about the section means (the trace of the centred covariance).
    """
    n, m = len(blocks.of_spot), len(blocks.size)
    n_inside = n - m
    n_sections = n - moments.n_free - 1
    # energy within blocks counts as no more than blocks do: it is thousands of spots of short range only
    weight = min(n_inside, m)
    n_terms = moments.contrasts.shape[0] + weight
    coefficient = moments.label / (moments.label @ moments.label)
    white = coefficient @ coefficient
    noise = 1 / (1 + ODDS)
    inside = (moments.inside + _JITTER).astype(np.float32)
    g = len(moments.effect)

    best = np.full(g, -np.inf, np.float32)
    sums = np.zeros((4, g))  # of weights, variances, their squares, and traces

    def add(likelihood: np.ndarray, variance: np.ndarray, trace: np.ndarray, part: slice) -> None:
        top = np.maximum(best[part], likelihood.max(0))
        sums[:, part] *= np.exp(best[part] - top)
        best[part] = top
        weights = np.exp(likelihood - top)
        sums[0, part] += weights.sum(0)
        sums[3, part] += (weights * trace).sum(0)
        weights *= variance
        sums[1, part] += weights.sum(0)
        weights *= variance
        sums[2, part] += weights.sum(0)

    everything = slice(0, g)
    level = np.full((1, g), -0.5 * n_terms * np.log1p(_JITTER))
    add(level, np.full((1, g), white), np.full((1, g), float(n - n_sections)), everything)
    for correlation in correlations(blocks):
        eigenvalues, vectors = np.linalg.eigh(moments.complement.T @ correlation @ moments.complement)
        spectrum = np.outer(1 - noise, np.maximum(eigenvalues, 0)) + noise[:, None]
        rest = max(n - np.trace(correlation), 0) / n_inside if n_inside else 1.0
        spectrum_inside = ((1 - noise) * rest + noise)[:, None]
        log_det = 0.5 * (np.log(spectrum).sum(1, keepdims=True) + weight * np.log(spectrum_inside))
        own = ((1 - noise) * (coefficient @ correlation @ coefficient) + noise * white)[:, None]
        # the trace of the centred correlation: all n spots have 1, less what the section means take
        taken = np.trace(correlation) - np.einsum("ij,ji->", moments.centred, correlation)
        trace = ((1 - noise) * (n - taken) + noise * (n - n_sections))[:, None]
        inverse, vectors, log_det, own, trace = (
            array.astype(np.float32) for array in (1 / spectrum, vectors.T, log_det, own, trace)
        )
        for start in range(0, g, _CHUNK):
            part = slice(start, start + _CHUNK)
            power = np.square(vectors @ moments.contrasts[:, part]) + np.float32(_JITTER)
            sigma2 = inverse @ power
            if n_inside:
                sigma2 += (weight / spectrum_inside).astype(np.float32) * inside[part]
            sigma2 /= np.float32(n_terms)
            likelihood = np.log(sigma2) * np.float32(-0.5 * n_terms) - log_det
            variance = np.maximum(sigma2 * own - np.float32(_JITTER * white), np.float32(1e-9 * white))
            add(likelihood, variance, sigma2 * trace - np.float32(_JITTER * (n - n_sections)), part)
    weights, variance, square, total = sums
    variance, square, total = variance / weights, square / weights, total / weights
    spread = np.maximum(square / variance**2 - 1, 0) + 2 / moments.n_free
    return variance * moments.scale, spread, total * moments.scale


def _check(
    result: SpatialTest, moments: _Moments, blocks: Blocks, check_top: int, n_perms: int, seed: int
) -> SpatialTest:
    """Randomise the top genes within triplets of Moran eigenvectors; raise the p-values that do not hold."""
    genes = np.argsort(result.pvalues, kind="stable")[:check_top]
    genes = genes[np.isfinite(result.pvalues[genes])]
    if not len(genes):
        return result
    nearest = next(correlations(blocks))
    vectors = np.linalg.eigh(moments.centred @ nearest @ moments.centred)[1][:, ::-1]
    # the last ones are the section means
    vectors = vectors[:, : moments.complement.shape[1] + 1]
    triplets = np.arange(vectors.shape[1]) // 3
    unit = np.sqrt(moments.scale[genes])
    values = moments.complement @ moments.contrasts[:, genes] + np.outer(moments.label, result.effect[genes] / unit)
    share = np.bincount(triplets, np.square(vectors.T @ moments.label))
    power = np.stack([np.bincount(triplets, column) for column in np.square(vectors.T @ values).T], axis=1)
    # turning a triplet at random leaves its energy and draws the cosine of its angle to the label's
    dimension = np.bincount(triplets)
    directions = np.random.default_rng(seed).standard_normal((n_perms, len(dimension), 3))
    directions[:, -1, dimension[-1] :] = 0
    cosine = directions[:, :, 0] / np.linalg.norm(directions, axis=2)
    drawn = np.abs(cosine @ np.sqrt(share[:, None] * power))
    observed = np.abs(result.effect[genes]) / unit * (moments.label @ moments.label)
    checked = (1 + (drawn >= observed).sum(0)) / (n_perms + 1)
    pvalues, pvalues_check = result.pvalues.copy(), result.pvalues_check.copy()
    pvalues_check[genes] = checked
    pvalues[genes] = np.where(checked > _CHECK_LEVEL, np.maximum(pvalues[genes], checked), pvalues[genes])
    return replace(result, pvalues=pvalues, pvalues_check=pvalues_check)


def _checked(values, group, xy, sections, level, check_top, n_perms) -> tuple[np.ndarray, np.ndarray]:
    """Return positions as float and sections as integer codes, or say which argument is wrong."""
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
            "`sections`: none holds spots of the group and of the reference, valid: at least one that does"
        )
    if len(np.unique(np.column_stack([codes, xy]), axis=0)) < n:
        raise ValueError("`xy` has spots of one section at the same position; each position may occur once")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, found {level}")
    if check_top < 0 or n_perms < 1:
        raise ValueError(f"`check_top` must be at least 0 and `n_perms` 1, found {check_top} and {n_perms}")
    return xy, codes
