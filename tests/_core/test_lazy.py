"""Layers above the memory limit are computed on reading and written by blocks; genes come from the embedding."""

from dataclasses import replace

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
import zarr
from anndata.experimental import read_elem_lazy

import he2gene_sc as hg
from he2gene_sc._core import lazy, spots
from tests.helpers.patients import slides

NEAR = {"rtol": 1e-5, "atol": 1e-6}


def layer_of(table):
    """Return the layer in memory, dense or lazy."""
    return np.asarray(table.layers["he2gene"])


@pytest.fixture
def small(monkeypatch):
    """Make all layers lazy, with blocks of a few spots and genes."""
    monkeypatch.setattr(hg.settings, "memory_limit", 1000)
    monkeypatch.setattr(lazy, "_SPOT_BLOCK", 320)
    monkeypatch.setattr(lazy, "_GENE_BLOCK", 300)
    monkeypatch.setattr(lazy, "_GENES", (10, 10))


@pytest.fixture
def both(toy, tiny_model, small):
    """Make a table with a dense layer, and an object with a lazy layer."""
    hg.settings.memory_limit = 2**31
    dense = hg.tl.predict(toy, model=tiny_model, copy=True)["table"]
    hg.settings.memory_limit = 1000
    hg.tl.predict(toy, model=tiny_model)
    return dense, toy


@pytest.fixture
def other_model(tiny_model):
    """Make another unsaved model, with another gene head."""
    tensors = {**tiny_model.tensors, "genes.weight": -tiny_model.tensors["genes.weight"]}
    other = replace(tiny_model, tensors=tensors)
    assert other.weights_sha256 == tiny_model.weights_sha256 == ""
    return other


def same_table(a, b):
    np.testing.assert_allclose(layer_of(a), layer_of(b), **NEAR)
    assert set(a.obsm) == set(b.obsm)


# Results of predict


def test_above_the_limit_the_layer_is_lazy_and_recorded_so(both):
    dense, sdata = both
    table = sdata["table"]
    assert isinstance(table.layers["he2gene"], da.Array)
    assert table.layers["he2gene"].chunksize == (8, 10)
    assert table.uns["he2gene"]["lazy"] is True
    assert "lazy" not in dense.uns["he2gene"]
    same_table(table, dense)
    np.testing.assert_array_equal(table.obsm["X_he2gene"], dense.obsm["X_he2gene"])
    assert np.isnan(layer_of(table[:, "FTL"])).all()


def test_the_limit_applies_to_the_layer_and_to_layer_and_x_together(toy, tiny_model, monkeypatch):
    n_bytes = 4 * toy["table"].n_obs * len(tiny_model.genes)
    monkeypatch.setattr(hg.settings, "memory_limit", 2 * n_bytes)
    hg.tl.predict(toy, model=tiny_model, genes="all")
    expected = toy["he2gene"].layers["he2gene"]
    assert isinstance(expected, np.ndarray)
    np.testing.assert_array_equal(toy["he2gene"].X, expected)
    monkeypatch.setattr(hg.settings, "memory_limit", 2 * n_bytes - 1)
    hg.tl.predict(toy, model=tiny_model, genes="all")
    assert toy["he2gene"].X.nnz == 0
    np.testing.assert_array_equal(toy["he2gene"].layers["he2gene"], expected)
    monkeypatch.setattr(hg.settings, "memory_limit", n_bytes - 1)
    hg.tl.predict(toy, model=tiny_model, genes="all")
    assert toy["he2gene"].X.nnz == 0
    assert isinstance(toy["he2gene"].layers["he2gene"], da.Array)
    np.testing.assert_allclose(layer_of(toy["he2gene"]), expected, **NEAR)


def test_expression_of_many_spots_is_computed_by_blocks(tiny_model):
    latent = torch.zeros(500_000, tiny_model.network.n_latent)
    shapes = [v.shape for _, _, v in tiny_model.network.expression_blocks(latent, np.arange(len(tiny_model.genes)))]
    assert sum(n for n, _ in shapes) == len(latent)
    assert max(n * g for n, g in shapes) <= 2**24


def test_changing_the_embedding_does_not_change_the_layer(both):
    dense, sdata = both
    table = sdata["table"]
    view = table[3:9]
    table.obsm["X_he2gene"][:] = 0
    same_table(table, dense)
    np.testing.assert_allclose(layer_of(view), layer_of(dense)[3:9], **NEAR)


