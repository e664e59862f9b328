"""Closed-form training compared with dense algebra, and grouped validation."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from he2gene_sc.models._embedding import Context, rings_of
from he2gene_sc.stats import log_normalise, pearson, skill
from he2gene_sc.training import cross_validate, feature_weights, fit_basis, fit_sums, folds_of, spill
from he2gene_sc.training._calibrate import temperature
from he2gene_sc.training._closed_form.annotation import equal_weights, fit_annotation
from he2gene_sc.training._closed_form.heads import components, embed, fit_softmax, principal_directions
from he2gene_sc.training._closed_form.validate import Choice, Panel, panels
from he2gene_sc.training._held_out import Depth, centre_by_part
from tests.helpers.tiny_sections import CONTEXT, N_FEATURES, everything, planted, recipe, section

GAPS = ((1, 2), (3, 2), (0, 5))


def dense_ridge(sections, rows, basis, penalty, power):
    """Ridge on all spots and views at once, per gene, on the sections that measured it, with targets centred by section."""
    g = sections[0].targets.shape[1]
    weights = np.zeros((basis.mixing.shape[1], g))
    for gene in range(g):
        used = [(s, r) for s, r in zip(sections, rows, strict=True) if s.measured[gene] and r.any()]
        views = sections[0].features.shape[1]
        x = np.concatenate([embed(s, basis, v)[r] for s, r in used for v in range(views)]).astype(float)
        y = [s.targets.toarray()[r, gene].astype(float) for s, r in used]
        y = np.concatenate([part - part.mean() for part in y for _ in range(views)])
        k = x.shape[1]
        weights[:, gene] = np.linalg.solve(x.T @ x / views + penalty * power * np.eye(k), x.T @ y / views)
    return weights


# Sections


def test_counts_are_recovered_exactly_from_the_targets():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (40, 6)) * rng.choice([1, 7, 1_000, 250_000, 30_000_000], (40, 6))
    counts[0] = [1, 0, 0, 0, 0, 2_000_000]
    totals = counts.sum(1) + 11.0
    counts[totals == 11] = 1
    totals = counts.sum(1) + 11.0
    found = section(rng.normal(size=(40, 1, 3)), counts, totals=totals).counts()
    small = counts < 1_000_000
    np.testing.assert_array_equal(np.where(small, found.toarray(), 0), np.where(small, counts, 0))
    np.testing.assert_allclose(found.toarray(), counts, rtol=2e-6)


def test_targets_are_log_normalised_and_stored_zeros_are_removed():
    counts = np.array([[3, 0, 1], [0, 0, 9]])
    s = section(np.zeros((2, 1, 3)), scipy.sparse.csr_array(counts))
    np.testing.assert_allclose(s.targets.toarray(), log_normalise(counts), rtol=1e-6)
    assert s.targets.dtype == np.float32
    assert len(s) == 2


def test_sums_equal_those_of_dense_targets_over_the_chosen_spots():
    s = planted(1)[0]
    rows = np.arange(len(s)) % 3 == 0
    dense = s.targets.toarray().astype(float)[rows]
    total, squares = s.sums(rows)
    np.testing.assert_allclose(total, dense.sum(0))
    np.testing.assert_allclose(squares, np.square(dense).sum(0))


def test_dense_targets_are_nan_for_genes_that_were_not_measured():
    s = planted(2, gaps=GAPS)[1]
    assert np.isnan(s.dense(np.array([2, 0]))[:, 0]).all()
    np.testing.assert_array_equal(s.dense(np.array([2, 0]))[:, 1], s.targets.toarray()[:, 0])
    np.testing.assert_array_equal(np.isnan(s.dense(slice(None))).any(0), ~s.measured)


def test_spilled_objects_are_equal_and_read_only():
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        np.zeros((0, 4)),
        np.array([True, False]),
        np.arange(10)[::2],
    ]
    matrix = scipy.sparse.csc_array(np.eye(3, dtype=np.float32))
    *found, other, (name, none) = spill([*arrays, matrix, ("name", None)])
    for ours, theirs in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert found[1].flags.f_contiguous
    assert [array.flags.writeable for array in found[:4]] == [False] * 4
    np.testing.assert_array_equal(other.toarray(), matrix.toarray())
    assert (type(other), name, none) == (type(matrix), "name", None)
    assert spill([]) == []


def test_a_full_disk_raises_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**24))
    with pytest.raises(OSError, match=r"the disk is full: training needs 864 bytes here, .* set TMPDIR"):
        spill([np.zeros(100)])


def test_sums_of_sections_with_the_same_gene_list_are_added():
    few = planted(6, gaps=((1, 2), (4, 2)))
    rows = everything(few)
    sums = fit_sums(few, rows, fit_basis(few, rows, recipe()), 1.0)
    assert sums.gram.shape[0] == len(sums.measured) == 2
    alone = [fit_sums([s], [r], fit_basis(few, rows, recipe()), 1.0).gram[0] for s, r in zip(few, rows, strict=True)]
    np.testing.assert_allclose(sums.gram[~sums.measured[:, 2]][0], alone[1] + alone[4])
    np.testing.assert_allclose(sums.gram.sum(0), np.sum(alone, axis=0))


# Panels


def test_panels_are_the_genes_of_highest_mean_and_of_highest_variance_inside_sections():
    wave = np.array([-1, 1, -1, 1])
    first, second = ([5, 3, 1, 1] + np.stack([0 * wave, 2 * wave, 0 * wave, wave], 1) for _ in range(2))
    second = second + [0, 0, 6, 0]
    parts = [
        replace(section(np.zeros((4, 1, 3)), np.ones((4, 4))), targets=scipy.sparse.csc_array(t), name=str(i))
        for i, t in enumerate((first, second))
    ]
    target, variable = panels(parts, everything(parts), 3, n_variable=2)
    assert target.tolist() == [0, 2, 1]
    assert variable.tolist() == [1, 3]


def test_panels_hold_genes_that_every_training_section_measured():
    sections = planted(4, gaps=GAPS)
    target, variable = panels(sections, everything(sections), 10, n_variable=10)
    for panel in (target, variable):
        assert sorted(panel) == [0, 1, 3, 4, 6, 7, 8, 9]
    rows = [np.full(len(s), i not in (1, 3)) for i, s in enumerate(sections)]
    assert 2 in panels(sections, rows, 10)[0]
    assert 5 not in panels(sections, rows, 10)[0]


# Basis


def test_feature_weights_give_each_stage_window_and_colour_its_share():
    found = feature_weights((4, 16), 3, 27, 0.25).astype(float) ** 2
    assert len(found) == 3 * 20 + 27
    encoder, colour = found[:60].reshape(3, 20), found[60:]
    assert encoder.sum() == pytest.approx(1)
    assert colour.sum() == pytest.approx(0.25)
    np.testing.assert_allclose(encoder[:, :4].sum(1), 1 / 6)
    np.testing.assert_allclose(encoder[:, 4:].sum(1), 1 / 6)
    assert len(np.unique(colour)) == 1


def test_feature_weights_without_colour():
    assert feature_weights((5,), 1, 0, 0.25).tolist() == pytest.approx([5**-0.5] * 5)


def test_projection_equals_principal_components_of_scikit_learn():
    """Without a prior every section is centred, so the centring of PCA has no effect."""
    sections = planted(3, views=1)
    context = replace(CONTEXT, prior_spots=1e-9)
    used_recipe = recipe(n_components=6, context=context)
    basis = fit_basis(sections, everything(sections), used_recipe)
    z = np.concatenate([context.standardise(s.features[:, 0], basis.mean, basis.scale) for s in sections])
    oracle = PCA(6, svd_solver="full").fit(z.astype(float) * used_recipe.weights)
    own = basis.projection / used_recipe.weights[:, None]
    np.testing.assert_allclose(np.abs(np.sum(oracle.components_.T * own, axis=0)), 1, atol=1e-3)
    np.testing.assert_allclose(
        np.sum(np.square(z @ basis.projection), axis=0), 180 * oracle.explained_variance_ * 179 / 180, rtol=1e-3
    )


def test_mixing_equals_principal_components_of_spot_and_rings():
    sections = planted(3, views=2)
    used_recipe = recipe()
    basis = fit_basis(sections, everything(sections), used_recipe)
    factors = np.sqrt(np.repeat([1, 0.7, 0.4], 10))
    parts = np.concatenate([components(s, basis, v) for s in sections for v in range(2)]).astype(float) * factors
    directions = np.linalg.svd(parts, full_matrices=False)[2][:8].T
    found = basis.mixing / factors[:, None]
    np.testing.assert_allclose(np.abs(np.sum(directions * found, axis=0)), 1, atol=1e-3)


def test_a_slide_is_standardised_by_all_spots_not_only_training_spots():
    """As in inference."""
    sections = planted(2, views=1)
    rows = [np.arange(60) < 15, np.ones(60, bool)]
    used_recipe = recipe(n_components=4)
    basis = fit_basis(sections, rows, used_recipe)
    z = [CONTEXT.standardise(s.features[:, 0], basis.mean, basis.scale) for s in sections]
    z = np.concatenate([part[r] for part, r in zip(z, rows, strict=True)]).astype(float) * used_recipe.weights
    directions = np.linalg.svd(z, full_matrices=False)[2][:4].T
    own = basis.projection / used_recipe.weights[:, None]
    np.testing.assert_allclose(np.abs(np.sum(directions * own, axis=0)), 1, atol=1e-4)


def test_mean_and_scale_are_averages_over_sections_of_any_size():
    small, large = planted(1, n=20)[0], planted(1, n=90, seed=1)[0]
    basis = fit_basis([small, large], everything([small, large]), recipe())
    flat = [s.features.reshape(-1, N_FEATURES).astype(float) for s in (small, large)]
    np.testing.assert_allclose(basis.mean, np.mean([x.mean(0) for x in flat], axis=0), rtol=1e-5)
    np.testing.assert_allclose(basis.scale, np.sqrt(np.mean([x.var(0) for x in flat], axis=0)), rtol=1e-5)


def test_signs_of_the_components_are_fixed():
    gram = np.cov(np.random.default_rng(0).normal(size=(6, 40)))
    directions = principal_directions(gram, 4)
    assert (directions[np.abs(directions).argmax(0), np.arange(4)] > 0).all()


def test_randomised_components_are_close_to_the_exact_ones(monkeypatch):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 10)) @ rng.normal(size=(10, 200)) * 3 + rng.normal(size=(300, 200))
    exact = principal_directions(z.T @ z, 10)
    monkeypatch.setattr("he2gene_sc.training._closed_form.heads._MAX_EXACT_FEATURES", 100)
    found = principal_directions(z.T @ z, 10)
    np.testing.assert_allclose(np.abs(np.sum(exact * found, axis=0)), 1, atol=1e-6)
    np.testing.assert_array_equal(principal_directions(z.T @ z, 10), found)


def test_a_constant_feature_has_no_effect():
    sections = [
        replace(s, features=np.concatenate([s.features[:, :, :-1], np.full((60, 2, 1), 7.3, np.float32)], 2))
        for s in planted(2)
    ]
    basis = fit_basis(sections, everything(sections), recipe())
    assert basis.scale[-1] == 0
    assert np.isfinite(embed(sections[0], basis)).all()
    changed = replace(sections[0], features=sections[0].features + np.eye(N_FEATURES, dtype=np.float32)[-1])
    np.testing.assert_array_equal(embed(changed, basis), embed(sections[0], basis))


def test_the_embedding_has_at_most_as_many_components_as_spots():
    sections = planted(2, n=4)
    assert fit_basis(sections, everything(sections), recipe()).mixing.shape[1] == 7


def test_features_on_disk_give_the_same_bits(tmp_path):
    sections = planted(3)
    mapped = []
    for s in sections:
        np.save(tmp_path / f"{s.name}.npy", s.features)
        mapped.append(replace(s, features=np.load(tmp_path / f"{s.name}.npy", mmap_mode="r")))
    results = []
    for these in (sections, mapped):
        basis = fit_basis(these, everything(these), recipe())
        results.append(
            (basis.mean, basis.projection, basis.mixing, fit_sums(these, everything(these), basis, 1.0).ridge(1.0, 3))
        )
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# Ridge


@pytest.mark.parametrize("penalty", [0.01, 3.0])
@pytest.mark.parametrize("gaps", [(), GAPS])
def test_ridge_equals_a_dense_one_on_all_spots_and_views(penalty, gaps):
    sections = planted(4, gaps=gaps)
    rows = [np.arange(60) % 4 != i for i in range(4)]
    used_recipe = recipe()
    basis = fit_basis(sections, rows, used_recipe)
    found = fit_sums(sections, rows, basis, used_recipe.power).ridge(penalty)
    expected = dense_ridge(sections, rows, basis, penalty, used_recipe.power)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-3)


def test_the_mean_of_a_gene_is_over_the_spots_in_which_it_was_measured():
    sections = planted(4, gaps=GAPS)
    rows = [np.arange(60) % 4 != i for i in range(4)]
    found = fit_sums(sections, rows, fit_basis(sections, rows, recipe()), 1.0).mean
    dense = np.concatenate([s.dense(slice(None))[r] for s, r in zip(sections, rows, strict=True)])
    np.testing.assert_allclose(found, np.nanmean(dense.astype(float), axis=0), rtol=1e-6)


def test_the_embedding_has_a_half_with_and_a_half_without_neighbours_each_with_its_own_ridge():
    sections = planted(4, noise=0.5)
    rows = [np.arange(60) % 4 != i for i in range(4)]
    both = recipe(context=replace(CONTEXT, fine_below_mpp=1.5))
    basis = fit_basis(sections, rows, both)
    weights = fit_sums(sections, rows, basis, both.power).weights(Choice(0.3, 3, Choice(1.0, 2)))
    for half, context, choice in (
        (slice(0, 4), Context((), (), CONTEXT.prior_spots), Choice(1.0, 2)),
        (slice(4, 8), CONTEXT, Choice(0.3, 3)),
    ):
        alike = recipe(n_latent=4, context=context)
        its_basis = fit_basis(sections, rows, alike)
        expected = fit_sums(sections, rows, its_basis, alike.power).weights(choice)
        np.testing.assert_allclose(weights[half], expected, atol=1e-4 * np.abs(expected).max())
        for one in sections:
            alone = embed(one, its_basis)
            if not context.rings_um:
                alone = (alone + 0.35 * (rings_of(one.centres_um, CONTEXT.rings_um)[0] @ alone)) / 1.35
            np.testing.assert_allclose(embed(one, basis)[:, half], alone, atol=1e-4)


def test_held_out_predictions_of_a_section_are_those_of_its_resolution():
    fine = planted(4)
    coarse = [replace(s, mpp=3.0) for s in fine]
    used_recipe, choice = recipe(context=replace(CONTEXT, fine_below_mpp=1.5)), Choice(0.3, 3, Choice(3.0, 2))
    rows = [np.ones(60, bool)] * 3 + [np.zeros(60, bool)]
    for sections, used in ((fine, [0.5] * 8), (coarse, [0] * 4 + [1] * 4)):
        basis = fit_basis(sections, rows, used_recipe)
        sums = fit_sums(sections, rows, basis, used_recipe.power)
        predicted = np.maximum(
            embed(sections[3], basis) @ (np.array(used)[:, None] * sums.weights(choice)) + sums.mean, 0
        )
        _, held_out = validate(sections, "section", used_recipe=used_recipe, choice=choice)
        found, genes = held_out.panel[3].predicted, held_out.panel[3].target
        np.testing.assert_allclose(found[:, : len(genes)], predicted[:, genes], atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_components_of_the_fitted_values_are_shrunk_by_their_size(rank):
    sections = planted(3, views=1)
    used_recipe = recipe()
    basis = fit_basis(sections, everything(sections), used_recipe)
    sums = fit_sums(sections, everything(sections), basis, used_recipe.power)
    full = sums.ridge(0.3).astype(float)
    x = np.concatenate([embed(s, basis) for s in sections]).astype(float)
    left, singular, right = np.linalg.svd(x @ full, full_matrices=False)
    kept = 1 / (1 + (singular[rank] / singular) ** 4)
    assert kept[rank] == 0.5
    assert (kept[:rank] > 0.5).all()
    best = (left * singular * kept) @ right
    found = x @ sums.ridge(0.3, rank).astype(float)
    np.testing.assert_allclose(found, best, atol=2e-3 * np.abs(best).max())
    assert np.abs(found - x @ full).max() > 0.05 * np.abs(best).max()


def test_components_that_are_rounding_errors_stay_zero():
    """With fewer components than the rank, none is shrunk, and components of 0 stay 0."""
    sections = planted(3)
    sums = fit_sums(sections, everything(sections), fit_basis(sections, everything(sections), recipe()), 1.0)
    one = replace(sums, cross=np.outer(sums.cross[:, 0], np.arange(1.0, 1 + sums.cross.shape[1])))
    np.testing.assert_allclose(one.ridge(1.0, 3), one.ridge(1.0), rtol=1e-3, atol=1e-6)
    nothing = replace(sums, cross=np.zeros_like(sums.cross))
    np.testing.assert_array_equal(nothing.ridge(1.0, 3), 0)


def test_a_path_gives_the_weights_of_each_rank_for_the_chosen_genes():
    sections = planted(3, gaps=GAPS)
    basis = fit_basis(sections, everything(sections), recipe())
    sums = fit_sums(sections, everything(sections), basis, 1.0)
    genes = np.array([7, 0, 2])
    for rank, weight in zip((2, 5, None, 8, 99), sums.path(1.0, (2, 5, None, 8, 99), genes), strict=True):
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, sums.ridge(1.0, rank)[:, genes], atol=1e-7)
    np.testing.assert_array_equal(sums.ridge(1.0, 8), sums.ridge(1.0))
    assert np.abs(sums.ridge(1.0, 2) - sums.ridge(1.0)).max() > 1e-3


def test_depth_of_a_section_does_not_change_the_slopes():
    sections = planted(3)
    shift = scipy.sparse.csc_array(np.full((60, 10), 2.5, np.float32))
    deeper = [
        sections[0],
        replace(sections[1], targets=scipy.sparse.csc_array(sections[1].targets + shift)),
        sections[2],
    ]
    basis = fit_basis(sections, everything(sections), recipe())
    found = [fit_sums(s, everything(s), basis, 1.0) for s in (sections, deeper)]
    np.testing.assert_allclose(found[0].ridge(1.0), found[1].ridge(1.0), atol=1e-5)
    np.testing.assert_allclose(found[1].mean - found[0].mean, 2.5 / 3, rtol=1e-5)


def test_held_out_sections_do_not_affect_the_fit():
    sections = planted(4)
    rows = [np.ones(60, bool)] * 3 + [np.zeros(60, bool)]
    results = []
    for these, chosen in ((sections, rows), (sections[:3], rows[:3])):
        basis = fit_basis(these, chosen, recipe())
        results.append((basis.mixing, fit_sums(these, chosen, basis, 1.0).ridge(0.3, 4)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_order_of_sections_and_of_spots_does_not_matter():
    sections = planted(3)
    rng = np.random.default_rng(0)
    mixed = []
    for s in sections[::-1]:
        order = rng.permutation(len(s))
        mixed.append(
            replace(
                s,
                centres_um=s.centres_um[order],
                features=s.features[order],
                targets=scipy.sparse.csc_array(s.targets.tocsr()[order]),
                totals=s.totals[order],
                codes=s.codes[order],
            )
        )
    found = []
    for these in (sections, mixed):
        basis = fit_basis(these, everything(these), recipe())
        weight = fit_sums(these, everything(these), basis, 1.0).ridge(0.3, 4)
        found.append(embed(sections[0], basis) @ weight)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * np.abs(found[0]).max())


def test_sections_repeated_four_times_give_the_same_heads():
    """The penalty must be four times as large, since repeated sections add no information."""
    sections = planted(3)
    repeated = [replace(s, name=f"{s.name}-{i}") for i in range(4) for s in sections]
    found = []
    for these, penalty in ((sections, 0.3), (repeated, 1.2)):
        basis = fit_basis(these, everything(these), recipe())
        sums = fit_sums(these, everything(these), basis, 1.0)
        found.append(embed(sections[0], basis) @ sums.ridge(penalty, 4) + sums.mean)
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


# Cross-validation


def validate(sections, unit="section", n_classes=0, n_target=10, used_recipe=None, **options):
    _, folds = folds_of(sections, unit)
    used_recipe = recipe(n_components=N_FEATURES, n_latent=30) if used_recipe is None else used_recipe
    choice, found = cross_validate(
        sections, {unit: folds}, used_recipe, n_classes=n_classes, n_target=n_target, **options
    )
    return choice, found[unit]


def test_a_planted_signal_is_recovered_on_held_out_sections():
    choice, held_out = validate(planted(n=120, seed=1))
    assert held_out.pcc.shape == (4, 10)
    assert np.median(held_out.pcc) > 0.8
    assert (held_out.skill > 0).mean() > 0.5
    assert choice.penalty <= 1


@pytest.mark.parametrize(("unit", "held"), [("section", [2]), ("patient", [0, 2])])
def test_held_out_metrics_equal_those_of_a_fit_to_the_other_groups(unit, held):
    sections = planted(gaps=GAPS)
    choice = Choice(0.3, 4)
    used_recipe = recipe()
    _, held_out = validate(sections, unit, n_classes=3, n_target=4, used_recipe=used_recipe, choice=choice)
    rows = [np.full(60, i not in held) for i in range(4)]
    basis = fit_basis(sections, rows, used_recipe)
    sums = fit_sums(sections, rows, basis, used_recipe.power)
    predicted = np.maximum(embed(sections[2], basis) @ sums.ridge(0.3, 4) + sums.mean, 0)
    measured = sections[2].dense(slice(None))
    np.testing.assert_allclose(held_out.pcc[2], pearson(predicted, measured), atol=1e-5)
    panel = held_out.panel[2]
    target, variable = panels(sections, rows, 4)
    np.testing.assert_array_equal(panel.target, target)
    np.testing.assert_array_equal(panel.variable, variable)
    np.testing.assert_allclose(panel.predicted[:, :4], predicted[:, target], atol=1e-4)
    np.testing.assert_allclose(
        held_out.pcc_given_depth[2], Depth.fit(sections[2].totals, np.zeros(60)).partial(predicted, measured), atol=1e-5
    )
    head = fit_annotation(sections, rows, used_recipe.weights, 3)
    np.testing.assert_allclose(held_out.logits[2], head.logits(sections[2]), atol=1e-3)


def test_skill_is_relative_to_the_mean_of_the_training_sections():
    sections = planted(2, patients=1)
    choice = Choice(0.3, None)
    used_recipe = recipe()
    _, held_out = validate(sections, used_recipe=used_recipe, choice=choice)
    predicted, measured, reference = [], [], []
    for i in (0, 1):
        rows = [np.full(60, j != i) for j in (0, 1)]
        basis = fit_basis(sections, rows, used_recipe)
        sums = fit_sums(sections, rows, basis, used_recipe.power)
        predicted.append(np.maximum(embed(sections[i], basis) @ sums.ridge(0.3) + sums.mean, 0))
        measured.append(sections[i].dense(slice(None)))
        reference.append(np.tile(sums.mean, (60, 1)))
    expected = skill(
        np.concatenate(predicted) - np.concatenate(reference),
        np.concatenate(measured) - np.concatenate(reference),
        np.zeros(10),
    )
    np.testing.assert_allclose(held_out.skill, expected, atol=1e-4)


@pytest.mark.parametrize("prior", [None, 20.0])
def test_targets_permuted_inside_sections_give_no_skill(prior):
    """With random features and many genes, choices on the folds must not give a positive skill."""
    rng = np.random.default_rng(0)
    sections = []
    for i in range(4):
        depth = rng.lognormal(0, 0.4, (80, 1)) * rng.lognormal(0, 1, 300)
        sections.append(
            section(rng.normal(size=(80, 2, N_FEATURES)), rng.poisson(3 * depth) + 1, name=f"S{i}", patient=f"P{i}")
        )
    used_recipe = recipe(context=replace(CONTEXT, prior_spots=prior))
    _, held_out = validate(sections, n_target=50, used_recipe=used_recipe)
    assert abs(held_out.pcc.mean()) < 0.02
    assert held_out.skill.mean() <= 0.002
    assert (held_out.skill > 0.03).mean() < 0.01


def test_metrics_of_a_section_held_out_in_parts_are_centred_by_part():
    """The section has a gradient that no feature shows, so the predicted mean of each part is wrong in the opposite direction."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(6):
        slope = np.exp(np.linspace(-1, 1, 160))[:, None]
        counts = np.hstack([rng.poisson(20 * slope * np.ones((160, 5))), rng.poisson(300, (160, 5))])
        (one,) = planted(1, n=160, patients=1, seed=seed)
        alone = section(one.features, counts, totals=np.full(160, 3000.0))
        _, held_out = validate([alone], "block", n_target=5, choice=Choice(1.0, None))
        found.append([held_out.pcc[0, :5].mean(), held_out.panel[0].scores()[0]])
        assert len(np.unique(held_out.parts[0])) == 5
        means = [held_out.panel[0].measured[held_out.parts[0] == part].mean(0) for part in range(5)]
        np.testing.assert_allclose(means, 0, atol=1e-6)
    assert np.abs(np.mean(found, axis=0)).max() < 0.1


