"""``hg.tl.adapt`` and the functions that it is built on."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData

import he2gene_sc as hg
from he2gene_sc.stats import CANDIDATES, adapt, log_normalise, pearson, residual_quantiles
from he2gene_sc.stats._smoothers import kriging, matched_folds, ridge
from he2gene_sc.stats._stack import simplex_weights, stack
from he2gene_sc.stats._support import confirmed_share
from tests.helpers.objects import two_regions


def grid(rows, columns):
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2).astype(float)


def field(rng, xy, n, reach=2.0):
    """Return smooth fields of unit variance over the spots."""
    covariance = np.exp(-np.square(xy[:, None] - xy[None]).sum(-1) / (2 * reach**2))
    return np.linalg.cholesky(covariance + 1e-6 * np.eye(len(xy))) @ rng.normal(size=(len(xy), n))


def slide(seed, *, useful=1.0, spatial=1.0, noise=1.0, n_genes=60, shape=(14, 14)):
    """Return the truth of 60 genes, a prediction that explains part of it, and the measured values."""
    rng = np.random.default_rng(seed)
    xy = grid(*shape)
    explained = rng.normal(size=(len(xy), 3)) @ rng.normal(size=(3, n_genes)) / np.sqrt(3)
    unexplained = field(rng, xy, n_genes)
    truth = 5 + explained + spatial * unexplained
    predicted = 4 + useful * explained
    return xy, predicted.astype(np.float32), truth, (truth + noise * rng.normal(size=truth.shape)).astype(np.float32)


def error(values, truth, spots):
    return np.square(values[spots] - truth[spots]).mean()


# Functions


def test_kriging_equals_a_gaussian_process():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    rng = np.random.default_rng(0)
    known, wanted = rng.uniform(0, 8, (40, 2)), rng.uniform(0, 8, (15, 2))
    values = rng.normal(size=(40, 3))
    process = GaussianProcessRegressor(RBF(2.0), alpha=0.5, optimizer=None).fit(known, values)
    np.testing.assert_allclose(kriging(wanted, known, 2.0, 0.5) @ values, process.predict(wanted), atol=1e-8)


def test_far_measured_spots_hardly_matter_to_kriging():
    rng = np.random.default_rng(0)
    known = grid(16, 16)
    values = rng.normal(size=len(known))
    covariance = np.exp(-np.square(known[:, None] - known[None]).sum(-1) / 2)
    exact = covariance @ np.linalg.solve(covariance + np.eye(len(known)), values)
    np.testing.assert_allclose(kriging(known, known, 1.0, 1.0) @ values, exact, atol=0.02)


@pytest.mark.parametrize("n", [20, 200])
def test_ridge_equals_scikit_learn(n):
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    known, wanted, values = rng.normal(size=(n, 30)), rng.normal(size=(9, 30)), rng.normal(size=(n, 4))
    values -= values.mean(0)
    alpha = 0.3 * np.square(known - known.mean(0)).sum() / n
    expected = Ridge(alpha=alpha).fit(known, values).predict(wanted)
    np.testing.assert_allclose(ridge(wanted, known, 0.3)(values), expected, atol=1e-8)


def test_weights_on_the_simplex_equal_those_of_a_general_solver():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    for _ in range(5):
        e = rng.normal(size=(50, 4)) * [1, 1.2, 0.8, 2] + 0.7 * rng.normal(size=(50, 1))
        moments = e.T @ e / 50
        found = simplex_weights(moments, n_steps=500)
        best = minimize(
            lambda w, m=moments: w @ m @ w,
            np.full(4, 0.25),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_stacking_prefers_the_better_candidate_and_keeps_the_prediction_if_none_is_better():
    rng = np.random.default_rng(0)
    folds = np.arange(60) % 10
    errors = rng.normal(size=(5, 60, 40))
    errors[1:] += errors[0]
    errors[2] = 0.5 * errors[0]
    weights, left = stack(errors, folds)
    assert weights[:, 2].mean() > 0.6
    assert np.square(left).mean() < np.square(errors[0]).mean()
    np.testing.assert_allclose(weights.sum(1), 1)
    worse = np.stack([errors[0], *(errors[0] + rng.normal(size=(4, 60, 40)))])
    assert stack(worse, folds)[0][:, 0].mean() > 0.97


def test_folds_match_the_distance_of_the_unmeasured_spots():
    from scipy.spatial import cKDTree

    xy = grid(20, 20)

    def distance(fold, at):
        return np.mean([cKDTree(at[fold != f]).query(at[fold == f])[0].mean() for f in np.unique(fold)])

    scattered = np.random.default_rng(0).random(400) < 0.4
    half = xy[:, 0] < 8
    assert distance(matched_folds(xy, scattered), xy[scattered]) < 1.8
    assert distance(matched_folds(xy, half), xy[half]) > 2


@pytest.mark.parametrize("n", [10, 19, 60])
def test_quantiles_cover_new_residuals(n):
    rng = np.random.default_rng(n)
    seen, new = rng.normal(size=(n, 20_000)), rng.normal(size=20_000)
    low, high = residual_quantiles(seen, np.array([0.05, 0.95]))
    assert ((new >= low) & (new <= high)).mean() >= 0.895
    assert np.isfinite(high).all() == (n >= 19)


def test_quantiles_ignore_missing_residuals():
    residuals = np.column_stack([np.arange(9.0), np.arange(9.0), np.full(9, np.nan)])
    residuals[6:, 1] = np.nan
    found = residual_quantiles(residuals, np.array([0.2, 0.5, 0.8]))
    np.testing.assert_allclose(found[:, 0], [1, 4, 7])
    np.testing.assert_allclose(found[:, 1], [0, 2.5, 5])
    assert np.isnan(found[:, 2]).all()


# Simulations with a known answer


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.slow
def test_adapted_is_better_than_prediction_and_neighbours_if_both_are_informative(share):
    gains = []
    for seed in range(3):
        xy, predicted, truth, measured = slide(seed, noise=0.7)
        mask = np.random.default_rng(seed).random(len(xy)) < share
        found = adapt(predicted, np.where(mask[:, None], measured, np.nan), xy)
        level = measured[mask].mean(0) - predicted[mask].mean(0)
        neighbours = measured[mask].mean(0) + kriging(xy, xy[mask], 2.0, 0.5) @ (
            measured[mask] - measured[mask].mean(0)
        )
        gains.append(
            [
                error(other, truth, ~mask) - error(found.expression, truth, ~mask)
                for other in (predicted + level, neighbours)
            ]
        )
    assert (np.mean(gains, axis=0) > 0).all()


@pytest.mark.slow
def test_a_useless_prediction_is_replaced_by_the_neighbours():
    ratio = []
    for seed in range(3):
        xy, predicted, truth, measured = slide(seed, noise=0.5)
        rng = np.random.default_rng(seed)
        mask = rng.random(len(xy)) < 0.4
        useless = predicted[rng.permutation(len(xy))]
        found = adapt(useless, np.where(mask[:, None], measured, np.nan), xy)
        neighbours = measured[mask].mean(0) + kriging(xy, xy[mask], 2.0, 0.5) @ (
            measured[mask] - measured[mask].mean(0)
        )
        ratio.append(error(found.expression, truth, ~mask) / error(neighbours, truth, ~mask))
        assert found.weights[:, CANDIDATES.index("neighbours")].mean() > 0.4
    assert np.mean(ratio) < 1.1


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.slow
def test_a_perfect_prediction_is_not_changed(share):
    for seed in range(3):
        xy, predicted, _, measured = slide(seed, spatial=0.0)
        mask = np.random.default_rng(seed).random(len(xy)) < share
        found = adapt(predicted, np.where(mask[:, None], measured, np.nan), xy).expression
        shape = found - found.mean(0) - (predicted - predicted.mean(0))
        assert np.square(shape).mean() < 0.02 * predicted.var(0).mean()
        assert abs((found - predicted).mean() - 1) < 0.15


@pytest.mark.slow
def test_measured_genes_improve_other_genes_at_the_same_spots():
    rng = np.random.default_rng(0)
    xy = grid(12, 12)
    weight = rng.normal(size=(3, 80))
    seen, hidden = rng.normal(size=(2, len(xy), 3))
    predicted = (5 + seen @ weight).astype(np.float32)
    truth = 5 + (seen + hidden) @ weight
    measured = (truth + 0.5 * rng.normal(size=truth.shape)).astype(np.float32)
    chosen = rng.random(len(xy)) < 0.2
    measured[np.ix_(~chosen, np.arange(50, 80))] = np.nan
    nowhere = measured.copy()
    nowhere[:, 70:] = np.nan
    for given, genes in ((measured, slice(50, 80)), (nowhere, slice(70, 80))):
        found = adapt(predicted, given, xy)
        assert error(found.expression[:, genes], truth[:, genes], ~chosen) < 0.5 * error(
            predicted[:, genes], truth[:, genes], ~chosen
        )
    assert np.isnan(found.residuals[:, 70:]).all()
    assert np.isnan(found.weights[:, 70:]).all()


def test_neither_order_nor_place_nor_size_of_the_slide_matters():
    xy, predicted, _, measured = slide(0, n_genes=20, shape=(8, 8))
    mask = np.random.default_rng(0).random(len(xy)) < 0.5
    given = np.where(mask[:, None], measured, np.nan)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    found = adapt(predicted, given, xy)
    moved = adapt(predicted, given, 290 * xy @ turn + 1000)
    np.testing.assert_allclose(moved.expression, found.expression, atol=0.02)
    order = np.random.default_rng(1).permutation(20)
    other = adapt(predicted[:, order], given[:, order], xy)
    np.testing.assert_allclose(other.expression, found.expression[:, order], atol=1e-3)


def test_residuals_are_from_held_out_spots():
    xy, predicted, truth, measured = slide(0, noise=1.0)
    mask = np.random.default_rng(0).random(len(xy)) < 0.4
    found = adapt(predicted, np.where(mask[:, None], measured, np.nan), xy)
    assert np.isnan(found.residuals[~mask]).all()
    left = np.square(found.residuals[mask]).mean()
    assert left == pytest.approx(error(found.expression, measured, ~mask), rel=0.15)
    assert left > error(found.expression, measured, mask)


# Measured spots that do not represent the others


def biased(seed, n_genes=40):
    """Return a slide of 14 × 14 spots with predictions 0.6 too high in the right half, which is one class."""
    rng = np.random.default_rng(seed)
    xy = grid(14, 14)
    right = xy[:, 0] >= 7
    truth = 3 + 0.3 * field(rng, xy, n_genes) + np.outer(right, rng.normal(0, 0.5, n_genes))
    predicted = truth + 0.6 * right[:, None] + 0.3 * field(rng, xy, n_genes)
    return xy, right, predicted.astype(np.float32), truth, truth + rng.normal(size=truth.shape)


@pytest.mark.parametrize("classes", [True, False])
def test_a_correction_is_not_applied_to_a_class_without_measured_spots(classes):
    xy, right, predicted, truth, measured = biased(0)
    given = np.where(right[:, None], measured, np.nan)
    found = adapt(predicted, given, xy, classes=right.astype(int) if classes else None)
    assert error(found.expression, truth, ~right) <= 1.02 * error(predicted, truth, ~right)
    assert found.support[~right].max() < 0.5
    assert np.nanmax(found.reach) < 0.2


def test_few_spots_in_a_corner_do_no_harm_and_folds_leave_enough_of_them():
    ratios = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        xy = grid(14, 14)
        truth = 3 + 0.8 * field(rng, xy, 30, reach=4)
        predicted = (truth + 0.25 * field(rng, xy, 30, reach=4)).astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        corner = np.argsort(np.argsort(xy @ [np.cos(angle), np.sin(angle)])) < 12
        assert np.bincount(matched_folds(xy, corner)).max() <= 8
        measured = truth + rng.normal(size=truth.shape)
        found = adapt(predicted, np.where(corner[:, None], measured, np.nan), xy)
        ratios.append(error(found.expression, truth, ~corner) / error(predicted, truth, ~corner))
    assert np.mean(ratios) <= 1.02
    assert max(ratios) < 1.1


def test_folds_with_an_outlying_spot_keep_enough_training_spots():
    known = np.concatenate([grid(1, 11), [[40.0, 0.0]]])
    xy = np.concatenate([known, grid(1, 20) + [80.0, 0.0]])
    assert np.bincount(matched_folds(xy, np.arange(len(xy)) < 12)).max() <= 8


def test_the_share_of_a_correction_depends_on_the_agreement_of_tissue_blocks():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(4), 6)
    before = rng.normal(size=(24, 20))
    assert confirmed_share(1 + 0.1 * before, 0.1 * before, blocks, None)[0] > 0.9
    # Neighbouring blocks disagree, so 24 spots agree only by chance.
    swinging = np.array([2.0, -1.5, 1.5, -1.0])[blocks][:, None] + 0.1 * before
    assert confirmed_share(swinging, swinging - 1, blocks, None)[0] == 0
    share, by_class = confirmed_share(1 + 0.1 * before, 0.1 * before, blocks, (blocks > 1).astype(int))
    np.testing.assert_allclose(by_class, 1, atol=0.1)


def test_the_level_is_corrected_equally_at_all_other_spots():
    """If only half of them are represented, a partial correction would add a pattern that was not measured."""
    rng = np.random.default_rng(0)
    xy = grid(8, 20)
    truth = 4 + 0.3 * field(rng, xy, 30, reach=1)
    predicted = (truth - 1 + 0.1 * rng.normal(size=truth.shape)).astype(np.float32)
    near = xy[:, 0] < 10
    given = np.where(near[:, None], truth + 0.3 * rng.normal(size=truth.shape), np.nan)
    found = adapt(predicted, given, xy)
    assert 0.6 < found.support[~near].mean() < 0.97
    change = (found.expression - predicted)[~near].mean(1)
    assert np.ptp(change) < 0.2
    assert change.mean() > 0.3


def test_random_spots_represent_the_others_and_correct_their_offset():
    xy, _, predicted, truth, measured = biased(1)
    chosen = np.random.default_rng(0).permutation(len(xy))[:12]
    given = np.full(truth.shape, np.nan)
    given[chosen] = measured[chosen] - 1
    found = adapt(predicted, given, xy)
    rest = np.setdiff1d(np.arange(len(xy)), chosen)
    assert found.support[rest].mean() > 0.8
    assert error(found.expression, truth - 1, rest) < 0.3 * error(predicted, truth - 1, rest)


def test_a_class_with_correct_predictions_is_not_changed():
    xy, right, predicted, truth, measured = biased(2)
    mask = np.random.default_rng(0).random(len(xy)) < np.where(right, 0.8, 0.1)
    given = np.where(mask[:, None], measured, np.nan)
    without, found = (adapt(predicted, given, xy, classes=codes).expression for codes in (None, right.astype(int)))
    left = ~right & ~mask
    assert error(found, truth, left) <= 1.02 * error(predicted, truth, left)
    assert error(found, truth, left) <= error(without, truth, left)


# hg.tl.adapt


def test_unrepresented_spots_get_a_warning_and_no_gain():
    xy, right, predicted, _, measured = biased(0)
    obs = pd.DataFrame({"he2gene_annotation": pd.Categorical(np.where(right, "tumour", "stroma"))})
    made = AnnData(scipy.sparse.csr_matrix(predicted.shape), obs=obs.set_index(obs.index.astype(str)))
    made.obsm["spatial"] = xy
    made.layers["he2gene"] = predicted
    made.layers["measured"] = np.where(right[:, None], np.maximum(measured, 0), np.nan)
    with pytest.warns(UserWarning, match="do not represent 98 of 98 others, .* also of class 'stroma'"):
        hg.tl.adapt(made, "measured", measured_scale="log")
    assert np.nanmean(made.var["he2gene_adapted_gain"]) < 0.01
    assert made.obs["he2gene_adapted_support"].to_numpy()[~right].max() == 0
    np.testing.assert_array_equal(made.layers["he2gene_adapted"][~right], predicted[~right])
    assert made.uns["he2gene_adapted"]["support"] == [0.0]


@pytest.fixture
def table():
    """Return two sections of 7 × 7 spots with a prediction, as predict writes it."""
    rng = np.random.default_rng(0)
    xy = np.concatenate([grid(7, 7), grid(7, 7)]) * 100
    rates = np.exp(np.concatenate([field(rng, grid(7, 7), 12) for _ in range(2)]) * 0.5 + 2)
    made = AnnData(
        scipy.sparse.csr_matrix(rng.poisson(rates).astype(np.float32)),
        obs=pd.DataFrame({"section": ["a"] * 49 + ["b"] * 49}, index=[f"s{i}" for i in range(98)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )
    made.obsm["spatial"] = xy
    made.layers["he2gene"] = (log_normalise(rates) + rng.normal(0, 0.2, rates.shape)).astype(np.float32)
    made.layers["he2gene"][:, 11] = np.nan
    made.layers["he2gene"][5] = np.nan
    made.obs["seen"] = rng.random(98) < 0.5
    return made


def test_all_results_are_written(table):
    before = table.copy()
    hg.tl.adapt(table, "seen")
    adapted, record = table.layers["he2gene_adapted"], table.uns["he2gene_adapted"]
    assert adapted.dtype == np.float32
    rows = np.arange(98) != 5
    assert np.isfinite(adapted[np.ix_(rows, np.arange(11))]).all()
    assert np.isnan(adapted[5]).all()
    assert np.isnan(adapted[:, 11]).all()
    assert np.nanmin(adapted) >= 0
    gain = table.var["he2gene_adapted_gain"]
    assert gain[:11].notna().all()
    assert gain[:11].max() <= 1
    assert np.isnan(gain.iloc[11])
    assert record["residual_quantiles"].shape == (len(record["residual_levels"]), 12)
    assert record["residual_quantiles"].dtype == np.float32
    assert np.isnan(record["residual_quantiles"][:, 11]).all()
    quantiles = record["residual_quantiles"][:, :11]
    assert (quantiles[1:] >= quantiles[:-1]).all()
    assert record["sections"] == ["a", "b"]
    assert record["n_measured"] == [int((before.obs["seen"] & rows & (before.obs["section"] == s)).sum()) for s in "ab"]
    np.testing.assert_allclose(record["weights"][list(CANDIDATES)].sum(axis=1), 1, atol=1e-5)
    assert "drawn at random" in record["guarantee"]
    assert (table.X != before.X).nnz == 0
    np.testing.assert_array_equal(table.layers["he2gene"], before.layers["he2gene"])


def test_sections_are_adapted_one_by_one(table):
    hg.tl.adapt(table, "seen")
    alone = table[table.obs["section"] == "b"].copy()
    hg.tl.adapt(alone, "seen")
    np.testing.assert_allclose(alone.layers["he2gene_adapted"], table.layers["he2gene_adapted"][49:], atol=1e-5)


@pytest.mark.slow
def test_masks_are_accepted_in_several_forms(table):
    hg.tl.adapt(table, "seen")
    expected = table.layers["he2gene_adapted"].copy()
    mask = table.obs["seen"]
    layer = np.where(mask.to_numpy()[:, None], table.X.toarray(), np.nan)
    table.layers["counts"] = table.X.copy()
    table.X = None
    table.layers["measured"] = layer
    table.layers["log"] = np.where(mask.to_numpy()[:, None], log_normalise(table.layers["counts"]), np.nan)
    for arguments in (
        {"measured": mask.to_numpy(), "counts": "counts"},
        {"measured": mask.sample(frac=1, random_state=0), "counts": "counts"},
        {"measured": "measured"},
        {"measured": "log", "measured_scale": "log"},
    ):
        hg.tl.adapt(table, **arguments)
        np.testing.assert_allclose(table.layers["he2gene_adapted"], expected, atol=1e-4)


@pytest.mark.slow
def test_boolean_columns_are_accepted_in_several_dtypes(table):
    hg.tl.adapt(table, "seen", genes=["g1"])
    expected = table.layers["he2gene_adapted"].copy()
    seen = table.obs["seen"]
    table.obs["nullable"] = seen.astype("boolean")
    table.obs["object"] = seen.astype(object)
    table.obs["category"] = seen.astype("category")
    table.obs["text"] = seen.astype(str)
    table.obs["text category"] = seen.astype(str).astype("category")
    table.obs["number"] = seen.astype(int)
    for measured in (
        "nullable",
        "object",
        "category",
        "text",
        "text category",
        seen.tolist(),
        seen.astype(str).tolist(),
    ):
        hg.tl.adapt(table, measured, genes=["g1"])
        np.testing.assert_array_equal(table.layers["he2gene_adapted"], expected)
    accepted = ["seen", "nullable", "object", "category", "text", "text category"]
    with pytest.raises(ValueError, match="boolean columns: .*, layers") as found:
        hg.tl.adapt(table, "no")
    assert all(repr(name) in str(found.value) for name in accepted)


def test_values_of_unmeasured_spots_are_not_used(table):
    hg.tl.adapt(table, "seen")
    expected = table.layers["he2gene_adapted"].copy()
    changed = table.X.toarray()
    changed[~table.obs["seen"].to_numpy()] = 7
    table.X = changed
    hg.tl.adapt(table, "seen")
    np.testing.assert_array_equal(table.layers["he2gene_adapted"], expected)


@pytest.mark.slow
def test_some_genes_may_be_measured_at_all_spots(table):
    log = log_normalise(table.X)
    log[np.ix_(~table.obs["seen"].to_numpy(), np.arange(6))] = np.nan
    table.layers["some"] = log
    with pytest.raises(ValueError, match=r"`measured`: \d+ spots have some genes measured and others not"):
        hg.tl.adapt(table, "some")
    hg.tl.adapt(table, "some", measured_scale="log")
    assert np.isfinite(table.layers["he2gene_adapted"][0, :11]).all()
    assert table.var["he2gene_adapted_gain"][:11].notna().all()


def test_a_section_without_measured_spots_gets_nan(table):
    mask = (table.obs["seen"] & (table.obs["section"] == "a")).to_numpy()
    with pytest.warns(UserWarning, match=r"section\(s\) \['b'\] have no measured spots and get NaN"):
        hg.tl.adapt(table, mask)
    assert np.isnan(table.layers["he2gene_adapted"][49:]).all()
    assert table.uns["he2gene_adapted"]["sections"] == ["a"]


def test_only_chosen_genes_are_adapted(table):
    hg.tl.adapt(table, "seen", genes=["g3", "g1"])
    found = np.isfinite(table.layers["he2gene_adapted"]).any(0)
    assert table.var_names[found].tolist() == ["g1", "g3"]


def test_measured_spots_without_counts_are_left_out(table):
    counts = table.X.toarray()
    row = np.flatnonzero(table.obs["seen"])[0]
    counts[row] = 0
    table.X = counts
    with pytest.warns(UserWarning, match="1 measured spots have no counts"):
        hg.tl.adapt(table, "seen")
    expected = table.layers["he2gene_adapted"].copy()
    table.obs.iloc[row, table.obs.columns.get_loc("seen")] = False
    hg.tl.adapt(table, "seen")
    np.testing.assert_array_equal(table.layers["he2gene_adapted"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measured": np.zeros(98, bool)}, "False for all 98 spots; set it to True at measured spots"),
        ({"measured": np.ones(98, bool)}, "True for all 98 spots; no spot is left to correct"),
        ({"measured": np.ones(97, bool)}, r"shape \(97,\); shape \(98,\)"),
        ({"measured": np.ones((98, 1), bool)}, r"shape \(98, 1\)"),
        ({"measured": np.arange(98)}, "holds int64; True and False"),
        ({"measured": np.arange(98) < 7}, r"too few spots .* in 'a' \(6\); measure at least 10"),
        ({"measured": "no"}, r"'no' is neither a column of obs nor a layer; boolean columns: \['seen'\]"),
        ({"measured": "section"}, "True and False are needed"),
        ({"measured": None}, "`measured` is None; a mask"),
        ({"measured": []}, "`measured` is empty; True or False for each spot"),
        ({"measured": slice(0, 50)}, "is a slice; an array of True and False"),
        ({"measured": [[True], [False, True]]}, r"holds \[True\], \[False, True\]; True and False"),
        ({"measured": [1, 0] * 49}, "holds 1, 0; True and False"),
        ({"measured": ["yes", "no"] * 49}, "holds 'yes', 'no'; True and False"),
        ({"measured": "nullable"}, r"`measured` 'nullable' is NA for 1 of 98 spots; .*fillna\(False\)"),
        ({"measured": pd.Series([True], index=["s0"])}, "97 of 98 spots are not in its index"),
        ({"measured": "he2gene"}, "is the prediction itself"),
        ({"measured": "seen log"}, "like log-transformed values.*measured_scale='log'"),
        ({"measured": "log", "measured_scale": "log"}, "NaN nowhere"),
        ({"measured": "nothing"}, "NaN everywhere"),
        ({"measured": "seen", "counts": "log"}, "`counts`: layer 'log' looks like log-transformed values"),
        ({"measured": "log", "counts": "log"}, "pass only one of them"),
        ({"measured": "seen", "counts": "no"}, "`counts` 'no' is not a layer"),
        ({"measured": "seen", "measured_scale": "cpm"}, "`measured_scale` is 'cpm'"),
        ({"measured": "seen", "genes": ["g1", "g11", "NO"]}, r"2 of 3 are not predicted.*\['g11', 'NO'\]"),
        ({"measured": "seen", "genes": "g1"}, "a list of genes"),
        ({"measured": "seen", "layer": "no"}, "`layer` 'no' is not a layer"),
        ({"measured": "seen", "section_key": "no"}, "`section_key` 'no'"),
        ({"measured": "seen", "key_added": "a/b"}, "cannot be stored"),
        ({"measured": "seen", "key_added": "log"}, r"layers\['log'\] exists"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(table, arguments, message):
    table.layers["log"] = log_normalise(table.X)
    table.layers["nothing"] = np.full(table.shape, np.nan)
    table.layers["seen log"] = np.where(table.obs[["seen"]], table.layers["log"], np.nan)
    table.obs["nullable"] = pd.array([pd.NA, *table.obs["seen"][1:]], dtype="boolean")
    keys = (set(table.layers), set(table.obs), set(table.var), set(table.uns))
    with pytest.raises(ValueError, match=message):
        hg.tl.adapt(table, **arguments)
    assert keys == (set(table.layers), set(table.obs), set(table.var), set(table.uns))


def test_genes_measured_on_too_many_sets_of_spots_are_refused():
    xy, predicted, _, measured = slide(0, shape=(6, 6))
    measured[np.random.default_rng(0).random(measured.shape) < 0.3] = np.nan
    with pytest.raises(ValueError, match="60 different sets of spots, at most 20"):
        adapt(predicted, measured, xy)


@pytest.mark.slow
def test_an_adapted_slide_is_saved_and_read(toy, tiny_model, tmp_path):
    import spatialdata as sd

    hg.tl.predict(toy, model=tiny_model)
    hg.tl.adapt(toy, np.arange(30) % 2 == 0)
    toy.write(tmp_path / "toy.zarr")
    back = sd.read_zarr(tmp_path / "toy.zarr")["table"]
    record = back.uns["he2gene_adapted"]
    np.testing.assert_array_equal(
        record["residual_quantiles"], toy["table"].uns["he2gene_adapted"]["residual_quantiles"]
    )
    np.testing.assert_array_equal(back.layers["he2gene_adapted"], toy["table"].layers["he2gene_adapted"])
    hg.tl.adapt(back, np.arange(30) % 2 == 0)


def test_adapting_without_a_prediction_raises(toy):
    with pytest.raises(ValueError, match="holds no prediction"):
        hg.tl.adapt(toy, np.arange(30) % 2 == 0)


@pytest.mark.data
@pytest.mark.slow
def test_measured_spots_help_on_held_out_tissue(predicted_c5):
    table = predicted_c5["table"]
    genes = hg.models.load().genes
    genes = genes.index[genes["group"] == "target"].intersection(table.var_names).tolist()
    columns = table.var_names.get_indexer(genes)
    truth = log_normalise(table.X)[:, columns]
    gains = []
    for seed in range(4):
        mask = np.random.default_rng(seed).random(table.n_obs) < 0.3
        hg.tl.adapt(table, mask, genes=genes)
        layers = (table.layers[key][:, columns][~mask] for key in ("he2gene_adapted", "he2gene"))
        after, before = (np.nan_to_num(pearson(values, truth[~mask])).mean() for values in layers)
        gains.append(after - before)
    assert np.mean(gains) > 0.003
    assert min(gains) > -0.002


# Records of an adaptation


@pytest.fixture
def predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    return toy


def test_measured_spots_are_recorded(table):
    table.layers["he2gene"][5] = np.nan
    hg.tl.adapt(table, "seen")
    expected = table.obs["seen"].to_numpy() & (np.arange(98) != 5)
    assert table.obs["he2gene_adapted_measured"].dtype == bool
    np.testing.assert_array_equal(table.obs["he2gene_adapted_measured"], expected)
    assert table.uns["he2gene_adapted"]["measured_spots"] == "he2gene_adapted_measured"


def test_another_layer_gets_its_own_adapted_layer(table):
    hg.tl.adapt(table, "seen")
    before = table.layers["he2gene_adapted"].copy()
    table.layers["v2"] = table.layers["he2gene"] + 1
    hg.tl.adapt(table, "seen", layer="v2")
    np.testing.assert_array_equal(table.layers["he2gene_adapted"], before)
    assert table.uns["v2_adapted"]["params"]["layer"] == "v2"


def test_an_adapted_layer_can_only_be_adapted_to_other_spots(table):
    first = (np.arange(98) % 4 == 0, np.arange(98) % 4 == 1)
    hg.tl.adapt(table, first[0])
    with pytest.raises(
        ValueError, match=r"was already adapted to 25 of the 49 measured spots; adapt the prediction 'he2"
    ):
        hg.tl.adapt(table, first[0] | first[1], layer="he2gene_adapted")
    hg.tl.adapt(table, first[1], layer="he2gene_adapted")
    assert "he2gene_adapted_adapted" in table.layers
    # Also not to those of an earlier step.
    with pytest.raises(
        ValueError,
        match=r"'he2gene_adapted_adapted' was already adapted to 25 of .* adapt the prediction 'he2gene' to all",
    ):
        hg.tl.adapt(table, first[0], layer="he2gene_adapted_adapted")


def test_regions_that_were_predicted_for_different_genes_raise(toy, tiny_model):
    both, _ = two_regions(toy)
    names = list(both["table"].var_names)
    for region, genes in (("spots", names[:12]), ("more", names[8:20])):
        hg.tl.predict(both, model=tiny_model, shapes_key=region, genes=genes)
    mask = np.arange(both["table"].n_obs) % 2 == 0
    with pytest.raises(
        ValueError, match="no spot has values of all 20 genes, for example because regions were predicted for"
    ):
        hg.tl.adapt(both, mask)
    hg.tl.adapt(both, mask, genes=names[8:12])


def test_a_prediction_is_not_adapted_to_itself_or_another(predicted, tiny_model):
    table = predicted["table"]
    mask = np.arange(30) % 2 == 0
    with pytest.raises(ValueError, match="`counts` 'he2gene' is the prediction itself"):
        hg.tl.adapt(table, mask, counts="he2gene", measured_scale="log")
    hg.tl.predict(predicted, model=tiny_model, key_added="v2")
    with pytest.raises(ValueError, match="`counts` 'v2' was predicted"):
        hg.tl.adapt(table, mask, counts="v2", measured_scale="log")
    hg.tl.predict(predicted, model=tiny_model, genes="all", key_added="every")
    with pytest.raises(ValueError, match=r"hg\.tl\.predict made the table, its X is the prediction"):
        hg.tl.adapt(predicted, mask, layer="every", measured_scale="log")


@pytest.mark.slow
def test_sparse_layers_give_the_same_as_dense_layers(table):
    hg.tl.adapt(table, "seen")
    expected = table.layers["he2gene_adapted"].copy()
    table.layers["he2gene"] = scipy.sparse.csr_matrix(table.layers["he2gene"])
    hg.tl.adapt(table, "seen")
    np.testing.assert_array_equal(table.layers["he2gene_adapted"], expected)
    table.layers["sparse"] = table.X.copy()
    with pytest.raises(ValueError, match="`measured`: layer 'sparse' is NaN nowhere"):
        hg.tl.adapt(table, "sparse")
    missing = np.where(table.obs[["seen"]], table.X.toarray(), np.nan)
    table.layers["sparse"] = scipy.sparse.csr_matrix(missing)
    hg.tl.adapt(table, "sparse")
    np.testing.assert_allclose(table.layers["he2gene_adapted"], expected, atol=1e-4)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_seed_must_be_a_whole_number(table, seed):
    with pytest.raises(ValueError, match="`seed` is"):
        hg.tl.adapt(table, "seen", seed=seed)


def test_infinite_counts_are_refused(table):
    counts = table.X.toarray()
    counts[3, 2] = np.inf
    table.X = counts
    with pytest.raises(ValueError, match="`counts`: X holds 1 infinite value"):
        hg.tl.adapt(table, "seen")


def test_a_backed_table_is_read(table, tmp_path):
    import anndata as ad

    expected = table.copy()
    hg.tl.adapt(expected, "seen")
    table.write_h5ad(tmp_path / "t.h5ad")
    backed = ad.read_h5ad(tmp_path / "t.h5ad", backed="r")
    hg.tl.adapt(backed, "seen")
    np.testing.assert_array_equal(backed.layers["he2gene_adapted"], expected.layers["he2gene_adapted"])


def test_the_position_of_a_spot_outside_the_image_does_not_matter(table):
    hg.tl.adapt(table, "seen")
    expected = table.layers["he2gene_adapted"].copy()
    table.obsm["spatial"][5] = np.nan
    hg.tl.adapt(table, "seen")
    np.testing.assert_array_equal(table.layers["he2gene_adapted"], expected)
