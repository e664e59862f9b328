"""Held-out metrics: intervals over blocks of tissue, calibration, noise ceilings."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import norm

from he2gene_sc.models._card import BLOCK_BOOTSTRAP
from he2gene_sc.stats import calibration_error, noise_ceiling, pearson
from he2gene_sc.training import cross_validate, folds_of
from he2gene_sc.training._calibrate import UNSEEN_LOGIT
from he2gene_sc.training._closed_form.validate import Choice, HeldOut, Panel
from he2gene_sc.training._figures import (
    BLOCK_UM,
    annotation_figures,
    bootstrap,
    calibrate_logits,
    expression_figures,
    interval,
    partial_correlations,
    pooled_temperature,
)
from he2gene_sc.training._held_out import centre_by_part
from tests.helpers.tiny_sections import everything, grid, planted, recipe


def panel(predicted, measured, n_target):
    g = predicted.shape[1]
    return Panel(np.arange(n_target), np.arange(n_target, g), predicted, measured)


def pair(n, g, r=0.6, seed=0):
    """Return predicted and measured values with a known correlation, independent between spots."""
    rng = np.random.default_rng(seed)
    measured = rng.normal(size=(n, g))
    return (r * measured + np.sqrt(1 - r * r) * rng.normal(size=(n, g))).astype(np.float32), measured.astype(np.float32)


# Bootstrap


def test_one_block_gives_the_point_estimate_in_every_draw():
    predicted, measured = pair(30, 5)
    whole = panel(predicted + 100, measured - 3, 3)
    draws = bootstrap(whole, np.random.default_rng(0).uniform(0, BLOCK_UM - 1, (30, 2)), n_draws=7)
    assert draws.shape == (7, 2)
    np.testing.assert_allclose(draws, np.tile(whole.scores(), (7, 1)), atol=1e-6)


def test_draws_are_correlations_of_the_drawn_blocks():
    predicted, measured = pair(60, 4)
    centres = np.stack([np.repeat(np.arange(6), 10) * BLOCK_UM + 1, np.zeros(60)], axis=1)
    found = bootstrap(panel(predicted, measured, 2), centres, n_draws=20, seed=3)
    drawn = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=20)
    for row, counts in zip(found, drawn, strict=True):
        rows = np.concatenate(
            [np.flatnonzero(np.repeat(np.arange(6), 10) == b) for b in np.repeat(np.arange(6), counts)]
        )
        r = pearson(predicted[rows], measured[rows])
        np.testing.assert_allclose(row, [r[:2].mean(), r[2:].mean()], atol=1e-6)


def test_intervals_cover_the_true_correlation():
    covered = []
    for seed in range(60):
        predicted, measured = pair(240, 2, seed=seed)
        draws = bootstrap(panel(predicted, measured, 1), grid(240, width=16), n_draws=200)
        low, high = np.quantile(draws, (0.025, 0.975), axis=0)
        covered += list((low <= 0.6) & (high >= 0.6))
    assert 0.8 < np.mean(covered) < 1


def test_intervals_over_few_blocks_are_expanded_and_over_too_few_are_nan():
    predicted, measured = pair(60, 4)
    one_each = np.stack([np.arange(60) % 6 * BLOCK_UM + 1, np.zeros(60)], axis=1)
    whole = panel(predicted, measured, 2)
    found = interval(whole, one_each)
    # Six blocks: t of 5 degrees of freedom at 2.5 % is 2.571, times the root of 6 / 5 is 2.816, a normal tail of .0024.
    expected = np.quantile(
        bootstrap(whole, one_each), (norm.cdf(-2.5706 * np.sqrt(1.2)), norm.cdf(2.5706 * np.sqrt(1.2))), 0
    )
    np.testing.assert_allclose(found, expected.T, atol=1e-5)
    assert found.shape == (2, 2)
    assert np.isnan(interval(whole, np.minimum(one_each, [3 * BLOCK_UM + 1, 0]))).all()


def test_correlation_due_to_depth_only_gives_no_partial_correlation():
    rng = np.random.default_rng(0)
    totals = rng.lognormal(8, 0.5, 400)
    depth = np.log(totals)[:, None]
    by_depth = np.hstack([depth, depth**2, np.exp(-depth / 8), np.full((400, 1), 3.0)])
    truth = rng.normal(size=(400, 4))
    measured = by_depth + truth * [0.01, 0.05, 0.001, 0]
    assert panel(by_depth, measured, 2).scores()[0] > 0.99
    assert np.abs(partial_correlations(panel(by_depth, measured, 2), totals, np.zeros(400))).max() < 0.1
    # Correlation that is not due to depth is kept.
    alone = panel(truth + by_depth, measured, 3)
    assert partial_correlations(alone, totals, np.zeros(400))[0] > 0.99
    assert partial_correlations(panel(truth, truth, 3), np.full(400, 7.0), np.zeros(400)) == pytest.approx((1.0, 1.0))


def test_depth_is_subtracted_by_part_of_a_section():
    """Depth has a gradient over the parts, so that parts differ in their means."""
    rng = np.random.default_rng(0)
    parts = np.repeat(np.arange(5), 80)
    depth = 8 + 0.2 * rng.normal(size=400) + parts
    values = [centre_by_part(depth[:, None] + 0.1 * rng.normal(size=(400, 4)), parts) for _ in range(2)]
    assert panel(*values, 2).scores()[0] > 0.7
    assert np.abs(partial_correlations(panel(*values, 2), np.exp(depth), parts)).max() < 0.1


def test_correlated_neighbours_make_intervals_wider():
    rng = np.random.default_rng(0)
    centres = grid(256, width=16)
    block = np.unique(np.floor(centres / BLOCK_UM), axis=0, return_inverse=True)[1].ravel()
    widths = []
    for alike in (False, True):
        values = rng.normal(size=(2, 256, 20))
        predicted, measured = (v[block] if alike else v for v in values)
        draws = bootstrap(panel(predicted, measured, 10), centres)
        widths.append(np.ptp(np.quantile(draws, (0.025, 0.975), axis=0)))
    assert widths[1] > 2 * widths[0]


def test_bootstrap_of_constant_and_unmeasured_genes():
    predicted, measured = pair(80, 4)
    predicted[:, 0] = 3.0
    measured[:, 2] = np.nan
    draws = bootstrap(panel(predicted, measured, 2), grid(80), n_draws=50)
    assert np.isfinite(draws).all()
    alone = bootstrap(panel(predicted[:, [1, 3]], measured[:, [1, 3]], 1), grid(80), n_draws=50)
    np.testing.assert_allclose(draws, alone * [0.5, 1], atol=1e-9)


# Calibration


def test_calibration_error_by_hand():
    proba = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65], [0.0, 1.0]])
    codes = np.array([0, 1, 1, 1, 1])
    # Bin .9 to 1 has confidences .95, .95, 1, two of three correct; bin .6 to .7 has .65, .65, both correct.
    assert calibration_error(proba, codes) == pytest.approx((abs(2.9 - 2) + abs(1.3 - 2)) / 5)
    assert calibration_error(proba, codes, n_bins=1) == pytest.approx(abs(4.2 - 4) / 5)
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0])) == pytest.approx(1)


def logits_of(sections, sharpness, seed=0):
    """Return logits that are overconfident by a factor ``sharpness``, with codes drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    logits, labelled = [], []
    for s in sections:
        true = 2 * rng.normal(size=(len(s), 3))
        codes = (rng.random((len(s), 1)) > softmax(true, 1).cumsum(1)).sum(1).clip(0, 2)
        logits.append(sharpness * true)
        labelled.append(replace(s, codes=codes))
    return labelled, tuple(logits)


