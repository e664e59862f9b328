import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge

from he2gene_sc.stats import pearson
from he2gene_sc.training import TrainingSet, cross_validate, fit_basis, panels
from he2gene_sc.training._closed_form import fit_softmax, temperature

N, R, F, G, N_COLOUR = 120, 2, 12, 8, 4
OPTIONS = {"n_latent": 8, "n_colour": N_COLOUR, "colour_share": 0.25}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, 1, F)) * rng.uniform(0.5, 3, F) + 0.1 * rng.normal(size=(N, R, F)) + 5
    features[:, :, F - N_COLOUR :] = features[:, :1, F - N_COLOUR :]
    targets = 4 + rng.normal(size=(N, G))
    return features.astype(np.float32), targets.astype(np.float32), np.repeat([0, 1, 2], N // 3)


def planted(seed=0, noise=0.3, n=240, n_classes=3):
    """Sections that differ in depth, and genes and classes that are linear in the features."""
    rng = np.random.default_rng(seed)
    sections = np.repeat(np.arange(4), n // 4)
    features = rng.normal(size=(n, 1, F)).astype(np.float32)
    slopes = rng.normal(size=(F, G))
    targets = 10 + features[:, 0] @ slopes + noise * rng.normal(size=(n, G)) + rng.normal(size=(4, G))[sections]
    codes = (features[:, 0] @ rng.normal(size=(F, n_classes))).argmax(1)
    return TrainingSet(features, targets.astype(np.float32), codes, sections, sections // 2, N_COLOUR)


def validate(data, groups=None, n_classes=0, **options):
    groups = data.sections if groups is None else groups
    return cross_validate(data, groups, n_classes=n_classes, n_latent=F, n_target=G, colour_share=0.25, **options)


# panels


def test_panels_are_the_highest_means_and_the_highest_variances_within_sections():
    sections = np.repeat([0, 1], 4)
    wave = np.array([-1, 1, -1, 1] * 2)
    between = np.repeat([-1, 1], 4)
    targets = np.stack([5 + 0 * wave, 3 + 2 * wave, 4 + 3 * between, 1 + wave], axis=1).astype(np.float32)
    target, variable = panels(targets, sections, 2, n_variable=2)
    assert target.tolist() == [0, 2]
    assert variable.tolist() == [1, 3]


# fit_basis


def standardised(features):
    flat = features.reshape(-1, F).astype(float)
    z = (flat - flat.mean(0)) / flat.std(0)
    z[:, F - N_COLOUR :] *= np.sqrt(0.25 * (F - N_COLOUR) / N_COLOUR)
    return z


def test_projection_spans_the_principal_components_of_the_standardised_features(arrays):
    features, targets, sections = arrays
    projection = fit_basis(features, targets, sections, **OPTIONS).projection.astype(float)
    components = np.linalg.svd(standardised(features), full_matrices=False)[2][: OPTIONS["n_latent"]].T
    np.testing.assert_allclose(np.abs(np.sum(components * projection, axis=0)), 1, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_ridge_equals_scikit_learn_on_the_same_components(arrays, penalty):
    features, targets, sections = arrays
    heads = fit_basis(features, targets, sections, **OPTIONS).ridge(penalty)
    centred = targets - np.stack([targets[sections == s].mean(0) for s in sections])
    embedding = standardised(features) @ heads.projection
    oracle = Ridge(alpha=penalty * F, fit_intercept=False)
    oracle.fit(embedding, centred.repeat(R, axis=0), sample_weight=np.full(N * R, 1 / R))
    np.testing.assert_allclose(heads.weight, oracle.coef_.T, atol=1e-4)
    np.testing.assert_allclose(heads.bias, targets.mean(0), rtol=1e-5)
    np.testing.assert_allclose(heads.embed(features.reshape(-1, F)), embedding, atol=1e-3)


def test_colour_has_its_share_of_the_sum_of_squares(arrays):
    features, targets, sections = arrays
    basis = fit_basis(features, targets, sections, **OPTIONS)
    energy = np.square((features.reshape(-1, F) - basis.mean) / basis.scale).sum(0)
    assert energy[F - N_COLOUR :].sum() / energy[: F - N_COLOUR].sum() == pytest.approx(0.25, rel=1e-3)


def test_depth_of_a_section_does_not_change_the_slopes(arrays):
    features, targets, sections = arrays
    deeper = targets + np.array([0, 5, -3], np.float32)[sections][:, None]
    weights = [fit_basis(features, t, sections, **OPTIONS).ridge(1.0).weight for t in (targets, deeper)]
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-4)


def test_a_constant_feature_is_harmless(arrays):
    features, targets, sections = arrays
    features[:, :, 3] = 7
    heads = fit_basis(features, targets, sections, **OPTIONS).ridge(1.0)
    assert np.isfinite(heads.predict(features[:, 0])).all()
    np.testing.assert_allclose(heads.projection[3], 0, atol=1e-5)


def test_predictions_are_floored_at_zero(arrays):
    features, targets, sections = arrays
    heads = fit_basis(features, targets - 4, sections, **OPTIONS).ridge(1.0)
    raw = heads.embed(features[:, 0]) @ heads.weight + heads.bias
    assert (raw < 0).any()
    np.testing.assert_array_equal(heads.predict(features[:, 0]), np.where(raw > 0, raw, 0))


def test_fitting_twice_gives_the_same_bits(arrays):
    first, second = (fit_basis(*arrays, **OPTIONS).ridge(3.0) for _ in range(2))
    for name in ("mean", "scale", "projection", "weight", "bias"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


# cross_validate


def test_a_planted_linear_signal_is_recovered_on_held_out_sections():
    _, _, held_out = validate(planted())
    assert held_out.pcc.shape == (4, G)
    assert held_out.pcc.min() > 0.95


def test_held_out_figures_equal_a_fit_on_the_other_sections():
    data = planted(noise=2.0)
    _, _, held_out = validate(data, penalties=(3.0,))
    train, test = data.rows(data.sections != 2), data.rows(data.sections == 2)
    basis = fit_basis(train.features, train.targets, train.sections, n_latent=F, n_colour=N_COLOUR, colour_share=0.25)
    expected = pearson(basis.ridge(3.0).predict(test.features[:, 0]), test.targets)
    np.testing.assert_allclose(held_out.pcc[2], expected, atol=1e-5)
    assert held_out.panel[2] == pytest.approx(expected.mean(), abs=1e-5)


def test_permuted_targets_leave_no_held_out_correlation():
    means = []
    for seed in range(3):
        data = planted(seed)
        shuffled = np.random.default_rng(seed).permutation(data.targets)
        means.append(validate(TrainingSet(**{**vars(data), "targets": shuffled}))[2].pcc.mean())
    assert abs(np.mean(means)) < 0.08


def test_groups_of_several_sections_are_held_out_together():
    data = planted(noise=2.0)
    _, _, by_patient = validate(data, data.patients, penalties=(3.0,))
    train, test = data.rows(data.patients != 1), data.rows(data.sections == 3)
    basis = fit_basis(train.features, train.targets, train.sections, n_latent=F, n_colour=N_COLOUR, colour_share=0.25)
    expected = pearson(basis.ridge(3.0).predict(test.features[:, 0]), test.targets)
    assert by_patient.sections.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(by_patient.pcc[3], expected, atol=1e-5)


def test_a_weak_penalty_is_chosen_for_a_clean_signal():
    chosen, _, _ = validate(planted(noise=0.01), penalties=(0.01, 1000.0))
    assert chosen == 0.01


def test_planted_classes_are_recovered_on_held_out_sections():
    data = planted()
    _, _, held_out = validate(data, n_classes=3)
    assert (held_out.logits.argmax(1) == data.codes).mean() > 0.85


def test_spots_without_a_label_are_not_used_for_the_annotation():
    data = planted()
    codes = data.codes.copy()
    codes[::2] = -1
    misleading = TrainingSet(**{**vars(data), "codes": codes})
    _, _, held_out = validate(misleading, n_classes=3)
    assert (held_out.logits.argmax(1)[::2] == data.codes[::2]).mean() > 0.8


def test_validating_twice_gives_the_same_figures():
    first, second = (validate(planted(), n_classes=3) for _ in range(2))
    assert first[:2] == second[:2]
    np.testing.assert_array_equal(first[2].pcc, second[2].pcc)
    np.testing.assert_array_equal(first[2].logits, second[2].logits)


def test_colour_alone_keeps_the_last_features_of_the_identity(arrays):
    features, targets, sections = arrays
    data = TrainingSet(features, targets, sections, sections, sections, N_COLOUR)
    np.testing.assert_array_equal(data.colour_only().features, features[:, :1, F - N_COLOUR :])


# Annotation head


@pytest.mark.parametrize("n_classes", [2, 3])
def test_softmax_gives_the_probabilities_of_scikit_learn(n_classes):
    data = planted(n_classes=n_classes)
    embedding = data.features[:, 0].astype(float)
    weight, bias = fit_softmax(embedding, data.codes, n_classes, 0.3)
    scale = np.sqrt(np.square(embedding).mean())
    oracle = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000).fit(embedding / scale, data.codes)
    np.testing.assert_allclose(
        softmax(embedding @ weight + bias, axis=1), oracle.predict_proba(embedding / scale), atol=1e-3
    )


def test_softmax_of_a_single_class_is_certain():
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
