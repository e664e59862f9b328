import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from sklearn import metrics

from he2gene_sc.stats import (
    _domains,
    admissible_shifts,
    agreement,
    chaos,
    enrichment_agreement,
    match,
    pas,
    shift_test,
    silhouette,
)


def lattice(rows, columns, hexagonal=False):
    row, column = np.mgrid[:rows, :columns]
    if hexagonal:
        return np.c_[(column + 0.5 * (row % 2)).ravel(), (row * np.sqrt(0.75)).ravel()]
    return np.c_[column.ravel(), row.ravel()].astype(float)


def compact(rng, xy, k):
    """Voronoi cells of random seeds within the extent of the spots; at least two cells have spots."""
    while True:
        labels = cKDTree(rng.uniform(xy.min(0), xy.max(0), (k, 2))).query(xy)[1]
        labels = np.unique(labels, return_inverse=True)[1]
        if labels.max():
            return labels


def test_agreement_equals_scikit_learn():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    assert agreement(a, b) == {
        "ari": metrics.adjusted_rand_score(a, b),
        "nmi": metrics.normalized_mutual_info_score(a, b),
        "ami": metrics.adjusted_mutual_info_score(a, b),
        "homogeneity": metrics.homogeneity_score(a, b),
        "completeness": metrics.completeness_score(a, b),
    }


def test_observed_and_shifted_indices_equal_scikit_learn_over_matched_spots():
    rng = np.random.default_rng(1)
    xy = lattice(7, 9)
    domains, clusters = compact(rng, xy, 4), compact(rng, xy, 3)
    shifts = admissible_shifts(xy)
    test = shift_test([domains], [clusters], shifts)
    assert test.observed == pytest.approx(metrics.adjusted_rand_score(domains, clusters), abs=1e-12)
    for shift, value in zip(shifts, test.null, strict=True):
        meets = shift >= 0
        expected = metrics.adjusted_rand_score(domains[shift[meets]], clusters[meets])
        assert value == pytest.approx(expected, abs=1e-12)
    assert test.p_value == (1 + (test.null >= test.observed - 1e-12).sum()) / (1 + len(shifts))


def test_pairs_are_averaged_for_every_shift():
    rng = np.random.default_rng(2)
    xy = lattice(8, 8)
    a, b, c = (compact(rng, xy, 3) for _ in range(3))
    shifts = admissible_shifts(xy)
    both = shift_test([a, a], [b, c], shifts)
    apart = [shift_test([a], [labels], shifts) for labels in (b, c)]
    assert both.observed == pytest.approx(np.mean([t.observed for t in apart]))
    np.testing.assert_allclose(both.null, np.mean([t.null for t in apart], axis=0))


@pytest.mark.parametrize("hexagonal", [False, True])
def test_shifts_move_all_spots_equally_and_match_most_of_them(hexagonal):
    xy = lattice(8, 9, hexagonal)
    shifts = admissible_shifts(xy, min_overlap=0.6)
    assert len(np.unique(shifts, axis=0)) == len(shifts)
    assert ((shifts >= 0).mean(1) >= 0.6 - 1e-9).all()
    assert not (shifts == np.arange(len(xy))).all(1).any()
    turned = 0
    for shift in shifts:
        meets = shift >= 0
        step, sum_ = xy[shift[meets]] - xy[meets], xy[shift[meets]] + xy[meets]
        is_shift, is_turn = np.ptp(step, axis=0).max() < 1e-9, np.ptp(sum_, axis=0).max() < 1e-9
        assert is_shift or is_turn
        turned += is_turn
    assert 0 < turned < len(shifts)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1e4), st.floats(-1e5, 1e5), st.floats(0, 6.28))
def test_shifts_do_not_depend_on_unit_origin_or_direction(scale, origin, angle):
    xy = lattice(5, 6)[np.random.default_rng(0).permutation(30)[:27]]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = admissible_shifts(xy)
    found = admissible_shifts(scale * xy @ turn.T + origin)
    assert {row.tobytes() for row in found} == {row.tobytes() for row in expected}


def test_a_skewed_lattice_has_the_same_shifts():
    xy = lattice(9, 9)
    askew = xy + np.random.default_rng(0).uniform(-0.07, 0.07, xy.shape)
    assert len(admissible_shifts(askew)) == len(admissible_shifts(xy))


def test_shifts_are_sampled_if_there_are_too_many():
    xy = lattice(12, 12)
    every = {row.tobytes() for row in admissible_shifts(xy)}
    drawn = admissible_shifts(xy, n_max=20, seed=3)
    assert len(drawn) == 20
    assert {row.tobytes() for row in drawn} <= every
    np.testing.assert_array_equal(drawn, admissible_shifts(xy, n_max=20, seed=3))
    assert len(admissible_shifts(xy, n_max=10_000)) == len(every)


def test_shifts_of_many_spots_are_tested_on_a_subset_first(monkeypatch):
    xy = lattice(20, 60)[::-1]
    found = admissible_shifts(xy, n_max=60)
    assert len(found) == 60
    monkeypatch.setattr(_domains, "_PROBES", len(xy))
    np.testing.assert_array_equal(found, admissible_shifts(xy, n_max=60))