def test_a_subset_another_order_and_a_concatenation_hold_the_values(both):
    dense, sdata = both
    table = sdata["table"]
    order = np.random.default_rng(0).permutation(table.n_obs)
    np.testing.assert_allclose(layer_of(table[order].copy()), layer_of(dense)[order], **NEAR)
    other = dense.copy()
    other.layers["he2gene"] += 1
    for join in ("inner", "outer"):
        joined = ad.concat({"a": table, "b": other}, join=join, index_unique="-")
        np.testing.assert_allclose(
            layer_of(joined), np.concatenate([layer_of(dense), layer_of(other)]), **NEAR, equal_nan=True
        )


def test_a_varm_of_the_user_stays(toy, tiny_model, small):
    toy["table"].varm["he2gene_head"] = np.ones((toy["table"].n_vars, 2))
    hg.tl.predict(toy, model=tiny_model)
    hg.tl.predict(toy, model=tiny_model)
    assert toy["table"].varm["he2gene_head"].sum() == 2 * toy["table"].n_vars


@pytest.mark.parametrize("at", [np.s_[3, 4], np.s_[:], np.s_[:, :2]])
def test_values_that_a_user_sets_in_a_lazy_layer_are_values_of_the_user(both, tiny_model, at):
    dense, sdata = both
    table, copied = sdata["table"], sdata["table"].copy()
    table.layers["he2gene"][at] = 7
    dense.layers["he2gene"][at] = 7
    same_table(table, dense)
    assert not np.array_equal(layer_of(copied), layer_of(table), equal_nan=True)
    with pytest.raises(ValueError, match="was changed after hg.tl.predict wrote it"):
        hg.tl.predict(sdata, model=tiny_model)


# Regions


def regions(tiny_model, **first):
    slides = {name: hg.datasets.toy((4, 4), mpp=2.0, seed=seed) for seed, name in enumerate("AB")}
    sdata = sd.concatenate(slides, concatenate_tables=True)
    for name in "AB":
        hg.tl.predict(
            sdata, model=tiny_model, shapes_key=f"spots-{name}", image_key=f"he-{name}", mpp=2.0, **first.pop(name, {})
        )
    return sdata


def test_regions_keep_their_own_genes_and_need_no_embedding_of_the_others(tiny_model, monkeypatch, small):
    genes = {"A": {"genes": ["ERBB2", "KRT19"]}, "B": {"genes": ["ERBB2", "VIM"]}}
    monkeypatch.setattr(hg.settings, "memory_limit", 2**31)
    expected = layer_of(regions(tiny_model, **genes)["table"])
    monkeypatch.setattr(hg.settings, "memory_limit", 1000)
    sdata = regions(tiny_model, **genes)
    assert isinstance(sdata["table"].layers["he2gene"], da.Array)
    np.testing.assert_allclose(layer_of(sdata["table"]), expected, **NEAR)
    del sdata["table"].obsm["X_he2gene"]
    hg.tl.predict(sdata, model=tiny_model, shapes_key="spots-B", image_key="he-B", mpp=2.0, genes=["ERBB2", "VIM"])
    np.testing.assert_allclose(layer_of(sdata["table"]), expected, **NEAR)


def test_a_dense_layer_of_the_other_region_stays_and_a_lazy_one_becomes_dense(tiny_model, monkeypatch, small):
    monkeypatch.setattr(hg.settings, "memory_limit", 2**31)
    sdata = regions(tiny_model)
    expected = layer_of(sdata["table"]).copy()
    before = sdata["table"].layers["he2gene"]
    for limit, kind in ((1000, da.Array), (2**31, np.ndarray)):
        monkeypatch.setattr(hg.settings, "memory_limit", limit)
        hg.tl.predict(sdata, model=tiny_model, shapes_key="spots-B", image_key="he-B", mpp=2.0)
        before[:] = -1
        assert isinstance(sdata["table"].layers["he2gene"], kind)
        np.testing.assert_allclose(layer_of(sdata["table"]), expected, **NEAR)


# Stores


