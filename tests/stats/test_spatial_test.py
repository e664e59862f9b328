"""The spatial test against formulas, simulations and invariances; the Wilcoxon test against scanpy."""

import anndata as ad
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from he2gene_sc.stats import _spatial_fit, _spatial_moments, _spatial_test, spatial_test, wilcoxon_test
from he2gene_sc.stats._covariance import _Distances, _Parts, make_blocks

pytestmark = pytest.mark.slow

GRID = np.argwhere(np.ones((12, 14))).astype(float)
DISTANCE = cdist(GRID, GRID)
BLOB = np.linalg.norm(GRID - [3, 4], axis=1) < 3.5


def field(covariance, genes, seed=0):
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng(seed).standard_normal((len(covariance), genes))
    return vectors @ (np.sqrt(np.maximum(values, 0))[:, None] * noise)


@pytest.fixture(scope="module")
def smooth():
    return field(np.exp(-DISTANCE / 3), 300)


def assert_same(a, b, rtol=1e-4):
    for name in ("effect", "scores", "pvalues", "df", "ci_low", "ci_high", "n_effective"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-6, err_msg=name)


def test_without_a_field_and_with_equal_variances_it_is_students_t(monkeypatch):
    monkeypatch.setattr(_spatial_fit, "correlations", lambda blocks: iter(()))
    monkeypatch.setattr(_spatial_fit, "_ratios", lambda moments: np.zeros((1, len(moments.effect))))
    values = np.random.default_rng(0).standard_normal((len(GRID), 20))
    test = spatial_test(values, BLOB, GRID, check_top=0)
    student = stats.ttest_ind(values[BLOB], values[~BLOB])
    np.testing.assert_allclose(test.scores, student.statistic, rtol=1e-6)
    np.testing.assert_allclose(test.pvalues, student.pvalue, rtol=1e-6)
    interval = student.confidence_interval(0.95)
    np.testing.assert_allclose(np.stack([test.ci_low, test.ci_high]), np.stack([interval.low, interval.high]))
    np.testing.assert_allclose(test.n_effective, len(GRID))


def test_independent_spots_with_scattered_labels_are_close_to_students_t():
    rng = np.random.default_rng(0)
    values, group = rng.standard_normal((len(GRID), 200)), rng.random(len(GRID)) < 0.3
    test, student = spatial_test(values, group, GRID, check_top=0), stats.ttest_ind(values[group], values[~group])
    assert 0.9 < np.median(test.scores / student.statistic) < 1.05
    assert np.median(test.n_effective) > 0.85 * len(GRID)


def test_effective_size_equals_dutilleul_for_a_known_covariance(monkeypatch):
    sigma = np.exp(-DISTANCE / 3)
    monkeypatch.setattr(_spatial_fit, "correlations", lambda blocks: iter([sigma]))
    monkeypatch.setattr(_spatial_fit, "ODDS", np.array([1e9]))
    monkeypatch.setattr(_spatial_fit, "JITTER", 0.0)
    monkeypatch.setattr(_spatial_fit, "_ratios", lambda moments: np.zeros((1, len(moments.effect))))
    test = spatial_test(field(sigma, 10), BLOB, GRID, check_top=0)
    n = len(GRID)
    b = (np.eye(n) - np.ones((n, n)) / n) / n
    label = (BLOB - BLOB.mean())[:, None]
    sigma_x = label @ label.T
    variance_of_r = np.trace(b @ sigma_x @ b @ sigma) / (np.trace(b @ sigma_x) * np.trace(b @ sigma))
    np.testing.assert_allclose(test.n_effective, 1 + 1 / variance_of_r, rtol=1e-3)


@pytest.mark.parametrize(
    ("power", "reach", "layout"),
    [(1, 0.3, "blob"), (1, 1.5, "scattered"), (1, 3.5, "half"), (2, 1.5, "blob"), (2, 3.5, "half"), (2, 3.5, "blob")],
)
def test_error_rate_is_nominal_for_every_range(power, reach, layout):
    group = {"blob": BLOB, "half": GRID[:, 1] < 7, "scattered": np.random.default_rng(1).random(len(GRID)) < 0.1}[
        layout
    ]
    values = field(np.exp(-((DISTANCE / reach) ** power)), 400)
    # 400 genes: 7 % and 1.3 standard errors
    assert np.mean(spatial_test(values, group, GRID, check_top=0).pvalues < 0.05) <= 0.086


