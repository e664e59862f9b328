"""``hg.tl.train`` with preset ``"default"``."""

import copy
import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from spatialdata.models import TableModel

import he2gene_sc as hg
from he2gene_sc import training
from he2gene_sc._core.provenance import image_facts
from he2gene_sc._core.slide import resolve
from he2gene_sc.models import load
from he2gene_sc.stats import log_normalise, pearson
from he2gene_sc.tl._train import fit as _fit
from he2gene_sc.training._closed_form import validate as _validate
from tests.helpers.pictures import read_all
from tests.helpers.toy_sections import (
    SPEC,
    network,
    own,
    predicted,
    renamed,
    same_model,
    toy,
    toys,
    train,
    with_table,
    without_genes,
)

pytestmark = pytest.mark.slow

PATIENT, SECTION = "leave one patient out", "leave one section out"


@pytest.fixture(scope="session")
def sections():
    """Read only."""
    return toys()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Cache with the features of the toy sections, so that tests do not encode again."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def model(sections, cache):
    return train(sections, cache=cache, name="mine", n_target_genes=12)


# The model


def test_the_card_describes_the_training(model, sections):
    card = model.card
    assert card.name == "mine"
    assert card.windows_um == (100.0, 200.0, 400.0)
    assert card.training["preset"] == "default"
    (slide,) = resolve(sections[1])
    assert card.training["sections"]["S1"] == {
        "patient": "B",
        "n_spots": 30,
        "mpp": 2.0,
        "image": image_facts(slide, slide.centres),
    }
    assert (card.training["n_patients"], card.training["n_spots"]) == (2, 90)
    assert (
        card.training["chosen_by"]
        == "leave one section out and leave one patient out, the folds that the figures are of"
    )
    labels = pd.concat([s["table"].obs["annotation"].astype(str) for s in sections]).value_counts()
    assert card.training["labelled_spots"] == {name: labels[name] for name in card.classes}
    # Metrics on new patients come first.
    assert list(card.metrics) == [PATIENT, SECTION]
    for figures in card.metrics.values():
        assert figures["mean Pearson, 12 target genes"].keys() == {"S0", "S1", "S2"}
        # Toys of 1 mm have too few blocks for an interval, see tests/training/test_figures.py.
        assert not any(title.startswith(("95 %", "bootstrap")) for title in figures)
        assert figures["mean partial Pearson given the spots' counts, 12 target genes"].keys() == {"S0", "S1", "S2"}
        assert {"balanced accuracy of the annotation", "calibration of the annotation, all held-out spots"} <= set(
            figures
        )
    assert card.context["rings_um"]
    assert "mean of the neighbours" in card.to_markdown()
    assert str(card.to_json())


@pytest.mark.filterwarnings("error:encoder:UserWarning")
def test_an_encoder_with_a_known_scale_is_trained_and_used_at_this_scale(sections, tmp_path, caplog):
    encoder = (network(), replace(SPEC, mpp=4.0))
    caplog.set_level("INFO", "he2gene_sc")
    made = train(sections, encoder=encoder, n_target_genes=12)
    assert made.card.windows_um == (64.0, 128.0)
    assert "windows of [64.0, 128.0] µm, read as 1 × 1, 2 × 2 tiles at 4, 4 µm/px" in caplog.text
    assert (made.card.encoder["mpp"], made.card.encoder["tiles"]) == (4.0, [1, 2])
    assert "windows of 64, 128 µm, read as 1 × 1, 2 × 2 tiles at 4, 4 µm/px" in made.card.to_markdown()
    loaded = load(made.save(tmp_path / "model"), encoder=encoder)
    assert loaded.network.extractor.tiles == (1, 2)
    np.testing.assert_array_equal(
        predicted(sections[0], loaded).layers["he2gene"], predicted(sections[0], made).layers["he2gene"]
    )


def test_coarse_windows_give_a_warning(sections):
    warned = pytest.warns(UserWarning, match="trained at 4 µm/px. `windows_um` of 128 show it 8 µm/px")
    with warned, pytest.raises(ValueError, match="`sdatas`"):
        train([], encoder=(network(), replace(SPEC, mpp=4.0)), tile_windows=False)
    with pytest.raises(ValueError, match="`tile_windows` is 'no'"):
        train(sections, tile_windows="no")