@pytest.mark.slow
@pytest.mark.parametrize("save", [hg.io.save, lambda sdata, path: sdata.write(path)])
def test_a_saved_lazy_layer_is_still_recognised_as_ours(both, tiny_model, tmp_path, recwarn, save):
    dense, sdata = both
    hg.tl.evaluate(sdata, baselines=[], model=tiny_model)
    save(sdata, tmp_path / "a.zarr")
    again = sd.read_zarr(tmp_path / "a.zarr")
    same_table(again["table"], dense)
    recwarn.clear()
    hg.tl.predict(again, model=tiny_model)
    assert not [w for w in recwarn if "removed" in str(w.message) or "changed" in str(w.message)]
    assert "he2gene_eval" in again["table"].uns
    again["table"].layers["he2gene"] = np.asarray(again["table"].layers["he2gene"]) * np.r_[1:2:30j,][:, None]
    with pytest.raises(ValueError, match="was changed after hg.tl.predict wrote it"):
        hg.tl.predict(again, model=tiny_model)


def test_a_save_writes_the_layer_after_changes_of_embedding_and_order(both, tmp_path):
    dense, sdata = both
    order = np.random.default_rng(0).permutation(30)
    sdata.tables["table"] = sdata["table"][order].copy()
    sdata["table"].obsm["X_he2gene"] = np.zeros_like(sdata["table"].obsm["X_he2gene"])
    hg.io.save(sdata, tmp_path / "a.zarr")
    np.testing.assert_allclose(layer_of(sd.read_zarr(tmp_path / "a.zarr")["table"]), layer_of(dense)[order], **NEAR)
    np.testing.assert_allclose(layer_of(sdata["table"]), layer_of(dense)[order], **NEAR)
    written = (tmp_path / "a.zarr/tables/table").stat().st_ino
    hg.io.save(sdata)
    assert (tmp_path / "a.zarr/tables/table").stat().st_ino == written


# Any gene


def test_genes_come_from_the_layer_and_others_from_the_embedding(toy, tiny_model):
    every = hg.tl.predict(toy, model=tiny_model, copy=True)
    names = hg.get.genes(every)[:3]
    expected = every["table"][:, names].layers["he2gene"]
    hg.tl.predict(toy, model=tiny_model, genes=names[:1])
    toy["table"].layers["he2gene"][:, toy["table"].var_names == names[0]] += 1
    found = hg.get.expression(toy, names, model=tiny_model)
    assert list(found.columns) == names
    np.testing.assert_allclose(found, expected + [1, 0, 0], **NEAR)
    np.testing.assert_allclose(
        hg.get.expression(toy, "NOT1", model=tiny_model)["NOT1"],
        hg.tl.predict(toy, model=tiny_model, genes="all", key_added="all", copy=True)["all"][:, "NOT1"].X[:, 0],
        **NEAR,
    )
    assert hg.get.expression(toy, names[0]).shape == (30, 1)
    # A gene that the layer lacks at one spot is computed only there.
    toy["table"].layers["he2gene"][3, toy["table"].var_names == names[0]] = np.nan
    own = np.ravel(expected[:, 0]) + (np.arange(30) != 3)
    np.testing.assert_allclose(hg.get.expression(toy, names[0], model=tiny_model)[names[0]], own, **NEAR)
    with pytest.raises(ValueError, match="'NOGENE'. are unknown to model 'tiny'"):
        hg.get.expression(toy, "NOGENE", model=tiny_model)
    with pytest.raises(ValueError, match="pass its folder or the loaded model"):
        hg.get.expression(toy, names)


def test_genes_are_computed_after_the_layer_is_deleted_and_the_store_reopened(both, tiny_model, tmp_path):
    dense, sdata = both
    del sdata["table"].layers["he2gene"]
    hg.io.save(sdata, tmp_path / "a.zarr")
    again = sd.read_zarr(tmp_path / "a.zarr")
    found = hg.get.expression(again, ["ERBB2", "FTL"][:1], model=tiny_model)
    np.testing.assert_allclose(found, dense[:, "ERBB2"].layers["he2gene"], **NEAR)
    part = again["table"][[7, 2, 20]]
    for table in (part, part.copy()):
        np.testing.assert_allclose(hg.get.expression(table, "ERBB2", model=tiny_model), found.iloc[[7, 2, 20]], **NEAR)
    with pytest.raises(ValueError, match="hg.get.expression"):
        hg.pl.spatial(again, "ERBB2")