def test_centred_by_part_constant_genes_are_zero_and_unmeasured_ones_nan():
    values = np.stack([np.full(30, 10 / 3), np.full(30, np.nan), np.arange(30.0)], axis=1)
    found = centre_by_part(values, np.arange(30) // 15)
    assert (found[:, 0] == 0).all()
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[:, 2], np.tile(np.arange(15) - 7.0, 2))
    assert centre_by_part(values, np.zeros(30)) is values


def test_every_fold_chooses_its_panels_without_the_held_out_section():
    sections = planted(2, n_genes=12, patients=1)
    loud = sections[1].targets.toarray()
    loud[:, 3] += np.linspace(0, 50, 60)
    sections[1] = replace(sections[1], targets=scipy.sparse.csc_array(loud))
    _, held_out = validate(sections, n_target=3, choice=Choice(1.0, None))
    assert held_out.panel[0].target[0] == 3
    assert held_out.panel[1].target.tolist() == panels(sections, [np.ones(60, bool), np.zeros(60, bool)], 3)[0].tolist()


def test_a_gene_missing_in_the_held_out_section_is_left_out_of_its_metrics():
    predicted = np.random.default_rng(0).normal(size=(30, 4))
    measured = predicted.copy()
    measured[:, 1] = np.nan
    measured[:, 3] = 5.0
    panel = Panel(np.array([0, 1]), np.array([2, 3]), predicted, measured)
    assert panel.scores() == pytest.approx((1.0, 0.5))
    assert [float(x) for x in panel.means(np.array([1.0, 9.0, 2.0, 4.0]))] == [1.0, 3.0]


