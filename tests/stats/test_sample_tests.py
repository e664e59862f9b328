import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from he2gene_sc.stats import (
    mixed_model,
    paired_moderated_t,
    prediction_powered_mean,
    ranking_agreement,
    squeeze_variance,
    t_test,
    trigamma_inverse,
)

# ----------------------------------------------------------------------------------------------- pseudobulk


@given(st.floats(1e-5, 1e5))
def test_trigamma_is_inverted(x):
    assert special.polygamma(1, trigamma_inverse(x)) == pytest.approx(x, rel=1e-6)


def test_prior_is_recovered():
    rng = np.random.default_rng(0)
    d0, prior, df = 6.0, 0.3, 7
    true = prior * d0 / rng.chisquare(d0, 100_000)
    posterior, found_prior, found_d0 = squeeze_variance(true * rng.chisquare(df, len(true)) / df, df)
    assert found_d0 == pytest.approx(d0, rel=0.05)
    assert found_prior == pytest.approx(prior, rel=0.02)
    assert np.corrcoef(np.log(posterior), np.log(true))[0, 1] > 0.7


def test_posterior_variances_equal_smyth():
    # From the formulas of Smyth 2004, section 6.2; the prior is solved by a root finder.
    from scipy.optimize import brentq

    s2, df = np.array([0.2, 0.5, 1.1, 3.0, 0.05]), 4
    e = np.log(s2) - special.digamma(df / 2) + np.log(df / 2)
    spread = ((e - e.mean()) ** 2).sum() / 4 - special.polygamma(1, df / 2)
    d0 = 2 * brentq(lambda y: special.polygamma(1, y) - spread, 1e-3, 1e3)
    prior = np.exp(e.mean() + special.digamma(d0 / 2) - np.log(d0 / 2))
    posterior, found_prior, found_d0 = squeeze_variance(s2, df)
    np.testing.assert_allclose([found_prior, found_d0], [prior, d0], rtol=1e-6)
    np.testing.assert_allclose(posterior, (d0 * prior + df * s2) / (d0 + df), rtol=1e-6)


def test_variances_that_differ_by_chance_become_the_prior():
    rng = np.random.default_rng(1)
    d = rng.standard_normal((8, 2000)) * np.linspace(1, 1.0001, 2000)
    alike = np.tile(d[:, :1], 50)
    posterior, prior, d0 = squeeze_variance(alike.var(0, ddof=1), 7)
    assert np.isinf(d0)
    np.testing.assert_allclose(posterior, prior)
    # As in limma: at most the degrees of freedom of all genes together.
    assert paired_moderated_t(alike).df[0] == 7 * 50


@pytest.mark.parametrize("alike", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, np.nan, 1.0]])
def test_expected_variances_are_one_positive_number_per_gene(alike):
    with pytest.raises(ValueError, match="`alike` must be 3 positive numbers"):
        squeeze_variance(np.ones(3), 2, alike=np.array(alike))


def test_without_a_prior_the_test_is_the_paired_t_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 6, 30))
    plain = paired_moderated_t(a - b, moderate=False)
    expected = stats.ttest_rel(a, b)
    np.testing.assert_allclose(plain.scores, expected.statistic)
    np.testing.assert_allclose(plain.pvalues, expected.pvalue)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([plain.ci_low, plain.ci_high], [interval.low, interval.high])
    one = paired_moderated_t((a - b)[:, :1])
    assert one.pvalues[0] == pytest.approx(expected.pvalue[0])


def test_moderated_t_follows_from_the_posterior_variance():
    rng = np.random.default_rng(3)
    d = rng.normal(size=(8, 500)) * rng.gamma(2, 1, 500)
    test = paired_moderated_t(d)
    posterior, _, d0 = squeeze_variance(d.var(0, ddof=1), 7)
    np.testing.assert_allclose(test.scores, d.mean(0) / np.sqrt(posterior / 8))
    np.testing.assert_allclose(test.pvalues, 2 * stats.t.sf(np.abs(test.scores), d0 + 7))


def test_a_constant_gene_has_no_p_value():
    test = t_test(np.array([0.0, 1.0, 3.0]), np.array([0.0, 0.5, np.nan]), 7)
    for found in (test.scores, test.pvalues, test.ci_low, test.ci_high):
        np.testing.assert_array_equal(np.isnan(found), [True, False, True])