def stretched(ratio, degrees, reach=4.0):
    """Covariance of a smooth field (Matérn 3/2) that is longer in one direction."""
    turn = np.radians(degrees)
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = GRID @ axes / np.sqrt([ratio, 1 / ratio]) / reach
    distance = np.sqrt(3) * cdist(points, points)
    return (1 + distance) * np.exp(-distance)


@pytest.mark.parametrize(("ratio", "degrees", "layout"), [(3, 0, "rim"), (5, 45, "rim"), (5, 90, "half")])
def test_error_rate_is_nominal_in_smooth_anisotropic_fields(ratio, degrees, layout):
    away = np.linalg.norm((GRID - GRID.mean(0)) / np.ptp(GRID, axis=0), axis=1)
    group = away > np.quantile(away, 0.7) if layout == "rim" else GRID[:, 1] < 7
    test = spatial_test(field(stretched(ratio, degrees), 200), group, GRID, check_top=0)
    assert np.mean(test.pvalues < 0.05) <= 0.06


# ------------------------------------------------------------------------------------------------ covariates

DEPTH = (BLOB + np.random.default_rng(2).normal(0, 1, len(GRID)))[:, None]


def test_a_covariate_that_differs_between_groups_is_not_a_difference(smooth):
    values = 0.3 * smooth[:, :100] + field(np.eye(len(GRID)), 100, 1)
    assert np.mean(spatial_test(values + DEPTH, BLOB, GRID, check_top=0).pvalues < 0.05) > 0.5
    test = spatial_test(values + DEPTH, BLOB, GRID, covariates=DEPTH)
    assert np.mean(test.pvalues < 0.05) <= 0.07
    assert_same(test, spatial_test(values, BLOB, GRID, covariates=DEPTH), rtol=1e-3)


def test_effects_at_equal_covariates_equal_least_squares(monkeypatch):
    monkeypatch.setattr(_spatial_fit, "correlations", lambda blocks: iter(()))
    monkeypatch.setattr(_spatial_fit, "_ratios", lambda moments: np.zeros((1, len(moments.effect))))
    values = np.random.default_rng(0).standard_normal((len(GRID), 20)) + DEPTH + BLOB[:, None]
    test = spatial_test(values, BLOB, GRID, covariates=DEPTH, check_top=0)
    design = np.column_stack([BLOB, np.ones(len(GRID)), DEPTH])
    fit = np.linalg.lstsq(design, values)[0]
    np.testing.assert_allclose(test.effect, fit[0])
    error = np.sqrt(np.square(values - design @ fit).sum(0) / (len(GRID) - 3) * np.linalg.inv(design.T @ design)[0, 0])
    np.testing.assert_allclose(test.effect / test.scores, error, rtol=0.03)


def test_covariates_in_blocks_give_nearly_the_result_of_spots(monkeypatch, smooth):
    values, group = smooth[:, :60] + 0.5 * DEPTH, BLOB
    exact = spatial_test(values, group, GRID, covariates=DEPTH, check_top=0)
    monkeypatch.setattr(_spatial_test, "make_blocks", lambda *args: make_blocks(*args, max_blocks=80))
    coarse = spatial_test(values, group, GRID, covariates=DEPTH, check_top=0)
    np.testing.assert_allclose(coarse.effect, exact.effect)
    assert 0.85 < np.median(coarse.scores / exact.scores) < 1.15


def test_constant_covariates_change_nothing(smooth):
    values = smooth[:, :10]
    constant = np.column_stack([np.ones(len(GRID)), np.zeros(len(GRID))])
    assert_same(
        spatial_test(values, BLOB, GRID, covariates=constant, check_top=0),
        spatial_test(values, BLOB, GRID, check_top=0),
        rtol=1e-12,
    )


