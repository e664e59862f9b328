"""`hg.tl.predict` writes the documented results, and the numbers do not depend on how the tissue is stored."""

import json
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, set_transformation

import he2gene_sc as hg
from he2gene_sc._core.matrix import layer_names
from tests.helpers.objects import two_regions

CLASSES = ["adipose tissue", "connective tissue", "invasive cancer"]


@pytest.fixture(scope="session")
def tiny_model(tiny_model):
    """Return the tiny model with an annotation head that predicts every class for some spots."""
    from he2gene_sc.models._embedding import NO_CONTEXT
    from he2gene_sc.models._network import Network

    latent = hg.tl.predict(hg.datasets.toy((5, 6), mpp=2.0), model=tiny_model, copy=True)["table"].obsm["X_he2gene"]
    weight = np.eye(5, 3, dtype=np.float32) / latent.std(axis=0)[:, None]
    changed = {"annotation.weight": weight, "annotation.bias": -latent.mean(axis=0) @ weight}
    model = hg.models.HE2Gene(tiny_model.card, tiny_model.genes, {**tiny_model.tensors, **changed})
    tensors = {key: torch.from_numpy(value) for key, value in model.tensors.items()}
    model.__dict__["network"] = Network(tiny_model.network.extractor, tensors, NO_CONTEXT)
    return model


def run(sdata, model, **kwargs):
    """Predict in a copy and return its measured table."""
    return hg.tl.predict(sdata, model=model, copy=True, **kwargs)["table"]


def same(a, b, atol=1e-4):
    np.testing.assert_allclose(a.layers["he2gene"], b.layers["he2gene"], atol=atol)
    np.testing.assert_allclose(a.obsm["X_he2gene"], b.obsm["X_he2gene"], atol=atol)
    np.testing.assert_allclose(a.obsm["he2gene_annotation_proba"], b.obsm["he2gene_annotation_proba"], atol=atol)