def test_the_gene_table_describes_the_measured_genes(model, sections):
    tables = [s["table"] for s in sections]
    expected = np.mean(
        [log_normalise(t.X)[:, t.var_names.get_indexer(model.genes.index)].mean(0) for t in tables], axis=0
    )
    np.testing.assert_allclose(model.genes["mean"], expected, rtol=1e-5)
    assert model.genes.index.tolist() == sorted(tables[0].var_names)
    assert (model.genes["group"] == "target").sum() == 12
    top = np.argsort(-expected, kind="stable")[:12]
    assert set(model.genes.index[top]) == set(model.genes.index[model.genes["group"] == "target"])
    assert (model.genes["pcc_low"] <= model.genes["pcc"]).all()
    assert (model.genes.loc[model.genes["reliable"], "pcc_low"] > 0.1).all()


def test_planted_genes_and_classes_are_learned(model):
    other = predicted(toy(7, "C", shape=(7, 7)), model)
    truth = log_normalise(other.X)
    r = pd.Series(pearson(other.layers["he2gene"], truth), index=other.var_names)
    planted = other.var["planted"] != "none"
    assert r[planted].mean() > 0.3
    assert (other.obs["he2gene_annotation"].astype(str) == other.obs["annotation"].astype(str)).mean() > 0.6


def test_a_saved_model_predicts_the_same(model, tmp_path):
    saved = load(model.save(tmp_path / "mine"), encoder=own())
    one, two = (predicted(toy(5), m) for m in (model, saved))
    np.testing.assert_array_equal(one.layers["he2gene"], two.layers["he2gene"])
    np.testing.assert_array_equal(one.obsm["he2gene_annotation_proba"], two.obsm["he2gene_annotation_proba"])
    assert two.uns["he2gene"]["encoder"] == "tiny-own"
    with pytest.raises(RuntimeError, match="'tiny-own'.*supply it"):
        _ = load(tmp_path / "mine").network
    with pytest.raises(ValueError, match="trained on encoder 'tiny-own' with weights"):
        _ = load(tmp_path / "mine", encoder=(network(1), SPEC)).network


def test_the_default_encoder_uses_its_stages_and_loads_by_name(tmp_path, small_lite0):
    preset = hg.DefaultRecipe(windows_um=(100.0,))
    model = hg.tl.train([toy(0, shape=(4, 4)), toy(1, "B", shape=(4, 4))], preset=preset, device="cpu")
    assert model.card.encoder["stages"] == [2, 3, 4]
    assert model.card.windows_um == (100.0,)
    assert model.card.classes == ()
    assert len(model.tensors["latent.mean"]) == 40 + 112 + 320 + 9
    one, two = (predicted(toy(5, shape=(3, 3)), m) for m in (model, load(model.save(tmp_path / "m"))))
    np.testing.assert_array_equal(one.layers["he2gene"], two.layers["he2gene"])
    assert "he2gene_annotation" not in one.obs


def test_stages_can_be_chosen_or_left_out(small_lite0):
    parts = [toy(0, shape=(3, 3)), toy(1, "B", shape=(3, 3))]
    sizes = {}
    for stages in (None, (4,)):
        model = hg.tl.train(parts, preset=hg.DefaultRecipe(stages=stages, windows_um=(100.0,)), device="cpu")
        sizes[stages] = len(model.tensors["latent.mean"])
        assert model.card.encoder.get("stages") == (None if stages is None else [4])
    assert sizes == {None: 1280 + 9, (4,): 320 + 9}


def test_the_order_in_which_stages_are_given_does_not_change_the_model(small_lite0):
    """Their maps come in the order of the network, and each stage has its own weight."""
    parts = [toy(0, shape=(3, 3)), toy(1, "B", shape=(3, 3))]
    one, other = (
        hg.tl.train(parts, preset=hg.DefaultRecipe(stages=stages, windows_um=(100.0,)), device="cpu")
        for stages in ([2, 4], [4, 2])
    )
    assert other.card.encoder["stages"] == [2, 4]
    for key, value in one.tensors.items():
        np.testing.assert_array_equal(other.tensors[key], value, err_msg=key)


