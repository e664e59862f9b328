import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import squidpy as sq
from anndata import AnnData
from shapely import Point

import he2gene_sc as hg
from he2gene_sc._core.predictions import predicted_layer


@pytest.fixture
def predicted(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    return toy


def test_genes_are_those_that_the_model_knows(predicted):
    assert set(hg.get.genes(predicted)) == set(predicted["table"].var_names) - {"FTL"}


def test_genes_are_sorted_by_held_out_correlation(predicted):
    pcc = predicted["table"].var["he2gene_pcc"][hg.get.genes(predicted)]
    assert pcc.is_monotonic_decreasing


def test_reliable_and_unreliable_genes_make_up_all(predicted):
    reliable, unreliable = (hg.get.genes(predicted, reliable=flag) for flag in (True, False))
    assert predicted["table"].var["he2gene_reliable"][reliable].all()
    assert not predicted["table"].var["he2gene_reliable"][unreliable].any()
    assert sorted(reliable + unreliable) == sorted(hg.get.genes(predicted))


def test_no_gene_of_the_list_is_nan(predicted):
    layer = predicted["table"][:, hg.get.genes(predicted)].layers["he2gene"]
    assert (layer == layer).all()


def test_genes_of_a_table_are_those_of_its_object(predicted):
    assert hg.get.genes(predicted["table"]) == hg.get.genes(predicted)


def test_genes_of_the_table_of_all_genes(predicted, tiny_model):
    hg.tl.predict(predicted, model=tiny_model, genes="all")
    assert "NOT1" not in hg.get.genes(predicted)
    assert "NOT1" in hg.get.genes(predicted, table_key="he2gene")


def test_genes_of_another_run_are_found_by_its_key(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model, genes=["ERBB2", "CD24"], key_added="mine")
    assert set(hg.get.genes(toy, prediction_key="mine")) == {"ERBB2", "CD24"}


def test_genes_without_a_prediction_raise(toy):
    for data in (toy, toy["table"]):
        with pytest.raises(ValueError, match="run hg.tl.predict first"):
            hg.get.genes(data)


@pytest.mark.parametrize(
    "wrong", [{"group": []}, {"group": 5}, {"group": "Tumour"}, {"pval_cutoff": np.nan}, {"log2fc_min": np.nan}]
)
def test_biomarkers_raise_for_arguments_that_select_nothing(wrong):
    results = pd.DataFrame({"group": ["tumour"], "logfoldchanges": [1.0], "pvals_adj": [0.1]})
    table = AnnData(np.ones((2, 2)), uns={"he2gene_biomarkers": {"verb": "biomarkers", "results": results}})
    assert len(hg.get.biomarkers(table, "tumour", pval_cutoff=0.5)) == 1
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        hg.get.biomarkers(table, **wrong)


def test_genes_raise_for_a_missing_table(predicted):
    with pytest.raises(ValueError, match=r"`table_key` 'other' not found, valid keys: \['table'\]"):
        hg.get.genes(predicted, table_key="other")


# ------------------------------------------------------------------------- squidpy on results of predict


@pytest.fixture
def imperfect(toy, tiny_model):
    """Return a prediction with a gene that the model does not know (FTL) and a spot outside the image."""
    toy["spots"].loc[toy["spots"].index[0], "geometry"] = Point(-500.0, -500.0)
    with pytest.warns(UserWarning, match="1 of 30 spots"):
        hg.tl.predict(toy, model=tiny_model)
    # The random model predicts one class everywhere, which has no neighbourhood enrichment.
    annotation = toy["table"].obs["he2gene_annotation"]
    codes = np.where(annotation.isna(), -1, np.arange(len(annotation)) % 2)
    toy["table"].obs["he2gene_annotation"] = pd.Categorical.from_codes(codes, categories=tiny_model.card.classes[:2])
    return toy


def _annotated(sdata):
    table = sdata["table"]
    subset = table[table.obs["he2gene_annotation"].notna()].copy()
    subset.obs["he2gene_annotation"] = subset.obs["he2gene_annotation"].cat.remove_unused_categories()
    return subset


def _varying(table):
    """Return the predicted genes that are not constant; a constant has no autocorrelation."""
    genes = hg.get.genes(table)
    return [gene for gene, sd in zip(genes, table[:, genes].layers["he2gene"].std(axis=0), strict=True) if sd > 0]


def test_squidpy_chain_on_the_annotated_rows_of_the_table(imperfect):
    table = _annotated(imperfect)
    sq.gr.spatial_neighbors_grid(table, n_neighs=4)
    sq.gr.nhood_enrichment(table, cluster_key="he2gene_annotation", n_perms=10, show_progress_bar=False)
    sq.gr.spatial_autocorr(table, layer="he2gene", genes=_varying(table), show_progress_bar=False)
    n = table.obs["he2gene_annotation"].nunique()
    assert table.uns["he2gene_annotation_nhood_enrichment"]["zscore"].shape == (n, n)
    assert set(table.uns["moranI"].index) == set(_varying(table))
    assert table.uns["moranI"]["pval_norm_fdr_bh"].notna().all()


def test_squidpy_chain_on_the_object(imperfect):
    shown = sd.match_sdata_to_table(imperfect, table=_annotated(imperfect), table_name="table")
    sq.gr.spatial_neighbors_grid(
        shown, elements_to_coordinate_systems={"spots": "global"}, table_key="table", n_neighs=4
    )
    options = {"table_key": "table", "show_progress_bar": False}
    sq.gr.nhood_enrichment(shown, cluster_key="he2gene_annotation", n_perms=10, **options)
    sq.gr.spatial_autocorr(shown, layer="he2gene", genes=_varying(shown["table"]), **options)
    assert shown["table"].uns["moranI"]["pval_norm_fdr_bh"].notna().all()


def test_squidpy_finds_neighbours_on_the_whole_object(imperfect):
    sq.gr.spatial_neighbors_grid(
        imperfect, elements_to_coordinate_systems={"spots": "global"}, table_key="table", n_neighs=4
    )
    assert imperfect["table"].obsp["spatial_connectivities"].shape == (30, 30)


def test_squidpy_makes_all_corrected_p_values_nan_with_one_unknown_gene(imperfect):
    """This is why the examples take a subset. If this test fails, squidpy handles NaN and they no longer need to."""
    table = _annotated(imperfect)
    sq.gr.spatial_neighbors_grid(table, n_neighs=4)
    genes = [*_varying(table), "FTL"]
    sq.gr.spatial_autocorr(table, layer="he2gene", genes=genes, show_progress_bar=False)
    assert table.uns["moranI"]["pval_norm_fdr_bh"].isna().all()


def test_squidpy_raises_key_error_at_one_missing_label(imperfect):
    """This is why the examples take a subset. If this test fails, squidpy handles missing labels and they no longer need to."""
    table = imperfect["table"]
    sq.gr.spatial_neighbors_grid(table, n_neighs=4)
    with pytest.raises(KeyError):
        sq.gr.nhood_enrichment(table, cluster_key="he2gene_annotation", n_perms=10, show_progress_bar=False)


@pytest.mark.parametrize("verb", [hg.tl.evaluate, hg.tl.intervals, hg.pl.calibration])
def test_layer_none_is_never_the_prediction(toy, verb):
    with pytest.raises(ValueError, match="`layer` is of type NoneType; a text is needed"):
        verb(toy, layer=None)


def test_the_default_layer_is_the_layer_of_prediction_key(toy, tiny_model):
    hg.tl.predict(
        toy, model=tiny_model, genes=["ERBB2", "CD24"], key_added="mine", layer="values", show_progress_bar=False
    )
    table = toy["table"]
    assert [predicted_layer(table, "mine", name) for name in ("he2gene", "mine", "values")] == ["values"] * 3
    hg.tl.evaluate(toy, prediction_key="mine")
    assert hg.get.evaluation(toy, "genes")["predictor"].unique()[0] == "he2gene"


@pytest.mark.parametrize("read", [hg.get.evaluation, hg.get.domains, hg.get.biomarkers, hg.pl.domains])
@pytest.mark.parametrize("data", [1, None, "slide.zarr", [1]])
def test_get_raises_for_data_that_is_not_an_object(read, data):
    with pytest.raises(TypeError, match="`data` (is|holds) a "):
        read(data)