def test_a_gene_measured_in_no_training_section_has_zero_weights():
    sections = planted(3, gaps=((0, 4), (1, 4)))
    _, held_out = validate(sections, choice=Choice(1.0, 3))
    assert np.isnan(held_out.pcc[:2, 4]).all()
    assert np.isnan(held_out.pcc[2, 4])
    assert np.isfinite(np.delete(held_out.pcc, 4, axis=1)).all()
    assert held_out.skill[4] <= 0


def without_stain_differences(sections):
    """Return sections without differences in stain, since the annotation uses unstandardised features."""
    return [replace(s, features=s.features - s.features.mean((0, 1))) for s in sections]


def test_planted_classes_are_recovered_on_held_out_sections():
    sections = without_stain_differences(planted(n=120))
    _, held_out = validate(sections, n_classes=3)
    right = [(logits.argmax(1) == s.codes).mean() for s, logits in zip(sections, held_out.logits, strict=True)]
    assert min(right) > 0.7


def test_spots_without_a_label_do_not_affect_the_annotation():
    sections = without_stain_differences(planted(n=120))
    bare = [replace(s, codes=np.where(np.arange(120) % 2, s.codes, -1)) for s in sections]
    head = fit_annotation(bare[:3], everything(bare[:3]), recipe().weights, 3)
    assert (head.logits(sections[3]).argmax(1) == sections[3].codes).mean() > 0.7
    assert (
        fit_annotation(
            [replace(s, codes=np.full(120, -1)) for s in sections], everything(sections), recipe().weights, 3
        )
        is None
    )