@pytest.mark.parametrize("change", ["in place", "one row", "order", "missing", "names", "other table"])
def test_a_changed_embedding_is_refused(both, other_model, tiny_model, change):
    _, sdata = both
    table = sdata["table"]
    del table.layers["he2gene"]
    if change == "in place":
        table.obsm["X_he2gene"][:] += 1
    elif change == "one row":
        table.obsm["X_he2gene"][17, 2] = np.nextafter(table.obsm["X_he2gene"][17, 2], np.float32(9))
    elif change == "order":
        table.obsm["X_he2gene"] = table.obsm["X_he2gene"][::-1].copy()
    elif change == "missing":
        del table.obsm["X_he2gene"]
    elif change == "names":
        table.obs_names = "x" + table.obs_names
    else:
        other = hg.tl.predict(hg.datasets.toy((5, 6), mpp=2.0, seed=5), model=tiny_model, copy=True)["table"]
        del other.layers["he2gene"]
        table = ad.concat([table, other], merge="first", uns_merge="first")
    for chosen in (table, table[15:]):
        with pytest.raises(ValueError, match=r"obsm\['X_he2gene'\], from which genes are computed"):
            hg.get.expression(chosen, "ERBB2", model=tiny_model)


def test_another_head_is_refused_also_for_unsaved_models(both, other_model):
    _, sdata = both
    del sdata["table"].layers["he2gene"]
    with pytest.raises(ValueError, match="pass that model"):
        hg.get.expression(sdata, "ERBB2", model=other_model)


def test_regions_of_two_heads_are_not_joined(tiny_model, other_model, small):
    sdata = regions(tiny_model)
    other_model.__dict__["network"] = tiny_model.network
    with pytest.warns(UserWarning, match="one column cannot hold two models"):
        hg.tl.predict(sdata, model=other_model, shapes_key="spots-B", image_key="he-B", mpp=2.0)
    in_a = (sdata["table"].obs["region"] == "spots-A").to_numpy()
    assert np.isnan(layer_of(sdata["table"])[in_a]).all()


# Reading by blocks


@pytest.fixture
def read(monkeypatch):
    """Record the sizes of blocks of layers in memory."""
    found, compute = [], da.Array.compute

    def counted(self, *args, **kwargs):
        # Images have three dimensions.
        found.append(self.size if self.ndim < 3 else 0)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(da.Array, "compute", counted)
    monkeypatch.setattr(spots, "_BLOCK", 320)
    return found


