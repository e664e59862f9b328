"""`hg.get.predicted` returns a table that scanpy, squidpy and decoupler can use directly."""

import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
import squidpy as sq
from shapely import Point

import he2gene_sc as hg
from he2gene_sc._core.matrix import layer_names

OUTSIDE = "1 of 30 spots that were not predicted"


@pytest.fixture
def predicted(toy, tiny_model):
    """Return a prediction without FTL, which the model does not know, with the first spot outside the image."""
    toy["spots"].loc[toy["spots"].index[0], "geometry"] = Point(-500.0, -500.0)
    with pytest.warns(UserWarning, match="1 of 30 spots"):
        hg.tl.predict(toy, model=tiny_model)
    table = toy["table"]
    # The random model predicts one class everywhere, and 0 for many genes.
    codes = np.r_[-1, np.arange(29) % 2]
    table.obs["he2gene_annotation"] = pd.Categorical.from_codes(codes, categories=tiny_model.card.classes[:2])
    table.uns["he2gene_annotation_colors"] = list(tiny_model.card.class_colors[:2])
    known = np.flatnonzero(table.var["he2gene_predicted"])
    noise = np.random.default_rng(0).gamma(2.0, 0.5, (29, len(known)))
    table.layers["he2gene"][np.ix_(range(1, 30), known)] = noise
    return toy


def _get(*arguments, **options):
    with pytest.warns(UserWarning, match=OUTSIDE):
        return hg.get.predicted(*arguments, **options)


# ------------------------------------------------------------------------------------------------ contents


def test_values_equal_the_layer_and_none_is_missing(predicted):
    table, found = predicted["table"], _get(predicted)
    assert found.shape == (29, table.n_vars - 1)
    assert "FTL" not in found.var_names
    assert found.X.dtype == np.float32
    assert np.isfinite(found.X).all()
    np.testing.assert_array_equal(found.X, table[found.obs_names, found.var_names].layers["he2gene"])


def test_obs_and_var_are_kept_in_the_order_of_the_table(predicted):
    table, found = predicted["table"], _get(predicted)
    assert found.obs_names.equals(table.obs_names[1:])
    assert found.var_names.tolist() == [name for name in table.var_names if name != "FTL"]
    pd.testing.assert_frame_equal(
        found.var, table.var.loc[found.var_names].astype(found.var.dtypes), check_index_type=False
    )
    assert set(found.obs) == set(table.obs)
    np.testing.assert_array_equal(found.obsm["spatial"], table.obsm["spatial"][1:])
    np.testing.assert_array_equal(found.obsm["X_he2gene"], table.obsm["X_he2gene"][1:])
    assert found.uns["he2gene"]["weights_sha256"] == table.uns["he2gene"]["weights_sha256"]


def test_results_of_other_values_or_spots_are_left_out(predicted):
    table = predicted["table"]
    table.obsm["X_pca"] = np.zeros((30, 2))
    table.layers["counts"] = table.X.copy()
    sq.gr.spatial_neighbors_grid(table, n_neighs=4)
    found = _get(predicted)
    assert layer_names(found) == []
    assert "X_pca" not in found.obsm
    assert not found.obsp
    assert found.raw is None


def test_colours_match_the_remaining_classes(predicted):
    table = predicted["table"]
    table.obs["group"] = pd.Categorical(["a"] + ["b"] * 14 + ["c"] * 15)
    table.uns["group_colors"] = ["#111111", "#222222", "#333333"]
    found = _get(predicted)
    assert found.obs["group"].cat.categories.tolist() == ["b", "c"]
    assert list(found.uns["group_colors"]) == ["#222222", "#333333"]
    assert list(found.uns["he2gene_annotation_colors"]) == list(table.uns["he2gene_annotation_colors"])


def test_images_of_scanpy_are_kept(predicted):
    predicted["table"].uns["spatial"] = {"slide": {"images": {}, "scalefactors": {"spot_diameter_fullres": 10.0}}}
    assert _get(predicted).uns["spatial"]["slide"]["scalefactors"]["spot_diameter_fullres"] == 10.0


def test_changing_the_copy_changes_nothing_else(predicted):
    before = predicted["table"].copy()
    found = _get(predicted)
    found.X[:] = -1
    found.obs["he2gene_annotation"] = "x"
    found.var["he2gene_pcc"] = -1.0
    found.obsm["spatial"][:] = -1
    found.uns["he2gene"]["model"] = "x"
    found.uns["he2gene"]["windows_um"].append(1.0)
    table = predicted["table"]
    np.testing.assert_array_equal(table.layers["he2gene"], before.layers["he2gene"])
    np.testing.assert_array_equal(table.obsm["spatial"], before.obsm["spatial"])
    pd.testing.assert_frame_equal(table.obs, before.obs)
    pd.testing.assert_frame_equal(table.var, before.var)
    assert table.uns["he2gene"] == before.uns["he2gene"]


def test_no_warning_if_every_spot_was_predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert hg.get.predicted(toy).n_obs == 30


