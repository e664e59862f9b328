import logging

import numpy as np
import pytest

from he2gene_sc.training import grouped_folds, neighbour_table, warn_of_unit

SECTIONS = np.repeat(np.arange(6), [10, 20, 30, 40, 50, 60])


def test_patients_are_held_out_if_there_are_several():
    unit, folds = grouped_folds(SECTIONS, SECTIONS // 2)
    assert unit == "patient"
    np.testing.assert_array_equal(folds, SECTIONS // 2)


def test_sections_are_held_out_if_there_is_one_patient():
    unit, folds = grouped_folds(SECTIONS, np.zeros_like(SECTIONS))
    assert unit == "section"
    np.testing.assert_array_equal(folds, SECTIONS)


@pytest.mark.parametrize("n_folds", [2, 3, 4])
def test_groups_are_not_split_and_folds_have_similar_sizes(n_folds):
    unit, folds = grouped_folds(SECTIONS, SECTIONS, n_folds=n_folds)
    assert unit == "patient"
    assert all(len(np.unique(folds[s == SECTIONS])) == 1 for s in range(6))
    sizes = np.bincount(folds)
    assert len(sizes) == n_folds
    assert np.ptp(sizes) <= 20


def test_there_are_at_most_as_many_folds_as_groups():
    assert grouped_folds(SECTIONS, SECTIONS, n_folds=99)[1].max() == 5


def test_blocks_are_strips_across_the_longer_side():
    x, y = (grid.ravel() for grid in np.mgrid[:20, :5])
    order = np.random.default_rng(0).permutation(100)
    coordinates = np.stack([x, y], axis=1)[order].astype(float)
    zero = np.zeros(100, int)
    unit, folds = grouped_folds(zero, zero, coordinates)
    assert unit == "block"
    assert np.bincount(folds).tolist() == [20] * 5
    for fold in range(4):
        assert coordinates[folds == fold, 0].max() < coordinates[folds == fold + 1, 0].min()


def test_every_section_is_split_if_blocks_are_requested():
    coordinates = np.random.default_rng(0).uniform(size=(len(SECTIONS), 2))
    unit, folds = grouped_folds(SECTIONS, SECTIONS, coordinates, n_folds=2, unit="block")
    assert unit == "block"
    assert all(abs((folds[s == SECTIONS] == 0).mean() - 0.5) < 0.01 for s in range(6))


def test_folds_are_deterministic():
    first, second = (grouped_folds(SECTIONS, SECTIONS, n_folds=3)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"patients": np.zeros_like(SECTIONS), "unit": "patient"}, "there is only one"),
        ({"unit": "block", "coordinates": np.zeros((len(SECTIONS), 2)), "n_folds": 11}, "10 spots cannot be cut"),
    ],
)
def test_invalid_arguments_of_folds_raise(arguments, match):
    arguments = {"sections": SECTIONS, "patients": SECTIONS} | arguments
    with pytest.raises(ValueError, match=match):
        grouped_folds(**arguments)


@pytest.mark.parametrize(
    ("unit", "message"), [("patient", ""), ("section", "not for other patients"), ("block", "SAME section")]
)
def test_limitations_of_the_unit_are_logged(caplog, unit, message):
    with caplog.at_level(logging.WARNING, "he2gene_sc"):
        warn_of_unit(unit)
    assert message in caplog.text
    assert bool(caplog.text) == bool(message)


# Neighbours


def square(n=5, pitch=200.0):
    return pitch * np.stack(np.mgrid[:n, :n], axis=-1).reshape(-1, 2)


def rotated(points, degrees):
    a = np.deg2rad(degrees)
    return points @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


@pytest.mark.parametrize("degrees", [0, 17, 45])
@pytest.mark.parametrize("pitch", [None, 200.0])
def test_spots_of_a_square_grid_have_eight_neighbours(degrees, pitch):
    rng = np.random.default_rng(0)
    points = square() + rng.uniform(-14, 14, (25, 2))
    table = neighbour_table(rotated(points, degrees), pitch)
    grid = np.stack(np.mgrid[:5, :5], axis=-1).reshape(-1, 2)
    for spot, row in enumerate(table):
        expected = np.flatnonzero(np.abs(grid - grid[spot]).max(1) == 1)
        assert sorted(row[row >= 0]) == expected.tolist()
        assert (row[len(expected) :] == -1).all()


def test_spots_of_a_hexagonal_grid_have_six_neighbours():
    rows, columns = np.mgrid[:6, :6]
    points = np.stack([100.0 * (columns + 0.5 * (rows % 2)), 86.6 * rows], axis=-1).reshape(-1, 2)
    table = neighbour_table(points)
    inner = (rows.ravel() % 5 > 0) & (columns.ravel() % 5 > 0)
    assert ((table >= 0).sum(1)[inner] == 6).all()


def test_missing_spots_leave_gaps_and_spots_of_other_sections_are_not_neighbours():
    points = square(3)
    kept = np.delete(np.arange(9), 4)
    table = neighbour_table(np.concatenate([points[kept], points]), 200.0, np.repeat([0, 1], [8, 9]))
    assert (table[:8] < 8).all()
    assert ((table[8:] >= 8) | (table[8:] == -1)).all()
    assert (table[:8] >= 0).sum(1).tolist() == [2, 4, 2, 4, 4, 2, 4, 2]


def test_neighbours_are_mutual():
    table = neighbour_table(square() + np.random.default_rng(1).uniform(-20, 20, (25, 2)), 200.0)
    pairs = {(i, j) for i, row in enumerate(table) for j in row if j >= 0}
    assert all((j, i) in pairs for i, j in pairs)


def test_a_single_spot_has_no_neighbour():
    assert (neighbour_table(np.zeros((1, 2))) == -1).all()
