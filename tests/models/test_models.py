import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import he2gene_sc as hg
from he2gene_sc.models import BUNDLED, HE2Gene, load, load_encoder

PACKAGE = Path(hg.__file__).parent


@pytest.fixture
def folder(tiny_model, tmp_path):
    return tiny_model.save(tmp_path / "tiny")


def rewrite_card(folder, **changes):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


def size_mb(path):
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts) / 1e6


# Folders


def test_round_trip_gives_identical_tensors_and_card(tiny_model, folder):
    found = load(folder)
    assert found.tensors.keys() == tiny_model.tensors.keys()
    for name, tensor in tiny_model.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found.tensors[name], tensor)
    assert replace(found.card, files={}) == tiny_model.card
    assert len(found.weights_sha256) == 64


def test_round_trip_keeps_genes_to_five_digits_and_then_exactly(tiny_model, folder, tmp_path):
    once = load(folder)
    pd.testing.assert_frame_equal(once.genes, tiny_model.genes, rtol=1e-4, check_dtype=False)
    twice = load(once.save(tmp_path / "again"))
    pd.testing.assert_frame_equal(twice.genes, once.genes)


def test_genes_named_like_missing_values_and_missing_metrics_survive(tiny_model, tmp_path):
    genes = tiny_model.genes.rename(index={"NOT1": "NA", "NOT2": "nan"})
    genes.loc["NA", ["pcc", "pcc_low", "skill"]] = np.nan
    genes["ensembl_id"] = ""
    found = load(HE2Gene(tiny_model.card, genes, tiny_model.tensors).save(tmp_path / "model")).genes
    assert found.index[-2:].tolist() == ["NA", "nan"]
    assert found.loc["NA", ["pcc", "pcc_low", "skill"]].isna().all()
    assert (found["ensembl_id"] == "").all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "card.json is not valid: `name` is ' ': a text that is not blank is needed$"),
        ({"limitations": (1,)}, "card.json is not valid: `limitations.0` is 1: it must be a valid string$"),
        ({"n_latent": 3}, "needed for 3 components"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(tiny_model, folder, changes, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        replace(tiny_model, card=replace(tiny_model.card, **changes)).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_gene_table_that_could_not_be_loaded_is_not_saved(tiny_model, tmp_path):
    genes = tiny_model.genes.assign(ensembl_id="ENSG 1")
    with pytest.raises(ValueError, match="mine/genes.csv: column 'ensembl_id' .* is 'ENSG 1'"):
        replace(tiny_model, genes=genes).save(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_all_files_of_an_older_model(tiny_model, folder):
    newer = HE2Gene(replace(tiny_model.card, version="2"), tiny_model.genes, tiny_model.tensors)
    assert load(newer.save(folder)).card.version == "2"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "card.json", "genes.csv", "weights.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_saving_over_a_folder_with_other_files_raises(tiny_model, folder):
    (folder / "notes.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"`path` .* holds a model and \['notes.txt'\]"):
        tiny_model.save(folder)
    assert (folder / "notes.txt").read_text() == "years of work"
    assert load(folder).name == "tiny"


def test_saving_through_a_link_replaces_its_target(tiny_model, folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    newer = HE2Gene(replace(tiny_model.card, version="2"), tiny_model.genes, tiny_model.tensors)
    newer.save(link)
    assert link.is_symlink()
    assert load(folder).card.version == "2"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["link", "tiny"]


def test_several_threads_can_save_the_same_model_at_once(tiny_model, tmp_path):
    """As in training on several devices."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for saved in [pool.submit(tiny_model.save, tmp_path / "model") for _ in range(40)]:
            saved.result()
    assert load(tmp_path / "model").name == "tiny"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_another_process_writes_between_two_steps_is_replaced(tiny_model, tmp_path, monkeypatch):
    target = tiny_model.save(tmp_path / "model")
    rename, failed = Path.rename, []

    def disturbed(self, to):
        if to == target and len(failed) < 2:
            # Neither the new nor the older folder can be moved there, since another one arrives first.
            failed.append(self.name)
            if len(failed) == 2:
                target.mkdir()
                (target / "weights.safetensors").write_bytes(b"of another process")
            raise OSError(39, "Directory not empty")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", disturbed)
    tiny_model.save(target)
    assert "old" in failed[1]
    assert load(target).name == "tiny"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_hidden_files_of_a_model_folder_are_kept(tiny_model, tmp_path):
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    (tmp_path / "clone" / ".git" / "HEAD").write_text("ref")
    for _ in range(2):
        tiny_model.save(tmp_path / "clone")
        assert (tmp_path / "clone" / ".git" / "HEAD").read_text() == "ref"
        assert load(tmp_path / "clone").name == "tiny"
    assert [p.name for p in tmp_path.iterdir()] == ["clone"]


def test_the_current_working_directory_is_not_replaced(tiny_model, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(FileExistsError, match="`path` '.' is the current working directory"):
        tiny_model.save(".")


def test_saving_into_an_empty_folder_works(tiny_model, tmp_path):
    assert load(tiny_model.save(tmp_path)).name == "tiny"


def test_saving_over_another_file_or_folder_raises_and_keeps_it(tiny_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is not a model folder"):
            tiny_model.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["card.json", "genes.csv", "weights.safetensors"])
def test_an_incomplete_folder_raises_with_the_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"incomplete.*{name}"):
        load(folder)


def test_truncated_weights_raise(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights\.safetensors was altered or truncated"):
        load(folder)


def test_an_altered_gene_table_raises(folder):
    genes = folder / "genes.csv"
    genes.write_text(genes.read_text().replace("NOT1", "NOT3"))
    with pytest.raises(ValueError, match=r"genes\.csv was altered or truncated"):
        load(folder)


def test_a_newer_schema_raises_with_the_command_to_upgrade(folder):
    rewrite_card(folder, schema_version=5)
    with pytest.raises(ValueError, match="schema version 5.*pip install -U"):
        load(folder)


@pytest.mark.parametrize("text", ["not json", "", "[]", "{}", '{"schema_version": "one"}'])
def test_a_file_that_is_not_a_card_raises(folder, text):
    (folder / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card\.json"):
        load(folder)


def test_a_missing_field_of_the_card_is_named(folder):
    card = json.loads((folder / "card.json").read_text())
    del card["classes"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"lacks \['classes'\]"):
        load(folder)


def test_a_card_of_the_first_schema_raises_with_what_to_do(folder):
    rewrite_card(folder, schema_version=1)
    with pytest.raises(ValueError, match=r"schema version 1, of he2gene_sc 0\.1.*train the model again"):
        load(folder)


def test_a_folder_of_the_second_schema_loads_without_the_newer_fields(folder, tiny_model):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(
        json.dumps(
            {key: v for key, v in card.items() if key not in ("intervals", "guard", "annotation")}
            | {"schema_version": 2}
        )
    )
    found = load(folder)
    assert (found.card.intervals, found.card.guard, found.detector) == (None, None, None)
    assert replace(found.card, files={}) == tiny_model.card
    assert load(found.save(folder.with_name("again"))).card.schema_version == 4


def test_optional_metrics_of_the_genes_survive_saving(tiny_model, tmp_path):
    genes = tiny_model.genes.assign(pcc_high=0.5, pcc_new_patient=np.nan, ceiling=0.8)
    found = load(HE2Gene(tiny_model.card, genes, tiny_model.tensors).save(tmp_path / "model")).genes
    assert found[["pcc_high", "pcc_new_patient", "ceiling"]].dtypes.eq(float).all()
    assert found["pcc_new_patient"].isna().all()
    assert (found["ceiling"] == 0.8).all()


def test_an_unknown_fusion_raises(folder):
    rewrite_card(folder, fusion="attention")
    with pytest.raises(ValueError, match="`fusion` is 'attention': it must be 'concat' or 'mean'"):
        load(folder)


@pytest.mark.parametrize("part", ["mean", "scale", "projection", "mixing"])
def test_a_missing_tensor_of_the_embedding_is_named(tiny_model, tmp_path, part):
    tensors = {key: value for key, value in tiny_model.tensors.items() if key != f"latent.{part}"}
    with pytest.raises(ValueError, match=rf"lacks \['latent\.{part}'\]"):
        HE2Gene(tiny_model.card, tiny_model.genes, tensors).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_card_with_another_number_of_genes_raises(folder):
    rewrite_card(folder, n_genes=1)
    with pytest.raises(ValueError, match="must agree"):
        load(folder)


def test_an_unknown_name_raises_with_the_bundled_ones():
    with pytest.raises(ValueError, match="'no-such-model'.*breast-her2st"):
        load("no-such-model")


@pytest.mark.parametrize("model", [None, 3, ["breast-her2st"]])
def test_an_argument_that_is_not_a_model_raises(model):
    with pytest.raises(ValueError, match="`model` is a"):
        load(model)


def test_a_loaded_model_is_returned_unchanged(tiny_model):
    assert load(tiny_model) is tiny_model


def test_the_readme_shows_the_card(tiny_model, folder):
    text = (folder / "README.md").read_text()
    assert text == tiny_model.card.to_markdown()
    for stated in ("# tiny 1", "For tests.", "Tests.", "None of it is real.", "100, 200 µm", "it stands first"):
        assert stated in text
    for name in tiny_model.card.classes:
        assert name in text


# Encoders


def test_the_bundled_encoder_gives_1280_features_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder, spec = load_encoder("efficientnet-lite0")
    with torch.inference_mode():
        found = encoder(torch.zeros(2, 3, spec.input_px, spec.input_px))
    assert found.shape == (2, 1280)
    assert encoder.num_classes == 0
    assert not encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["no-such-net", "hfnet", "hub/no-such-net"])
def test_an_unknown_encoder_raises_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"'{name}' is unknown.*efficientnet-lite0"):
        load_encoder(name)


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "hf-hub:someone/gated"])
def test_the_error_of_an_encoder_that_cannot_be_fetched_says_what_to_do(monkeypatch, name):
    import timm

    def create_model(*_, pretrained, **__):
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(RuntimeError, match="no route to host.*efficientnet-lite0"):
        load_encoder(name)


def test_an_encoder_outside_the_registry_has_the_specification_of_timm(monkeypatch):
    import timm

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: create_model(name, pretrained=False, **k))
    _, spec = load_encoder("mobilenetv3_small_050")
    assert (spec.name, spec.input_px, spec.mean) == ("mobilenetv3_small_050", 224, (0.485, 0.456, 0.406))


def test_other_encoder_weights_than_in_training_raise(tiny_model):
    encoder = tiny_model.card.encoder | {"name": "efficientnet-lite0"}
    model = HE2Gene(replace(tiny_model.card, encoder=encoder), tiny_model.genes, tiny_model.tensors)
    with pytest.raises(ValueError, match="trained on encoder 'efficientnet-lite0' with weights"):
        _ = model.network


# Network


@pytest.mark.parametrize("size", [20, 32, 51])
def test_patches_of_any_size_are_resized_and_normalised(tiny_model, size):
    patches = torch.full((2, 3, size, size), 51, dtype=torch.uint8)
    found = tiny_model.network.extractor.preprocess(patches)
    assert found.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(found.numpy(), (51 / 255 - 0.5) / 0.5, atol=1e-6)


def test_colour_features_are_the_moments_of_optical_density_in_each_window(tiny_model):
    rng = np.random.default_rng(0)
    patches = [rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for _ in range(2)]
    expected = []
    for window in patches:
        density = -np.log(np.maximum(window.reshape(4, 3, -1), 1) / 255)
        covariance = np.stack([np.cov(spot, ddof=0) for spot in density])
        expected += [density.mean(2), density.std(2), covariance[:, (0, 0, 1), (1, 2, 2)]]
    found = tiny_model.network.extractor.colour(tuple(torch.from_numpy(p) for p in patches))
    assert found.shape == (4, 18)
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected, axis=1), atol=2e-5)


def test_colour_features_of_a_single_colour_are_finite_with_zero_spread(tiny_model):
    patches = tuple(torch.full((2, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 255))
    found = tiny_model.network.extractor.colour(patches).numpy().reshape(2, 2, 9)
    np.testing.assert_allclose(found[:, 0, :3], np.log(255), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1, :3], 0, atol=1e-6)
    np.testing.assert_allclose(found[:, :, 3:], 0, atol=5e-3)


# The bundled model


@pytest.fixture(scope="module")
def bundled():
    return load("breast-her2st")


def test_the_bundled_model_predicts_with_the_bundled_encoder(bundled):
    network = bundled.network
    patches = tuple(torch.full((1, 3, 224, 224), 200, dtype=torch.uint8) for _ in bundled.card.windows_um)
    with torch.inference_mode():
        features = network.extractor(patches).mean(1)
        latent = torch.from_numpy(network.embed(features.numpy(), np.zeros((1, 2)), 0.5))
        expression = network.expression(latent, torch.arange(bundled.card.n_genes))
        proba = network.classify(features.numpy(), np.zeros((1, 2)), latent)
    assert expression.shape == (1, bundled.card.n_genes)
    assert torch.isfinite(expression).all()
    assert proba.shape == (1, len(bundled.card.classes))
    assert proba.sum().item() == pytest.approx(1)


def test_changes_of_a_loaded_model_do_not_change_the_next_one():
    model, other = load(), load()
    model.genes["reliable"] = True
    model.card.encoder["name"] = "other"
    model.tensors.clear()
    assert not other.genes["reliable"].all()
    assert load().card.encoder["name"] == other.card.encoder["name"] != "other"
    assert load().tensors.keys() == other.tensors.keys()
    assert load().network is other.network


def test_the_bundled_model_has_over_ten_thousand_genes_with_unique_names(bundled):
    assert bundled.card.n_genes > 10_000
    assert bundled.genes.index.is_unique
    assert {"ERBB2", "CD24", "GNAS"} <= set(bundled.genes.index)


def test_the_demo_section_is_not_among_the_training_sections(bundled):
    sections = bundled.card.training["sections"]
    assert len(sections) > 1
    assert "C5" not in sections


def test_the_bundled_card_states_the_limitations_and_metrics(bundled):
    assert bundled.card.name in BUNDLED
    assert bundled.card.limitations
    assert len(bundled.card.classes) == len(bundled.card.class_colors) > 1
    text = bundled.card.to_markdown()
    assert all(sentence in text for sentence in (bundled.card.name, *bundled.card.limitations))
    assert "mean Pearson, prediction minus colour, 250 target genes" in text
    without = replace(bundled.card, metrics={}, programmes=None).to_markdown()
    assert "references that see no gene (depth, colour, coordinates): not recorded." in without


def test_the_bootstrap_of_an_older_card_is_not_called_a_95_percent_interval(bundled):
    old = bundled.card.to_json().replace("bootstrap over 800 µm blocks of the section", "95 % interval")
    card = type(bundled.card).from_json(old, "card.json")
    assert card == bundled.card
    text = card.to_markdown()
    assert "| 95 % interval, " not in text
    assert "It is not a 95 % interval" in text


def test_reliable_genes_of_the_bundled_model_follow_from_their_metrics(bundled):
    genes = bundled.genes
    assert genes["reliable"].any()
    assert (genes.loc[genes["reliable"], "pcc_given_depth"] > 0.0999).all()
    assert genes["reliable_known_patient"].any()
    assert (genes.loc[genes["reliable_known_patient"], "pcc_low"] > 0.0999).all()
    assert (genes["pcc_low"] <= genes["pcc"]).all()


def test_package_and_model_stay_small():
    assert size_mb(PACKAGE) < 25
    assert size_mb(PACKAGE / "models" / "bundled" / "breast-her2st") < 20


def test_genes_of_the_bundled_model_have_ensembl_ids():
    """They would be missing if the table that the training file needs was not installed."""
    ids = load().genes["ensembl_id"]
    assert ids.str.fullmatch(r"ENSG\d{11}").mean() > 0.9
    assert load().genes.loc["ERBB2", "ensembl_id"] == "ENSG00000141736"


def test_notebooks_show_what_a_model_predicts_its_accuracy_and_next_steps(tiny_model):
    shown = tiny_model._repr_html_()
    assert "<strong>tiny 1</strong>" in shown
    assert "10 of 41 genes are reliable" in shown
    assert "hg.tl.predict(sdata, model=model)" in shown
    card = replace(tiny_model.card, intended_use="<script>")._repr_html_()
    assert "&lt;script&gt;" in card
    assert "<script>" not in card