def test_moderated_t_has_the_nominal_error_rate():
    rng = np.random.default_rng(4)
    scale = np.sqrt(4 / rng.chisquare(4, 5000))
    rate = (paired_moderated_t(rng.normal(size=(8, 5000)) * scale).pvalues < 0.05).mean()
    assert 0.04 < rate < 0.06


def test_prior_follows_the_expected_variances():
    rng = np.random.default_rng(5)
    d0, df = 8.0, 7
    x = rng.normal(size=50_000)
    prior = np.exp(0.5 * x + 0.3 * np.sin(x))
    true = prior * d0 / rng.chisquare(d0, len(x))
    posterior, found_prior, found_d0 = squeeze_variance(true * rng.chisquare(df, len(x)) / df, df, np.exp(x))
    assert found_d0 == pytest.approx(d0, rel=0.05)
    middle = np.abs(x) < 2
    np.testing.assert_allclose(found_prior[middle], prior[middle], rtol=0.08)
    assert np.corrcoef(np.log(posterior), np.log(true))[0, 1] > 0.85


@pytest.mark.parametrize("genes", [50, 500])
def test_equal_expected_variances_give_one_prior(genes):
    d = np.random.default_rng(6).normal(size=(8, genes))
    one, other = paired_moderated_t(d), paired_moderated_t(d, alike=np.full(genes, 2.0))
    np.testing.assert_allclose(one.pvalues, other.pvalues)


@pytest.mark.parametrize("genes", [2, 8, 40, 400])
def test_units_of_genes_do_not_matter_with_expected_variances(genes):
    rng = np.random.default_rng(7)
    d, scale = rng.normal(size=(8, genes)), np.exp(np.linspace(-1, 1, genes))
    test, again = (paired_moderated_t(d * unit, alike=np.square(unit)) for unit in (scale, 7 * scale))
    np.testing.assert_allclose(test.pvalues, again.pvalues, rtol=1e-6)
    if genes < 200:
        np.testing.assert_allclose(test.pvalues, paired_moderated_t(d).pvalues, rtol=1e-6)


def test_spot_variances_keep_the_error_rate_and_increase_power_if_scales_differ():
    rng = np.random.default_rng(8)
    scale = rng.lognormal(0, 0.5, 5000)
    d = rng.normal(size=(8, 5000)) * scale
    # Estimated variances, too.
    alike = scale**2 * rng.chisquare(200, 5000) / 200
    rates = paired_moderated_t(d, alike=alike).pvalues
    assert 0.04 < (rates < 0.05).mean() < 0.06
    assert 0.0002 < (rates < 0.001).mean() < 0.003
    shifted = d + 1.5 * scale
    plain, informed = paired_moderated_t(shifted), paired_moderated_t(shifted, alike=alike)
    assert (informed.pvalues < 0.001).mean() > (plain.pvalues < 0.001).mean() + 0.1


