import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import pearsonr

from he2gene_sc.stats import log_normalise, noise_ceiling, pearson, skill

few = settings(max_examples=40, deadline=None)
counts_arrays = arrays(np.int64, st.tuples(st.integers(2, 12), st.integers(1, 6)), elements=st.integers(0, 50))


# pearson


@given(seed=st.integers(0, 10_000), n=st.integers(3, 40), offset=st.floats(-100, 100), scale=st.floats(0.01, 100))
@few
def test_pearson_equals_scipy(seed, n, offset, scale):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, 4)) * scale + offset
    b = a * [1, -1, 0, 0.5] + rng.normal(size=(n, 4)) * scale
    expected = [pearsonr(a[:, j], b[:, j]).statistic for j in range(4)]
    np.testing.assert_allclose(pearson(a, b), expected, atol=1e-9)


@given(constant=st.floats(-1e6, 1e6), scale=st.floats(1e-3, 1e6))
@few
def test_pearson_of_a_constant_column_is_nan(constant, scale):
    a = np.random.default_rng(0).normal(size=(25, 2)) * scale
    b = a.copy()
    b[:, 0] = constant
    for found in (pearson(a, b), pearson(b, a)):
        assert np.isnan(found[0])
        assert found[1] == pytest.approx(1)


def test_pearson_does_not_depend_on_the_unit():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    np.testing.assert_allclose(pearson(a * 1e-9, b * 1e-9), pearson(a, b), atol=1e-9)


def test_pearson_of_float32_is_computed_in_double_precision():
    a = (1000 + np.random.default_rng(0).normal(size=(500, 1))).astype(np.float32)
    assert pearson(a, a)[0] == pytest.approx(1, abs=1e-12)


# skill


def test_skill_is_the_share_of_squared_error_that_is_removed():
    rng = np.random.default_rng(1)
    measured, predicted, reference = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), rng.normal(size=3)
    expected = [
        1
        - sum((p - m) ** 2 for p, m in zip(predicted[:, j], measured[:, j], strict=True))
        / sum((reference[j] - m) ** 2 for m in measured[:, j])
        for j in range(3)
    ]
    np.testing.assert_allclose(skill(predicted, measured, reference), expected)


def test_skill_is_one_for_the_truth_zero_for_the_reference_and_negative_if_worse():
    measured = np.random.default_rng(2).normal(size=(20, 2))
    reference = np.array([0.3, -0.2])
    constant = np.tile(reference, (20, 1))
    assert skill(measured, measured, reference) == pytest.approx([1, 1])
    assert skill(constant, measured, reference) == pytest.approx([0, 0])
    assert (skill(-5 * measured, measured, reference) < 0).all()


def test_skill_is_nan_if_the_reference_is_perfect():
    assert np.isnan(skill(np.ones((4, 1)), np.zeros((4, 1)), np.zeros(1))).all()


# noise_ceiling


def deep_counts(depth, n=300):
    rng = np.random.default_rng(0)
    signal = np.exp(rng.normal(size=(n, 5)))
    return rng.poisson(depth * np.concatenate([signal, np.full((n, 1), 200.0)], axis=1))


def test_noise_ceiling_is_near_one_for_deep_counts_with_a_strong_signal():
    assert (noise_ceiling(deep_counts(100))[:5] > 0.98).all()


def test_noise_ceiling_is_near_zero_for_pure_counting_noise():
    counts = np.random.default_rng(1).poisson(2.0, (600, 300))
    assert np.mean(noise_ceiling(counts)) < 0.2


def test_noise_ceiling_falls_with_depth():
    ceilings = [noise_ceiling(deep_counts(depth))[:5].mean() for depth in (0.1, 1, 10)]
    assert ceilings == sorted(ceilings)
    assert ceilings[0] < 0.8 < 0.9 < ceilings[2]