@pytest.mark.slow
def test_verbs_read_a_lazy_layer_by_blocks_and_as_a_dense_one(both, read, tiny_model):
    dense, sdata = both
    table, most = sdata["table"], sdata["table"].n_obs * sdata["table"].n_vars // 3
    genes = hg.get.genes(dense)[:3]
    calls = {
        "get": lambda data: hg.get.expression(data, genes),
        "pl": lambda _: hg.pl.spatial(sdata, genes[0]),
        "evaluate": lambda data: hg.tl.evaluate(data, baselines=[], model=tiny_model),
        "domains": lambda data: hg.tl.domain_preservation(
            data, "pathologist", genes=genes, clustering="kmeans", n_seeds=2, n_perms=9
        ),
        "biomarkers": lambda data: hg.tl.biomarkers(data, "pathologist", method="wilcoxon", layer="he2gene"),
        "spatial": lambda data: hg.tl.biomarkers(
            data, "pathologist", method="spatial", layer="he2gene", key_added="by_place"
        ),
    }
    for name, call in calls.items():
        read.clear()
        call(table)
        assert read, name
        assert max(read) <= most, (name, max(read), most)
        if name != "pl":
            call(dense)
    for get in (hg.get.evaluation, hg.get.biomarkers, hg.get.domains):
        one, other = get(dense), get(table)
        columns = one.select_dtypes("number").columns
        np.testing.assert_allclose(one[columns], other[columns], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_verbs_on_many_patients_give_the_same_for_lazy_and_dense_layers(monkeypatch, read):
    rng, table = np.random.default_rng(0), slides(9, n_genes=24)
    monkeypatch.setattr(lazy, "_SPOT_BLOCK", 24 * 50)
    monkeypatch.setattr(lazy, "_GENES", (10, 10))
    embedding = rng.normal(size=(table.n_obs, 5))
    weights = np.linalg.lstsq(embedding, table.layers["other_model"] - 2, rcond=None)[0]
    table.layers["other_model"] = lazy.lazy_layer(embedding, weights, np.full(24, 2.0))
    assert table.layers["other_model"].numblocks == (9, 3)
    dense = table.copy()
    dense.layers["other_model"] = np.asarray(table.layers["other_model"])
    sets = {"left": table.var_names[:5], "right": table.var_names[8:14]}

    def found(data):
        calibration = hg.tl.calibrate(data, layer="other_model")
        new = data[:96].copy()
        read.clear()
        hg.tl.intervals(new, layer="other_model", calibration=calibration)
        # Blocks of 50 spots, then blocks of 10 genes.
        assert max(read, default=0) <= 50 * new.n_vars < new.n_obs * new.n_vars
        assert bool(read) is isinstance(data.layers["other_model"], da.Array)
        hg.tl.concordance(data, "label", groups="left", layer="other_model", k=(5,))
        line = hg.pl.calibration(new, layer="other_model", calibration=calibration, coverages=[0.5, 0.9]).lines[-1]
        return [
            hg.tl.compare(data, "other_model"),
            hg.tl.programmes(new, sets, held_out=data, layer="other_model"),
            new.obsm["he2gene_programmes"],
            hg.get.concordance(data),
            pd.DataFrame(new.layers["other_model_lower"]).fillna(-1),
            pd.DataFrame(line.get_ydata()),
        ]

    for one, other in zip(found(table), found(dense), strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=1e-4)


@pytest.mark.slow
def test_a_report_and_other_tools_read_a_lazy_layer_as_a_dense_one(both, tiny_model, tmp_path):
    import scanpy as sc

    dense, sdata = both
    genes = hg.get.genes(dense)[:5]
    tables = sdata["table"][:, genes].copy(), dense[:, genes].copy()
    one, other = (hg.get.predicted(table) for table in tables)
    np.testing.assert_allclose(one.X, other.X, **NEAR)
    sc.pp.pca(one, n_comps=2)
    assert np.isfinite(one.obsm["X_pca"]).all()
    means = []
    for table in tables:
        del sdata.tables["table"]
        sdata["table"] = table
        page = hg.report(sdata, tmp_path / "report.html", genes=genes[:1], model=tiny_model, overwrite=True).read_text()
        means.append(page.split("mean predicted")[1].split("</table>")[0])
    assert means[0] == means[1]


def test_a_measured_layer_is_read_by_blocks(both, read):
    _, sdata = both
    sdata["table"].layers["counts"] = da.from_array(np.asarray(sdata["table"].X.todense()), chunks=(4, 10))
    hg.pl.spatial(sdata, "ERBB2", measured="counts")
    assert max(read) <= sdata["table"].n_obs * sdata["table"].n_vars // 3


def test_functions_that_need_the_whole_layer_raise(both):
    _, sdata = both
    with pytest.raises(ValueError, match=r"`reliable` is None: .* hg.get.expression"):
        hg.get.predicted(sdata)
    with pytest.raises(ValueError, match=r"`layer` 'he2gene' is lazy, .* subset the genes first"):
        hg.tl.adapt(sdata, np.arange(30) % 3 == 0)
    sdata.tables["table"] = sdata["table"][:, hg.get.genes(sdata)[:5]].copy()
    hg.tl.adapt(sdata, np.arange(30) % 3 == 0)
    assert hg.get.predicted(sdata).shape == (30, 5)


# After a save


@pytest.mark.slow
def test_copies_keep_their_values_after_later_saves(both, other_model, tiny_model, tmp_path):
    dense, sdata = both
    hg.io.save(sdata, tmp_path / "a.zarr")
    copy, part, layer = sdata["table"].copy(), sdata["table"][3:9].copy(), sdata["table"].layers["he2gene"]
    other_model.__dict__["network"] = tiny_model.network
    hg.tl.predict(sdata, model=other_model)
    hg.io.save(sdata, overwrite=True)
    assert not np.allclose(layer_of(sdata["table"]), layer_of(dense), equal_nan=True)
    (tmp_path / "a.zarr").rename(tmp_path / "moved.zarr")
    same_table(copy, dense)
    np.testing.assert_allclose(layer, layer_of(dense), **NEAR)
    np.testing.assert_allclose(layer_of(part), layer_of(dense)[3:9], **NEAR)


def test_a_lazy_table_whose_store_was_moved_is_refused(both, tmp_path):
    _, sdata = both
    hg.io.save(sdata, tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr/tables/table", mode="r", use_consolidated=False)
    table = sdata["table"].copy()
    table.layers["he2gene"] = read_elem_lazy(group["layers/he2gene"])
    assert hg.get.expression(table, "ERBB2").notna().all(axis=None)
    (tmp_path / "a.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(FileNotFoundError, match="layer 'he2gene' reads .*which does not exist"):
        hg.get.expression(table, "ERBB2")