def test_expression_of_training_spots_equals_the_heads_applied_to_the_features(model, sections, cache):
    """Training and prediction compute the same embedding."""
    from he2gene_sc.models._embedding import rings_of

    (path,) = [
        p for p in cache.iterdir() if np.isclose(np.load(p, mmap_mode="r")[0, 0], first_features(sections[0])).all()
    ]
    features = np.load(path)[:, 0]
    table = sections[0]["table"]
    centres = 2.0 * table.obsm["spatial"]
    basis = model.network.basis
    embedding = basis.embed(features, rings_of(centres, basis.context.rings_um)) * basis.column_weights(2.0)
    expected = np.maximum(embedding @ model.tensors["genes.weight"].astype(np.float32) + model.tensors["genes.bias"], 0)
    found = predicted(sections[0], model)
    columns = model.genes.index.get_indexer(found.var_names)
    np.testing.assert_allclose(found.layers["he2gene"], expected[:, columns], atol=1e-4)


@pytest.mark.parametrize(("mpp", "halves"), [(1.0, [0.5, 0.5]), (2.0, [0, 1])])
def test_a_fine_slide_is_predicted_with_and_without_neighbours(model, mpp, halves):
    table = predicted(hg.datasets.toy((5, 6), mpp=mpp, seed=5), model)
    embedding, weights = table.obsm["X_he2gene"], model.tensors["genes.weight"].astype(np.float32)
    half = embedding.shape[1] // 2
    (slide,) = resolve(hg.datasets.toy((5, 6), mpp=mpp, seed=5))
    assert slide.mpp == pytest.approx(mpp)
    assert embedding[:, :half].any() == bool(halves[0])
    basis = model.network.basis
    np.testing.assert_array_equal(basis.column_weights(mpp), np.repeat(halves, half))
    expected = np.maximum(embedding @ weights + model.tensors["genes.bias"], 0)
    columns = model.genes.index.get_indexer(table.var_names)
    np.testing.assert_allclose(table.layers["he2gene"], expected[:, columns], atol=1e-4)


def first_features(sdata):
    from he2gene_sc._core.slide import resolve
    from he2gene_sc.image import PatchReader
    from he2gene_sc.models._network import FeatureExtractor

    (slide,) = resolve(sdata)
    reader = PatchReader(slide.pyramid, slide.centres[:1], slide.mpp, windows_um=(100.0, 200.0, 400.0), input_px=16)
    with torch.inference_mode():
        return FeatureExtractor(*own())(tuple(torch.from_numpy(p) for p in read_all(reader)))[0, 0].numpy()


# Determinism, cache, batches


def test_training_is_deterministic_with_and_without_a_cache(model, sections, cache, monkeypatch):
    again = train(sections, name="mine", n_target_genes=12)
    same_model(model, again)

    def never(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr("he2gene_sc.inference._cache.encode", never)
    same_model(model, train(sections, cache=cache, name="mine", n_target_genes=12))


def test_the_batch_size_does_not_change_the_result(model, sections):
    other = train(sections, batch_size=7, name="mine", n_target_genes=12)
    one, two = (predicted(toy(5), m) for m in (model, other))
    np.testing.assert_allclose(one.layers["he2gene"], two.layers["he2gene"], atol=0.02)
    assert other.card.training == model.card.training


def test_random_choices_follow_the_seed(sections, cache):
    found = [train(sections, cache=cache, validation="random", seed=seed).card for seed in (0, 0, 1)]
    assert found[0].metrics == found[1].metrics != found[2].metrics


def test_the_order_of_the_sections_does_not_matter(model, sections, cache):
    other = train(sections[::-1], cache=cache, n_target_genes=12)
    one, two = (predicted(toy(5), m) for m in (model, other))
    np.testing.assert_allclose(one.layers["he2gene"], two.layers["he2gene"], atol=0.02)


def test_training_does_not_change_its_input(cache):
    sdata = toy(3)
    table = sdata["table"]
    table.layers["counts"] = table.X.copy()
    before, attrs, pixels = table.copy(), copy.deepcopy(sdata.attrs), np.asarray(sdata["he"]).copy()
    train([sdata, toy(1, "B")], cache=cache)
    assert sdata["table"] is table
    assert sorted(sdata.tables) == ["table"]
    pd.testing.assert_frame_equal(table.obs, before.obs)
    pd.testing.assert_frame_equal(table.var, before.var)
    assert table.uns.keys() == before.uns.keys()
    assert table.obsm.keys() == before.obsm.keys()
    assert table.layers.keys() == before.layers.keys()
    assert (table.X != before.X).nnz == 0
    assert sdata.attrs == attrs
    np.testing.assert_array_equal(np.asarray(sdata["he"]), pixels)


def test_one_image_at_a_time_is_in_memory(cache, model, monkeypatch):
    from he2gene_sc.tl._train import measured as _measured

    alive, made = [], []

    def resolve(sdata, **places):
        slides = hg._core.slide.resolve(sdata, **places)
        made.extend(weakref.ref(slide) for slide in slides)
        return slides

    def read():
        for i, patient in enumerate("ABA"):
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
            sdata = toy(i, patient)
            made.append(weakref.ref(sdata))
            yield sdata
            del sdata
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))

    monkeypatch.setattr(_measured, "resolve", resolve)
    found = train(read(), cache=cache, name="mine", n_target_genes=12)
    assert len(made) == 6
    assert alive == [0] * 4
    same_model(found, model)