@pytest.mark.parametrize("reach", [0.01, 2])
@pytest.mark.parametrize("layout", ["blob", "scattered"])
def test_error_rate_is_nominal_if_a_group_has_twice_the_sd(reach, layout):
    group = BLOB if layout == "blob" else np.random.default_rng(1).random(len(GRID)) < 0.25
    values = field(np.exp(-DISTANCE / reach), 600) * np.where(group, 2, 1)[:, None]
    assert np.mean(spatial_test(values, group, GRID, check_top=0).pvalues < 0.05) <= 0.086


def test_without_a_field_it_is_close_to_welchs_t(monkeypatch):
    monkeypatch.setattr(_spatial_fit, "correlations", lambda blocks: iter(()))
    values = np.random.default_rng(0).standard_normal((len(GRID), 200)) * np.where(BLOB, 3, 1)[:, None]
    test = spatial_test(values, BLOB, GRID, check_top=0)
    welch = stats.ttest_ind(values[BLOB], values[~BLOB], equal_var=False)
    assert 0.95 < np.median(test.scores / welch.statistic) < 1.05
    assert 0.6 < np.median(test.df) / np.median(welch.df) < 1.5


def test_equal_variances_keep_their_power():
    values = np.random.default_rng(0).standard_normal((len(GRID), 200)) + BLOB[:, None]
    assert np.mean(spatial_test(values, BLOB, GRID, check_top=0).pvalues < 0.05) > 0.9


@pytest.mark.parametrize(
    ("layout", "reach"), [("core", 4), ("core", 15), ("ring", 4), ("small core", 4), ("small core", 15)]
)
def test_error_rate_is_nominal_in_smooth_fields_around_a_core(reach, layout):
    away = np.linalg.norm(GRID - GRID.mean(0), axis=1)
    group = {"core": away < np.quantile(away, 0.4), "ring": away > np.quantile(away, 0.6)}.get(layout)
    group = away < np.quantile(away, 0.1) if group is None else group
    values = field(np.exp(-((DISTANCE / reach) ** 2)), 300)
    assert np.mean(spatial_test(values, group, GRID, check_top=0).pvalues < 0.05) <= 0.08


@pytest.mark.parametrize("ratio", [10, 100])
def test_a_group_can_have_a_much_larger_sd(ratio):
    values = np.random.default_rng(0).standard_normal((len(GRID), 400)) * np.where(BLOB, ratio, 1)[:, None]
    test = spatial_test(values, BLOB, GRID, check_top=0)
    assert np.mean(test.pvalues < 0.05) <= 0.08
    welch = stats.ttest_ind(values[BLOB], values[~BLOB], equal_var=False)
    assert np.median(np.abs(test.scores)) < 1.2 * np.median(np.abs(welch.statistic))
    assert (test.n_effective <= len(GRID)).all()


def test_a_gene_that_is_0_outside_the_group_has_the_variance_of_the_group():
    values = np.random.default_rng(0).normal(3, 1, (len(GRID), 50)) * BLOB[:, None]
    test = spatial_test(values, BLOB, GRID, check_top=0)
    welch = stats.ttest_ind(values[BLOB], values[~BLOB], equal_var=False)
    assert np.median(test.scores) < 1.1 * np.median(welch.statistic)


def test_check_of_several_sections_has_the_error_rate_of_one():
    sections = GRID[:, 0].astype(int) // 3
    group = np.random.default_rng(0).random(len(GRID)) < np.array([0.1, 0.3, 0.5, 0.9])[sections]
    values = np.zeros((len(GRID), 300))
    for code in range(4):
        part = sections == code
        values[part] = field(np.exp(-((DISTANCE[np.ix_(part, part)] / 3) ** 2)), 300, seed=code)
    test = spatial_test(values, group, GRID, sections, check_top=300)
    assert np.mean(test.pvalues_check < 0.05) <= 0.09