def test_noise_ceiling_is_the_correlation_of_the_expected_value():
    rng = np.random.default_rng(3)
    rate = np.concatenate([np.exp(rng.normal(size=(1000, 2))) * [2.0, 10.0], np.full((1000, 1), 1000.0)], axis=1)
    expected = np.mean([log_normalise(rng.poisson(rate)) for _ in range(100)], axis=0)
    counts = rng.poisson(rate)
    reached = pearson(expected, log_normalise(counts))[:2]
    np.testing.assert_allclose(noise_ceiling(counts)[:2], reached, atol=0.03)


@given(counts=counts_arrays, seed=st.integers(0, 100))
@pytest.mark.filterwarnings("error")
@few
def test_noise_ceiling_lies_between_zero_and_one_or_is_nan(counts, seed):
    found = noise_ceiling(counts, n_splits=3, seed=seed)
    assert found.shape == (counts.shape[1],)
    assert (np.isnan(found) | ((found >= 0) & (found <= 1))).all()


@pytest.mark.parametrize("largest", [127, 128, 255, 65_535, 10**10])
def test_noise_ceiling_of_large_counts_is_that_of_their_values(largest):
    counts = np.column_stack([np.linspace(0, largest, 20).round(), np.full(20, 7.0)])
    assert noise_ceiling(counts)[0] > 0.9


def test_noise_ceiling_does_not_depend_on_the_blocks(monkeypatch):
    counts = deep_counts(0.3, n=40)
    whole = noise_ceiling(counts)
    monkeypatch.setattr("he2gene_sc.stats._accuracy._SPLIT", 1)
    assert noise_ceiling(counts).tobytes() == whole.tobytes()


def test_noise_ceiling_is_the_correlation_of_log_normalised_halves():
    counts = scipy.sparse.csc_array(deep_counts(0.3, n=40))
    rng = np.random.default_rng(7)
    r = []
    for _ in range(3):
        half = counts.copy()
        half.data = rng.binomial(counts.data, 0.5)
        r.append(pearson(log_normalise(half), log_normalise(counts - half)))
    r = np.clip(np.mean(r, 0), 0, 1)
    np.testing.assert_allclose(noise_ceiling(counts, n_splits=3, seed=7), np.sqrt(2 * r / (1 + r)), atol=1e-6)


def test_noise_ceiling_of_selected_genes_does_not_depend_on_the_selection():
    counts = deep_counts(1, n=60)
    genes = np.array([3, 0])
    np.testing.assert_array_equal(noise_ceiling(counts, genes=genes), noise_ceiling(counts)[genes])
    assert len(noise_ceiling(counts, genes=np.empty(0, int))) == 0


def test_noise_ceiling_of_a_gene_without_counts_is_nan():
    counts = np.random.default_rng(0).poisson(5, (30, 3))
    counts[:, 1] = 0
    assert np.isnan(noise_ceiling(counts)).tolist() == [False, True, False]


def test_noise_ceiling_is_the_same_for_the_same_seed_and_for_sparse_counts():
    counts = deep_counts(1, n=50)
    np.testing.assert_array_equal(noise_ceiling(counts, seed=4), noise_ceiling(scipy.sparse.csr_array(counts), seed=4))
    assert (noise_ceiling(counts, seed=4) != noise_ceiling(counts, seed=5)).any()


# log_normalise


@given(counts=counts_arrays)
@few
def test_log_normalise_equals_a_plain_loop_and_sparse_equals_dense(counts):
    expected = [[np.log(1 + 1e4 * c / max(1, row.sum())) for c in row] for row in counts]
    for matrix in (counts, scipy.sparse.csr_array(counts), scipy.sparse.csc_matrix(counts)):
        found = log_normalise(matrix)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_log_normalise_of_a_spot_without_counts_is_zero():
    assert log_normalise(np.array([[0, 0], [1, 1]])).tolist()[0] == [0, 0]


def test_log_normalise_does_not_overflow_small_integer_types():
    np.testing.assert_allclose(log_normalise(np.full((1, 4), 200, np.uint8)), np.log1p(2500), rtol=1e-6)