# Genes


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_section_keeps_one_file_open_while_heads_are_fitted(tmp_path, monkeypatch):
    """A process can open about a thousand files, and training sets have hundreds of sections."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build, held = training.build_model, []

    def spy(sections, *args, **kwargs):
        gc.collect()
        open_files = [entry.resolve() for entry in Path("/proc/self/fd").iterdir()]
        held.append((len(sections), sum(path.is_relative_to(tmp_path) for path in open_files)))
        return build(sections, *args, **kwargs)

    monkeypatch.setattr(training, "build_model", spy)
    train(toys("ABAB"))
    ((n, found),) = held
    # One file of features per section, one of all targets, and one of all recoloured copies.
    assert found <= n + 2


def test_a_gene_missing_in_a_section_is_learned_from_the_others(sections, cache, model):
    parts = [sections[0], without_genes(toy(1, "B"), ["ERBB2"]), sections[2]]
    found = train(parts, cache=cache, n_target_genes=12)
    measured = [
        log_normalise(s["table"].X)[:, s["table"].var_names.get_loc("ERBB2")] for s in (sections[0], sections[2])
    ]
    assert found.genes.loc["ERBB2", "mean"] == pytest.approx(np.mean(measured), rel=1e-5)
    assert found.genes.loc["ERBB2", "group"] == "auxiliary"
    slope = np.abs(found.tensors["genes.weight"][:, found.genes.index.get_loc("ERBB2")]).max()
    assert slope > 0
    zero = train(parts, cache=cache, missing_genes_are_zero=True)
    assert zero.genes.loc["ERBB2", "mean"] == pytest.approx(2 / 3 * np.mean(measured), rel=1e-5)
    alone = train([sections[0], sections[2]], cache=cache)
    assert alone.genes.loc["ERBB2", "mean"] == pytest.approx(found.genes.loc["ERBB2", "mean"], rel=1e-5)


def test_requested_genes_are_learned_even_if_rare(sections, cache):
    parts = toys()
    for s in parts:
        matrix = s["table"].X.tolil()
        matrix[:, s["table"].var_names.get_loc("ADIPOQ")] = 0
        s["table"].X = matrix.tocsr()
    parts[0]["table"].X[0, parts[0]["table"].var_names.get_loc("ADIPOQ")] = 1
    assert "ADIPOQ" not in train(parts, cache=cache, min_spot_share=0.02).genes.index
    found = train(parts, cache=cache, genes=["GAPDH", "ADIPOQ", "ERBB2"], n_target_genes=2)
    assert found.genes.index.tolist() == ["ADIPOQ", "ERBB2", "GAPDH"]
    assert found.card.n_genes == 3
    # Expression is normalised by all counts, not by the counts of the learned genes.
    everything = train(parts, cache=cache)
    assert found.genes.loc["ERBB2", "mean"] == pytest.approx(everything.genes.loc["ERBB2", "mean"])


def test_symbols_and_ensembl_ids_are_matched(sections, cache, model):
    names = sections[0]["table"].var_names
    ids = {gene: f"ENSG{i:011d}" for i, gene in enumerate(names)}
    parts = [toy(0), renamed(toy(1, "B"), {k: f"{v}.{3}" for k, v in ids.items()}), toy(2)]
    found = train(parts, cache=cache, ensembl_ids=ids, name="mine", n_target_genes=12)
    assert found.genes["ensembl_id"].to_dict() == ids
    for key, value in model.tensors.items():
        np.testing.assert_array_equal(value, found.tensors[key])
    other = renamed(toy(5), ids)
    np.testing.assert_array_equal(predicted(other, found).layers["he2gene"], predicted(toy(5), model).layers["he2gene"])


def test_ids_without_a_symbol_are_kept_without_the_version(cache):
    parts = [renamed(toy(i, p), {"FTL": "ENSG00000087086.16"}) for i, p in enumerate("AB")]
    found = train(parts, cache=cache, ensembl_ids={})
    assert found.genes.loc["ENSG00000087086", "ensembl_id"] == "ENSG00000087086"


def test_symbols_can_be_in_a_column(cache, model):
    parts = toys()
    for s in parts:
        s["table"].var["symbol"] = s["table"].var_names
        s["table"].var_names = [f"row{i}" for i in range(s["table"].n_vars)]
    same_model(train(parts, gene_symbols="symbol", cache=cache, name="mine", n_target_genes=12), model)


def test_counts_can_be_in_a_layer(cache, model):
    parts = toys()
    for s in parts:
        s["table"].layers["counts"] = s["table"].X.copy()
        s["table"].X = log_normalise(s["table"].X)
    same_model(train(parts, layer="counts", cache=cache, name="mine", n_target_genes=12), model)


def test_counts_can_be_dense_or_of_any_numeric_type(cache, model):
    parts = toys()
    parts[0]["table"].X = parts[0]["table"].X.toarray().astype(np.uint16)
    parts[1]["table"].X = parts[1]["table"].X.tocsc().astype(np.int64)
    same_model(train(parts, cache=cache, name="mine", n_target_genes=12), model)


# Labels


def test_a_section_without_labels_trains_expression(cache, model):
    parts = toys()
    parts[1]["table"].obs["annotation"] = np.nan
    found = train(parts, cache=cache, n_target_genes=12)
    assert sum(found.card.training["labelled_spots"].values()) == 60
    np.testing.assert_array_equal(found.tensors["genes.weight"], model.tensors["genes.weight"])
    assert found.card.metrics[SECTION]["balanced accuracy of the annotation"].keys() == {"S0", "S2"}


def test_sections_with_labels_are_also_read_recoloured(cache, monkeypatch):
    read, encode = [], _fit.encode_section

    def spy(section, *args, recolouring=None):
        features = encode(section, *args, recolouring=recolouring)
        read.append((section.name, recolouring is not None, np.array(features)))
        return features

    monkeypatch.setattr(_fit, "encode_section", spy)
    parts = toys()
    parts[2]["table"].obs["annotation"] = np.nan
    used, build = [], training.build_model
    monkeypatch.setattr(
        training, "build_model", lambda found, *args, **kwargs: used.extend(found) or build(found, *args, **kwargs)
    )
    with_copies = train(parts, cache=cache, n_recoloured=2, name="mine", n_target_genes=12)
    names = [(name, recoloured) for name, recoloured, _ in read]
    assert names == [(name, copy) for name in ("S0", "S1") for copy in (False, True, True)] + [("S2", False)]
    assert with_copies.card.training["recoloured_copies"] == 2
    by_name = {section.name: section for section in used}
    for name in ("S0", "S1"):
        plain, first, second = (features for of, _, features in read if of == name)
        for found, expected in zip(by_name[name].recoloured, (first, second), strict=True):
            np.testing.assert_array_equal(found, expected[:, 0])
        for one, other in ((plain, first), (plain, second), (first, second)):
            assert np.abs(one - other).mean() > 0.03 * plain.std()
    assert by_name["S2"].recoloured == ()
    read.clear()
    without = train(parts, cache=cache, n_recoloured=0, name="mine", n_target_genes=12)
    assert not any(recoloured for _, recoloured, _ in read)
    assert without.card.training["recoloured_copies"] == 0
    np.testing.assert_array_equal(with_copies.tensors["genes.weight"], without.tensors["genes.weight"])
    assert (with_copies.tensors["annotation.weight"] != without.tensors["annotation.weight"]).any()


def test_sections_without_a_class_are_not_read_recoloured(cache, monkeypatch):
    encode = _fit.encode_section

    def spy(section, *args, recolouring=None):
        assert recolouring is None or section.name != "S2"
        return encode(section, *args, recolouring=recolouring)

    monkeypatch.setattr(_fit, "encode_section", spy)
    parts = toys()
    parts[2]["table"].obs["annotation"] = "Undetermined"
    assert train(parts, cache=cache).card.training["recoloured_copies"] == 1
    alone = toys()
    for part in alone:
        part["table"].obs["annotation"] = "tumour"
    monkeypatch.setattr(_fit, "encode_section", encode)
    assert train(alone, cache=cache).card.training["recoloured_copies"] == 0


def test_a_copy_with_infinite_features_names_its_section(cache, monkeypatch):
    encode = _fit.encode_section

    def overflowing(section, *args, recolouring=None):
        features = np.array(encode(section, *args, recolouring=recolouring))
        return features if recolouring is None else np.full_like(features, np.inf)

    monkeypatch.setattr(_fit, "encode_section", overflowing)
    with pytest.raises(ValueError, match="infinite features in section 'S0, recoloured'"):
        train(toys(), cache=cache)


def test_classes_are_merged_left_out_and_coloured(cache, sections):
    found = train(
        sections,
        cache=cache,
        classes=hg.Classes(
            merge={"tumour": "cancer", "stroma": "other", "adipose": "other"}, colors={"cancer": "#123456"}
        ),
    )
    assert found.card.classes == ("cancer", "other")
    assert found.card.class_colors[0] == "#123456"
    assert sum(found.card.training["labelled_spots"].values()) == 90
    for classes in ({"adipose": None}, hg.Classes(ignore=("adipose",))):
        left = train(sections, cache=cache, classes=classes)
        assert left.card.classes == ("stroma", "tumour")
        assert sum(left.card.training["labelled_spots"].values()) < 90


def test_classes_with_fewer_than_five_spots_are_left_out(cache, caplog):
    parts = toys()
    labels = parts[0]["table"].obs["annotation"].astype(str).to_numpy(object)
    labels[:4] = "rare"
    parts[0]["table"].obs["annotation"] = labels
    found = train(parts, cache=cache)
    assert "fewer than 5 spots are left out: ['rare']" in caplog.text
    assert "rare" not in found.card.classes
    assert sum(found.card.training["labelled_spots"].values()) == 86


def test_a_single_class_skips_the_annotation_head(cache, sections, caplog):
    merged = dict.fromkeys(("tumour", "stroma", "adipose"), "tissue")
    found = train(sections, cache=cache, classes=merged)
    assert "has enough labelled spots; the annotation head is skipped" in caplog.text
    assert found.card.classes == ()
    assert "annotation.weight" not in found.tensors


# Sections and patients


def test_one_patient_gives_a_warning_and_sections_are_held_out(sections, cache, caplog):
    found = train([toy(0), toy(2)], cache=cache)
    assert "not for other patients" in caplog.text
    assert list(found.card.metrics) == [SECTION]
    assert found.card.training["chosen_by"] == "leave one section out, the folds that the figures are of"


def test_one_section_gives_a_stronger_warning(cache, caplog):
    found = train(toy(0), cache=cache)
    assert "SAME section" in caplog.text
    assert "do not report" in caplog.text
    assert list(found.card.metrics) == ["parts of one section"]
    assert not found.genes["reliable"].any()
    assert np.isfinite(predicted(toy(5), found).layers["he2gene"]).all()


def test_random_validation_is_named_in_the_card(sections, cache):
    found = train(sections, cache=cache, validation="random")
    (protocol,) = found.card.metrics
    assert "leaks" in protocol
    assert not found.genes["reliable"].any()


def test_one_object_can_hold_two_sections(cache, model):
    parts = toys()
    tables = []
    for i, s in enumerate(parts[:2]):
        table = s["table"].copy()
        table.obs["region"] = pd.Categorical([f"spots{i}"] * table.n_obs)
        table.obs_names = [f"{i}-{name}" for name in table.obs_names]
        tables.append(table)
    import anndata as ad

    both = ad.concat(tables, merge="same")
    both.obs["region"] = both.obs["region"].astype("category")
    whole = sd.SpatialData(
        images={f"he{i}": s["he"] for i, s in enumerate(parts[:2])},
        shapes={f"spots{i}": s["spots"] for i, s in enumerate(parts[:2])},
        tables={
            "table": TableModel.parse(
                both, region=["spots0", "spots1"], region_key="region", instance_key="instance_id"
            )
        },
    )
    for i in (0, 1):
        from spatialdata.transformations import Identity, set_transformation

        set_transformation(whole[f"he{i}"], {f"slide{i}": Identity()}, set_all=True)
        set_transformation(whole[f"spots{i}"], {f"slide{i}": Identity()}, set_all=True)
    whole.attrs["he2gene"] = {"mpp": {"he0": 2.0, "he1": 2.0}}
    same_model(train([whole, parts[2]], cache=cache, name="mine", n_target_genes=12), model)


def test_sections_can_have_different_resolutions(cache):
    parts = [toy(0), hg.datasets.toy((5, 6), mpp=1.0, seed=1)]
    for key, value in {"section": "S1", "patient": "B"}.items():
        parts[1]["table"].obs[key] = value
    found = train(parts, cache=cache)
    assert found.card.training["mpp_range"] == [1.0, 2.0]


def test_spots_without_counts_are_left_out_with_a_warning(cache, caplog):
    parts = toys()
    matrix = parts[0]["table"].X.tolil()
    matrix[[3, 4]] = 0
    parts[0]["table"].X = matrix.tocsr()
    found = train(parts, cache=cache)
    assert "section S0: 2 spots without counts are left out" in caplog.text
    assert found.card.training["sections"]["S0"]["n_spots"] == 28


def test_spots_outside_the_image_are_left_out_with_a_warning(cache, caplog):
    from spatialdata.models import Image2DModel

    sdata = toy(0)
    pixels = np.asarray(sdata["he"])[:, :, :550]
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    found = train([sdata, toy(1, "B")])
    assert "section S0: 5 spots outside the image are left out" in caplog.text
    assert found.card.training["sections"]["S0"]["n_spots"] == 25


# Permuted targets


def test_permuted_counts_give_no_reliable_genes(cache):
    """Full training with counts permuted between the spots of a section."""
    parts = []
    for i, patient in enumerate("ABCD"):
        sdata = toy(i, patient)
        table = sdata["table"]
        order = np.random.default_rng(i).permutation(table.n_obs)
        table.X = table.X[order]
        table.obs["annotation"] = table.obs["annotation"].to_numpy()[order]
        parts.append(sdata)
    found = train(parts, cache=cache)
    assert found.genes["pcc"].mean() < 0.05
    assert found.genes["skill"].mean() < 0.01
    assert found.genes["reliable"].mean() <= 0.05
    auroc = found.card.metrics[PATIENT][
        "AUROC of each class against the rest, held-out spots whose model had seen the class"
    ]
    assert max(auroc.values()) < 0.7


def test_sections_given_four_times_give_nearly_the_same_model(cache, sections, monkeypatch):
    # Given, not chosen: copies of a held-out section stay in training, so that another penalty would look best. It stands
    # against a sum over spots.
    monkeypatch.setattr(_validate, "RANKS", (5,))
    repeated = [toy(i, p, section=f"S{i}-{k}") for k in range(4) for i, p in enumerate("ABA")]
    monkeypatch.setattr(_validate, "PENALTIES", (1.0,))
    one = train(sections, cache=cache)
    monkeypatch.setattr(_validate, "PENALTIES", (4.0,))
    four = train(repeated, cache=cache)
    assert four.card.training["n_spots"] == 360
    np.testing.assert_allclose(four.genes["mean"], one.genes["mean"], rtol=1e-5)
    found = [predicted(toy(5), m).layers["he2gene"] for m in (one, four)]
    assert np.nanmin(pearson(*found)) > 0.999


def test_the_table_can_be_replaced(sections, cache, model):
    parts = [with_table(s, s["table"].copy()) for s in toys()]
    same_model(train(parts, cache=cache, name="mine", n_target_genes=12), model)