@pytest.mark.parametrize(("n", "genes"), [(3, 10), (3, 40), (4, 10)])
def test_few_genes_have_the_nominal_error_rate(n, genes):
    rng = np.random.default_rng(9)
    low = []
    for _ in range(8000 // genes):
        scale = rng.lognormal(0, 0.5, genes)
        alike = scale**2 * rng.chisquare(100, genes) / 100
        low.append((paired_moderated_t(rng.normal(size=(n, genes)) * scale, alike=alike).pvalues < 0.05).mean())
    assert 0.035 < np.mean(low) < 0.06


def test_few_genes_with_unrelated_variances_have_one_prior():
    rng = np.random.default_rng(10)
    low = []
    for _ in range(300):
        d = rng.normal(size=(3, 30))
        low.append(paired_moderated_t(d, alike=rng.lognormal(0, 1, 30)).pvalues < 0.05)
    assert 0.04 < np.mean(low) < 0.058


@pytest.mark.parametrize("alike", [np.ones(3), np.array([1, np.nan, 1, 2]), np.array([1.0, 0, 1, 2]), np.ones((4, 1))])
def test_invalid_variances_raise(alike):
    with pytest.raises(ValueError, match="`alike` must be 4 positive numbers"):
        paired_moderated_t(np.ones((3, 4)), alike=alike)


def test_lower_bounds_of_variances_count_without_weights_too():
    d = np.random.default_rng(11).normal(size=(5, 30))
    least = np.linspace(5, 50, 30) * np.ones((5, 1))
    test, even = (paired_moderated_t(d, weights=weights, least=least) for weights in (None, np.ones((5, 30))))
    np.testing.assert_array_equal(test.pvalues, even.pvalues)
    np.testing.assert_allclose(test.scores, d.mean(0) / np.sqrt(least[0] / 5))


def test_one_sample_raises():
    with pytest.raises(ValueError, match="1 samples"):
        paired_moderated_t(np.zeros((1, 3)))


# ----------------------------------------------------------------------------------------------- mixed


def _cells(rng, n=8, genes=20, between=1.0):
    sample, group = np.repeat(np.arange(n), 2), np.tile([True, False], n)
    return rng.normal(0, between, (n, genes))[sample] + rng.normal(size=(2 * n, genes)), group, sample


def test_mixed_model_equals_the_paired_t_test_if_samples_differ():
    values, group, sample = _cells(np.random.default_rng(0), between=5.0)
    test = mixed_model(values, group, sample)
    expected = stats.ttest_rel(values[group], values[~group])
    np.testing.assert_allclose(test.pvalues, expected.pvalue, atol=1e-6)
    np.testing.assert_allclose(test.effect, (values[group] - values[~group]).mean(0), atol=1e-6)
    assert (test.df == 7).all()


def test_mixed_model_does_not_depend_on_order_or_names():
    values, group, sample = _cells(np.random.default_rng(1), genes=4)
    order = np.random.default_rng(2).permutation(len(group))
    names = np.array([f"P{9 - s}" for s in sample])
    one, other = mixed_model(values, group, sample), mixed_model(values[order], group[order], names[order])
    np.testing.assert_allclose(one.pvalues, other.pvalues, rtol=1e-4)


def test_mixed_model_uses_samples_with_one_group():
    values, group, sample = _cells(np.random.default_rng(3), genes=3)
    test = mixed_model(values[:-1], group[:-1], sample[:-1])
    assert (test.df == 6).all()
    assert np.isfinite(test.pvalues).all()


def test_mixed_model_adjusts_for_covariates():
    rng = np.random.default_rng(4)
    values, group, sample = _cells(rng, genes=10)
    depth = group + rng.normal(size=len(group))
    confounded = values + 5 * depth[:, None]
    adjusted = mixed_model(confounded, group, sample, depth[:, None])
    np.testing.assert_allclose(adjusted.effect, mixed_model(values, group, sample, depth[:, None]).effect, atol=1e-3)
    assert (adjusted.df == 6).all()
    with pytest.raises(ValueError, match="leave it out"):
        mixed_model(values, group, sample, group[:, None].astype(float))
    with pytest.raises(ValueError, match="degrees of freedom"):
        mixed_model(values[:4], group[:4], sample[:4], rng.normal(size=(4, 1)))


def test_mixed_model_has_no_p_value_for_a_constant_gene():
    values, group, sample = _cells(np.random.default_rng(5), genes=2)
    values[:, 0] = 3.0
    np.testing.assert_array_equal(np.isnan(mixed_model(values, group, sample).pvalues), [True, False])


@pytest.mark.slow
def test_mixed_model_error_is_by_generalised_least_squares_if_the_hessian_fails():
    # Eight samples, three with both groups, six SD apart: the Hessian of statsmodels gives NaN here.
    rng = np.random.default_rng(5)
    sample = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7])
    group = np.array([True, False, True, False, True, False, False, True, False, True, False])
    values = 6 * group[:, None] + rng.standard_normal((len(group), 150))
    with warnings.catch_warnings(action="error"):
        test = mixed_model(values, group, sample)
    assert np.isfinite(test.pvalues).all()
    assert test.pvalues.max() < 0.05


# ----------------------------------------------------------------------------------------------- ppi