def test_a_table_gives_the_same_as_its_object(predicted):
    np.testing.assert_array_equal(_get(predicted["table"]).X, _get(predicted).X)


def test_table_of_all_genes_of_the_model(predicted, tiny_model):
    with pytest.warns(UserWarning, match="outside the image"):
        hg.tl.predict(predicted, model=tiny_model, genes="all")
    assert "NOT1" in _get(predicted, table_key="he2gene").var_names
    assert "NOT1" not in _get(predicted).var_names


# ------------------------------------------------------------------------------------------- reliable, layers


def test_reliable_and_other_genes_are_all_genes(predicted):
    reliable, others = (_get(predicted, reliable=flag) for flag in (True, False))
    assert set(reliable.var_names) == set(hg.get.genes(predicted, reliable=True))
    assert set(others.var_names) == set(hg.get.genes(predicted, reliable=False))


def test_no_reliable_gene_raises_with_advice(predicted):
    predicted["table"].var["he2gene_reliable"] = False
    with pytest.raises(ValueError, match="calls none of the 39 predicted genes reliable.*reliable=None.*hg.tl.train"):
        hg.get.predicted(predicted, reliable=True)


@pytest.mark.parametrize("argument", [{"reliable": "yes"}, {"layer": ["he2gene"]}, {"layer": 1}, {"prediction_key": 1}])
def test_arguments_of_the_wrong_type_raise(predicted, argument):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}` is .* is needed"):
        hg.get.predicted(predicted, **argument)


def test_a_flag_that_is_neither_true_nor_false_raises(predicted):
    flags = predicted["table"].var["he2gene_reliable"].astype(object)
    flags.iloc[3] = "False"
    predicted["table"].var["he2gene_reliable"] = flags
    for call in (hg.get.predicted, hg.get.genes):
        with pytest.raises(ValueError, match="neither True nor False for 1 genes, for example 'False'"):
            call(predicted, reliable=True)


def test_another_layer_becomes_x(predicted):
    table = predicted["table"]
    table.layers["other"] = table.layers["he2gene"] + 1
    np.testing.assert_array_equal(_get(predicted, layer="other").X, _get(predicted).X + 1)


def test_layer_none_is_x_as_in_scanpy(predicted):
    found = hg.get.predicted(predicted, layer=None)
    np.testing.assert_array_equal(found.X, predicted["table"][:, found.var_names].X.toarray())
    assert "log1p" not in found.uns


def test_the_layer_of_another_prediction_raises(predicted, tiny_model):
    with pytest.warns(UserWarning, match="outside the image"):
        hg.tl.predict(predicted, model=tiny_model, key_added="mine", genes=["ERBB2", "CD24"])
    assert set(_get(predicted, prediction_key="mine").var_names) == {"ERBB2", "CD24"}
    with pytest.raises(ValueError, match="`layer` 'mine' belongs to prediction 'mine', not to 'he2gene'"):
        hg.get.predicted(predicted, layer="mine")


def test_genes_that_some_regions_lack_are_left_out_with_a_warning(predicted):
    table = predicted["table"]
    table.layers["he2gene"][5:10, table.var_names.get_loc("ERBB2")] = np.nan
    with pytest.warns(UserWarning, match=f"{OUTSIDE}, 1 of 39 genes that are NaN for some spots"):
        found = hg.get.predicted(predicted)
    assert "ERBB2" not in found.var_names
    assert np.isfinite(found.X).all()


def test_bad_input_is_named(predicted, toy):
    table = predicted["table"].copy()
    with pytest.raises(ValueError, match=r"`layer` 'nope' is no.* layer|`layer` 'nope' not found"):
        hg.get.predicted(table, layer="nope")
    with pytest.raises(ValueError, match="holds no prediction 'nope'; run hg.tl.predict first"):
        hg.get.predicted(table, prediction_key="nope")
    with pytest.raises(TypeError, match="`data` is a list"):
        hg.get.predicted([1])
    table.layers["he2gene"][3, table.var_names.get_loc("ERBB2")] = np.inf
    with pytest.raises(ValueError, match="1 infinite value"):
        hg.get.predicted(table)
    table.layers["he2gene"][:] = np.nan
    with pytest.raises(ValueError, match="is NaN for all 30 spots"):
        hg.get.predicted(table)


def test_duplicated_gene_names_raise(predicted):
    table = predicted["table"].copy()
    table.var_names = ["CD24", *table.var_names[1:]]
    with pytest.raises(ValueError, match="'CD24'.*occur twice.*var_names_make_unique"):
        hg.get.predicted(table)


# ------------------------------------------------------------------------------------- use by other tools


def test_scanpy_ranks_genes_without_missing_values(predicted):
    found = _get(predicted)
    column = found.var_names.get_loc("ERBB2")
    found.X[:, column] = np.where(found.obs["he2gene_annotation"].cat.codes == 0, 5.0, 1.0) + 0.1 * found.X[:, column]
    sc.tl.rank_genes_groups(found, "he2gene_annotation", method="wilcoxon")
    table = sc.get.rank_genes_groups_df(found, found.obs["he2gene_annotation"].cat.categories[0])
    assert table["names"].iloc[0] == "ERBB2"
    assert table["pvals_adj"].notna().all()
    assert (table["pvals_adj"] < 0.05).sum() < 10


def test_scanpy_clusters_it(predicted):
    found = _get(predicted)
    sc.pp.pca(found, n_comps=5)
    sc.pp.neighbors(found, n_neighbors=5)
    sc.tl.leiden(found, flavor="igraph", n_iterations=2, directed=False)
    assert found.obs["leiden"].notna().all()


def test_scanpy_knows_that_values_are_natural_logarithms(predicted):
    assert _get(predicted).uns["log1p"] == {"base": np.e}


def test_squidpy_reads_it(predicted):
    found = _get(predicted)
    sq.gr.spatial_neighbors_grid(found, n_neighs=4)
    sq.gr.nhood_enrichment(found, cluster_key="he2gene_annotation", n_perms=10, show_progress_bar=False)
    sq.gr.spatial_autocorr(found, show_progress_bar=False)
    assert found.uns["he2gene_annotation_nhood_enrichment"]["zscore"].shape == (2, 2)
    assert set(found.uns["moranI"].index) == set(found.var_names)
    assert found.uns["moranI"]["pval_norm_fdr_bh"].notna().all()


def test_decoupler_reads_it(predicted):
    import decoupler as dc

    found = _get(predicted)
    net = pd.DataFrame({"source": ["set"] * 6, "target": found.var_names[:6], "weight": 1.0})
    dc.mt.ulm(found, net, tmin=3)
    assert found.obsm["score_ulm"].shape == (29, 1)
    assert found.obsm["score_ulm"].notna().all(axis=None)


@pytest.mark.slow
def test_the_table_can_be_added_to_the_object(predicted, tmp_path):
    predicted["reliable"] = _get(predicted, reliable=True)
    assert hg.get.genes(predicted) == hg.get.genes(predicted["table"])
    assert len(sd.match_sdata_to_table(predicted, table=predicted["reliable"], table_name="reliable")["spots"]) == 29
    hg.io.save(predicted, tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")["reliable"]
    np.testing.assert_array_equal(again.X, predicted["reliable"].X)
    _get(predicted).write_h5ad(tmp_path / "table.h5ad")
    assert ad.read_h5ad(tmp_path / "table.h5ad").uns["he2gene"]["model"] == "tiny"


def test_the_table_annotates_only_the_remaining_regions(predicted):
    table = predicted["table"].copy()
    table.obs["region"] = pd.Categorical(["other"] + ["spots"] * 29)
    table.uns["spatialdata_attrs"]["region"] = ["other", "spots"]
    assert _get(table).uns["spatialdata_attrs"]["region"] == "spots"


def test_labels_of_the_same_image_are_also_circular_in_the_copy(toy, tiny_model):
    from he2gene_sc._core.provenance import circularity

    hg.tl.predict(toy, model=tiny_model)
    assert "predicted from the same image" in circularity([hg.get.predicted(toy)], "he2gene_annotation", None)
    assert not circularity([toy["table"]], "pathologist", None)


def test_the_table_can_be_written_to_files_of_other_tools(predicted, tmp_path):
    adata = _get(predicted)
    adata.write_h5ad(tmp_path / "predicted.h5ad")
    adata.to_df().to_parquet(tmp_path / "predicted.parquet")
    back = sc.read_h5ad(tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(back.X, adata.X)
    written = adata.obs["he2gene_annotation"]
    pd.testing.assert_series_equal(back.obs["he2gene_annotation"], written, check_index_type=False)
    assert back.uns["he2gene"]["model"] == "tiny"
    frame = pd.read_parquet(tmp_path / "predicted.parquet")
    assert list(frame.columns) == list(adata.var_names)
    np.testing.assert_array_equal(frame.to_numpy(), adata.X)


def test_r_readers_and_older_anndata_know_every_part_of_the_file(predicted, tmp_path):
    # pandas 3 has its own type for all texts; here, it is in the table of any pandas.
    table = predicted["table"]
    for frame in (table.obs, table.var, table.obsm["he2gene_annotation_proba"]):
        frame.index = frame.index.astype("string")
    table.obs["id"] = pd.array([f"spot {i}" for i in range(30)], "string")
    adata = _get(predicted)
    adata.write_h5ad(tmp_path / "predicted.h5ad")
    found = {}
    with h5py.File(tmp_path / "predicted.h5ad") as file:
        file.visititems(lambda name, part: found.update({name: part.attrs["encoding-type"]}))
        assert file["obs/_index"].asstr()[:].tolist() == adata.obs_names.tolist()
        assert file["obs/id"].asstr()[:].tolist() == adata.obs["id"].tolist()
    assert {found[name] for name in ("obs/_index", "var/_index", "obsm/he2gene_annotation_proba/_index")} == {
        "string-array"
    }
    assert not {"nullable-string-array", "null"} & set(found.values())