def test_too_few_spots_for_their_sections_raise():
    group, sections = np.arange(7) < 3, np.array([0, 1, 2, 0, 1, 2, 2])
    with pytest.raises(ValueError, match="`sections`: 7 spots in 6 groups of a section leave 1 degrees"):
        spatial_test(np.ones((7, 2)), group, GRID[:7], sections)


def test_a_test_of_independent_spots_rejects_too_often(smooth):
    assert np.mean(wilcoxon_test(smooth, BLOB)[1] < 0.05) > 0.3


def test_interval_covers_the_planted_effect(smooth):
    test = spatial_test(smooth + 3 * BLOB[:, None], BLOB, GRID, check_top=0)
    covered = (test.ci_low < 3) & (test.ci_high > 3)
    assert covered.mean() > 0.93
    assert np.mean(test.pvalues < 0.05) > 0.8


def test_interval_and_pvalue_agree(smooth):
    test = spatial_test(smooth + BLOB[:, None], BLOB, GRID, level=0.9, check_top=0)
    np.testing.assert_array_equal(test.pvalues < 0.1, (test.ci_low > 0) | (test.ci_high < 0))


def test_a_longer_range_gives_fewer_effective_spots():
    sizes = [
        np.median(spatial_test(field(np.exp(-DISTANCE / reach), 20), BLOB, GRID, check_top=0).n_effective)
        for reach in (0.2, 1, 4)
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 1


def test_order_unit_position_and_scale_do_not_matter(smooth):
    values = smooth[:, :10]
    test = spatial_test(values, BLOB, GRID, check_top=0)
    order = np.random.default_rng(0).permutation(len(GRID))
    assert_same(test, spatial_test(values[order], BLOB[order], GRID[order], check_top=0))
    assert_same(test, spatial_test(values + 5, BLOB, 200 * GRID - 1e4, check_top=0))
    np.testing.assert_allclose(test.pvalues, spatial_test(1e-4 * values, BLOB, GRID, check_top=0).pvalues, rtol=1e-4)


def test_swapped_groups_swap_the_sign(smooth):
    a, b = (spatial_test(smooth[:, :20], group, GRID, check_top=0) for group in (BLOB, ~BLOB))
    np.testing.assert_allclose(a.effect, -b.effect)
    np.testing.assert_allclose(a.pvalues, b.pvalues, rtol=1e-4)


def test_the_mean_of_a_section_does_not_matter(smooth):
    values, sections = smooth[:, :10], np.where(GRID[:, 1] < 7, "a", "b")
    shifted = values + 10 * (sections == "b")[:, None]
    group = (GRID[:, 0] < 5) ^ (GRID[:, 1] == 2)
    assert_same(spatial_test(values, group, GRID, sections), spatial_test(shifted, group, GRID, sections), rtol=1e-3)
    assert_same(
        spatial_test(values, group, GRID, sections),
        spatial_test(values, group, GRID + 1000 * (sections == "b")[:, None], sections),
    )


def test_error_rate_is_nominal_in_two_sections():
    sections = np.repeat([0, 1], len(GRID))
    values = np.vstack([field(np.exp(-DISTANCE / 3), 200, seed) for seed in (1, 2)])
    group = np.concatenate([BLOB, GRID[:, 0] < 6])
    assert np.mean(spatial_test(values, group, np.vstack([GRID, GRID]), sections).pvalues < 0.05) <= 0.09


def test_sections_of_one_sample_count_as_one_field(smooth):
    # Serial sections share nearly one field: without `samples`, 12 and 13 % of such genes have p < .05.
    serial, sections = np.vstack([smooth, smooth]), np.repeat([0, 1], len(GRID))
    group, xy = np.tile(BLOB, 2), np.vstack([GRID, GRID])
    one = spatial_test(smooth, BLOB, GRID, check_top=0)
    both = spatial_test(serial, group, xy, sections, samples=np.zeros(len(xy)), check_top=0)
    apart = spatial_test(serial, group, xy, sections, samples=sections, check_top=0)
    assert np.median(both.scores / one.scores) < 1.1
    assert np.median(both.n_effective) < 1.25 * np.median(one.n_effective)
    assert_same(apart, spatial_test(serial, group, xy, sections, check_top=0))


def test_noise_is_independent_between_sections_of_one_sample():
    values = np.random.default_rng(0).standard_normal((2 * len(GRID), 100))
    sections, xy = np.repeat([0, 1], len(GRID)), np.vstack([GRID, GRID])
    group = np.random.default_rng(1).random(len(xy)) < 0.3
    plain, one = (
        spatial_test(values, group, xy, sections, samples=samples, check_top=0) for samples in (None, np.zeros(len(xy)))
    )
    assert np.median(one.scores / plain.scores) > 0.9


def test_blocks_preserve_label_and_covariance():
    blocks = make_blocks(GRID, np.zeros(len(GRID), int), BLOB, max_blocks=60)
    assert len(blocks.size) == 60
    assert blocks.size.sum() == len(GRID)
    label = (BLOB - BLOB.mean())[:, None]
    assert np.isclose(np.square(blocks.project(label)).sum(), np.square(label).sum())
    basis = (blocks.of_spot[:, None] == np.arange(60)) / np.sqrt(blocks.size)
    found = _Distances(blocks, _Parts(blocks), np.eye(2)).correlation("exponential", 3)
    exact = basis.T @ np.exp(-DISTANCE / 3) @ basis
    np.testing.assert_allclose(found, exact, atol=3e-3)
    np.testing.assert_allclose(np.diag(found), np.diag(exact), atol=1e-10)


@pytest.mark.slow
def test_error_rate_is_nominal_in_blocks_of_an_anisotropic_field(monkeypatch):
    """Ten spots per block. With four representative spots per block, 11 % of p-values were below .05."""
    rows, columns = np.divmod(np.arange(1600), 40)
    xy = np.column_stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)])
    centred = (xy - xy.mean(0)) / np.ptp(xy, axis=0)
    away = np.linalg.norm(centred, axis=1)
    turn = np.array([[np.cos(1.05), -np.sin(1.05)], [np.sin(1.05), np.cos(1.05)]])
    points = xy @ turn / np.sqrt([5, 0.2]) / 25
    distance = np.sqrt(3) * np.linalg.norm(points[:, None] - points, axis=2)
    values = field((1 + distance) * np.exp(-distance), 300, 1)
    monkeypatch.setattr(_spatial_test, "make_blocks", lambda *args: make_blocks(*args, max_blocks=160))
    pvalues = spatial_test(values, away > np.quantile(away, 0.7), xy, check_top=0).pvalues
    assert np.mean(pvalues < 0.05) <= 0.07
    assert np.mean(pvalues < 0.001) <= 0.01


