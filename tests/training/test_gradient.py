from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import timm
import torch

import he2gene_sc as hg
from he2gene_sc.models import load, load_encoder
from he2gene_sc.stats import pearson
from he2gene_sc.training import (
    ModelMetadata,
    PatchSet,
    RunOptions,
    Section,
    fit_network,
    log_targets,
    patch_set,
    train_network,
)
from he2gene_sc.training._gradient.held_out import HeldOutSection, gene_figures, held_out_sections
from he2gene_sc.training._gradient.patches import Split
from he2gene_sc.training._gradient.train_network import target_mask
from tests.helpers.tiny_network import BASE, SPEC, encoder, toy_set

pytestmark = pytest.mark.slow

RECIPE = replace(BASE, lr=1e-2, max_epochs=4)


SECTIONS = [SimpleNamespace(name=name, patient=name[0], mpp=0.5, image=None) for name in ("A1", "A2", "B1", "B2", "C1")]


def train(data, known, recipe, network, sections=SECTIONS, **options):
    return train_network(data, sections, known, recipe, network, **({"device": "cpu"} | options))


def facts(**changes):
    values = {
        "genes": pd.Index([f"G{i}" for i in range(6)]),
        "ensembl_ids": ("", "ENSG00000000001", "", "", "", ""),
        "classes": ("red", "green", "blue"),
        "class_colors": ("#ff0000", "#00ff00", "#0000ff"),
        "encoder": SPEC,
        "windows_um": (50.0, 100.0, 150.0),
        "name": "mine",
        "version": "1",
        "description": "For tests.",
        "intended_use": "Tests.",
        "limitations": ("None of it is real.",),
    }
    return ModelMetadata(**(values | changes))


@pytest.fixture(scope="module")
def data():
    return toy_set(100)


@pytest.fixture(scope="module")
def model(data):
    own = replace(SPEC, timm_name="")
    return train(data, facts(encoder=own), RECIPE, encoder(), device="cpu")


def test_the_card_states_the_training_and_the_held_out_spots(model):
    card = model.card
    assert (card.fusion, card.tta, card.windows_um, card.n_latent) == ("mean", True, (50.0, 100.0, 150.0), 16)
    assert card.training["sections"]["B1"] == {"patient": "B", "n_spots": 20, "mpp": 0.5}
    assert card.training["held_out_to_stop"] == {"C1": 20}
    assert (card.training["lr"], card.training["epochs"], card.training["preset"]) == (0.01, 4, "he2gene-base")
    (protocol,) = card.metrics
    assert "one fold of held-out patients, also used for early stopping" in protocol
    assert card.metrics[protocol]["mean Pearson, target genes"].keys() == {"C1"}
    assert "calibrated by one temperature on the held-out patients" in card.to_markdown()
    assert card.training["annotation_temperature"] > 0


def test_the_gene_table_has_the_metrics_of_the_held_out_section(model, data):
    trained = np.flatnonzero(data.patients != data.patients[-1])
    data = replace(data, target_mask=target_mask(data.targets, trained, 3))
    fitted = fit_network(data, RECIPE, encoder(), SPEC, device="cpu", n_classes=3)
    np.testing.assert_array_equal(fitted.trained, trained)
    expected = pearson(fitted.expression, data.targets[fitted.rows])
    np.testing.assert_allclose(model.genes["pcc"], expected, atol=1e-6)
    assert model.genes["pcc_low"].isna().all()
    assert not model.genes["reliable"].any()
    assert model.genes["group"].tolist() == np.where(data.target_mask, "target", "auxiliary").tolist()
    np.testing.assert_allclose(model.genes["mean"], data.targets.mean(0), rtol=1e-5)
    assert model.genes.loc["G1", "ensembl_id"] == "ENSG00000000001"