def test_the_annotation_ignores_what_recoloured_copies_change():
    sections = without_stain_differences(planted(n=120, n_classes=2))
    # The first feature shows the class, until the sections are recoloured.
    plain = [replace(s, features=s.features.copy()) for s in sections]
    for s in plain:
        s.features[:, 0, 0] = 10 * s.codes
    copies = [s.features.copy() for s in plain]
    for i, copy in enumerate(copies):
        copy[:, 0, 0] = np.random.default_rng(i).permutation(copy[:, 0, 0])
    with_copies = [replace(s, recoloured=(copy[:, 0],)) for s, copy in zip(plain, copies, strict=True)]
    new = replace(plain[3], features=copies[3])
    naive, robust = (
        fit_annotation(part[:3], everything(part[:3]), recipe().weights, 2) for part in (plain, with_copies)
    )
    wrong = [(head.logits(new).argmax(1) != new.codes).mean() for head in (naive, robust)]
    assert wrong[1] < 0.1
    assert wrong[1] < 0.6 * wrong[0]


def test_copies_have_the_weight_of_their_section_whatever_their_number():
    sections = without_stain_differences(planted(n=60, n_classes=2))[:3]
    copies = [s.features[:, 0] + np.float32(0.5) for s in sections]
    one, three = (
        fit_annotation(
            [replace(s, recoloured=n * (copy,)) for s, copy in zip(sections, copies, strict=True)],
            everything(sections),
            recipe().weights,
            2,
        )
        for n in (1, 3)
    )
    none = fit_annotation(sections, everything(sections), recipe().weights, 2)
    np.testing.assert_allclose(one.logits(sections[0]), three.logits(sections[0]), atol=1e-3)
    assert np.abs(one.logits(sections[0]) - none.logits(sections[0])).max() > 0.01