def test_prediction_powered_mean_equals_the_published_estimate():
    rng = np.random.default_rng(0)
    y, f = rng.normal(size=(2, 30, 1))
    f, more = f + y, rng.normal(size=(300, 1))
    test = prediction_powered_mean(y, f, more)
    # Weight and mean (equation 3) of Angelopoulos, Duchi and Zrnic 2023; a weight of 1 is the estimate of Science 2023.
    variance = ((f - f.mean()) ** 2).sum() + ((more - more.mean()) ** 2).sum()
    weight = np.cov(y[:, 0], f[:, 0])[0, 1] / ((1 + 30 / 300) * variance / 328)
    assert test.weight[0] == pytest.approx(weight)
    assert test.effect[0] == pytest.approx(weight * more.mean() + (y - weight * f).mean())
    assert test.ci_high[0] - test.effect[0] == pytest.approx(test.effect[0] - test.ci_low[0])


def test_a_useless_prediction_has_weight_zero():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(30, 4))
    test = prediction_powered_mean(y, np.zeros((30, 4)), np.zeros((50, 4)))
    assert (test.weight == 0).all()
    np.testing.assert_allclose(test.effect, y.mean(0))


def test_a_constant_bias_cancels():
    rng = np.random.default_rng(2)
    y, more = rng.normal(size=(30, 4)), rng.normal(size=(90, 4))
    f = y + rng.normal(size=y.shape)
    one, other = prediction_powered_mean(y, f, more), prediction_powered_mean(y, f + 7, more + 7)
    np.testing.assert_allclose(one.effect, other.effect)
    np.testing.assert_allclose(one.ci_low, other.ci_low)


@pytest.mark.parametrize(("r", "widest"), [(0.8, 0.8), (0.0, 1.05)])
def test_prediction_powered_intervals_have_nominal_coverage(r, widest):
    rng = np.random.default_rng(3)
    y = rng.standard_normal((330, 5000))
    f = r * y + np.sqrt(1 - r**2) * rng.standard_normal(y.shape) + 2
    test = prediction_powered_mean(y[:30], f[:30], f[30:])
    assert 0.94 <= ((test.ci_low <= 0) & (test.ci_high >= 0)).mean() <= 0.96
    alone = 2 * stats.t.ppf(0.975, 29) * y[:30].std(0, ddof=1) / np.sqrt(30)
    assert (test.ci_high - test.ci_low).mean() <= widest * alone.mean()


def test_prediction_powered_p_values_need_eight_measured_samples():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((58, 20_000))
    f = 0.5 * y + np.sqrt(0.75) * rng.standard_normal(y.shape)
    for n in (3, 7, 8):
        test = prediction_powered_mean(y[:n], f[:n], f[n:])
        assert np.isnan(test.pvalues).all() == (n < 8)
        assert ((test.ci_low <= 0) & (test.ci_high >= 0)).mean() > 0.94
    assert (test.pvalues < 1e-3).mean() < 3e-3


def test_prediction_powered_mean_raises_for_invalid_shapes():
    y = np.zeros((5, 2))
    with pytest.raises(ValueError, match="have different shapes"):
        prediction_powered_mean(y, y[:4], y)
    with pytest.raises(ValueError, match="2 measured"):
        prediction_powered_mean(y[:2], y[:2], y)


# ----------------------------------------------------------------------------------------------- ranking


def test_rankings_are_compared():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=100)
    same = ranking_agreement(
        measured, measured, np.abs(measured) > 1, predicted_scores=measured, measured_scores=measured, k=(10,)
    )
    assert same["spearman"] == pytest.approx(1)
    assert same["auroc"] == 1
    assert same["precision_at_10"] == 1
    assert same["chance_at_10"] == 0.1
    turned = ranking_agreement(
        -measured, measured, measured > 1, predicted_scores=-measured, measured_scores=measured, k=(10, 200)
    )
    assert turned["sign_agreement"] == 0
    assert turned["precision_at_10"] == 0
    assert np.isnan(turned["precision_at_200"])


def test_agreement_is_nan_without_genes_to_compare():
    empty = np.zeros(0)
    found = ranking_agreement(empty, empty, empty, predicted_scores=empty, measured_scores=empty, k=(5,))
    assert all(np.isnan(value) for value in found.values())
    none = ranking_agreement([1, 2, 3], [1, 3, 2], [False] * 3, predicted_scores=[1, 2, 3], measured_scores=[1, 3, 2])
    assert np.isnan(none["auroc"])
    assert np.isnan(none["sign_agreement_significant"])