def plain(value):
    """Return whether a value consists of JSON types only, with text keys in mappings."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)


def without_table(toy):
    del toy.tables["table"]
    return toy


# Results


def test_layer_is_float32_floored_at_0_and_nan_for_unknown_genes(toy, tiny_model):
    assert hg.tl.predict(toy, model=tiny_model) is None
    layer = toy["table"].layers["he2gene"]
    known = toy["table"].var_names != "FTL"
    assert layer.dtype == np.float32
    assert layer.shape == toy["table"].shape
    assert np.isnan(layer[:, ~known]).all()
    assert np.isfinite(layer[:, known]).all()
    assert layer[:, known].min() == 0
    assert np.nanmax(layer) > 0


def test_var_has_the_facts_of_the_model_on_each_gene(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    var = toy["table"].var
    assert var["he2gene_predicted"].dtype == bool
    assert list(var.index[~var["he2gene_predicted"]]) == ["FTL"]
    assert var["he2gene_reliable"].dtype == bool
    known = var.index.drop("FTL")
    np.testing.assert_allclose(var.loc[known, "he2gene_pcc"], tiny_model.genes.loc[known, "pcc"], rtol=1e-6)
    assert (var.loc[known, "he2gene_reliable"] == tiny_model.genes.loc[known, "reliable"]).all()
    assert (var.loc[known, "he2gene_mean"] == tiny_model.genes.loc[known, "mean"]).all()
    assert np.isnan(var.loc["FTL", ["he2gene_pcc", "he2gene_mean"]].astype(float)).all()
    assert not var.loc["FTL", "he2gene_reliable"]


def test_annotation_is_the_most_probable_class_with_the_colours_of_the_card(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    proba = table.obsm["he2gene_annotation_proba"]
    annotation = table.obs["he2gene_annotation"]
    assert isinstance(proba, pd.DataFrame)
    assert list(proba.columns) == CLASSES
    assert list(proba.index) == list(table.obs_names)
    np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-5)
    assert list(annotation.cat.categories) == CLASSES
    assert annotation.nunique() == 3
    assert list(annotation) == list(proba.idxmax(axis=1))
    np.testing.assert_array_equal(table.obs["he2gene_annotation_confidence"], proba.max(axis=1))
    assert table.uns["he2gene_annotation_colors"] == ["#ffdd57", "#2ca02c", "#d62728"]


def test_predictions_can_be_recomputed_from_the_embedding(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    latent = table.obsm["X_he2gene"]
    assert latent.shape == (30, 5)
    assert latent.dtype == np.float32
    tensors = tiny_model.tensors
    rebuilt = np.maximum(latent @ tensors["genes.weight"].astype(np.float32) + tensors["genes.bias"], 0)
    rebuilt = pd.DataFrame(rebuilt, columns=tiny_model.genes.index)
    known = table.var_names.drop("FTL")
    np.testing.assert_allclose(table[:, known].layers["he2gene"], rebuilt[known], atol=1e-3)


def test_uns_holds_json_types_and_no_host_paths(toy, tiny_model, tmp_path):
    toy.write(tmp_path / "slide.zarr")
    toy = sd.read_zarr(tmp_path / "slide.zarr")
    hg.tl.predict(toy, model=tiny_model)
    record = toy["table"].uns["he2gene"]
    assert plain(record)
    assert str(tmp_path) not in json.dumps(record)
    assert '"/' not in json.dumps(record)
    facts = ("model", "model_version", "encoder", "encoder_license", "image", "coordinate_system", "mpp", "mpp_source")
    assert [record[f] for f in facts] == ["tiny", "1", "tiny", "BSD-3-Clause", "he", "global", 2.0, "metadata"]
    assert record["expression_scale"] == tiny_model.card.expression_scale
    assert record["level"] == 0
    assert set(record["versions"]) >= {"he2gene_sc", "torch", "timm", "spatialdata"}


def test_only_documented_keys_are_written(toy, tiny_model):
    slots = ("layers", "obsm", "obsp", "varm", "varp", "uns")
    table = toy["table"]
    before = {slot: set(getattr(table, slot)) for slot in slots}
    obs, var = set(table.obs), set(table.var)
    hg.tl.predict(toy, model=tiny_model)
    new = {slot: set(getattr(table, slot)) - before[slot] for slot in slots}
    assert new["layers"] == {"he2gene"}
    assert new["obsm"] == {"X_he2gene", "he2gene_annotation_proba"}
    assert new["uns"] == {"he2gene", "X_he2gene_rows", "he2gene_annotation_colors"}
    assert not new["obsp"] | new["varm"] | new["varp"]
    assert set(table.obs) - obs == {"he2gene_annotation", "he2gene_annotation_confidence", "he2gene_tissue"}
    figures = ("predicted", "pcc", "pcc_new_patient", "pcc_given_depth", "reliable", "reliable_known_patient", "mean")
    assert set(table.var) - var == {f"he2gene_{name}" for name in figures}
    assert list(toy.tables) == ["table"]


def test_x_and_all_other_slots_are_unchanged(toy, tiny_model):
    table = toy["table"]
    table.layers["counts"] = table.X.copy()
    table.raw = table.copy()
    before = table.copy()
    hg.tl.predict(toy, model=tiny_model)
    assert toy["table"] is table
    assert (table.X != before.X).nnz == 0
    assert type(table.X) is type(before.X)
    assert (table.layers["counts"] != before.layers["counts"]).nnz == 0
    assert list(table.obs_names) == list(before.obs_names)
    pd.testing.assert_frame_equal(table.obs[before.obs.columns], before.obs)
    pd.testing.assert_frame_equal(table.var[before.var.columns], before.var)
    np.testing.assert_array_equal(table.obsm["spatial"], before.obsm["spatial"])
    assert table.uns["spatialdata_attrs"] == before.uns["spatialdata_attrs"]
    assert table.raw.shape == before.raw.shape


def test_key_added_and_layer_set_all_names(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model, key_added="run2", layer="imputed")
    table = toy["table"]
    assert layer_names(table) == ["imputed"]
    assert {"X_run2", "run2_annotation_proba"} <= set(table.obsm)
    assert {"run2", "run2_annotation_colors"} <= set(table.uns)
    assert {"run2_annotation", "run2_annotation_confidence"} <= set(table.obs)
    assert {"run2_predicted", "run2_pcc", "run2_reliable"} <= set(table.var)
    assert not [name for name in (*table.obs, *table.var, *table.obsm, *table.uns) if "he2gene" in name]
    assert table.uns["run2"]["layer"] == "imputed"


def test_copy_does_not_change_the_original(toy, tiny_model):
    result = hg.tl.predict(toy, model=tiny_model, copy=True)
    assert "he2gene" in result["table"].layers
    assert not toy["table"].layers
    assert "he2gene_annotation" not in toy["table"].obs
    assert result["he"] is toy["he"]
    assert result.attrs == toy.attrs


def test_spatial_is_added_if_the_table_lacks_it(toy, tiny_model):
    expected = toy["table"].obsm.pop("spatial")
    hg.tl.predict(toy, model=tiny_model)
    np.testing.assert_allclose(toy["table"].obsm["spatial"], expected)


# Choice of genes


def test_a_list_of_genes_predicts_only_these(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model, genes=["KRT8", "ERBB2"])
    table = toy["table"]
    assert set(table.var_names[table.var["he2gene_predicted"]]) == {"ERBB2", "KRT8"}
    assert set(table.var_names[np.isfinite(table.layers["he2gene"]).all(0)]) == {"ERBB2", "KRT8"}


def test_all_genes_are_written_to_a_second_table_and_the_first_is_unchanged(toy, tiny_model):
    before = toy["table"].copy()
    hg.tl.predict(toy, model=tiny_model, genes="all")
    made = toy["he2gene"]
    assert list(made.var_names) == list(tiny_model.genes.index)
    np.testing.assert_array_equal(made.X, made.layers["he2gene"])
    assert list(made.obs_names) == list(before.obs_names)
    assert made.uns["spatialdata_attrs"]["region"] == "spots"
    assert set(toy["table"].layers) == set(before.layers)
    assert list(toy["table"].obs) == list(before.obs)


def test_predict_after_all_genes_still_finds_the_measured_table(toy, tiny_model):
    expected = run(toy, tiny_model)
    for genes in ("all", None, "all", None):
        hg.tl.predict(toy, model=tiny_model, genes=genes)
    assert sorted(toy.tables) == ["he2gene", "table"]
    same(toy["table"], expected)
    known = expected.var_names.drop("FTL")
    np.testing.assert_allclose(
        toy["he2gene"][:, known].layers["he2gene"], expected[:, known].layers["he2gene"], atol=1e-4
    )


def test_predict_twice_gives_the_same(toy, tiny_model):
    expected = run(toy, tiny_model)
    hg.tl.predict(toy, model=tiny_model, genes=["ERBB2"])
    hg.tl.predict(toy, model=tiny_model)
    same(toy["table"], expected)
    assert list(toy["table"].var["he2gene_predicted"]) == list(expected.var["he2gene_predicted"])
    assert list(toy["table"].obs.columns) == list(expected.obs.columns)


def test_gene_symbols_names_a_column(toy, tiny_model):
    expected = run(toy, tiny_model)
    toy["table"].var["symbol"] = toy["table"].var_names.to_numpy()
    toy["table"].var_names = [f"id{i}" for i in range(toy["table"].n_vars)]
    hg.tl.predict(toy, model=tiny_model, gene_symbols="symbol")
    same(toy["table"], expected)


def test_device_and_dtype_are_checked_before_the_slide_is_read(toy, tiny_model):
    with mock.patch("he2gene_sc.tl._predict.find_slides", side_effect=AssertionError):
        with pytest.raises(ValueError, match="device"):
            hg.tl.predict(toy, model=tiny_model, device="cudda")
        with pytest.raises(ValueError, match="`dtype` 'float99' is unknown"):
            hg.tl.predict(toy, model=tiny_model, dtype="float99")


@pytest.mark.parametrize("version", ["", ".7"])
def test_ensembl_ids_are_matched_without_their_version(toy, tiny_model, version):
    expected = run(toy, tiny_model)
    ids = tiny_model.genes["ensembl_id"] + version
    toy["table"].var_names = [ids.get(name, "ENSG99999999999") for name in toy["table"].var_names]
    hg.tl.predict(toy, model=tiny_model)
    same(toy["table"], expected)


def test_one_gene_under_two_names_is_written_to_both_columns(toy, tiny_model):
    names = toy["table"].var_names.to_numpy().copy()
    names[names == "FTL"] = tiny_model.genes.loc["ERBB2", "ensembl_id"]
    toy["table"].var_names = names
    hg.tl.predict(toy, model=tiny_model)
    layer = toy["table"].to_df("he2gene")
    np.testing.assert_array_equal(layer["ERBB2"], layer[tiny_model.genes.loc["ERBB2", "ensembl_id"]])


def test_duplicated_genes_in_var_are_both_written(toy, tiny_model):
    expected = run(toy, tiny_model).to_df("he2gene")["ERBB2"]
    names = toy["table"].var_names.to_numpy().copy()
    names[5] = "ERBB2"
    toy["table"].var_names = names
    hg.tl.predict(toy, model=tiny_model)
    twice = toy["table"].layers["he2gene"][:, names == "ERBB2"]
    np.testing.assert_allclose(twice, np.column_stack([expected, expected]), atol=1e-4)


def test_a_gene_that_is_passed_twice_gets_one_column(toy, tiny_model):
    asked = ["ERBB2", "NOT1", "ERBB2", tiny_model.genes.loc["NOT1", "ensembl_id"]]
    hg.tl.predict(without_table(toy), model=tiny_model, genes=asked)
    assert list(toy["table"].var_names) == ["ERBB2", "NOT1"]


# Tables


def test_a_slide_without_table_gets_one(toy, tiny_model):
    expected = run(toy, tiny_model)
    hg.tl.predict(without_table(toy), model=tiny_model)
    table = toy["table"]
    assert list(toy.tables) == ["table"]
    assert list(table.var_names) == list(tiny_model.genes.index)
    np.testing.assert_array_equal(table.X, table.layers["he2gene"])
    assert table.uns["spatialdata_attrs"]["region"] == "spots"
    assert table.uns["he2gene_made"]["X"] == tiny_model.card.expression_scale
    np.testing.assert_array_equal(table.obsm["spatial"], expected.obsm["spatial"])
    known = expected.var_names.drop("FTL")
    np.testing.assert_allclose(table[:, known].layers["he2gene"], expected[:, known].layers["he2gene"], atol=1e-4)


def test_a_slide_without_table_can_be_predicted_twice(toy, tiny_model):
    hg.tl.predict(without_table(toy), model=tiny_model)
    first = toy["table"].copy()
    hg.tl.predict(toy, model=tiny_model)
    assert list(toy.tables) == ["table"]
    same(toy["table"], first)


def test_a_slide_without_table_takes_a_list_of_genes(toy, tiny_model):
    hg.tl.predict(without_table(toy), model=tiny_model, genes=["NOT1", "ERBB2"])
    assert list(toy["table"].var_names) == ["NOT1", "ERBB2"]


def test_over_the_memory_limit_x_stays_empty(toy, tiny_model, monkeypatch):
    monkeypatch.setattr(hg.settings, "memory_limit", 100)
    hg.tl.predict(without_table(toy), model=tiny_model)
    table = toy["table"]
    assert table.X.nnz == 0
    assert np.isfinite(table.layers["he2gene"]).all()
    assert "memory_limit" in table.uns["he2gene_made"]["X"]


def test_a_view_of_a_table_is_filled(toy, tiny_model):
    expected = run(toy, tiny_model)
    toy.tables["table"] = toy["table"][:, :20]
    assert toy["table"].is_view
    hg.tl.predict(toy, model=tiny_model)
    np.testing.assert_allclose(toy["table"].layers["he2gene"], expected.layers["he2gene"][:, :20], atol=1e-4)


def test_a_table_filtered_together_with_its_shapes_is_filled(toy, tiny_model):
    expected = run(toy, tiny_model)
    toy.tables["table"] = toy["table"][::3]
    toy.shapes["spots"] = toy["spots"].iloc[::3]
    hg.tl.predict(toy, model=tiny_model)
    np.testing.assert_allclose(toy["table"].layers["he2gene"], expected.layers["he2gene"][::3], atol=1e-4)


def test_two_regions_of_a_table_are_predicted_by_one_call(toy, tiny_model):
    both, other = two_regions(toy)
    hg.tl.predict(both, model=tiny_model)
    for region, slide in (("spots", toy), ("more", other)):
        rows = both["table"][both["table"].obs["region"] == region]
        expected = run(slide, tiny_model)[rows.obs["instance_id"]]
        same(rows, expected)
    assert both["table"].uns["he2gene"]["image"] == {"spots": "he", "more": "he2"}
    assert plain(both["table"].uns["he2gene"])


def test_predicting_one_region_keeps_the_prediction_of_the_other(toy, tiny_model):
    both, _ = two_regions(toy)
    hg.tl.predict(both, model=tiny_model)
    before = both["table"].copy()
    hg.tl.predict(both, model=tiny_model, shapes_key="more")
    same(both["table"], before)
    assert list(both["table"].obs["he2gene_annotation"]) == list(before.obs["he2gene_annotation"])


def test_regions_predicted_one_by_one_are_as_by_one_call(toy, tiny_model):
    (both, _), (apart, _) = two_regions(toy), two_regions(toy)
    hg.tl.predict(both, model=tiny_model)
    for region in ("spots", "more"):
        hg.tl.predict(apart, model=tiny_model, shapes_key=region)
    same(apart["table"], both["table"])
    np.testing.assert_array_equal(apart["table"].obsm["spatial"], both["table"].obsm["spatial"])
    assert np.isfinite(apart["table"].obsm["spatial"]).all()
    for name in ("regions", "share_on_tissue", "n_spots", "mpp", "image"):
        assert apart["table"].uns["he2gene"][name] == both["table"].uns["he2gene"][name]


def test_colours_that_a_user_chose_for_the_classes_are_kept(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    classes, drawn = list(table.obs["he2gene_annotation"].cat.categories), list(table.uns["he2gene_annotation_colors"])
    table.uns["he2gene_annotation_colors"] = ["#123456", *drawn[1:]]
    hg.tl.predict(toy, model=tiny_model, mpp=3.0)
    found = dict(
        zip(table.obs["he2gene_annotation"].cat.categories, table.uns["he2gene_annotation_colors"], strict=True)
    )
    assert found == {name: dict(zip(classes, ["#123456", *drawn[1:]], strict=True))[name] for name in found}
    del table.uns["he2gene_annotation_colors"]
    hg.tl.predict(toy, model=tiny_model)
    assert list(table.uns["he2gene_annotation_colors"]) == drawn


def test_one_region_of_two_leaves_the_other_empty(toy, tiny_model):
    both, _ = two_regions(toy)
    hg.tl.predict(both, model=tiny_model, shapes_key="more")
    done = (both["table"].obs["region"] == "more").to_numpy()
    assert np.isnan(both["table"].layers["he2gene"][~done]).all()
    assert both["table"].obs["he2gene_annotation"].isna().to_numpy().tolist() == (~done).tolist()


@pytest.mark.slow
def test_two_regions_get_a_table_of_all_genes_with_unique_names(toy, tiny_model, tmp_path):
    both, _ = two_regions(toy)
    hg.tl.predict(both, model=tiny_model, genes="all")
    assert both["he2gene"].obs_names.is_unique
    assert both["he2gene"].uns["spatialdata_attrs"]["region"] == ["spots", "more"]
    both.write(tmp_path / "both.zarr")
    assert sd.read_zarr(tmp_path / "both.zarr")["he2gene"].shape == (60, len(tiny_model.genes))


# Order of spots and storage of images


@pytest.mark.slow
@hypothesis_settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16), batch_size=st.integers(1, 40))
def test_results_do_not_depend_on_the_order_of_spots_and_genes(tiny_model, seed, batch_size):
    toy = hg.datasets.toy((5, 6), mpp=2.0)
    expected = run(toy, tiny_model)
    rng = np.random.default_rng(seed)
    toy.tables["table"] = toy["table"][rng.permutation(30), rng.permutation(40)].copy()
    toy.shapes["spots"] = toy["spots"].iloc[rng.permutation(30)]
    hg.tl.predict(toy, model=tiny_model, batch_size=batch_size)
    same(toy["table"][expected.obs_names, expected.var_names], expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_numbers(toy, tiny_model, batch_size):
    same(run(toy, tiny_model, batch_size=batch_size), run(toy, tiny_model))


@pytest.mark.parametrize("chunks", [(1, 64, 64), (3, 37, 5000), (3, 600, 700)])
def test_any_chunking_gives_the_same_numbers(toy, tiny_model, chunks):
    expected = run(toy, tiny_model)
    toy.images["he"] = Image2DModel.parse(toy["he"].to_numpy(), dims=("c", "y", "x"), chunks=chunks)
    same(run(toy, tiny_model), expected)


def test_an_image_in_memory_gives_the_same_numbers(toy, tiny_model):
    expected = run(toy, tiny_model)
    toy.images.data["he"] = toy["he"].compute()
    hg.tl.predict(toy, model=tiny_model)
    same(toy["table"], expected)


def test_a_zarr_backed_image_gives_the_same_numbers(toy, tiny_model, tmp_path):
    expected = run(toy, tiny_model)
    toy.write(tmp_path / "slide.zarr")
    same(run(sd.read_zarr(tmp_path / "slide.zarr"), tiny_model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backed", [False, True])
def test_a_multiscale_image_gives_the_same_numbers(tiny_model, tmp_path, backed):
    single = hg.datasets.toy((3, 4), mpp=0.5)
    multi = hg.datasets.toy((3, 4), mpp=0.5)
    finest = sd.get_pyramid_levels(single["he"], n=0)
    assert len(multi["he"].children) > 1
    single.images.data["he"] = finest
    if backed:
        multi.write(tmp_path / "slide.zarr")
        multi = sd.read_zarr(tmp_path / "slide.zarr")
    a, b = run(single, tiny_model), run(multi, tiny_model)
    assert b.uns["he2gene"]["level"] > 0
    same(a, b, atol=1e-3)


def test_another_system_with_a_scale_and_an_affine_gives_the_same_numbers(toy, tiny_model):
    expected = run(toy, tiny_model)
    affine = Affine([[0.8, -0.6, 50.0], [0.6, 0.8, -20.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(toy["he"], {"slide": affine}, set_all=True)
    toy.shapes["spots"] = ShapesModel.parse(
        np.column_stack([toy["spots"].geometry.x, toy["spots"].geometry.y]) / 4,
        geometry=0,
        radius=25.0 / 4,
        index=toy["spots"].index,
        transformations={"slide": sd.transformations.Sequence([Scale([4.0, 4.0], axes=("x", "y")), affine])},
    )
    same(run(toy, tiny_model), expected, atol=1e-3)


def test_an_image_twice_as_large_with_half_the_mpp_gives_the_same_pattern(toy, tiny_model):
    expected = run(toy, tiny_model)
    pixels = toy["he"].to_numpy().repeat(2, axis=1).repeat(2, axis=2)
    toy.images["he"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations={"global": Scale([0.5, 0.5], axes=("x", "y"))}
    )
    toy.attrs["he2gene"]["mpp"]["he"] = 1.0
    result = run(toy, tiny_model)
    a, b = (table[:, table.var_names != "FTL"].to_df("he2gene") for table in (expected, result))
    varying = a.columns[(a > 0).mean() > 0.5]
    assert len(varying) > 10
    assert a[varying].corrwith(b[varying]).min() >= 0.99


@pytest.mark.slow
def test_the_bundled_model_predicts_the_same_from_an_image_twice_as_large():
    toy = hg.datasets.toy((4, 5), mpp=0.5)
    expected = hg.tl.predict(toy, copy=True)["table"]
    pixels = sd.get_pyramid_levels(toy["he"], n=0).to_numpy().repeat(2, axis=1).repeat(2, axis=2)
    toy.images["he"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations={"global": Scale([0.5, 0.5], axes=("x", "y"))}
    )
    toy.attrs["he2gene"]["mpp"]["he"] = 0.25
    result = hg.tl.predict(toy, copy=True)["table"]
    known = expected.var["he2gene_predicted"].to_numpy()
    assert known.sum() > 30
    a, b = (table[:, known].to_df("he2gene") for table in (expected, result))
    assert a.corrwith(b).min() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 20])
def test_the_bundled_model_gives_the_same_in_any_batch(batch_size):
    toy = hg.datasets.toy((2, 4), mpp=2.0)
    tables = [hg.tl.predict(toy, copy=True, batch_size=size, dtype="float32")["table"] for size in (8, batch_size)]
    same(*tables)


def test_tta_gives_the_same_for_a_mirrored_slide(tiny_model):
    toy = hg.datasets.toy((5, 5), mpp=2.0)
    expected = run(toy, tiny_model, tta=True)
    pixels = toy["he"].to_numpy()[:, :, ::-1]
    width = pixels.shape[2]
    toy.images["he"] = Image2DModel.parse(
        np.ascontiguousarray(pixels),
        dims=("c", "y", "x"),
        transformations={
            "global": Affine([[-1, 0, width], [0, 1, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
        },
    )
    same(run(toy, tiny_model, tta=True), expected, atol=1e-3)
    assert np.abs(run(toy, tiny_model).layers["he2gene"] - expected.layers["he2gene"])[:, :20].max() > 1e-3


# Spots at the border


def shift(toy, dx, dy=0.0, rows=slice(0, 2)):
    """Move some spots by a number of pixels; their order does not change."""
    xy = np.column_stack([toy["spots"].geometry.x, toy["spots"].geometry.y])
    xy[rows] += (dx, dy)
    toy.shapes["spots"] = ShapesModel.parse(
        xy, geometry=0, radius=25.0, index=toy["spots"].index, transformations={"global": Identity()}
    )
    return toy


def test_spots_outside_the_image_get_nan_and_one_warning_counts_them(toy, tiny_model):
    shift(toy, -1000.0)
    with pytest.warns(UserWarning, match="outside") as caught:
        hg.tl.predict(toy, model=tiny_model)
    messages = [str(w.message) for w in caught if "outside" in str(w.message)]
    assert messages == ["2 of 30 spots have their centre outside the image: they get NaN and no annotation"]
    table = toy["table"]
    assert np.isnan(table.layers["he2gene"][:2]).all()
    assert np.isnan(table.obsm["X_he2gene"][:2]).all()
    assert table.obsm["he2gene_annotation_proba"].iloc[:2].isna().all(axis=None)
    assert table.obs["he2gene_annotation"].isna().tolist() == [True] * 2 + [False] * 28
    assert table.obs["he2gene_annotation_confidence"].isna().tolist() == [True] * 2 + [False] * 28
    assert table.uns["he2gene"]["n_outside"] == 2


def test_spots_outside_do_not_change_the_others(toy, tiny_model):
    expected = run(toy, tiny_model)
    with pytest.warns(UserWarning, match="outside"):
        result = run(shift(toy, -1000.0), tiny_model)
    same(result[2:], expected[2:])


@pytest.mark.parametrize("dx", [-100.0, -99.0, -80.0])
def test_a_spot_at_the_border_is_kept(toy, tiny_model, dx):
    shift(toy, dx, rows=slice(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hg.tl.predict(toy, model=tiny_model)
    assert np.isfinite(toy["table"].to_df("he2gene")["ERBB2"]).all()
    assert toy["table"].obs["he2gene_annotation"].notna().all()


# Round trip


@pytest.mark.parametrize("genes", [None, "all"])
def test_write_and_read_keep_everything_that_was_written(toy, tiny_model, tmp_path, genes):
    shift(toy, -1000.0)
    with pytest.warns(UserWarning, match="outside"):
        hg.tl.predict(toy, model=tiny_model, genes=genes)
    written = toy["table" if genes is None else "he2gene"]
    toy.write(tmp_path / "slide.zarr")
    read = sd.read_zarr(tmp_path / "slide.zarr")[("table" if genes is None else "he2gene")]
    np.testing.assert_array_equal(read.layers["he2gene"], written.layers["he2gene"])
    np.testing.assert_array_equal(read.obsm["X_he2gene"], written.obsm["X_he2gene"])
    pd.testing.assert_frame_equal(
        read.obsm["he2gene_annotation_proba"], written.obsm["he2gene_annotation_proba"], check_index_type=False
    )
    assert read.obs["he2gene_annotation"].astype(object).fillna("-").tolist() == (
        written.obs["he2gene_annotation"].astype(object).fillna("-").tolist()
    )
    assert list(read.obs["he2gene_annotation"].cat.categories) == CLASSES
    for column in ("he2gene_predicted", "he2gene_pcc", "he2gene_reliable", "he2gene_mean"):
        np.testing.assert_array_equal(read.var[column], written.var[column])
        assert read.var[column].dtype == written.var[column].dtype
    assert list(read.uns["he2gene_annotation_colors"]) == written.uns["he2gene_annotation_colors"]
    stored = json.loads(json.dumps(read.uns["he2gene"], default=lambda v: v.tolist()))
    assert stored == written.uns["he2gene"]


@pytest.mark.slow
def test_an_object_that_was_read_can_be_predicted_again(toy, tiny_model, tmp_path):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    hg.tl.predict(toy, model=tiny_model)
    toy.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    for genes in ("all", None):
        hg.tl.predict(again, model=tiny_model, genes=genes)
    assert sorted(again.tables) == ["he2gene", "table"]
    same(again["table"], toy["table"])


def test_annotation_has_the_occurring_classes_with_their_colours(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    categories = list(table.obs["he2gene_annotation"].cat.categories)
    assert set(categories) == set(table.obs["he2gene_annotation"].unique())
    colours = dict(zip(tiny_model.card.classes, tiny_model.card.class_colors, strict=True))
    assert list(table.uns["he2gene_annotation_colors"]) == [colours[name] for name in categories]
    assert list(table.obsm["he2gene_annotation_proba"].columns) == list(tiny_model.card.classes)


def test_second_key_on_a_slide_without_a_table_keeps_the_first_and_the_users_columns(toy, tiny_model):
    del toy.tables["table"]
    hg.tl.predict(toy, model=tiny_model, key_added="a")
    toy["table"].obs["leiden"] = "0"
    first = toy["table"].layers["a"].copy()
    hg.tl.predict(toy, model=tiny_model, key_added="b")
    hg.tl.predict(toy, model=tiny_model, key_added="a")
    np.testing.assert_array_equal(toy["table"].layers["a"], first)
    assert {"a", "b"} <= set(toy["table"].layers)
    assert (toy["table"].obs["leiden"] == "0").all()


def test_layer_that_predict_did_not_write_is_not_overwritten(toy, tiny_model):
    toy["table"].layers["counts"] = toy["table"].X.copy()
    with pytest.raises(ValueError, match=r"`layer`: layers\['counts'\] exists and was not written by"):
        hg.tl.predict(toy, model=tiny_model, layer="counts")
    assert toy["table"].layers["counts"].sum() == toy["table"].X.sum()


def _two_regions():
    slides = {name: hg.datasets.toy((4, 4), mpp=2.0, seed=seed) for seed, name in enumerate("AB")}
    return sd.concatenate(slides, concatenate_tables=True), {"spots-A": "he-A", "spots-B": "he-B"}


def test_one_region_predicted_again_keeps_the_other_and_its_record(tiny_model):
    sdata, images = _two_regions()
    hg.tl.predict(sdata, model=tiny_model, image_key=images, mpp={"spots-A": 2.0, "spots-B": 2.0})
    before = sdata["table"].layers["he2gene"].copy()
    hg.tl.predict(sdata, model=tiny_model, shapes_key="spots-B", image_key="he-B", mpp=2.0)
    np.testing.assert_allclose(sdata["table"].layers["he2gene"], before, atol=1e-5)
    assert sdata["table"].uns["he2gene"]["image"] == images


def test_one_region_predicted_by_another_model_leaves_the_other_empty_with_a_warning(tiny_model):
    from dataclasses import replace

    sdata, images = _two_regions()
    hg.tl.predict(sdata, model=tiny_model, image_key=images, mpp=2.0)
    other = replace(tiny_model, card=replace(tiny_model.card, name="other"))
    other.__dict__["network"] = tiny_model.network
    with pytest.warns(UserWarning, match="one column cannot hold two models"):
        hg.tl.predict(sdata, model=other, shapes_key="spots-B", image_key="he-B", mpp=2.0)
    table = sdata["table"]
    in_a = (table.obs["region"] == "spots-A").to_numpy()
    assert table.obs["he2gene_annotation"].isna().to_numpy()[in_a].all()
    assert not table.obs["he2gene_annotation"].isna().to_numpy()[~in_a].any()


def test_spatial_follows_the_image_when_predict_wrote_it(toy, tiny_model):
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    del toy["table"].obsm["spatial"]
    half = np.ascontiguousarray(np.asarray(toy["he"])[:, ::2, ::2])
    toy["small"] = Image2DModel.parse(
        half, dims=("c", "y", "x"), transformations={"global": Scale([2.0, 2.0], axes=("x", "y"))}
    )
    hg.tl.predict(toy, model=tiny_model, image_key="he", mpp=2.0)
    large = toy["table"].obsm["spatial"].copy()
    hg.tl.predict(toy, model=tiny_model, image_key="small", mpp=4.0)
    np.testing.assert_allclose(toy["table"].obsm["spatial"], large / 2)


@pytest.mark.parametrize("order", ["bgr", "grb"])
def test_named_channels_may_have_any_order(toy, tiny_model, order):
    from spatialdata.models import Image2DModel

    hg.tl.predict(toy, model=tiny_model)
    expected = toy["table"].layers["he2gene"].copy()
    pixels = np.asarray(toy["he"])[["rgb".index(name) for name in order]]
    del toy.images["he"]
    toy["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list(order))
    hg.tl.predict(toy, model=tiny_model)
    np.testing.assert_allclose(toy["table"].layers["he2gene"], expected, atol=1e-5)


def test_a_table_without_annotated_spots_raises_with_the_call_that_links_it(toy, tiny_model):
    del toy["table"].uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match="set_table_annotates_spatialelement"):
        hg.tl.predict(toy, model=tiny_model)


# Unknown classes and patients


def test_spots_on_glass_are_not_annotated_and_keep_their_probabilities(tiny_model):
    sdata = hg.datasets.toy((6, 6), mpp=2.0)
    image = np.asarray(sdata["he"]["scale0"]["image"] if hasattr(sdata["he"], "children") else sdata["he"]).copy()
    glass = np.asarray(sdata["spots"].geometry.x) < image.shape[2] / 3
    image[:, :, : image.shape[2] // 2] = 230
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(image, dims=("c", "y", "x"))
    hg.tl.predict(sdata, model=tiny_model, mpp=2.0)
    obs = sdata["table"].obs
    assert (obs["he2gene_tissue"][glass] < 0.25).all()
    assert obs["he2gene_annotation"][glass].isna().all()
    proba = sdata["table"].obsm["he2gene_annotation_proba"]
    assert proba.notna().all(axis=None)
    expected = proba.max(axis=1).where(obs["he2gene_annotation"].notna())
    pd.testing.assert_series_equal(obs["he2gene_annotation_confidence"], expected, check_names=False)
    assert obs["he2gene_annotation"][~glass].notna().any()
    record = sdata["table"].uns["he2gene"]
    assert 0 < record["share_on_tissue"] < 1
    assert (obs["he2gene_tissue"] >= record["min_tissue"]).mean() == pytest.approx(record["share_on_tissue"])


def test_reliable_is_for_new_patients_unless_the_patient_is_known(toy, tiny_model):
    genes = tiny_model.genes.assign(reliable_known_patient=True, pcc_new_patient=0.3, pcc_given_depth=0.2)
    model = replace(tiny_model, genes=genes)
    model.__dict__["network"] = tiny_model.network
    new, known = (
        hg.tl.predict(toy, model=model, known_patient=known, copy=True)["table"].var for known in (False, True)
    )
    predicted = new["he2gene_predicted"]
    expected = genes["reliable"].reindex(new.index[predicted]).astype(bool)
    assert new["he2gene_reliable"][predicted].tolist() == expected.tolist()
    assert known["he2gene_reliable"][predicted].all()
    assert new["he2gene_reliable_known_patient"].equals(known["he2gene_reliable_known_patient"])
    np.testing.assert_allclose(new["he2gene_pcc_given_depth"][predicted], 0.2, rtol=1e-6)