def test_the_silhouette_of_many_spots_uses_a_subset(monkeypatch):
    rng = np.random.default_rng(0)
    domains = rng.integers(0, 3, 900)
    features = domains[:, None] + 0.3 * rng.standard_normal((900, 4))
    whole = silhouette(features, domains)
    monkeypatch.setattr(_domains, "MAX_SILHOUETTE", 300)
    some = silhouette(features, domains)
    assert some != whole
    assert some == pytest.approx(whole, abs=0.03)
    assert some == silhouette(features, domains)


def test_without_a_shift_there_is_no_p_value():
    domains = np.array([0, 1])
    assert np.isnan(shift_test([domains], [domains], np.zeros((0, 2), np.int32)).p_value)


@pytest.mark.parametrize("kind", ["compact", "strata", "rare", "field"])
def test_independent_maps_are_rarely_significant_but_more_often_by_shuffling(kind):
    rng = np.random.default_rng(5)
    xy = lattice(13, 13)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    root = np.linalg.cholesky(np.exp(-distance / 4) + 1e-9 * np.eye(len(xy)))

    def draw():
        if kind == "compact":
            return compact(rng, xy, rng.integers(2, 6))
        if kind == "strata":
            return (xy[:, 0] > rng.uniform(0, 12)).astype(int)
        if kind == "rare":
            near = np.linalg.norm(xy - xy[rng.integers(len(xy))], axis=1)
            return (near < np.sort(near)[9]).astype(int)
        return np.digitize(root @ rng.standard_normal(len(xy)), [-0.6, 0.4])

    shifts = admissible_shifts(xy)
    shuffles = np.array([rng.permutation(len(xy)) for _ in range(99)])
    p_values = []
    for _ in range(250):
        a, b = draw(), draw()
        p_values.append([shift_test([a], [b], moves).p_value for moves in (shifts, shuffles)])
    by_shift, by_shuffle = (np.array(p_values) < 0.05).mean(0)
    # 250 slides: 6.5 % and two standard errors.
    assert by_shift <= 0.065 + 2 * np.sqrt(0.065 * 0.935 / 250)
    assert by_shuffle > 0.08


def test_domains_that_follow_the_clusters_are_significant():
    rng = np.random.default_rng(6)
    xy = lattice(13, 13)
    shifts = admissible_shifts(xy)
    called = []
    for _ in range(50):
        clusters = compact(rng, xy, 8) % 3
        domains = np.where(rng.uniform(size=len(xy)) < 0.15, rng.integers(0, 3, len(xy)), clusters)
        called.append(shift_test([domains], [clusters], shifts).p_value < 0.05)
    assert np.mean(called) > 0.9


def test_invalid_input_raises():
    with pytest.raises(ValueError, match="`xy` is"):
        admissible_shifts(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="`min_overlap` is 0"):
        admissible_shifts(lattice(3, 3), min_overlap=0)
    labels, shifts = np.zeros(9, int), admissible_shifts(lattice(3, 3))
    with pytest.raises(ValueError, match="pairs of labels"):
        shift_test([labels], [labels[:5]], shifts)
    with pytest.raises(ValueError, match="codes from 0"):
        shift_test([labels - 1], [labels], shifts)


def test_chaos_is_one_for_blocks_and_the_diagonal_for_a_chessboard():
    xy = lattice(6, 6)
    halves, chessboard = (xy[:, 0] > 2).astype(int), (xy.sum(1) % 2).astype(int)
    assert chaos(xy, halves) == pytest.approx(1)
    assert chaos(250 * xy + 7, chessboard) == pytest.approx(np.sqrt(2))
    single = halves.copy()
    single[0] = 9
    assert chaos(xy, single) == pytest.approx(1)
    assert np.isnan(chaos(xy[:3], np.arange(3)))


def test_pas_counts_spots_that_differ_from_more_than_half_of_ten_neighbours():
    rng = np.random.default_rng(0)
    xy, labels = rng.uniform(size=(50, 2)), rng.integers(0, 3, 50)
    expected = 0
    for i in range(50):
        near = np.argsort(np.linalg.norm(xy - xy[i], axis=1))[1:11]
        expected += (labels[near] != labels[i]).sum() >= 6
    assert pas(xy, labels) == expected / 50
    assert pas(xy, np.zeros(50)) == 0


def test_silhouette_equals_scikit_learn_and_is_nan_with_one_domain():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    assert silhouette(x, labels) == pytest.approx(metrics.silhouette_score(x, labels))
    assert np.isnan(silhouette(x, np.zeros(30)))


def test_matching_recovers_renamed_labels():
    rng = np.random.default_rng(0)
    domains = rng.integers(0, 4, 80)
    names = np.array([2, 0, 3, 1])
    matched = match(domains, names[domains])
    np.testing.assert_array_equal(matched[names], np.arange(4))
    z = rng.normal(size=(4, 4))
    z = z + z.T
    renamed = z[np.ix_(matched, matched)]
    assert enrichment_agreement(z, renamed, matched) == pytest.approx(1)


def test_enrichment_agreement_of_one_matched_label_is_nan():
    assert np.isnan(enrichment_agreement(np.eye(2), np.eye(2), np.array([0, -1])))