def test_blocks_give_nearly_the_exact_test(monkeypatch, smooth):
    values = smooth[:, :100] + 0.5 * field(np.eye(len(GRID)), 100, 1)
    exact = spatial_test(values, BLOB, GRID, check_top=0)
    monkeypatch.setattr(_spatial_test, "make_blocks", lambda *args: make_blocks(*args, max_blocks=80))
    coarse = spatial_test(values, BLOB, GRID, check_top=0)
    np.testing.assert_allclose(coarse.effect, exact.effect)
    assert 0.85 < np.median(coarse.scores / exact.scores) < 1.15
    assert np.corrcoef(coarse.scores, exact.scores)[0, 1] > 0.97


def test_check_only_increases_pvalues_of_the_top_genes(smooth):
    smooth = smooth[:, :150]
    plain = spatial_test(smooth, BLOB, GRID, check_top=0)
    checked = spatial_test(smooth, BLOB, GRID, check_top=25)
    assert np.isnan(plain.pvalues_check).all()
    done = np.isfinite(checked.pvalues_check)
    np.testing.assert_array_equal(np.flatnonzero(done), np.sort(np.argsort(plain.pvalues, kind="stable")[:25]))
    raised = done & (checked.pvalues_check > 0.05)
    assert 0 < raised.sum() < 25
    np.testing.assert_array_equal(checked.pvalues[~raised], plain.pvalues[~raised])
    assert (checked.pvalues[raised] >= checked.pvalues_check[raised]).all()
    np.testing.assert_array_equal(checked.pvalues, spatial_test(smooth, BLOB, GRID, check_top=25).pvalues)


