"""Bounds of held-out correlations, the gene table, and the rule of reliable genes."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from scipy.sparse import csr_array

from he2gene_sc.models._embedding import Basis, rings_of
from he2gene_sc.models._gene_table import REFERENCES
from he2gene_sc.stats import noise_ceiling, pearson
from he2gene_sc.training import build_model, cross_validate, folds_of, log_targets
from he2gene_sc.training._predictability import (
    MIN_PATIENTS,
    RELIABLE_PCC,
    bounds,
    ceilings,
    is_better,
    mean_by_patient,
    new_patient_bound,
    patient_bound,
    section_pcc,
    with_unmodelled_counts,
)
from tests.helpers.tiny_sections import CONTEXT, N_COLOUR, facts, held_out_correlations, planted, recipe

N_GENES = 40


def build(sections, n_genes=N_GENES):
    return build_model(sections, facts(n_genes), recipe(), n_colour=N_COLOUR, n_target=10)


def predicted(model, section):
    tensors = {key: np.asarray(value, np.float32) for key, value in model.tensors.items()}
    basis = Basis(*(tensors[f"latent.{name}"] for name in ("mean", "scale", "projection", "mixing")), CONTEXT)
    latent = basis.embed(section.features[:, 0], rings_of(section.centres_um, CONTEXT.rings_um))
    return np.maximum(latent @ tensors["genes.weight"] + tensors["genes.bias"], 0)


def permuted(section, seed):
    """Permute the counts over the spots of a section."""
    order = np.random.default_rng(seed).permutation(len(section))
    return replace(
        section,
        targets=section.targets.tocsr()[order].tocsc(),
        totals=section.totals[order],
        codes=section.codes[order],
    )


@pytest.fixture(scope="module")
def sections():
    """Sections in which half of the genes follow the image, and the counts of the others are permuted over spots."""
    made = planted(6, n=60, n_genes=N_GENES, noise=0.3)
    mixed = []
    for i, section in enumerate(made):
        other = permuted(section, i)
        targets = np.concatenate([section.targets.toarray()[:, :20], other.targets.toarray()[:, 20:]], axis=1)
        mixed.append(replace(section, targets=type(section.targets)(targets)))
    return mixed


@pytest.fixture(scope="module")
def model(sections):
    return build(sections[:5])


def test_bounds_equal_those_of_a_t_test():
    pcc = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 4))
    pcc[0, 1] = np.nan
    mean, low, high = bounds(pcc)
    for gene in range(4):
        values = pcc[np.isfinite(pcc[:, gene]), gene]
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose([mean[gene], low[gene], high[gene]], [values.mean(), *expected])


def test_two_groups_give_a_mean_without_bounds_and_no_group_gives_nan():
    mean, low, high = bounds(np.array([[0.2, np.nan], [0.4, np.nan]]))
    assert mean[0] == pytest.approx(0.3)
    assert np.isnan([mean[1], *low, *high]).all()


def test_patients_have_equal_weight_for_any_number_of_sections():
    pcc = np.array([[0.1, np.nan], [0.3, np.nan], [0.8, 0.5]])
    np.testing.assert_allclose(mean_by_patient(pcc, ["A", "A", "B"]), [[0.2, np.nan], [0.8, 0.5]])


def test_the_bound_of_a_patient_is_by_fishers_z():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 80))
    y += 0.5 * x
    r = np.corrcoef(x, y)[0, 1]
    expected = scipy.stats.pearsonr(x, y).confidence_interval(0.95).low
    assert patient_bound(np.array([[r]]), [80], ["A"])[0, 0] == pytest.approx(expected, abs=1e-4)
    # Two sections halve the variance of the mean; sections that did not measure the gene are left out.
    pcc = np.array([[0.3, 0.3, np.nan], [0.3, np.nan, np.nan], [0.2, 0.2, np.nan]])
    found = patient_bound(pcc, [103, 103, 28], ["A", "A", "B"])
    z = np.arctanh(0.3)
    np.testing.assert_allclose(found[0], [np.tanh(z - 1.96 / np.sqrt(200)), np.tanh(z - 0.196), np.nan])
    np.testing.assert_allclose(found[1], [np.tanh(np.arctanh(0.2) - 1.96 / 5)] * 2 + [np.nan])


def test_the_gene_table_keeps_one_array_of_all_sections_in_memory():
    pcc = np.random.default_rng(0).uniform(-1, 1, (60, 5000))
    sections = [SimpleNamespace(measured=np.ones(5000, bool))] * 60
    for compute in (
        lambda: section_pcc(sections, pcc),
        lambda: patient_bound(pcc, [50] * 60, [f"P{i // 2}" for i in range(60)]),
    ):
        tracemalloc.start()
        compute()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * pcc.nbytes


@pytest.mark.slow
def test_a_gene_that_fails_in_one_patient_is_not_reliable():
    """Half of the genes are permuted in the only section of one patient, against eight sections of another patient."""
    made = [
        replace(section, patient="B" if i == 8 else "A")
        for i, section in enumerate(planted(9, n_genes=N_GENES, n=90, noise=0.3))
    ]
    other = permuted(made[8], 0)
    targets = np.concatenate([made[8].targets.toarray()[:, :20], other.targets.toarray()[:, 20:]], axis=1)
    made[8] = replace(made[8], targets=type(made[8].targets)(targets))
    genes = build(made).genes
    assert genes["reliable_known_patient"][:20].sum() >= 15
    bad = genes[20:]
    # By the mean over sections, most of them would be reliable.
    assert ((bad["pcc_low"] > RELIABLE_PCC) & (bad["skill"] > 0)).sum() >= 10
    assert not bad["reliable_known_patient"].any()
    assert (bad["pcc_patient_low"] < RELIABLE_PCC).all()


def test_noise_ceilings_are_averaged_over_the_sections_that_measured_a_gene():
    made = planted(3, n_genes=6, gaps=((1, 2),))
    found = [np.nan_to_num(noise_ceiling(with_unmodelled_counts(s), genes=np.arange(6), n_splits=2)) for s in made]
    expected = np.mean(found, axis=0)
    expected[2] = (found[0][2] + found[2][2]) / 2
    np.testing.assert_allclose(ceilings(made), expected)


def test_the_gene_table_states_interval_new_patients_and_ceiling(model, sections):
    genes = model.genes
    protocols = {unit: folds_of(sections[:5], unit)[1] for unit in ("section", "patient")}
    _, held_out = cross_validate(sections[:5], protocols, recipe(), n_classes=3, n_target=10)
    mean, low, high = bounds(held_out["section"].pcc)
    for name, expected in (("pcc", mean), ("pcc_low", low), ("pcc_high", high)):
        np.testing.assert_allclose(genes[name], expected, atol=1e-6)
    across = mean_by_patient(held_out["patient"].pcc, [s.patient for s in sections[:5]]).mean(0)
    np.testing.assert_allclose(genes["pcc_new_patient"], across, atol=1e-6)
    np.testing.assert_allclose(genes["ceiling"], ceilings(sections[:5]))
    shown = np.concatenate([np.where(s.measured, s.targets.toarray() > 0, np.nan) for s in sections[:5]])
    np.testing.assert_allclose(genes["detected"], np.nanmean(shown, axis=0))
    assert (genes["pcc_low"] <= genes["pcc"]).all()
    assert (genes["pcc"] <= genes["pcc_high"]).all()


def test_reliable_genes_are_above_the_limit_on_a_held_out_section(model, sections):
    truth = sections[5].targets.toarray()
    r = np.nan_to_num(pearson(predicted(model, sections[5]), truth))
    reliable = model.genes["reliable_known_patient"].to_numpy()
    assert reliable[:20].sum() >= 15
    assert (r[reliable] > RELIABLE_PCC).mean() >= 0.8


@pytest.mark.slow
def test_with_permuted_spots_hardly_any_gene_is_reliable():
    """Counts that are permuted over the spots of a section do not follow the image."""
    found = [
        build([permuted(s, seed) for s in planted(5, n_genes=N_GENES, noise=0.3, seed=seed)]).genes for seed in range(3)
    ]
    assert np.mean([genes["reliable_known_patient"].mean() for genes in found]) <= 0.025
    assert np.mean([genes["skill"].mean() for genes in found]) <= 0


@pytest.mark.slow
def test_with_enough_patients_metrics_are_over_held_out_patients():
    made = planted(6, n_genes=6, patients=MIN_PATIENTS)
    found = build(made, 6)
    protocols = {unit: folds_of(made, unit)[1] for unit in ("section", "patient")}
    _, held_out = cross_validate(made, protocols, recipe(), n_classes=3, n_target=6)
    names = [s.patient for s in made]
    np.testing.assert_allclose(found.genes["pcc"], mean_by_patient(held_out["patient"].pcc, names).mean(0), atol=1e-5)
    np.testing.assert_allclose(found.genes["skill"], held_out["patient"].skill, atol=1e-5)
    assert f"t over the {MIN_PATIENTS} patients, held out" in found.card.reliable_rule


def test_a_gene_of_a_single_patient_has_no_metric_of_new_patients():
    made = planted(4, n_genes=6, gaps=((1, 2), (3, 2)))
    genes = build(made, 6).genes
    assert genes["pcc_new_patient"].isna().tolist() == [False, False, True, False, False, False]
    assert not genes["reliable_known_patient"].iloc[2]


def test_a_gene_of_a_single_section_has_no_metrics():
    made = planted(3, n_genes=6, patients=1, gaps=((1, 2), (2, 2)))
    genes = build(made, 6).genes
    for name in ("pcc", "skill"):
        assert genes[name].isna().tolist() == [False, False, True, False, False, False]
    assert not genes["reliable_known_patient"].iloc[2]


# New patients


def simulated(rho, n_patients=3, spots=200, between=0.1, n_genes=2000, seed=0):
    """Partial correlations of genes whose population correlation is ``rho``, in patients that differ."""
    rng = np.random.default_rng(seed)
    true = np.arctanh(rho) + between * rng.normal(size=(n_patients, n_genes))
    return np.tanh(true + rng.normal(size=true.shape) / np.sqrt(spots - 6))


def test_the_bound_over_three_patients_controls_false_calls_and_has_power():
    parts = [simulated(rho, n_genes=20_000, seed=i) for i, rho in enumerate((0.0, 0.05, 0.1, 0.3))]
    called = (new_patient_bound(np.concatenate(parts, axis=1), np.full(3, 200)) > RELIABLE_PCC).reshape(4, -1).mean(1)
    # At the limit, 5 % are called, within three standard errors of 20,000 genes.
    assert called[2] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)
    assert called[:2].max() <= 0.02
    assert called[3] >= 0.6


def test_two_patients_give_no_bound_for_new_patients():
    pcc_given_depth = simulated(0.6, n_patients=3)
    pcc_given_depth[2, :5] = np.nan
    found = new_patient_bound(pcc_given_depth, np.full(3, 200))
    assert (found[:5] == -1).all()
    assert (found[5:] > RELIABLE_PCC).mean() > 0.9
    assert (new_patient_bound(pcc_given_depth[:2], np.full(2, 200)) == -1).all()


def test_a_gene_is_reliable_on_a_new_patient_if_it_is_predicted_in_every_patient(three):
    sections, genes = three
    assert genes["reliable"][:20].sum() >= 10
    assert not genes["reliable"][20:].any()
    assert (genes["pcc_given_depth"][:20] > genes["pcc_given_depth"][20:].max()).mean() > 0.7


@pytest.fixture(scope="module")
def three():
    """Six sections of three patients, with half of the genes permuted over spots."""
    mixed = []
    for i, section in enumerate(planted(6, n=90, n_genes=N_GENES, noise=0.3, patients=3)):
        other = permuted(section, i)
        targets = np.concatenate([section.targets.toarray()[:, :20], other.targets.toarray()[:, 20:]], axis=1)
        mixed.append(replace(section, targets=type(section.targets)(targets)))
    return mixed, build(mixed).genes


# References without genes


def called_reliable(own, pcc_given_depth, alone):
    """Return genes called reliable on a new patient, with and without comparison to depth, colour and coordinates."""
    called = (new_patient_bound(pcc_given_depth, np.full(len(pcc_given_depth), 200)) > RELIABLE_PCC) & (
        own.min(0) > RELIABLE_PCC
    )
    return (
        called & is_better({name: own - r for name, r in zip(REFERENCES, alone, strict=True)})
    ).mean(), called.mean()


def test_genes_predicted_better_than_all_references_are_called_with_three_patients():
    weak = {"depth": 0.2, "coordinates": 0.1}
    power, before = called_reliable(*held_out_correlations(0.3, colour=0.2, **weak))
    assert before >= power >= 0.6
    for rho in (0.0, 0.05, 0.1):
        assert called_reliable(*held_out_correlations(rho, colour=rho / 2, **weak))[0] <= 0.05
    # Genes predicted by colour only, which the rule without references would call reliable.
    called, before = called_reliable(*held_out_correlations(0.3, colour=0.3, coordinates=0.1))
    assert called <= 0.05
    assert before >= 0.6


def test_two_patients_are_too_few_to_compare_with_references():
    assert not is_better({"depth": np.full((2, 3), 0.9)}).any()
    three = np.array([[0.3, np.nan, -0.2], [0.32, 0.4, -0.2], [0.31, 0.4, -0.2]])
    assert is_better({"depth": three, "colour": three}).tolist() == [True, False, False]


def test_genes_that_follow_only_colour_depth_or_position_are_not_reliable():
    rng = np.random.default_rng(0)
    made = []
    for section in planted(6, n=120, n_genes=1, patients=3):
        seen = section.features[:, 0].astype(float)
        seen = (seen - seen.mean(0)) / seen.std(0)
        depth, place = rng.normal(size=(2, len(section)))
        place = section.centres_um[:, 0] / np.ptp(section.centres_um[:, 0]) - 0.5
        # The image shows depth and position, but less accurately than the references.
        features = section.features.copy()
        features[:, :, 6] = (depth + 0.5 * rng.normal(size=len(section)))[:, None]
        features[:, :, 5] = (3 * place + 0.5 * rng.normal(size=len(section)))[:, None]
        follows = {"true": seen[:, 7], "depth": depth, "colour": seen[:, -1], "coordinates": 3 * place}
        log_rate = np.repeat(np.stack(list(follows.values()), axis=1), 5, axis=1)
        totals = np.rint(20_000 * np.exp(0.2 * depth))
        noise = 0.2 * rng.normal(size=log_rate.shape)
        counts = rng.poisson(totals[:, None] / 1000 * np.exp(0.5 * log_rate + noise))
        made.append(
            replace(
                section,
                features=features,
                targets=log_targets(csr_array(counts), totals),
                totals=totals,
                measured=np.ones(20, bool),
            )
        )
    wide = recipe(n_components=12, n_latent=36)
    model = build_model(made, facts(20), wide, n_colour=N_COLOUR, n_target=10)
    genes = model.genes
    row = model.card.metrics["leave one patient out"]["mean Pearson, prediction minus depth, 10 target genes"]
    assert list(row) == ["P0", "P1", "P2", "mean of patients", "95 % interval"]
    of_target = genes["minus_depth"][genes["group"] == "target"].mean()
    # The panel of a fold has the genes of highest mean in its training patients.
    assert row["mean of patients"] == pytest.approx(of_target, abs=0.1)
    assert "not recorded" not in model.card.to_markdown()
    kinds = dict(zip(("true", "depth", "colour", "coordinates"), np.arange(20).reshape(4, 5), strict=True))
    assert genes["reliable"].to_numpy()[kinds["true"]].all()
    for name in ("depth", "colour", "coordinates"):
        of = genes.iloc[kinds[name]]
        assert (of["pcc_new_patient"] > 0.3).all()
        assert (of[f"pcc_{name}"] > 0.3).all()
        assert not of["reliable"].any()
        np.testing.assert_allclose(of[f"minus_{name}"], of["pcc_new_patient"] - of[f"pcc_{name}"], atol=1e-6)
        assert (genes.iloc[kinds["true"]][f"minus_{name}_low"] > 0.2).all()
