"""Metrics of hg.tl.evaluate against scipy, scikit-learn, scikit-image and squidpy."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, pearsonr, spearmanr
from skimage.metrics import structural_similarity
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

from he2gene_sc.stats import _baselines as baselines
from he2gene_sc.stats import (
    class_scores,
    moran,
    neighbour_weights,
    pearson,
    sd_ratio,
    slope,
    spearman,
    ssim_on_grid,
)
from he2gene_sc.stats._accuracy import column_blocks

few = settings(max_examples=30, deadline=None)


def pair(seed, n=40, g=4, ties=False):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, g))
    b = 0.5 * a + rng.normal(size=(n, g))
    return (np.round(a), np.round(b)) if ties else (a, b)


def lattice(shape=(9, 11), pitch=100.0):
    rows, columns = (x.ravel() for x in np.mgrid[: shape[0], : shape[1]])
    return np.column_stack([columns, rows]) * pitch, rows, columns


# Correlation and scale


@given(seed=st.integers(0, 10_000), n=st.integers(3, 60), ties=st.booleans())
@few
def test_correlations_and_scales_equal_scipy(seed, n, ties):
    a, b = pair(seed, n, ties=ties)
    for j in range(a.shape[1]):
        x, y = a[:, j], b[:, j]
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        column = slice(j, j + 1)
        assert pearson(a[:, column], b[:, column])[0] == pytest.approx(pearsonr(x, y).statistic, abs=1e-6)
        assert spearman(a[:, column], b[:, column])[0] == pytest.approx(spearmanr(x, y).statistic, abs=1e-6)
        assert slope(a[:, column], b[:, column])[0] == pytest.approx(linregress(x, y).slope, abs=1e-6)
        assert sd_ratio(a[:, column], b[:, column])[0] == pytest.approx(x.std() / y.std(), abs=1e-6)


def test_blocks_cover_every_column_once_and_do_not_change_the_result():
    assert [list(range(10))[block] for block in column_blocks((4, 10), size=16)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    a, b = pair(0, n=2000, g=600)
    np.testing.assert_allclose(pearson(a, b)[597:], [pearsonr(a[:, j], b[:, j]).statistic for j in (597, 598, 599)])
    np.testing.assert_allclose(spearman(a, b)[597:], [spearmanr(a[:, j], b[:, j]).statistic for j in (597, 598, 599)])


@pytest.mark.parametrize("metric", [pearson, spearman, slope, sd_ratio])
def test_a_gene_that_is_constant_or_has_nan_is_nan(metric):
    a, b = pair(1)
    a[:, 0] = 3.3
    b[:, 1] = -1.1
    b[5, 2] = np.nan
    assert np.isfinite(metric(a, b)).tolist() == [False, False, False, True]


@pytest.mark.parametrize("metric", [pearson, spearman, slope, sd_ratio])
def test_the_order_of_spots_does_not_matter(metric):
    a, b = pair(2)
    order = np.random.default_rng(0).permutation(len(a))
    np.testing.assert_allclose(metric(a[order], b[order]), metric(a, b), atol=1e-12)


# Maps


def squidpy_moran(values, weights):
    import squidpy as sq
    from anndata import AnnData

    table = AnnData(values)
    table.obsp["spatial_connectivities"] = scipy.sparse.csr_matrix(weights > 0, dtype=float)
    return sq.gr.spatial_autocorr(table, mode="moran", n_perms=None, copy=True, n_jobs=1).loc[table.var_names, "I"]


def test_moran_equals_squidpy_on_the_same_graph():
    rng = np.random.default_rng(0)
    xy = rng.random((60, 2)) * 800
    xy[-1] = 5000
    weights = neighbour_weights(xy, 100.0)
    values = np.column_stack([xy[:, 0], rng.normal(size=(60, 2))])
    np.testing.assert_allclose(moran(values, weights), squidpy_moran(values, weights), atol=1e-6)


def test_neighbours_are_eight_on_a_square_and_six_on_a_hexagonal_lattice():
    xy, rows, _ = lattice()
    assert np.median(np.diff(neighbour_weights(xy, 100.0).indptr)) == 8
    assert np.median(np.diff(neighbour_weights(xy, 100.0, 1.1).indptr)) == 4
    hexagonal = xy * [1, 0.866] + np.column_stack([rows % 2 * 50.0, 0 * rows])
    assert np.median(np.diff(neighbour_weights(hexagonal, 100.0).indptr)) == 6


def test_moran_of_a_constant_gene_or_without_neighbours_is_nan():
    xy, rows, _ = lattice()
    weights = neighbour_weights(xy, 100.0)
    assert np.isnan(moran(np.column_stack([rows, np.ones(len(xy))]), weights)).tolist() == [False, True]
    assert np.isnan(moran(rows[:, None], neighbour_weights(xy, 10.0))).all()


@pytest.mark.parametrize("shape", [(9, 11), (7, 7), (5, 12)])
def test_ssim_equals_scikit_image_on_a_full_grid(shape):
    a, b = pair(3, n=shape[0] * shape[1], g=3)
    a, b = a + 2, b + 2
    _, rows, columns = lattice(shape)
    found = ssim_on_grid(a, b, rows, columns)
    for j in range(3):
        span = max(a[:, j].max(), b[:, j].max()) - min(a[:, j].min(), b[:, j].min())
        x, y = a[:, j].reshape(shape), b[:, j].reshape(shape)
        _, maps = structural_similarity(x, y, data_range=span, full=True, win_size=min(7, shape[0]))
        assert found[j] == pytest.approx(maps.mean(), abs=1e-6)


def test_ssim_with_holes_uses_the_spots_in_each_window():
    rng = np.random.default_rng(4)
    _, rows, columns = lattice((10, 12))
    kept = rng.random(120) < 0.6
    rows, columns = rows[kept], columns[kept]
    a, b = pair(5, n=kept.sum(), g=1)
    span = max(a.max(), b.max()) - min(a.min(), b.min())
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    cells = {(r, c): i for i, (r, c) in enumerate(zip(rows, columns, strict=True))}

    def reflected(i, n):
        return -1 - i if i < 0 else 2 * n - 1 - i if i >= n else i

    expected = []
    for r, c in zip(rows, columns, strict=True):
        window = [
            cells[key]
            for i in range(r - 3, r + 4)
            for j in range(c - 3, c + 4)
            if (key := (reflected(i, 10), reflected(j, 12))) in cells
        ]
        if len(window) >= 7:
            x, y = a[window, 0], b[window, 0]
            (vx, cov), (_, vy) = np.cov(x, y)
            expected.append(
                (2 * x.mean() * y.mean() + c1)
                * (2 * cov + c2)
                / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (vx + vy + c2))
            )
    assert ssim_on_grid(a, b, rows, columns)[0] == pytest.approx(np.mean(expected), abs=1e-6)


def test_ssim_compresses_the_rows_of_a_hexagonal_lattice():
    _, rows, columns = lattice((8, 8))
    a, b = pair(6, n=64)
    np.testing.assert_allclose(
        ssim_on_grid(a, b, rows, 2 * columns + rows % 2), ssim_on_grid(a, b, rows, columns), atol=1e-12
    )


def test_ssim_is_one_for_equal_maps_and_nan_without_a_map():
    _, rows, columns = lattice()
    a, b = pair(7, n=len(rows))
    assert ssim_on_grid(a, a, rows, columns) == pytest.approx(np.ones(4))
    b[:, 1] = 2
    assert np.isnan(ssim_on_grid(a, b, rows, columns)).tolist() == [False, True, False, False]
    assert np.isnan(ssim_on_grid(a, b, np.zeros(len(a), int), np.arange(len(a)))).all()


# Classes


@given(seed=st.integers(0, 10_000))
@few
def test_class_scores_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    proba, codes = rng.dirichlet(np.ones(4), 50), rng.integers(0, 3, 50)
    found, scores = proba.argmax(1), class_scores(proba, codes)
    present = np.unique(codes)
    assert scores.balanced_accuracy == pytest.approx(
        confusion_matrix(codes, found, labels=range(4), normalize="true").diagonal()[present].mean(), abs=1e-6
    )
    assert scores.macro_f1 == pytest.approx(f1_score(codes, found, labels=present, average="macro"), abs=1e-6)
    for c in present:
        assert scores.auroc[c] == pytest.approx(roc_auc_score(codes == c, proba[:, c]), abs=1e-6)
    assert np.isnan([scores.auroc[3], scores.f1[3], scores.recall[3]]).all()
    assert scores.macro_auroc == pytest.approx(np.mean(scores.auroc[present]), abs=1e-6)
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(codes, found, labels=range(4)))
    known = np.isin(found, present)
    if known.all():
        assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(codes, found), abs=1e-6)


def test_a_single_class_has_no_auroc_and_no_labels_raise():
    scores = class_scores(np.tile([0.7, 0.3], (5, 1)), np.zeros(5, int))
    assert np.isnan([*scores.auroc, scores.macro_auroc]).all()
    assert scores.balanced_accuracy == 1
    with pytest.raises(ValueError, match="`codes` is empty"):
        class_scores(np.empty((0, 2)), np.empty(0, int))


# Baselines


def leave_one_out(values, predict):
    rows = np.arange(len(values))
    return np.array([predict(i, rows != i) for i in rows])


def test_leave_one_out_baselines_equal_plain_loops():
    rng = np.random.default_rng(0)
    values, x, codes = rng.normal(size=(25, 3)), rng.normal(size=25), rng.integers(-1, 3, 25)
    codes[4] = 7

    def of_class(i, rest):
        same = rest & (codes == codes[i]) & (codes[i] >= 0)
        return values[same if same.any() else rest].mean(0)

    def on_line(i, rest):
        return np.array([np.polyval(np.polyfit(x[rest], values[rest, j], 1), x[i]) for j in range(3)])

    xy, _, _ = lattice((5, 5))
    weights = neighbour_weights(xy, 100.0)

    def near(i, _):
        return values[weights[[i]].indices].mean(0)

    np.testing.assert_allclose(baselines.class_mean(values, codes).predicted, leave_one_out(values, of_class))
    np.testing.assert_allclose(baselines.line(values, x).predicted, leave_one_out(values, on_line))
    np.testing.assert_allclose(baselines.neighbours_mean(values, weights).predicted, leave_one_out(values, near))


def test_no_baseline_uses_the_spot_that_it_predicts():
    rng = np.random.default_rng(1)
    values, x, codes = rng.normal(size=(99, 2)), rng.normal(size=(99, 4)), rng.integers(0, 3, 99)
    xy, _, _ = lattice()
    weights, parts = neighbour_weights(xy, 100.0), baselines.tissue_parts(xy, 100.0)
    changed = values.copy()
    changed[17] += 100
    for baseline in (
        lambda v: baselines.class_mean(v, codes),
        lambda v: baselines.line(v, x[:, 0]),
        lambda v: baselines.neighbours_mean(v, weights),
        lambda v: baselines.ridge(v, x, parts),
    ):
        np.testing.assert_allclose(baseline(values).predicted[17], baseline(changed).predicted[17], atol=1e-8)
        assert not np.allclose(baseline(values).predicted, baseline(changed).predicted)


def shared(predicted, values):
    """Mean covariance over genes, as a share of its maximum."""
    cov = ((predicted - predicted.mean(0)) * (values - values.mean(0))).mean(0)
    return cov.mean() / (predicted.std(0) * values.std(0)).mean()


def test_uninformative_baselines_have_no_covariance_with_measured_values():
    rng = np.random.default_rng(2)
    values, codes, x = rng.normal(size=(99, 3000)), rng.integers(0, 3, 99), rng.normal(size=(99, 3))
    xy, _, _ = lattice()
    weights, parts = neighbour_weights(xy, 100.0), baselines.tissue_parts(xy, 100.0)
    for found in (
        baselines.class_mean(values, codes),
        baselines.line(values, x[:, 0]),
        baselines.neighbours_mean(values, weights),
        baselines.ridge(values, x, parts),
    ):
        assert abs(shared(found.comparable, values)) < 0.015
    # Without the corrected mean, an uninformative baseline would have a negative score.
    assert shared(baselines.line(values, x[:, 0]).predicted, values) < -0.05
    assert pearson(baselines.others_mean(values), values) == pytest.approx(-np.ones(3000))


def test_ridge_recovers_a_line_across_parts_of_the_slide():
    rng = np.random.default_rng(3)
    xy, _, _ = lattice((20, 20))
    parts = baselines.tissue_parts(xy, 100.0)
    assert np.bincount(parts).tolist() == [80] * 5
    assert len(np.unique(parts[(xy < 400).all(1)])) == 1
    x = rng.normal(size=(400, 3))
    values = x @ rng.normal(size=(3, 2)) + 5
    assert (pearson(baselines.ridge(values, x, parts).predicted, values) > 0.999).all()


def test_a_slide_with_one_square_has_two_parts_and_a_constant_line_is_the_mean():
    assert baselines.tissue_parts(np.zeros((5, 2)), 1.0).tolist() == [0, 0, 1, 1, 1]
    values = np.random.default_rng(4).normal(size=(9, 2))
    np.testing.assert_allclose(
        baselines.line(values, np.full(9, 3.0)).predicted, baselines.others_mean(values), atol=1e-12
    )
