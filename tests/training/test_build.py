"""Building a model with its card from sections: every part equals the result of its own function."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t

from he2gene_sc.models._embedding import NO_CONTEXT, Context
from he2gene_sc.training import Recipe, _figures, build_model, cross_validate, fit_basis, fit_sums, folds_of, spill
from he2gene_sc.training._closed_form import ood as _ood
from he2gene_sc.training._closed_form import validate as _validate
from he2gene_sc.training._closed_form.annotation import fit_annotation
from he2gene_sc.training._closed_form.heads import embed
from he2gene_sc.training._closed_form.validate import Choice, panels
from he2gene_sc.training._figures import pooled_temperature
from tests.helpers.tiny_sections import CONTEXT, N_COLOUR, N_FEATURES, everything, facts, planted, recipe

N_GENES = 10
GAPS = ((1, 2),)


@pytest.fixture(scope="module")
def sections():
    return planted(4, n=60, n_genes=N_GENES, noise=0.5, gaps=GAPS)


@pytest.fixture(scope="module")
def model(sections):
    return build_model(sections, facts(N_GENES), recipe(), n_colour=N_COLOUR, n_target=4)


def validated(sections, **options):
    protocols = {unit: folds_of(sections, unit)[1] for unit in ("section", "patient")}
    return cross_validate(sections, protocols, recipe(), n_classes=3, n_target=4, **options)


def test_sections_with_constant_depth_can_be_trained_on(sections):
    """Counts were thinned to one total, so depth is a constant reference."""
    even = [replace(section, totals=np.full(len(section.totals), 1000.0)) for section in sections]
    model = build_model(even, facts(N_GENES), recipe(), n_colour=N_COLOUR, n_target=4)
    assert not np.nan_to_num(model.genes["pcc_depth"]).any()


def test_penalties_are_chosen_on_held_out_sections_and_patients(model, sections):
    choice, _ = validated(sections)
    training = model.card.training
    assert Choice(training["penalty"], training["rank"]) == choice


def test_each_half_of_the_embedding_has_the_penalty_and_rank_that_are_best_for_it_alone(sections, monkeypatch):
    monkeypatch.setattr("he2gene_sc.training._closed_form.heads._SMOOTHING", 0.0)
    protocols = {unit: folds_of(sections, unit)[1] for unit in ("section", "patient")}
    both = recipe(context=replace(CONTEXT, fine_below_mpp=1.5))
    training = build_model(sections, facts(N_GENES), both, n_colour=N_COLOUR, n_target=4).card.training
    found = {}
    for end, context in (("", CONTEXT), ("_without_neighbours", Context((), (), CONTEXT.prior_spots))):
        one = recipe(n_latent=4, context=context)
        found[end], _ = cross_validate(sections, protocols, one, n_classes=3, n_target=4)
        assert Choice(training[f"penalty{end}"], training[f"rank{end}"]) == found[end]
    assert found[""] != found["_without_neighbours"]


def test_heads_are_fitted_to_all_sections(model, sections):
    choice, _ = validated(sections)
    basis = fit_basis(sections, everything(sections), recipe())
    sums = fit_sums(sections, everything(sections), basis, recipe().power)
    np.testing.assert_array_equal(model.tensors["latent.mean"], basis.mean)
    np.testing.assert_array_equal(model.tensors["latent.scale"], basis.scale)
    for key, expected in (
        ("latent.projection", basis.projection),
        ("latent.mixing", basis.mixing),
        ("genes.weight", sums.ridge(choice.penalty, choice.rank)),
    ):
        assert model.tensors[key].dtype == np.float16
        np.testing.assert_array_equal(model.tensors[key], expected.astype(np.float16))
    np.testing.assert_allclose(model.tensors["genes.bias"], sums.mean, rtol=1e-6)


def test_with_two_patients_the_annotation_is_not_calibrated(model, sections):
    head = fit_annotation(sections, everything(sections), recipe().weights, 3)
    np.testing.assert_allclose(model.tensors["annotation.weight"], head.basis.mixing, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.tensors["annotation.bias"], head.bias, rtol=1e-4, atol=1e-5)


def test_probabilities_are_calibrated_on_held_out_patients(sections):
    sections = [*sections[:3], replace(sections[3], patient="another")]
    model = build_model(sections, facts(N_GENES), recipe(), n_colour=N_COLOUR, n_target=4)
    choice, _ = validated(sections)
    held_out = validated(sections, choice=choice)[1]["patient"]
    head = fit_annotation(sections, everything(sections), recipe().weights, 3)
    temperature = pooled_temperature(sections, held_out.logits)
    of_sections = pooled_temperature(sections, validated(sections, choice=choice)[1]["section"].logits)
    assert abs(temperature / of_sections - 1) > 0.01
    np.testing.assert_allclose(
        model.tensors["annotation.weight"], head.basis.mixing / temperature, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(model.tensors["annotation.bias"], head.bias / temperature, rtol=1e-4, atol=1e-5)


def test_metrics_of_genes_are_over_held_out_sections(model, sections):
    choice, _ = validated(sections)
    held_out = validated(sections, choice=choice)[1]["section"]
    pcc = held_out.pcc
    genes = model.genes
    np.testing.assert_allclose(genes["pcc"], np.nanmean(pcc, axis=0), atol=1e-6)
    n = np.isfinite(pcc).sum(0)
    assert n.tolist() == [4, 4, 3, *[4] * 7]
    low = np.nanmean(pcc, 0) - t.ppf(0.975, n - 1) * np.nanstd(pcc, 0, ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(genes["pcc_low"], low, atol=1e-6)
    np.testing.assert_allclose(genes["skill"], held_out.skill)
    elsewhere = validated(sections, choice=choice)[1]["patient"].pcc
    new_patient = np.mean([np.nanmean(elsewhere[i::2], axis=0) for i in range(2)], axis=0)
    expected = (low > 0.1) & (held_out.skill > 0) & (new_patient > 0.1)
    assert genes["reliable_known_patient"].tolist() == expected.tolist()
    # Two patients are too few for new patients.
    assert not genes["reliable"].any()
    target, variable = panels(sections, everything(sections), 4)
    assert set(np.flatnonzero(genes["group"] == "target")) == set(target)
    assert set(np.flatnonzero(genes["variable"])) == set(variable)


def test_the_colour_baseline_uses_only_colour(model, sections):
    training = model.card.training
    colour = np.concatenate([s.features[:, 0, N_FEATURES - N_COLOUR :] for s in sections]).astype(float)
    found = colour @ model.tensors["colour.weight"] + model.tensors["colour.bias"]
    bare = [replace(s, features=s.features[:, :1, N_FEATURES - N_COLOUR :]) for s in sections]
    made = Recipe(np.full(N_COLOUR, 0.5, np.float32), N_COLOUR, N_COLOUR, NO_CONTEXT)
    basis = fit_basis(bare, everything(bare), made)
    sums = fit_sums(bare, everything(bare), basis, made.power)
    weight = sums.ridge(training["colour_penalty"], training["colour_rank"])
    expected = np.concatenate([embed(s, basis) for s in bare]) @ weight + sums.mean
    np.testing.assert_allclose(found, expected[:, model.tensors["colour.genes"]], atol=1e-3)


def test_an_annotation_of_only_one_section_is_not_calibrated_and_the_card_says_so(sections, caplog):
    bare = [sections[0], *(replace(s, codes=np.full(len(s), -1)) for s in sections[1:])]
    known = replace(facts(N_GENES), limitations=("One.",))
    found = build_model(bare, known, recipe(), n_colour=N_COLOUR, n_target=4)
    assert "its probabilities are NOT calibrated" in caplog.text
    *given, last = found.card.limitations
    assert given == ["One.", "The probabilities of its annotation are not calibrated."]
    assert last.startswith("No gene is reliable on a new patient. You can measure some spots")


def test_a_fold_trained_on_few_labels_is_not_used_for_calibration(sections):
    """One of three patients has nearly all labels, so the fold without it has too few labels for calibration."""
    patients = ("P0", "P1", "P0", "P2")
    labelled_in_one = [
        replace(s, patient=p, codes=np.where(np.arange(len(s)) < (len(s) if p == "P0" else 3), s.codes, -1))
        for p, s in zip(patients, sections, strict=True)
    ]
    made = build_model(labelled_in_one, facts(N_GENES), recipe(), n_colour=N_COLOUR, n_target=4)
    choice, held_out = validated(labelled_in_one)
    head = fit_annotation(labelled_in_one, everything(labelled_in_one), recipe().weights, 3)
    by_section, by_patient = (
        pooled_temperature(labelled_in_one, held_out[unit].logits) for unit in ("section", "patient")
    )
    assert abs(by_section / by_patient - 1) > 0.05
    np.testing.assert_allclose(made.tensors["annotation.weight"], head.basis.mixing / by_section, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sections(monkeypatch):
    """Features, targets and results per spot are on disk; only components of labelled spots are in memory."""
    monkeypatch.setattr(_validate, "_VALUES_AT_ONCE", 20_000)
    monkeypatch.setattr(_validate, "PENALTIES", (1.0,))
    monkeypatch.setattr(_validate, "RANKS", (None,))
    monkeypatch.setattr(_figures, "N_BOOTSTRAP", 20)
    monkeypatch.setattr(_ood, "_BANK", 100)

    def peak(n_sections):
        sections = planted(n_sections, n=64, n_genes=150, noise=0.5, patients=3)
        arrays = spill((s.features, s.targets) for s in sections)
        sections = [
            replace(s, features=x, targets=y, codes=np.full(len(s), -1))
            for s, (x, y) in zip(sections, arrays, strict=True)
        ]
        tracemalloc.start()
        build_model(sections, facts(150), recipe(), n_colour=N_COLOUR, n_target=150)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(3)
    # In memory, predictions and counts of 200 genes of a section, in six models and two protocols, would take 1.2 MB.
    assert (peak(10) - peak(4)) / 6 < 120_000


def test_residuals_by_level_are_kept_unless_the_recipe_disables_them():
    sections = planted(4, patients=4)
    options = {"n_colour": N_COLOUR, "n_target": 5}
    whole = build_model(sections, facts(10), recipe(), **options).tensors
    small = build_model(sections, facts(10), replace(recipe(), by_level=False), **options).tensors
    left_out = {f"intervals.level_{name}" for name in ("quantiles", "groups", "edges")}
    assert whole.keys() - small.keys() == left_out
    for name, values in small.items():
        np.testing.assert_array_equal(values, whole[name])