def test_check_confirms_a_planted_effect_but_not_noise():
    noise = field(np.eye(len(GRID)), 200)
    assert np.mean(spatial_test(noise, BLOB, GRID, check_top=200).pvalues_check < 0.05) < 0.1
    assert np.mean(spatial_test(noise + BLOB[:, None], BLOB, GRID, check_top=200).pvalues_check < 0.05) > 0.9


def test_a_constant_or_non_finite_gene_has_no_pvalue(smooth):
    values = smooth[:, :4].astype(np.float32)
    values[:, 1], values[3, 2] = 0.1, np.nan
    test, naive = spatial_test(values, BLOB, GRID), wilcoxon_test(values[:, :2], BLOB)
    np.testing.assert_array_equal(np.isnan(test.pvalues), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(naive[1]), [False, True])


def test_wilcoxon_equals_scanpy_and_scipy():
    import scanpy as sc

    values = np.random.default_rng(0).poisson(0.7, (len(GRID), 30)).astype(float) + 0.5 * BLOB[:, None]
    scores, pvalues = wilcoxon_test(values, BLOB)
    scipys = stats.mannwhitneyu(values[BLOB], values[~BLOB], use_continuity=False, method="asymptotic")
    np.testing.assert_allclose(pvalues, scipys.pvalue)
    table = ad.AnnData(values, obs={"group": np.where(BLOB, "in", "out")})
    sc.tl.rank_genes_groups(table, "group", groups=["in"], method="wilcoxon", tie_correct=True)
    ranked = sc.get.rank_genes_groups_df(table, "in").set_index("names").loc[table.var_names]
    np.testing.assert_allclose(scores, ranked["scores"], rtol=1e-5)
    np.testing.assert_allclose(pvalues, ranked["pvals"], rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"values": np.zeros(len(GRID))}, "`values`"),
        ({"group": BLOB.astype(int)}, "`group`"),
        ({"group": BLOB[1:]}, "`group`"),
        ({"group": np.arange(len(GRID)) < 2}, "`group`"),
        ({"group": np.arange(len(GRID)) > 1}, "`group`"),
        ({"xy": GRID[:, :1]}, "`xy`"),
        ({"xy": np.where(GRID == 0, np.nan, GRID)}, "`xy`"),
        ({"xy": np.maximum(GRID, 1)}, "`xy`"),
        ({"sections": np.zeros(3)}, "`sections`"),
        ({"covariates": np.ones(len(GRID))}, "`covariates`"),
        ({"covariates": BLOB[:, None].astype(float)}, "separate the group"),
        ({"sections": BLOB}, "`sections`"),
        ({"samples": np.zeros(3)}, "`samples`"),
        ({"samples": BLOB}, "`samples`"),
        ({"level": 95}, "`level`"),
        ({"check_top": -1}, "`check_top`"),
        ({"n_perms": 0}, "`n_perms`"),
    ],
)
def test_errors_name_the_invalid_argument(changed, named):
    arguments = {"values": np.zeros((len(GRID), 2)), "group": BLOB, "xy": GRID} | changed
    with pytest.raises(ValueError, match=named):
        spatial_test(**arguments)


def test_the_chunk_size_does_not_change_the_result(monkeypatch):
    values = np.random.default_rng(0).standard_normal((len(GRID), 40))
    expected, ranks = spatial_test(values, BLOB, GRID, n_perms=19), wilcoxon_test(values, BLOB)
    monkeypatch.setattr(_spatial_moments, "_NUMBERS", 16 * 1024)  # three genes at once
    found = spatial_test(values, BLOB, GRID, n_perms=19)
    for name in ("effect", "pvalues", "ci_low", "n_effective"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)
    np.testing.assert_array_equal(wilcoxon_test(values, BLOB)[1], ranks[1])