def held_out(sections, logits):
    empty = panel(np.zeros((1, 2)), np.zeros((1, 2)), 1)
    parts = tuple(np.zeros(len(section), int) for section in sections)
    return HeldOut(np.empty((0, 0)), np.empty((0, 0)), np.empty(0), (empty,) * len(sections), logits, parts)


def test_each_section_is_calibrated_on_the_others():
    sections, logits = logits_of(planted(3, n=400, n_genes=2), 5.0)
    sections[0] = replace(sections[0], codes=(sections[0].codes + 1) % 3)
    logits = list(logits)
    expected = [pooled_temperature([sections[j] for j in o], [logits[j] for j in o]) for o in ((1, 2), (0, 2), (0, 1))]
    found = calibrate_logits(sections, held_out(sections, tuple(logits)))
    for i in range(3):
        np.testing.assert_allclose(found[i], logits[i] / expected[i])
    assert expected[0] == pytest.approx(5, rel=0.2)
    assert expected[1] > 6


def test_logits_of_known_patients_can_be_calibrated_on_folds_of_new_patients():
    sections, logits = logits_of(planted(4, n=400, n_genes=2), 5.0)
    known, new = held_out(sections, logits), held_out(sections, tuple(3 * x for x in logits))
    found = calibrate_logits(sections, known, new, exclude_patient=True)
    for i in range(4):
        others = [j for j in range(4) if j % 2 != i % 2]
        expected = pooled_temperature([sections[j] for j in others], [new.logits[j] for j in others])
        np.testing.assert_allclose(found[i], logits[i] / expected)
        assert expected == pytest.approx(15, rel=0.2)


def test_parts_of_a_single_section_are_calibrated_on_the_other_parts():
    (section,), (logits,) = logits_of(planted(1, n=400, n_genes=2), 5.0)
    parts = np.arange(400) // 100
    section = replace(section, codes=np.where(parts == 0, (section.codes + 1) % 3, section.codes))
    found = calibrate_logits([section], replace(held_out([section], (logits,)), parts=(parts,)))[0]
    for part in range(4):
        rest = parts != part
        expected = pooled_temperature([replace(section, codes=np.where(rest, section.codes, -1))], [logits])
        np.testing.assert_allclose(found[~rest], logits[~rest] / expected)
    # Fitted on itself, the part with wrong labels would get a higher temperature.
    assert np.ptp(logits[0]) / np.ptp(found[0]) < 0.9 * np.ptp(logits[399]) / np.ptp(found[399])