def test_copies_of_held_out_spots_are_not_trained_on():
    sections = without_stain_differences(planted(n=60, n_classes=2))[:3]
    rows = [np.arange(60) % 3 > 0 for _ in sections]
    heads = []
    for noise in (0, 1):
        # Without neighbours, which a spot shares with held-out spots.
        parts = [replace(s, centres_um=1e4 * s.centres_um, recoloured=(s.features[:, 0].copy(),)) for s in sections]
        for part, chosen in zip(parts, rows, strict=True):
            part.recoloured[0][~chosen] += np.float32(noise)
        heads.append(fit_annotation(parts, rows, recipe().weights, 2))
    np.testing.assert_array_equal(heads[0].basis.mixing, heads[1].basis.mixing)


def test_patients_and_classes_have_equal_weight_in_the_annotation():
    codes = np.array([0] * 90 + [1] * 10 + [0] * 5 + [2] * 5)
    patients = np.repeat(["A", "B"], [100, 10]).astype(object)
    weight = equal_weights(codes, patients)
    assert weight.mean() == pytest.approx(1)
    of_classes = [weight[codes == c].sum() for c in range(3)]
    np.testing.assert_allclose(of_classes, of_classes[0])
    assert weight[:90].sum() == pytest.approx(weight[100:105].sum())