@pytest.mark.parametrize("cross_validate", [False, True])
def test_target_genes_are_chosen_without_the_held_out_patients(data, cross_validate):
    held = data.patients == data.patients[-1]
    lowest = np.argsort(data.targets[~held].mean(0))[:3]
    loud = data.targets.copy()
    loud[np.ix_(held, lowest)] += 100
    asked = []

    def watched(data, *arguments, rows, **options):
        asked.append((rows[1], np.flatnonzero(data.target_mask)))
        return fit_network(data, *arguments, rows=rows, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("he2gene_sc.training._gradient.train_network.fit_network", watched)
        made = train(
            replace(data, targets=loud),
            facts(),
            replace(RECIPE, max_epochs=1),
            encoder(),
            cross_validate=cross_validate,
        )
    assert len(asked) == (4 if cross_validate else 1)
    for rows, chosen in asked:
        assert set(chosen) == set(np.argsort(-loud[rows].mean(0), kind="stable")[:3])
    assert not set(lowest) & set(np.flatnonzero(made.genes["group"] == "target"))


def test_a_users_encoder_is_kept_by_the_model_and_given_at_load(model, tmp_path):
    patches = tuple(torch.full((2, 3, 20, 20), v, dtype=torch.uint8) for v in (30, 90, 200))
    saved = load(model.save(tmp_path / "mine"), encoder=(encoder(), replace(SPEC, timm_name="")))
    with torch.inference_mode():
        views = [m.network.extractor(patches) for m in (model, saved)]
    assert views[0].shape == (2, 3, 16)
    torch.testing.assert_close(*views)


def test_a_model_on_a_network_of_timm_is_loaded_from_its_folder_and_predicts(tmp_path):
    """Training and prediction on the toy slide, with the smallest network of timm."""
    sdata = hg.datasets.toy((5, 6), mpp=2.0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    _, spec = load_encoder("test_resnet", pretrained=False)
    table = sdata["table"]
    n, g = table.shape
    counts = table.X.toarray()
    data = PatchSet(
        patches=np.random.default_rng(0).integers(0, 256, (n, 3, 50, 50), dtype=np.uint8),
        targets=np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32),
        codes=table.obs["annotation"].cat.codes.to_numpy(),
        sections=np.arange(n) * 5 // n,
        patients=np.array([0, 0, 1, 1, 2])[np.arange(n) * 5 // n],
        target_mask=np.arange(g) < 10,
    )
    known = facts(
        encoder=spec,
        genes=table.var_names,
        ensembl_ids=[""] * g,
        classes=tuple(table.obs["annotation"].cat.categories),
        class_colors=("#111111",) * 3,
    )
    trained = train(data, known, replace(RECIPE, max_epochs=1, tta=False), network, device="cpu")
    saved = load(trained.save(tmp_path / "model"))
    tables = [hg.tl.predict(sdata, model=m, copy=True, device="cpu")["table"] for m in (trained, saved)]
    np.testing.assert_array_equal(tables[0].layers["he2gene"], tables[1].layers["he2gene"])
    assert np.isfinite(tables[0].layers["he2gene"]).all()
    assert np.isfinite(tables[0].obsm["he2gene_annotation_proba"].to_numpy()).all()


def test_cross_validation_metrics_are_over_folds_not_used_for_early_stopping(data, monkeypatch):
    from he2gene_sc.training._gradient import train_network as _gradient

    seen = []

    def spy(data, *args, rows, predicted=None, **options):
        if predicted is not None:
            seen.append((set(rows[1]), set(rows[2]), set(predicted)))
        return fit_network(data, *args, rows=rows, predicted=predicted, **options)

    monkeypatch.setattr(_gradient, "fit_network", spy)
    recipe = replace(RECIPE, lr=2e-2, lr_step=50, aux_weight=1.0, max_epochs=10)
    model = train(data, facts(), recipe, encoder(0.0), cross_validate=True, device="cpu")
    assert len(seen) == 3
    assert set.union(*(test for _, _, test in seen)) == set(range(100))
    for trained, stop, test in seen:
        assert not trained & stop
        assert not (trained | stop) & test
        patients = [set(data.patients[list(part)]) for part in (trained, test)]
        assert not patients[0] & patients[1]
    (protocol,) = model.card.metrics
    assert protocol == "cross-validated over 3 folds of patients"
    assert model.card.metrics[protocol]["mean Pearson, target genes"].keys() == {"A1", "A2", "B1", "B2", "C1"}
    assert model.genes["reliable"].any()
    assert (model.genes["pcc_low"] <= model.genes["pcc"]).all()
    assert "over the 3 patients, held out whole" in model.card.reliable_rule


def test_sections_of_one_or_two_patients_do_not_make_a_gene_reliable_on_a_new_patient(data):
    recipe = replace(RECIPE, lr=2e-2, lr_step=50, aux_weight=1.0, max_epochs=10)
    for of_section, number in (((0, 0, 0, 0, 0), "none"), ((0, 0, 0, 1, 1), "2")):
        parts = [
            SimpleNamespace(name=s.name, patient=f"P{i}", mpp=0.5, image=None)
            for s, i in zip(SECTIONS, of_section, strict=True)
        ]
        found = replace(data, patients=np.array(of_section)[data.sections])
        model = train(found, facts(), recipe, encoder(0.0), parts, cross_validate=True)
        assert (model.genes["pcc_low"] > 0.1).all()
        assert not model.genes["reliable"].any()
        expected = (model.genes["pcc_low"] > 0.1) & (model.genes["skill"] > 0)
        assert model.genes["reliable_known_patient"].tolist() == expected.tolist()
        assert f"needs 3 held-out patients; this model has {number}" in model.card.reliable_rule
        assert "No gene is reliable on a new patient" in model.card.limitations[-1]
        assert f"\n\n{model.card.reliable_rule}.\n" in model.card.to_markdown()


def test_a_gene_that_fails_in_one_held_out_patient_is_reliable_only_on_known_patients():
    pcc = np.full((10, 2), 0.8)
    pcc[3, 1] = 0.05
    one = np.ones(2)
    found = [HeldOutSection(i, row, 0.0, 0.0, 0.0, error=0.1 * one, base=one) for i, row in enumerate(pcc)]
    genes = gene_figures(found, "patient", range(10))
    assert (genes["pcc_low"] > 0.1).all()
    assert genes["reliable"].tolist() == [True, False]
    assert genes["reliable_known_patient"].tolist() == [True, True]
    assert not gene_figures(found, "patient", [0] * 5 + [1] * 5)["reliable"].any()
    assert not gene_figures(found, "section", range(10))["reliable"].any()
    assert not gene_figures(found, "block", range(10))["reliable_known_patient"].any()


def test_the_card_says_that_random_validation_leaks(data):
    recipe = replace(RECIPE, lr=2e-2, lr_step=50, aux_weight=1.0, max_epochs=6)
    model = train(data, facts(), recipe, encoder(0.0), validation="random", device="cpu")
    assert "this LEAKS" in next(iter(model.card.metrics))
    assert not model.genes["reliable"].any()


def test_one_patient_or_one_section_give_a_warning(data, caplog):
    zero = np.zeros(100, int)
    for changes, message in (({}, "not for other patients"), ({"sections": zero}, "SAME section")):
        caplog.clear()
        model = train(
            replace(data, patients=zero, **changes),
            facts(),
            replace(RECIPE, max_epochs=1),
            encoder(),
            sections=[SimpleNamespace(name=s.name, patient="A", mpp=0.5, image=None) for s in SECTIONS],
        )
        assert message in caplog.text
        if "section" in message:
            assert message in next(iter(model.card.metrics))


def test_without_labels_the_model_has_no_annotation(data):
    bare = replace(data, codes=np.full(100, -1))
    model = train(bare, facts(classes=(), class_colors=()), replace(RECIPE, max_epochs=1), encoder(), device="cpu")
    assert model.card.classes == ()
    assert "annotation.weight" not in model.tensors


def test_a_gene_missing_in_some_sections_is_evaluated_in_the_others(data):
    targets = data.targets.copy()
    targets[data.sections == 4, 1] = np.nan
    targets[data.sections == 3, 2] = 1.0
    gaps = replace(data, targets=targets)
    recipe = replace(RECIPE, max_epochs=2)
    rows = Split("section", np.flatnonzero(data.sections < 3), np.flatnonzero(data.sections >= 3))
    found = held_out_sections(gaps, fit_network(gaps, recipe, encoder(), SPEC, rows=rows, device="cpu"))
    assert [part.section for part in found] == [3, 4]
    assert np.isnan(found[1].pcc[1])
    assert found[0].pcc[2] == 0
    genes = gene_figures(found, "section", [0, 0, 1, 1, 2])
    assert genes["pcc"][1] == found[0].pcc[1]
    assert np.isnan(genes["pcc_low"][1])
    assert np.isfinite(genes["skill"]).all()


def test_each_fold_of_a_cross_validation_has_its_own_checkpoint_folder(data, tmp_path):
    recipe = replace(RECIPE, max_epochs=1)
    train(data, facts(), recipe, encoder(), cross_validate=True, run=RunOptions(checkpoint_dir=tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fold-0", "fold-1", "fold-2", "model"]


def test_sections_are_combined_for_training():
    rng = np.random.default_rng(0)
    grid = 200.0 * np.stack(np.mgrid[:3, :4], axis=-1).reshape(-1, 2)
    sections = []
    for name, patient in (("X1", "X"), ("Y1", "Y"), ("X2", "X")):
        counts = rng.poisson([5, 1, 9, 0.5], (12, 4)).astype(float) + 1
        totals = counts.sum(1)
        sections.append(
            Section(
                name=name,
                patient=patient,
                mpp=0.5,
                centres_um=grid,
                features=np.empty((12, 1, 0), np.float32),
                targets=log_targets(scipy.sparse.csr_array(counts), totals),
                totals=totals,
                measured=np.array([True, name != "Y1", True, True]),
                codes=np.zeros(12, int),
            )
        )
    data = patch_set(sections, np.zeros((36, 3, 8, 8), np.uint8), n_target=2, neighbours=True)
    assert data.sections.tolist() == np.repeat([0, 1, 2], 12).tolist()
    assert data.patients.tolist() == np.repeat([0, 1, 0], 12).tolist()
    assert data.target_mask.tolist() == [True, False, True, False]
    targets = data.targets[:]
    assert np.isnan(targets[12:24, 1]).all()
    assert np.isfinite(np.delete(targets, 1, axis=1)).all()
    np.testing.assert_allclose(targets[:12], sections[0].targets.toarray(), rtol=1e-6)
    assert (data.neighbours[12:24][data.neighbours[12:24] >= 0] // 12 == 1).all()
    assert patch_set(sections, np.zeros((36, 3, 8, 8), np.uint8), n_target=2).neighbours is None