def test_spots_and_folds_without_labels_are_ignored_in_calibration():
    sections, logits = logits_of(planted(2, n=400, n_genes=2), 3.0)
    full = pooled_temperature(sections[:1], logits[:1])
    spoiled = replace(sections[0], codes=np.where(np.arange(400) < 390, sections[0].codes, -1))
    assert pooled_temperature([spoiled], [logits[0]]) == pytest.approx(
        pooled_temperature([replace(spoiled)], [logits[0]])
    )
    assert pooled_temperature(sections, (logits[0], np.full((400, 3), np.nan))) == pytest.approx(full, rel=1e-3)
    assert pooled_temperature([replace(sections[0], codes=np.full(400, -1))], [logits[0]]) == 1.0


def test_annotation_figures_equal_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    sections, logits = logits_of(planted(3, n=200, n_genes=2), 4.0)
    sections[1] = replace(sections[1], codes=np.where(np.arange(200) < 150, sections[1].codes, -1))
    found = annotation_figures(sections, held_out(sections, logits), ("a", "b", "c"))
    accuracy, auroc, calibration = found.values()
    rows = sections[1].codes >= 0
    assert accuracy["S1"] == pytest.approx(
        balanced_accuracy_score(sections[1].codes[rows], logits[1][rows].argmax(1)), abs=1e-4
    )
    codes = np.concatenate([s.codes for s in sections])
    proba = softmax(np.concatenate(calibrate_logits(sections, held_out(sections, logits))), 1)[codes >= 0]
    codes = codes[codes >= 0]
    assert auroc == {c: pytest.approx(roc_auc_score(codes == i, proba[:, i]), abs=1e-4) for i, c in enumerate("abc")}
    assert calibration["labelled spots"] == 550
    assert calibration["expected calibration error, 10 bins"] == pytest.approx(
        calibration_error(proba, codes), abs=1e-4
    )
    assert calibration["expected calibration error, 10 bins"] < calibration_error(
        softmax(np.concatenate(logits), 1)[np.concatenate([s.codes for s in sections]) >= 0], codes
    )


def test_a_class_missing_in_a_fold_does_not_change_the_temperature():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 3)) * 2
    codes = (softmax(logits, 1).cumsum(1) < rng.random((400, 1))).sum(1)
    sections = [replace(s, codes=codes[:20]) for s in planted(1, n=20)]
    seen = pooled_temperature(sections, [logits[:20]])
    logits[20:40] = logits[:20]
    logits[20:40, 2] = UNSEEN_LOGIT
    more = [*sections, replace(sections[0], codes=np.full(20, 2))]
    assert pooled_temperature(more, [logits[:20], logits[20:40]]) == pytest.approx(seen)


def test_without_labels_there_are_no_metrics_of_the_annotation():
    sections = [replace(s, codes=np.full(20, -1)) for s in planted(2, n=20)]
    assert annotation_figures(sections, held_out(sections, (np.zeros((20, 3)),) * 2), ("a", "b", "c")) == {}


# Expression


def test_expression_metrics_equal_those_of_the_panels():
    sections = [replace(s, centres_um=2 * s.centres_um) for s in planted(3, gaps=((2, 0), (2, 1)))]
    _, folds = folds_of(sections, "section")
    options = {"n_classes": 0, "n_target": 4, "choice": Choice(0.3, None)}
    found = cross_validate(sections, {"section": folds}, recipe(), **options)[1]["section"]
    weak = cross_validate(sections, {"section": folds}, recipe(n_latent=1), **options)[1]["section"]
    figures = expression_figures(sections, found, {"colour alone": weak})
    title = "mean partial Pearson given the spots' counts"
    assert list(figures)[:5] == [
        f"{what}, 4 target genes" for what in ("mean Pearson", BLOCK_BOOTSTRAP, title, "colour alone", "noise ceiling")
    ]
    for i, s in enumerate(sections):
        low, high = figures[f"{BLOCK_BOOTSTRAP}, 4 target genes"][s.name]
        target = figures["mean Pearson, 4 target genes"][s.name]
        assert figures[f"{title}, 4 target genes"][s.name] == pytest.approx(
            partial_correlations(found.panel[i], s.totals, found.parts[i])[0], abs=1e-4
        )
        assert low <= target <= high
        assert target == pytest.approx(found.panel[i].scores()[0], abs=1e-4)
        assert figures["colour alone, 4 target genes"][s.name] == pytest.approx(weak.panel[i].scores()[0], abs=1e-4)
        genes = found.panel[i].target[s.measured[found.panel[i].target]]
        rest = np.rint(s.totals - s.counts().sum(axis=1)).astype(int)[:, None]
        ceiling = noise_ceiling(np.hstack([s.counts().toarray(), rest]))[genes].mean()
        assert figures["noise ceiling, 4 target genes"][s.name] == pytest.approx(ceiling, abs=1e-4)
    assert len(everything(sections)) == 3