def test_a_slide_of_a_single_class_is_annotated_as_that_class():
    """With features standardised by slide, all slides would get the same mixture of classes."""
    sections = planted(4, n=160, n_classes=2)
    apart = np.array([3.0, *[0] * 11])
    sections = [
        replace(s, features=s.features + apart * np.where(s.codes, 1, -1)[:, None, None])
        for s in without_stain_differences(sections)
    ]
    alone = sections[3].codes == 1
    part = replace(
        sections[3],
        centres_um=sections[3].centres_um[alone],
        features=sections[3].features[alone],
        targets=scipy.sparse.csc_array(sections[3].targets.tocsr()[alone]),
        totals=sections[3].totals[alone],
        codes=sections[3].codes[alone],
    )
    head = fit_annotation(sections[:3], everything(sections[:3]), recipe().weights, 2)
    assert (head.logits(part).argmax(1) == 1).mean() > 0.9


def test_a_fold_trained_without_labels_gives_no_logits():
    sections = planted(2, patients=1)
    sections[0] = replace(sections[0], codes=np.full(60, -1))
    _, held_out = validate(sections, n_classes=3)
    assert np.isnan(held_out.logits[1]).all()
    assert np.isfinite(held_out.logits[0]).all()


def test_cross_validation_is_deterministic():
    (first, one), (second, two) = (validate(planted(), n_classes=3) for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(one.pcc, two.pcc)
    np.testing.assert_array_equal(one.logits[0], two.logits[0])


def test_genes_predicted_in_blocks_give_the_same_metrics(monkeypatch):
    whole = validate(planted(gaps=GAPS), choice=Choice(1.0, 3))[1]
    monkeypatch.setattr("he2gene_sc.training._closed_form.validate._GENES_AT_ONCE", 3)
    parts = validate(planted(gaps=GAPS), choice=Choice(1.0, 3))[1]
    np.testing.assert_allclose(parts.pcc, whole.pcc, atol=1e-6)
    np.testing.assert_allclose(parts.skill, whole.skill, atol=1e-6)


# Folds


def test_folds_are_grouped_by_names_of_patients_and_sections():
    sections = planted(4, n=10)
    assert folds_of(sections, None)[0] == "patient"
    assert [sorted(set(codes)) for codes in folds_of(sections, None)[1]] == [[0], [1], [0], [1]]
    assert [sorted(set(codes)) for codes in folds_of(sections, "section")[1]] == [[0], [1], [2], [3]]
    one = [replace(s, patient="P") for s in sections]
    assert folds_of(one, None)[0] == "section"
    assert folds_of(one[:1], None)[0] == "block"
    assert [len(codes) for codes in folds_of(one, "section")[1]] == [10] * 4


def test_blocks_of_one_section_are_five_strips():
    (s,) = planted(1, n=80)
    unit, (codes,) = folds_of([s], None)
    assert unit == "block"
    assert np.bincount(codes).tolist() == [16] * 5


def test_many_patients_are_held_out_in_ten_groups():
    sections = [replace(s, name=str(i), patient=str(i // 2)) for i, s in enumerate(planted(1, n=6) * 30)]
    unit, codes = folds_of(sections, None)
    assert unit == "patient"
    assert len(np.unique(np.concatenate(codes))) == 10
    assert all((codes[i] == codes[i + 1]).all() for i in range(0, 30, 2))


def test_random_spots_give_five_folds_that_depend_on_the_seed():
    sections = planted(3, n=50)
    unit, codes = folds_of(sections, "spot", seed=3)
    assert unit == "spot"
    assert np.bincount(np.concatenate(codes)).tolist() == [30] * 5
    assert all(len(np.unique(part)) == 5 for part in codes)
    np.testing.assert_array_equal(np.concatenate(codes), np.concatenate(folds_of(sections, "spot", seed=3)[1]))
    assert (np.concatenate(codes) != np.concatenate(folds_of(sections, "spot", seed=4)[1])).any()


# Annotation head


@pytest.mark.parametrize("n_classes", [2, 3])
def test_softmax_gives_the_probabilities_of_scikit_learn(n_classes):
    sections = planted(n_classes=n_classes)
    embedding = np.concatenate([s.features[:, 0] for s in sections]).astype(float)
    codes = np.concatenate([s.codes for s in sections])
    weight, bias = fit_softmax(embedding, codes, n_classes, 0.3)
    scale = np.sqrt(np.square(embedding).mean())
    oracle = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000).fit(embedding / scale, codes)
    np.testing.assert_allclose(
        softmax(embedding @ weight + bias, axis=1), oracle.predict_proba(embedding / scale), atol=1e-3
    )


def test_softmax_of_a_single_class_has_probability_one():
    embedding = np.random.default_rng(0).normal(size=(9, 4))
    weight, bias = fit_softmax(embedding, np.zeros(9, int), 1, 0.3)
    assert softmax(embedding @ weight + bias, axis=1).tolist() == [[1.0]] * 9


@pytest.mark.parametrize("present", [[1], [0, 2], [0, 1, 3]])
def test_classes_that_do_not_occur_are_never_predicted(present):
    rng = np.random.default_rng(0)
    embedding, codes = rng.normal(size=(60, 4)), rng.choice(present, 60)
    weight, bias = fit_softmax(embedding, codes, 4, 0.3)
    proba = softmax(embedding @ weight + bias, axis=1)
    np.testing.assert_allclose(proba[:, present].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("true", [0.5, 1.0, 4.0])
def test_the_temperature_of_miscalibrated_logits_is_recovered(true):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 3))
    codes = (rng.random((20_000, 1)) > softmax(logits, axis=1).cumsum(1)).sum(1).clip(0, 2)
    assert temperature(true * logits, codes) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(("right", "bound"), [(True, 0.2), (False, 20)])
def test_the_temperature_stays_within_its_bounds(right, bound):
    codes = np.arange(90) % 3
    logits = np.eye(3)[codes if right else (codes + 1) % 3]
    assert temperature(logits, codes) == pytest.approx(bound, rel=0.05)
