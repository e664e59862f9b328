import io
import logging
import re
import sys
import warnings

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.text import Text
from scipy import stats
from statsmodels.stats.multitest import multipletests

import he2gene_sc as hg
from he2gene_sc._core.keys import OWN_TABLE
from he2gene_sc.stats import paired_moderated_t
from tests.helpers.patients import as_predicted, biomarkers, patient, patients

MARKERS = ["ERBB2", "EPCAM", "CD24", "CDH1"]
COLUMNS = [
    "group",
    "names",
    "logfoldchanges",
    "logfoldchanges_pooled",
    "effect_size",
    "ci_low",
    "ci_high",
    "scores",
    "pvals",
    "pvals_adj",
    "n_samples",
    "n_spots",
    "n_spots_reference",
    "method",
    "reliable",
    "circular",
]


def markers(tables, groupby="label", **options):
    options = {"layer": "log"} | options
    return biomarkers(tables, groupby, **options)


def rows_of(frame, group="tumour"):
    return frame[frame["group"] == group].set_index("names")


# ----------------------------------------------------------------------------------------------- results


def test_planted_genes_are_significant_and_the_table_is_tidy():
    result = markers(patients())
    assert list(result) == COLUMNS
    tumour = rows_of(result)
    assert set(tumour.index[tumour["pvals_adj"] < 0.05]) == {f"g{i}" for i in range(5)}
    assert set(tumour.index[:5]) == {f"g{i}" for i in range(5)}
    assert (tumour["method"] == "means").all()
    assert (tumour["n_samples"] == 5).all()
    assert (tumour["n_spots"] == 100).all()
    assert not tumour["circular"].any()
    assert tumour["reliable"].all()


def test_two_groups_have_opposite_effects():
    result = markers(patients())
    one, other = rows_of(result, "tumour"), rows_of(result, "stroma").reindex(rows_of(result, "tumour").index)
    np.testing.assert_allclose(one["effect_size"], -other["effect_size"], rtol=1e-6)
    np.testing.assert_allclose(one["pvals"], other["pvals"], rtol=1e-6)


def test_effects_are_paired_means():
    tables = patients()
    tumour = rows_of(markers(tables))
    means = [
        [t.layers["log"][t.obs["label"] == side].mean(0, dtype=float) for t in tables] for side in ("tumour", "stroma")
    ]
    d = pd.DataFrame(np.subtract(*np.array(means, float)), columns=tables[0].var_names)[tumour.index]
    np.testing.assert_allclose(tumour["effect_size"], d.mean(), rtol=1e-5)
    assert stats.spearmanr(tumour["pvals"], stats.ttest_1samp(d, 0).pvalue).statistic > 0.8


@pytest.mark.parametrize("trend", [True, False])
def test_prior_variance_follows_the_variance_over_spots(trend):
    tables = patients()
    tumour = rows_of(markers(tables, trend=trend, robust=False))
    values = [[t.layers["log"][t.obs["label"] == side].astype(float) for side in ("tumour", "stroma")] for t in tables]
    d = np.array([one.mean(0) - other.mean(0) for one, other in values])
    parts = [side for pair in values for side in pair]
    within = sum(side.var(0) * len(side) for side in parts) / sum(len(side) - 1 for side in parts)
    expected = paired_moderated_t(d, alike=within if trend else None)
    expected = pd.Series(expected.pvalues, tables[0].var_names)
    np.testing.assert_allclose(tumour["pvals"], expected[tumour.index], rtol=1e-3)


def test_p_values_are_adjusted_within_groups():
    result = markers(patients())
    for _, part in result.groupby("group"):
        np.testing.assert_allclose(part["pvals_adj"], multipletests(part["pvals"], method="fdr_bh")[1])


@pytest.mark.slow
def test_pooled_fold_changes_equal_scanpy():
    slides = [hg.datasets.toy((6, 6), seed=i)["table"] for i in range(4)]
    for i, slide in enumerate(slides):
        slide.obs["patient"] = f"P{i}"
    for reference in ("rest", "stroma"):
        result = markers(slides, "pathologist", layer=None, reference=reference)
        whole = anndata.concat(slides, index_unique="-")
        sc.pp.normalize_total(whole, target_sum=1e4)
        sc.pp.log1p(whole)
        whole.obs["pathologist"] = whole.obs["pathologist"].astype("category")
        sc.tl.rank_genes_groups(whole, "pathologist", reference=reference, method="t-test")
        expected = sc.get.rank_genes_groups_df(whole, "tumour").set_index("names")["logfoldchanges"]
        tumour = rows_of(result)
        np.testing.assert_allclose(tumour["logfoldchanges_pooled"], expected[tumour.index], atol=1e-5)


def test_order_of_spots_objects_and_genes_does_not_matter():
    tables = patients()
    one = rows_of(markers(tables))
    rng = np.random.default_rng(0)
    turned = [t[rng.permutation(t.n_obs), rng.permutation(t.n_vars)].copy() for t in reversed(patients())]
    other = rows_of(markers(turned)).loc[one.index]
    np.testing.assert_allclose(one["pvals"], other["pvals"], rtol=1e-4)


def test_one_table_with_a_sample_column_equals_several_objects():
    whole = anndata.concat(patients())
    assert markers(whole) is None
    pd.testing.assert_frame_equal(hg.get.biomarkers(whole), markers(patients()), rtol=1e-4)


def test_sections_of_a_patient_are_one_sample():
    tables = patients(6)
    for i, table in enumerate(tables):
        table.obs["patient"] = f"P{i // 2}"
    assert (markers(tables)["n_samples"] == 3).all()


def test_objects_and_their_tables_give_the_same_result(toy):
    slides = [hg.datasets.toy((6, 6), seed=i) for i in range(3)]
    for i, slide in enumerate(slides):
        slide["table"].obs["patient"] = f"P{i}"
    one = markers(slides, "pathologist", layer=None)
    other = markers([slide["table"] for slide in slides], "pathologist", layer=None)
    pd.testing.assert_frame_equal(one, other)


def test_results_survive_zarr(tmp_path):
    tables = patients(3)
    result = markers(tables)
    tables[1].write_zarr(tmp_path / "t.zarr")
    back = anndata.read_zarr(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(hg.get.biomarkers(back), result, check_dtype=False)
    assert back.uns["he2gene_biomarkers"]["params"]["method"] == "means"
    ax = hg.pl.biomarkers(back, "tumour", kind="dot", n_genes=2)
    names = result.loc[result["group"] == "tumour", "names"].tolist()
    assert [t.get_text() for t in ax.get_xticklabels()] == names[:2] + names[-2:]


def test_genes_are_matched_by_name(caplog):
    tables = patients(3)
    tables[0] = tables[0][:, 3:].copy()
    with caplog.at_level(logging.INFO, "he2gene_sc"):
        result = markers(tables)
    assert "57 genes are in every object, of at most 60" in caplog.text
    assert "g0" not in set(result["names"])
    with pytest.raises(ValueError, match=r"`join` 'outer' is only for raw counts"):
        markers(tables, join="outer")


def test_counts_can_be_joined_over_all_genes():
    tables = patients(3)
    for table in tables:
        table.X = np.random.default_rng(0).poisson(np.expm1(table.layers["log"])).astype(np.float32)
    lacking = [tables[0][:, 1:].copy(), *tables[1:]]
    result = rows_of(markers(lacking, layer=None, join="outer"))
    zeroed = tables[0].copy()
    zeroed.X[:, 0] = 0
    expected = rows_of(markers([zeroed, *tables[1:]], layer=None))
    assert "g0" in result.index
    np.testing.assert_allclose(result["effect_size"], expected["effect_size"].reindex(result.index), atol=1e-6)


def test_genes_below_the_mean_are_not_tested():
    tables = patients(3)
    for table in tables:
        table.layers["log"][:, 10:] = 0.01
    assert set(markers(tables)["names"]) == {f"g{i}" for i in range(10)}
    with pytest.raises(ValueError, match="`min_mean` is 20"):
        markers(tables, min_mean=20)


# ----------------------------------------------------------------------------------------------- methods


@pytest.mark.slow
def test_auto_compares_patients_with_three_samples_and_spots_with_fewer():
    assert (markers(patients(3))["method"] == "means").all()
    counted = [as_predicted(table) for table in patients(3)]
    assert (markers(counted, layer=None)["method"] == "pseudobulk").all()
    with pytest.warns(UserWarning, match="does not generalise"):
        result = markers(patients(2))
    assert (result["method"] == "spatial").all()
    with pytest.warns(UserWarning, match="does not generalise"):
        assert markers(patient(0)) is None


def _two_different_patients():
    """Two patients without a section column, with different expression and label shares, and without planted genes."""
    tables = [patient(i, n=80, genes=200, shift=0.0) for i in range(2)]
    for i, table in enumerate(tables):
        del table.obs["section"]
        table.obs["label"] = np.where(np.random.default_rng(i).random(80) < (0.8, 0.2)[i], "tumour", "stroma")
    return tables


@pytest.mark.slow
def test_patients_in_one_table_are_separate_sections():
    tables = _two_different_patients()
    whole = anndata.concat(tables)
    with pytest.warns(UserWarning, match="does not generalise"):
        expected = markers(tables)
    with pytest.warns(UserWarning, match="does not generalise"):
        markers(whole)
    result = hg.get.biomarkers(whole)
    pd.testing.assert_frame_equal(result, expected, rtol=1e-4)
    assert (rows_of(result)["pvals"] < 0.05).mean() < 0.1


def test_cross_fit_of_one_table_equals_cross_fit_of_several():
    tables = [as_predicted(table) for table in patients(4, genes=120)]
    for i, table in enumerate(tables):
        del table.obs["section"]
        # Measured levels differ between patients, so centring over all patients would give another result.
        table.X = table.X + np.random.default_rng(i).poisson(30, 120)
        table.X[:, 100:] += 60 * (table.obs["label"] == "tumour").to_numpy()[:, None]
    # The markers are a large part of the counts, so depth would act as a marker.
    options = {"layer": "he2gene", "cross_fit": True, "reliable_only": False, "depth": None}
    whole = anndata.concat(tables, merge="same")
    markers(whole, **options)
    pd.testing.assert_frame_equal(hg.get.biomarkers(whole), markers(tables, **options), rtol=1e-4)


@pytest.mark.parametrize("method", ["spatial", "wilcoxon"])
@pytest.mark.slow
def test_the_filter_does_not_favour_genes_that_are_high_in_the_smaller_group(method):
    rng = np.random.default_rng(5)
    table = patient(0, n=320, genes=2000)
    table.obs["label"] = np.where(rng.permutation(320) < 20, "few", "many")
    table.X = rng.poisson(np.r_[np.full(1990, 0.02), np.full(10, 20)], (320, 2000)).astype(np.float32)
    with pytest.warns(UserWarning, match=f"method '{method}'"):
        markers(table, layer=None, groups="few", method=method, min_mean=0.25)
    result = rows_of(hg.get.biomarkers(table), "few")
    assert set(result.index) == {f"g{i}" for i in range(1990, 2000)}


@pytest.mark.slow
def test_genes_rarely_detected_in_a_small_group_are_not_tested(caplog):
    rng = np.random.default_rng(5)
    table = patient(0, n=320, genes=60)
    table.obs["label"] = np.where(rng.permutation(320) < 5, "few", "many")
    share = np.r_[np.full(30, 0.3), np.full(30, 0.9)]
    table.X = ((rng.random((320, 60)) < share) * 4).astype(np.float32)
    with pytest.warns(UserWarning, match="does not generalise"), caplog.at_level(logging.WARNING, "he2gene_sc"):
        markers(table, layer=None, groups="few", method="spatial")
    assert set(rows_of(hg.get.biomarkers(table), "few").index) == {f"g{i}" for i in range(30, 60)}
    assert (
        "30 of 60 genes are not tested in 'few': they are expected to be detected in fewer than 3 of the 5 spots"
        in caplog.text
    )
    table.X[:, 30:] = table.X[:, :30]
    with pytest.raises(ValueError, match="smaller of 'few' and 'rest' has 5 spots; no gene .* detected in 3 of them"):
        markers(table, layer=None, groups="few", method="spatial")
    table.obs.iloc[:100, table.obs.columns.get_loc("label")] = "third"
    table.obs.iloc[:5, table.obs.columns.get_loc("label")] = "few"
    with pytest.warns(UserWarning, match="groups are left out: .*smaller of 'few'"):
        markers(table, layer=None, method="spatial")
    assert set(hg.get.biomarkers(table)["group"]) == {"many", "third"}


def test_mixed_model_uses_covariates():
    tables = patients(5, genes=12)
    for i, table in enumerate(tables):
        table.obs["depth"] = np.random.default_rng(i).normal(size=table.n_obs)
        table.obs["batch"] = "ab"[i % 2]
    plain, adjusted = markers(tables, method="mixed"), markers(tables, method="mixed", covariates=["depth", "batch"])
    assert {f"g{i}" for i in range(5)} == set(rows_of(plain).index[rows_of(plain)["pvals_adj"] < 0.05])
    assert (plain["method"] == "mixed").all()
    assert not np.allclose(rows_of(plain)["pvals"], rows_of(adjusted)["pvals"].reindex(rows_of(plain).index))
    with pytest.raises(ValueError, match="only for method='pseudobulk', 'means', 'mixed' and 'spatial'"):
        markers(tables, covariates="depth", method="wilcoxon")
    with pytest.raises(ValueError, match=r"`depth` is 'depth', which method='wilcoxon' does not use .*; leave it out"):
        markers(tables, depth="depth", method="wilcoxon")
    with pytest.raises(ValueError, match="`covariates` 'no' is not a column"):
        markers(tables, method="mixed", covariates="no")
    with pytest.raises(ValueError, match="combination of the others and the group"):
        markers(tables, method="mixed", covariates="label")


def test_mixed_model_takes_a_label_of_each_sample_and_group_and_reads_only_tested_spots():
    tables = patients(5, genes=12, labels=("tumour", "stroma", "fat"))
    for i, table in enumerate(tables):
        label = table.obs["label"]
        table.obs["code"] = np.select([label == "tumour", label == "stroma"], [i % 2, i // 2 % 2], np.nan)
        table.obs["batch"] = table.obs["code"].map({0: "a", 1: "b"})
    options = {"method": "mixed", "groups": "tumour", "reference": "stroma"}
    pd.testing.assert_frame_equal(
        markers(tables, covariates="batch", **options), markers(tables, covariates="code", **options)
    )
    tables[0].obs.loc[tables[0].obs_names[0], "batch"] = "b"
    with pytest.raises(
        ValueError, match="'batch' has several values within sample 'P0'; .* one label per sample and group"
    ):
        markers(tables, covariates="batch", **options)


def test_wilcoxon_equals_scanpy_and_is_called_naive():
    table = patient(0)
    with pytest.warns(UserWarning, match="as independent"):
        markers(table, method="wilcoxon")
    result = rows_of(hg.get.biomarkers(table))
    assert (result["method"] == "wilcoxon (naive)").all()
    other = anndata.AnnData(table.layers["log"], obs=table.obs, var=table.var)
    other.uns["log1p"] = {"base": None}
    other.obs["label"] = other.obs["label"].astype("category")
    sc.tl.rank_genes_groups(other, "label", method="wilcoxon", tie_correct=True)
    expected = sc.get.rank_genes_groups_df(other, "tumour").set_index("names")["pvals"]
    np.testing.assert_allclose(result["pvals"], expected[result.index], rtol=1e-4)


def test_ppi_uses_measured_samples_and_predictions_of_other_samples():
    tables = [as_predicted(table) for table in patients(12)]
    for table in tables[6:]:
        table.X = np.zeros_like(table.X)
    with pytest.warns(UserWarning, match="has 6 measured samples, but p-values need 8: pvals are NaN"):
        result = rows_of(markers(tables, layer="he2gene", method="ppi"))
    assert result[["pvals", "pvals_adj"]].isna().all(axis=None)
    assert (result.loc[[f"g{i}" for i in range(5)], "ci_low"] > 0).all()
    assert (result["method"] == "ppi").all()
    assert (result["n_samples"] == 12).all()
    assert set(result.index[:5]) == {f"g{i}" for i in range(5)}
    # A patient with measured reference spots only counts neither as measured nor as predicted.
    tables[6].X[(tables[6].obs["label"] != "tumour").to_numpy()] = 1
    with pytest.warns(UserWarning, match="has 6 measured samples"):
        assert (rows_of(markers(tables, layer="he2gene", method="ppi"))["n_samples"] == 11).all()
    with pytest.raises(ValueError, match="at least 3 measured and 2 more predicted samples"):
        markers(tables[:6], layer="he2gene", method="ppi")


def test_ppi_adjusts_measured_values_for_depth():
    """The groups differ only in depth, by a factor of 1.8."""
    rng, labels = np.random.default_rng(0), np.repeat(["tumour", "stroma"], 40)
    composition = rng.lognormal(0, 1.2, 400)
    tables = []
    for number in range(12):
        genes = composition * rng.lognormal(0, 0.2, 400)
        totals = 3000 * np.where(labels == "tumour", 1.8, 1) * rng.lognormal(0, 0.3, 80)
        counts = rng.poisson(totals[:, None] * genes / genes.sum()) * (number < 8)
        table = anndata.AnnData(counts.astype(np.float32), obs={"label": labels, "patient": [f"P{number}"] * 80})
        noise = 0.05 * rng.standard_normal((80, 400))
        table.layers["mine"] = np.log1p(1e4 * genes / genes.sum() + abs(noise)).astype(np.float32)
        if number > 9:
            # Like the table that hg.tl.predict makes for a slide without measurements.
            table.uns[OWN_TABLE] = True
        tables.append(table)
    options = {"groups": "tumour", "reference": "stroma", "layer": "mine", "layer_scale": "log", "reliable_only": False}
    result = hg.tl.biomarkers(tables, "label", method="ppi", **options)
    assert (result["pvals"] < 0.05).mean() < 0.1
    assert 0.35 < (result["effect_size"] > 0).mean() < 0.65


# ----------------------------------------------------------------------------------------------- reliable, circular


def test_only_reliable_genes_of_predictions_are_tested():
    tables = [as_predicted(table) for table in patients(4)]
    assert set(markers(tables, layer="he2gene")["names"]) == {f"g{i}" for i in range(30)}
    every = markers(tables, layer="he2gene", reliable_only=False)
    assert set(every.loc[every["reliable"], "names"]) == {f"g{i}" for i in range(30)}
    assert every["names"].nunique() == 60
    assert markers(tables, layer=None)["names"].nunique() == 60
    for table in tables:
        table.var["he2gene_reliable"] = False
    with pytest.raises(ValueError, match="`reliable_only`: no gene is reliable"):
        markers(tables, layer="he2gene")
    joined = anndata.concat(tables)
    with pytest.raises(ValueError, match="merge='same'"):
        markers(joined, layer="he2gene")


@pytest.mark.parametrize("copied", [False, True])
def test_labels_of_the_same_model_are_marked_circular(copied):
    tables = [as_predicted(t, annotation=t.obs["label"]) for t in patients(4)]
    key = "he2gene_annotation"
    if copied:
        for table in tables:
            table.obs["mine"] = table.obs[key].astype(str)
        key = "mine"
    with pytest.warns(UserWarning, match="share its errors"):
        result = markers(tables, key, layer="he2gene")
    assert result["circular"].all()
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert not markers(tables, key, layer=None)["circular"].any()


def test_a_layer_adapted_from_a_prediction_counts_as_a_prediction():
    tables = [as_predicted(t, annotation=t.obs["label"]) for t in patients(4)]
    for table in tables:
        table.layers["he2gene_adapted"] = table.layers["he2gene"]
        table.uns["he2gene_adapted"] = {"verb": "adapt", "params": {"layer": "he2gene"}, "written": {}}
    with pytest.warns(UserWarning, match="share its errors"):
        result = markers(tables, "he2gene_annotation", layer="he2gene_adapted")
    assert result["circular"].all()
    assert set(result["names"]) == {f"g{i}" for i in range(30)}


def _renamed(label):
    return label.map({"tumour": "T", "stroma": "S", "fat": "F"})


def _merged(label):
    return label.map({"tumour": "tumour", "stroma": "other", "fat": "other"})


def _some_changed(label):
    changed = label.copy()
    changed.iloc[0] = "stroma" if changed.iloc[0] == "tumour" else "tumour"
    return changed


def _unlike(label):
    return pd.Series(np.random.default_rng(0).permutation(label), label.index)


def _mostly_one(label):
    return pd.Series(np.where(np.arange(len(label)) < 3, "rare", "common"), label.index)


@pytest.mark.parametrize(
    ("change", "circular"),
    [(_renamed, True), (_merged, True), (_some_changed, False), (_unlike, False), (_mostly_one, False)],
)
def test_labels_that_follow_from_predicted_labels_are_circular(change, circular):
    tables = [patient(i, labels=("tumour", "stroma", "fat"), n=64) for i in range(4)]
    for table in tables:
        as_predicted(table, annotation=table.obs["label"])
        table.obs["mine"] = change(table.obs["label"].astype(str))
    with warnings.catch_warnings(record=True, action="always") as caught:
        result = markers(tables, "mine", layer="he2gene")
    assert (result["circular"] == circular).all()
    assert any("follows level by level from obs['he2gene_annotation']" in str(w.message) for w in caught) == circular


def test_predictions_are_recognised_after_concat_by_their_columns():
    tables = [as_predicted(t, annotation=t.obs["label"]) for t in patients(4)]
    for table in tables:
        table.layers["mine"] = table.layers["he2gene"]
        table.obs["mine_annotation"] = table.obs["label"]
        table.obs["mine_ood"] = 0.0
    whole = anndata.concat(tables)
    with pytest.raises(ValueError, match="`reliable_only`: var has no 'mine_reliable'"):
        markers(whole, "mine_annotation", layer="mine")
    with pytest.warns(UserWarning, match="share its errors"):
        markers(whole, "mine_annotation", layer="mine", reliable_only=False)
    assert hg.get.biomarkers(whole)["circular"].all()
    del whole.obs["mine_annotation"]
    markers(whole, layer="mine", reliable_only=False)
    assert not hg.get.biomarkers(whole)["reliable"].any()


def test_clusters_of_the_tested_values_are_circular():
    table = as_predicted(patient(0, n=64))
    table.obs["pathologist"] = table.obs["label"]
    hg.tl.domain_preservation(table, "pathologist", n_seeds=1, n_perms=19, clustering="kmeans")
    table.obs["mine"] = table.obs["he2gene_domains_measured"].astype(str).str.upper()
    cases = {
        ("he2gene_domains_predicted", "he2gene"): True,
        ("he2gene_domains_predicted", None): False,
        ("he2gene_domains_measured", "he2gene"): False,
        ("he2gene_domains_measured", None): True,
        ("mine", None): True,
        ("pathologist", None): False,
        ("pathologist", "he2gene"): False,
    }
    for (key, layer), circular in cases.items():
        with warnings.catch_warnings(record=True, action="always") as caught:
            markers(table, key, layer=layer, method="wilcoxon")
        assert (hg.get.biomarkers(table)["circular"] == circular).all(), (key, layer)
        assert any("is marked circular" in str(w.message) for w in caught) == circular
    assert hg.tl.concordance(table, "he2gene_domains_measured", method="wilcoxon") is None
    assert hg.get.concordance(table)["circular"].all()


def test_cross_fitted_labels_are_not_circular():
    tables = [as_predicted(t, annotation=t.obs["label"]) for t in patients(4)]
    for table in tables:
        # Measured genes that are not tested determine the labels.
        table.X[:, 40:50] += 15 * (table.obs["label"] == "tumour").to_numpy()[:, None]
    with warnings.catch_warnings(action="error", category=UserWarning):
        # The markers are a third of the counts of these few genes, so depth would act as a marker.
        warnings.filterwarnings("ignore", message=".*depth of the spots")
        result = markers(tables, "he2gene_annotation", layer="he2gene", cross_fit=True, depth=None)
    assert not result["circular"].any()
    tumour = rows_of(result)
    assert set(tumour.index[tumour["pvals_adj"] < 0.05]) == {f"g{i}" for i in range(5)}
    for table in tables[:1]:
        table.X = np.zeros_like(table.X)
    with pytest.raises(ValueError, match="`cross_fit`: section 'S0' of sample 'P0'.* has no measured counts"):
        markers(tables, "he2gene_annotation", layer="he2gene", cross_fit=True)
    with pytest.raises(ValueError, match="`cross_fit` needs several sections"):
        markers(tables[1], "he2gene_annotation", layer="he2gene", cross_fit=True)
    for table in tables:
        table.obs["total"] = 10.0
        table.X = np.zeros_like(table.X)
    with pytest.raises(ValueError, match="`cross_fit`: section 'S0' of sample 'P0'.* has no measured counts"):
        markers(tables, "he2gene_annotation", layer="he2gene", cross_fit=True, depth="total")


def test_cross_fit_of_method_ppi_is_an_error():
    slides = [hg.datasets.toy((4, 4), seed=i) for i in range(2)]
    with pytest.raises(ValueError, match="`cross_fit` keeps only measured samples, but method 'ppi' also needs"):
        hg.tl.biomarkers(slides, "pathologist", layer=None, method="ppi", cross_fit=True)


def test_low_agreement_of_cross_fitted_labels_is_a_warning_or_an_error():
    tables = [as_predicted(t) for t in patients(4)]
    for i, table in enumerate(tables):
        table.X[:, 40:50] += 15 * (table.obs["label"] == "tumour").to_numpy()[:, None]
        table.obs["noisy"] = table.obs["label"].astype(str).mask(np.arange(40) % 11 == i, "stroma")
    options = {"layer": "he2gene", "cross_fit": True, "depth": None}
    with pytest.warns(UserWarning, match="its labels agree with those of `groupby` in 9[1-4]% of the spots. Below 95%"):
        markers(tables, "noisy", **options)
    agreement = tables[0].uns["he2gene_biomarkers"]["params"]["cross_fit_agreement"]
    assert 0.91 <= agreement < 0.95
    for i, table in enumerate(tables):
        # Half of the labels are independent of the measured values.
        table.obs["noisy"] = table.obs["label"].astype(str).mask(np.random.default_rng(i).random(40) < 0.5, "stroma")
    with pytest.raises(ValueError, match=r"in [5-7]\d% of the spots; at least 85% are needed"):
        markers(tables, "noisy", **options)
    assert tables[0].uns["he2gene_biomarkers"]["params"]["cross_fit_agreement"] == agreement
    samples = tables[0].uns["he2gene_biomarkers"]["samples"]
    assert not samples.duplicated(["group", "sample"]).any()
    assert np.isfinite(tables[0].uns["he2gene_biomarkers"]["sample_effects"]).all()


def test_low_agreement_of_cross_fitted_labels_in_a_rare_group_is_a_warning():
    tables = [as_predicted(t) for t in patients(6)]
    for i, table in enumerate(tables):
        table.X[:, 40:50] += 15 * (table.obs["label"] == "tumour").to_numpy()[:, None]
        # The labels of five spots in two patients, and of one spot in a third (not tested), are independent of the measured values.
        table.obs["rare"] = table.obs["label"].astype(str).mask((np.arange(40) >= 35) & (i < 2), "immune")
        table.obs["rare"] = table.obs["rare"].mask((np.arange(40) == 30) & (i == 3), "odd")
    options = {"layer": "he2gene", "cross_fit": True, "depth": None}
    with pytest.warns(
        UserWarning, match="of the spots that are 'immune' by the given or the new label, only 0% have both"
    ):
        markers(tables, "rare", **options)
    with pytest.raises(ValueError, match=r"`groups` \['tumor'\] are not groups"):
        markers(tables, groups=["tumor"], **options)


# ----------------------------------------------------------------------------------------------- invalid input


def test_errors_name_unknown_names():
    tables = patients(3)
    with pytest.raises(ValueError, match="`groupby` 'no' is not a column of obs"):
        markers(tables, "no")
    with pytest.raises(ValueError, match=r"`reference` 'no' is not a group, valid: \['rest', 'stroma', 'tumour'\]"):
        markers(tables, reference="no")
    with pytest.raises(ValueError, match=r"`groups` \['no'\] are not groups"):
        markers(tables, groups=["no"])
    with pytest.raises(ValueError, match="holds the reference 'stroma'"):
        markers(tables, groups="stroma", reference="stroma")
    with pytest.raises(ValueError, match="`method` is 'no', valid"):
        markers(tables, method="no")
    with pytest.raises(ValueError, match="`layer` 'no' is not a layer"):
        markers(tables, layer="no")
    with pytest.raises(ValueError, match="`confidence_level` is 95"):
        markers(tables, confidence_level=95)
    with pytest.raises(ValueError, match="`trend` is 'no'"):
        markers(tables, trend="no")
    with pytest.raises(ValueError, match="`trend` is only for method='pseudobulk' and 'means', the method is 'mixed'"):
        markers(tables, method="mixed", trend=False)


def test_several_objects_without_a_patient_column_raise():
    tables = patients(3)
    for table in tables:
        del table.obs["patient"]
    with pytest.raises(ValueError, match=r"`sample_key`: object 0 has no obs\['patient'\]; name the column"):
        markers(tables)
    assert (markers(tables, sample_key="section")["n_samples"] == 3).all()


def test_a_single_group_raises():
    with pytest.raises(ValueError, match=r"`groupby` has one level, \['tumour'\]"):
        markers(patients(3, labels=("tumour",)))


def test_fractions_as_labels_raise():
    tables = patients(3)
    for table in tables:
        table.obs["label"] = np.linspace(0, 1, table.n_obs)
    with pytest.raises(ValueError, match="holds fractions"):
        markers(tables)


def _relabelled(n_first, others=0):
    """Patients with three labels: `n_first` spots of "rare" in the first patient, `others` in each other patient."""
    tables = patients(4)
    for i, table in enumerate(tables):
        table.obs["label"] = table.obs["label"].astype(object)
        table.obs.iloc[: n_first if i == 0 else others, table.obs.columns.get_loc("label")] = "rare"
    return tables


@pytest.mark.parametrize(
    ("n_first", "others", "why"),
    [
        (2, 0, "'rare' has 2 spots, at least 3 are needed"),
        (6, 0, r"'rare' has 3 or more spots only in samples \['P0'\]"),
        (6, 2, r"'rare' has 3 or more spots only in samples \['P0'\]"),
    ],
)
def test_groups_that_cannot_be_tested_raise_or_are_left_out(n_first, others, why):
    tables = _relabelled(n_first, others)
    with pytest.raises(ValueError, match=f"`groups`: {why}"):
        markers(tables, groups="rare")
    with pytest.warns(UserWarning, match=f"groups are left out: {why}"):
        result = markers(tables)
    assert set(result["group"]) == {"stroma", "tumour"}


def test_groups_that_never_share_a_sample_raise():
    tables = patients(4)
    for i, table in enumerate(tables):
        table.obs["label"] = ["tumour", "stroma"][i % 2]
    with pytest.raises(
        ValueError,
        match="0 of the samples have .* spots of both .*cannot be separated from a difference between samples",
    ):
        markers(tables)


def test_counts_and_logarithms_are_distinguished():
    tables = patients(3)
    for table in tables:
        table.layers["counts"] = np.random.default_rng(0).poisson(np.expm1(table.layers["log"])).astype(np.float32)
        table.X = table.layers["log"].copy()
    with pytest.raises(ValueError, match="`layer`: layer 'counts' looks like raw counts.*layer_scale='counts'"):
        markers(tables, layer="counts")
    with pytest.raises(ValueError, match="`layer`: X looks like log-transformed values.*layer_scale='log'"):
        markers(tables, layer=None)
    stated = markers(tables, layer="counts", layer_scale="counts")
    for table in tables:
        table.X = table.layers["counts"]
    pd.testing.assert_frame_equal(stated, markers(tables, layer=None))


def test_nan_genes_and_spots_are_left_out_and_counted(caplog):
    tables = patients(3)
    tables[1].layers["log"][:, 7] = np.nan
    tables[2].layers["log"][4] = np.nan
    with caplog.at_level(logging.INFO, "he2gene_sc"):
        result = rows_of(markers(tables))
    assert "1 genes contain NaN" in caplog.text
    assert "1 labelled spots have no values" in caplog.text
    assert "g7" not in result.index
    assert (result["n_spots"] + result["n_spots_reference"] == 119).all()
    for table in tables:
        table.layers["log"][:] = np.nan
    with pytest.raises(ValueError, match="is NaN for every gene"):
        markers(tables)


def test_duplicate_spots_raise():
    table = patient(0)
    double = anndata.concat([table, table[:4]], index_unique="-")
    with pytest.raises(ValueError, match=r"4 spots are duplicated at the same place.*section 'S0' of sample 'P0'"):
        markers([double, patient(1), patient(2)])
    del double.obsm["spatial"]
    double.obs_names = [*table.obs_names, *table.obs_names[:4]]
    with pytest.raises(ValueError, match="4 spots are duplicated under the same name"):
        markers(double)


def test_one_patient_under_two_names_raises():
    twin = patient(0)
    twin.obs["patient"] = "P9"
    twin.obsm["spatial"] = twin.obsm["spatial"] + 100
    with pytest.raises(ValueError, match=r"`sample_key`: 40 spots are the same.*'P0' and 'P9': a patient with two"):
        markers([*patients(3), twin[::-1].copy()])
    with pytest.raises(ValueError, match="40 spots are the same.* in two sections of sample 'P0'"):
        markers([*patients(3), patient(0)])


def _counted(i):
    table = as_predicted(patient(i))
    table.X *= 5
    return table


@pytest.mark.parametrize("change", ["fewer genes", "other values", "fewer spots and moved"])
def test_one_patient_under_two_names_raises_after_changes_of_the_table(change):
    twin = _counted(0)
    if change == "fewer genes":
        twin = twin[:, :-3].copy()
    elif change == "other values":
        twin.X = np.maximum(twin.X + np.random.default_rng(0).integers(-1, 2, twin.shape), 0).astype(np.float32)
    else:
        twin = twin[5:, ::-1].copy()
        twin.obsm["spatial"] = twin.obsm["spatial"] + 0.3
    twin.obs["patient"] = "P9"
    with pytest.raises(ValueError, match="in samples 'P0' and 'P9': a patient with two names"):
        markers([*(_counted(i) for i in range(3)), twin], layer=None)


@pytest.mark.parametrize("column", ["patient", "donor_id"])
def test_sections_used_as_patients_give_a_warning(column):
    tables = patients(4)
    for i, table in enumerate(tables):
        table.obs["slide"] = f"slide {i}"
        table.obs["patient"] = f"P{i // 2}"
        table.obs = table.obs.rename(columns={"patient": column})
    with pytest.warns(UserWarning, match=rf"4 samples are of 2 patients by obs\['{column}'\].*sample_key='{column}'"):
        markers(tables, sample_key="slide")
    for i, table in enumerate(tables):
        table.obs[column] = f"P{i}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not replicates")
        markers(tables, sample_key="slide")


def _in_two_sections(i, share, n=40):
    """A patient whose two sections hold `share` of the first label, and the rest of it; section 1 has other values."""
    table = patient(i, n=n, shift=0)
    first = (table.obs["label"] == "tumour").to_numpy()
    place = np.zeros(n, bool)
    for side, part in ((first, share), (~first, 1 - share)):
        place[np.flatnonzero(side)[: round(part * side.sum())]] = True
    table.obs["section"] = np.where(place, f"S{i}-1", f"S{i}-2")
    table.layers["log"] += (place[:, None] * np.where(np.arange(table.n_vars) % 2, 0.4, -0.4)).astype(np.float32)
    return table


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_labels_confounded_with_sections_give_a_warning(share):
    tables = [_in_two_sections(i, share) for i in range(6)]
    with pytest.warns(
        UserWarning, match="sections are confounded: the sections .* 'tumour' and 'stroma' .*Use one section"
    ):
        result = markers(tables, groups="tumour", reference="stroma")
    assert (result["pvals"] < 0.05).mean() > 0.3
    assert any("sections" in doubt for doubt in tables[0].uns["he2gene_biomarkers"]["params"]["doubts"])


def test_sections_with_the_same_shares_of_the_labels_give_no_warning():
    rng = np.random.default_rng(0)
    few = [_in_two_sections(i, 0.5, n=16) for i in range(4)]
    for table in few:
        table.obs["section"] = table.obs["patient"] + rng.permutation(["a", "b"] * 8).astype(object)
    unequal = [_in_two_sections(i, 0.5) for i in range(4)]
    for table in unequal:
        # Four fifths of both groups are in the first section.
        table.obs["section"] = table.obs["patient"] + np.where(np.arange(40) < 32, "a", "b").astype(object)
    for tables in (few, unequal, [_in_two_sections(i, 0.5) for i in range(4)]):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="groups and sections")
            markers(tables, groups="tumour", reference="stroma")


def test_a_prediction_that_is_the_same_at_all_spots_is_named():
    tables = patients(4, genes=20)
    level = np.random.default_rng(0).uniform(0.5, 3, 20).astype(np.float32)
    for table in tables:
        table.layers["log"] = np.tile(level, (table.n_obs, 1))
    with pytest.raises(ValueError, match="`layer` 'log' is the same at all spots of 'tumour' and 'stroma'"):
        markers(tables, groups="tumour", reference="stroma")
    with pytest.warns(UserWarning, match="pvals are NaN in all"):
        markers(tables[:1], groups="tumour", reference="stroma")
    # One spot that differs, at the same place in each section, does not make them one section.
    for table in tables:
        table.layers["log"][0] += 0.5
    assert len(markers(tables, groups="tumour", reference="stroma")) == 20


@pytest.mark.parametrize("method", ["means", "mixed", "spatial"])
def test_depth_from_a_panel_of_few_genes_gives_a_warning(method):
    few, more = ([as_predicted(patient(i, genes=n)) for i in range(4)] for n in (30, 60))
    options = {"layer": "log", "method": method, "groups": "tumour"}
    with pytest.warns(UserWarning, match=r"total of 30 genes, but 50 are needed.*hg.Design\(depth=...\)"):
        markers(few, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the depth of the spots is the total")
        markers(more, **options)
        markers(few, depth=None, **options)


def test_few_samples_and_genes_give_a_warning_if_genes_are_significant():
    message = "can be false"
    with pytest.warns(UserWarning, match=f"with 3 samples and 60 genes, .*{message}.*Add samples"):
        markers(patients(3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{message}")
        markers(patients(4))
        markers(patients(3, genes=300))


def test_concordance_warns_if_sections_are_used_as_patients():
    tables = _both()
    for i, table in enumerate(tables):
        table.obs["slide"] = f"slide {i}"
        table.obs["patient"] = f"P{i // 2}"
    with pytest.warns(UserWarning, match=r"4 samples are of 2 patients by obs\['patient'\]"):
        hg.tl.concordance(tables, "label", k=(5,), sample_key="slide")


def test_sections_with_the_same_layout_are_not_duplicates():
    # Same positions, same labels and little noise, as in neighbouring sections in one coordinate system.
    tables = [_counted(i) for i in range(2)]
    for table in tables:
        table.obs["patient"] = "P0"
    with pytest.warns(UserWarning, match="does not generalise"):
        assert len(markers(tables, layer=None))


def test_numbers_name_the_groups_of_a_numeric_column():
    tables = patients(3)
    for table in tables:
        table.obs["label"] = np.where(np.arange(table.n_obs) % 8 < 2, np.nan, np.arange(table.n_obs) % 2)
    expected = markers(tables, groups="1")
    for groups in (1, [1], [1.0], np.array([1])):
        pd.testing.assert_frame_equal(markers(tables, groups=groups), expected)
    pd.testing.assert_frame_equal(markers(tables, reference=0), markers(tables, groups=["1"], reference="0"))


def test_errors_name_invalid_arguments():
    tables = patients(3)
    with pytest.raises(ValueError, match=r"`groups` is empty; name some of \['stroma', 'tumour'\]"):
        markers(tables, groups=[])
    for value in ("a", None, np.nan):
        with pytest.raises(ValueError, match="`min_mean` is .*; a number is needed"):
            markers(tables, min_mean=value)
    for table in tables:
        table.obs["label"] = table.obs["label"].replace("stroma", "rest")
    with pytest.raises(ValueError, match="`groupby` has a level of this name"):
        markers(tables)
    assert set(markers(tables, groups="rest", reference="tumour")["group"]) == {"rest"}


def test_scaled_values_have_no_fold_change_and_give_a_warning():
    tables = patients(3)
    for table in tables:
        table.layers["log"] -= 5
    with pytest.warns(UserWarning, match="logfoldchanges are NaN for") as caught:
        result = markers(tables, layer_scale="log", min_mean=-9)
    assert not [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert result["logfoldchanges"].isna().any()
    assert result["effect_size"].notna().all()


def test_genes_without_a_p_value_are_not_adjusted():
    from he2gene_sc.tl._biomarkers.compare import adjust_pvalues

    tests = adjust_pvalues(pd.DataFrame({"group": "a", "pvals": [0.01, np.nan, 0.02]}))
    np.testing.assert_allclose(tests["pvals_adj"], [0.02, np.nan, 0.02])


def test_too_few_samples_suggest_another_method():
    with pytest.raises(ValueError, match="needs at least 2, found 1"):
        markers(patient(0), method="pseudobulk")


def test_other_types_raise():
    with pytest.raises(TypeError, match="is a str"):
        markers("table")
    with pytest.raises(TypeError, match="holds a int"):
        markers([1])
    with pytest.raises(ValueError, match="`data` is empty"):
        markers([])


def test_a_failed_run_changes_nothing():
    tables = patients(3)
    markers(tables)
    before = tables[0].uns["he2gene_biomarkers"]
    with pytest.raises(ValueError, match="`reference`"):
        markers(tables, reference="no")
    assert tables[0].uns["he2gene_biomarkers"] is before
    tables[2].uns["mine"] = {"a": 1}
    with pytest.raises(ValueError, match="was not written by hg.tl.biomarkers"):
        markers(tables, key_added="mine")
    assert "mine" not in tables[0].uns


# ----------------------------------------------------------------------------------------------- hg.get and hg.pl


def test_results_are_filtered():
    tables = patients()
    markers(tables)
    chosen = hg.get.biomarkers(tables, "tumour", pval_cutoff=0.05, log2fc_min=0.1)
    assert set(chosen["names"]) == {f"g{i}" for i in range(5)}
    assert hg.get.biomarkers(tables[3], log2fc_max=0)["logfoldchanges"].max() < 0
    assert hg.get.biomarkers(tables, reliable=False).empty
    with pytest.raises(ValueError, match=r"`group` \['no'\] was not tested"):
        hg.get.biomarkers(tables, "no")
    with pytest.raises(ValueError, match="run hg.tl.biomarkers first"):
        hg.get.biomarkers(patient(0))


def test_a_volcano_plot_shows_every_gene_and_names_significant_ones():
    tables = patients()
    markers(tables)
    axes = hg.pl.biomarkers(tables)
    assert len(axes) == 2
    tumour = next(ax for ax in axes if ax.get_title().startswith("tumour"))
    assert len(tumour.collections[0].get_offsets()) == 60
    assert {text.get_text() for text in tumour.texts} == {f"g{i}" for i in range(5)}
    assert "5 of 60 at FDR 0.05" in tumour.get_title()


def test_names_in_a_volcano_plot_do_not_overlap():
    tables = patients(genes=300)
    for table in tables:
        # Equal values, so that their points coincide.
        table.layers["log"][:, 5:25] += 0.8 * (table.obs["label"] == "tumour").to_numpy()[:, None]
    markers(tables)
    ax = hg.pl.biomarkers(tables, "tumour", n_genes=12)
    ax.figure.canvas.draw()
    # Extent of the text only; the extent of an annotation includes its line.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    texts = [(box.x0, box.x1, box.y0, box.y1) for box in boxes]
    assert len(texts) >= 12
    for i, (x0, x1, y0, y1) in enumerate(texts):
        for u0, u1, v0, v1 in texts[:i]:
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 + 1 or v1 <= y0 + 1


def test_the_dot_plot_shows_the_difference_in_every_patient():
    tables = patients(4)
    markers(tables)
    _, given = plt.subplots()
    ax = hg.pl.biomarkers(tables, "tumour", kind="dot", genes=["g0", "g30"], ax=given)
    assert ax is given
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"P{i}" for i in range(4)]
    assert [t.get_text() for t in ax.texts] == ["tumour"]
    dots = ax.collections[0]
    assert len(dots.get_offsets()) == 8
    mask = tables[2].obs["label"] == "tumour"
    log = tables[2].layers["log"][:, 0]
    colours = dict(zip(map(tuple, dots.get_offsets().tolist()), dots.get_array(), strict=True))
    assert colours[(0, 3)] == pytest.approx(log[mask].mean() - log[~mask].mean(), rel=1e-4)


def test_plots_of_untested_genes_raise(tmp_path):
    tables = patients(3)
    markers(tables)
    with pytest.raises(ValueError, match="`kind` is 'bar'"):
        hg.pl.biomarkers(tables, kind="bar")
    with pytest.raises(ValueError, match=r"`genes` \['no'\] were not tested"):
        hg.pl.biomarkers(tables, genes="no")
    with pytest.raises(ValueError, match="`ncols` is 0; a whole number from 1 is needed"):
        hg.pl.biomarkers(tables, ncols=0)
    hg.pl.biomarkers(tables, "tumour", save=tmp_path / "v.png")
    assert (tmp_path / "v.png").exists()


# ----------------------------------------------------------------------------------------------- concordance


def _both(n=4):
    tables = [as_predicted(table) for table in patients(n)]
    for table in tables:
        table.X[:, 59] += 10_000 - table.X.sum(1)
    return tables


def test_concordance_compares_predicted_with_measured():
    tables = _both()
    table = hg.tl.concordance(tables, "label", k=(5, 100))
    assert table.columns[:4].tolist() == ["group", "genes", "n_genes", "n_significant"]
    row = table[(table["group"] == "tumour") & (table["genes"] == "reliable")].iloc[0]
    assert row["n_genes"] == 30
    assert row["precision_at_5"] == 1
    assert np.isnan(row["precision_at_100"])
    assert row["chance_at_5"] == pytest.approx(5 / 30)
    genes = hg.get.concordance(tables, by_gene=True)
    part = genes[(genes["group"] == "tumour") & genes["reliable"]]
    expected = stats.spearmanr(part["effect_size_predicted"], part["effect_size_measured"]).statistic
    assert row["spearman"] == pytest.approx(expected)
    measured = rows_of(markers(tables, layer=None))
    np.testing.assert_allclose(
        part.set_index("names")["effect_size_measured"], measured["effect_size"].reindex(part["names"]), rtol=1e-6
    )


def test_concordance_of_a_copy_is_perfect():
    tables = patients(4)
    for table in tables:
        table.layers["copy"] = table.layers["log"].copy()
    table = hg.tl.concordance(tables, "label", layer="log", measured="copy", k=(5,))
    table = table[table["predictor"] == "log"]
    assert (table["spearman"] > 0.999).all()
    assert (table["precision_at_5"] == 1).all()
    assert (table["auroc"] == 1).all()


def test_gene_independent_references_are_scored_with_the_prediction():
    tables = _both()
    for table in tables:
        table.X = table.X.copy()
        table.X[table.obs["label"] == "tumour"] *= 3
    good = hg.tl.concordance(tables, "label", groups="tumour", k=())
    assert good["predictor"].tolist() == ["he2gene"] * 2 + ["depth"] * 2 + ["coordinates"] * 2
    rows = good[good["genes"] == "all"].set_index("predictor")
    assert rows.loc["depth", "spearman_difference"] == pytest.approx(
        rows.loc["he2gene", "spearman"] - rows.loc["depth", "spearman"]
    )
    assert rows.loc["depth", "spearman_difference"] > 0.3
    assert np.isnan(rows.loc["he2gene", "spearman_difference"])
    genes = hg.get.concordance(tables, by_gene=True)
    above = (genes["effect_size_measured"] > 0).mean()
    # Tumour is deeper, so all effects of depth are above 0.
    assert rows.loc["depth", "sign_agreement"] == pytest.approx(above)
    assert rows.loc["coordinates", "sign_agreement"] == pytest.approx(above)


def test_a_prediction_of_depth_alone_is_not_better_than_its_references():
    """One number per spot times the mean of each gene has perfect sign agreement."""
    tables = _both(6)
    rng = np.random.default_rng(0)
    for table in tables:
        table.X = table.X.copy()
        table.X[table.obs["label"] == "tumour"] *= 3
        mean = np.log1p(1e4 * table.X.sum(0) / table.X.sum())
        depth = np.log(table.X.sum(1))
        z = (depth - depth.mean()) / depth.std()
        depth_only = mean * (1 + 0.2 * z[:, None]) + rng.normal(0, 0.02, table.shape) * mean
        table.layers["depth only"] = np.clip(depth_only, 0, None).astype(np.float32)
    found = hg.tl.concordance(tables, "label", groups="tumour", layer="depth only", layer_scale="log", k=())
    rows = found[found["genes"] == "all"].set_index("predictor")
    assert rows.loc["depth only", "sign_agreement_significant"] == 1
    assert rows.loc["depth only", "auroc"] > 0.9
    # 60 genes: the standard error of a rank correlation is .13.
    most = {"spearman": 0.13, "sign_agreement": 0.05, "sign_agreement_significant": 0.05, "auroc": 0.05}
    for score, bound in most.items():
        assert (rows.loc[["depth", "coordinates"], f"{score}_difference"] <= bound).all()


def test_concordance_leaves_out_spots_that_were_not_measured():
    tables = _both(5)
    tables[4].X = np.zeros_like(tables[4].X)
    assert (hg.tl.concordance(tables, "label")["n_samples"] == 4).all()
    for table in tables:
        table.X = np.zeros_like(table.X)
    with pytest.raises(ValueError, match="`measured` holds no counts"):
        hg.tl.concordance(tables, "label")
    with pytest.raises(ValueError, match="are both 'he2gene'"):
        hg.tl.concordance(tables, "label", measured="he2gene")


def _with_unmeasured_sections(n=8, measured=4):
    """Measured patients have a second section that was only predicted, almost all of it with one label."""
    tables = _both(n)
    for i, table in enumerate(tables):
        if i >= measured:
            table.X = np.zeros_like(table.X)
            continue
        second = as_predicted(patient(i, seed=2))
        second.obs["section"] = f"S{i}b"
        second = second[(second.obs["label"] == "tumour").to_numpy() | (np.arange(40) < 8)].copy()
        second.X = np.zeros_like(second.X)
        tables.append(second)
    return tables


def test_sections_that_were_not_measured_are_not_zeros_in_concordance():
    tables = _with_unmeasured_sections()
    hg.tl.concordance(tables, "label", groups="tumour")
    expected = hg.tl.concordance(_both(4), "label", groups="tumour")
    pd.testing.assert_frame_equal(hg.get.concordance(tables), expected)
    one = [tables[0].copy(), anndata.concat(tables[1:], merge="same", uns_merge="same")]
    pd.testing.assert_frame_equal(hg.tl.concordance(one, "label", groups="tumour"), expected, rtol=1e-5)


def test_sections_that_were_not_measured_are_not_zeros_in_ppi():
    tables = _with_unmeasured_sections()
    with pytest.warns(UserWarning, match="not adjusted for the depth of the spots"):
        result = rows_of(
            markers(tables, layer="he2gene", method="ppi", groups="tumour", reliable_only=False, depth=None)
        )
    spots = anndata.concat(tables, merge="same")

    def effect(patient, gene):
        part = spots[spots.obs["patient"] == patient]
        inside = (part.obs["label"] == "tumour").to_numpy()
        return part.layers["he2gene"][inside].mean(0)[gene] - part.layers["he2gene"][~inside].mean(0)[gene]

    log = [hg.stats.log_normalise(t.X) for t in tables[:4]]
    inside = [(t.obs["label"] == "tumour").to_numpy() for t in tables[:4]]
    for gene in (0, 30):
        known = [v[i, gene].mean() - v[~i, gene].mean() for v, i in zip(log, inside, strict=True)]
        beside = [effect(f"P{i}", gene) for i in range(8)]
        expected = hg.stats.prediction_powered_mean(*(np.array(v)[:, None] for v in (known, beside[:4], beside[4:])))
        assert result.loc[f"g{gene}", "effect_size"] == pytest.approx(expected.effect[0], rel=1e-3)
    for table in tables:
        table.X = np.zeros_like(table.X)
    with pytest.raises(ValueError, match="`measured` holds no counts"):
        markers(tables, layer="he2gene", method="ppi")


def test_concordance_of_groups_without_a_gene_that_both_tests_rank_raises_or_leaves_them_out():
    tables = [as_predicted(patient(i, labels=("tumour", "stroma", "fat"), n=48)) for i in range(2)]
    for table in tables:
        table.layers["he2gene"] = table.layers["he2gene"].copy()
        table.layers["he2gene"][(table.obs["label"] != "fat").to_numpy()] = 2.5
    with pytest.warns(UserWarning, match="no gene has a p-value both .* in 'tumour'; these groups are left out"):
        found = hg.tl.concordance(tables, "label", reference="stroma", method="wilcoxon", k=())
    assert set(found["group"]) == {"fat"}
    for table in tables:
        table.layers["he2gene"][:] = 2.5
    with pytest.raises(ValueError, match="`layer` 'he2gene': no gene has a p-value both .* in 'fat', 'tumour'; name"):
        hg.tl.concordance(tables, "label", reference="stroma", method="wilcoxon", k=())


def test_concordance_takes_depth_from_the_measured_counts_or_says_that_it_is_unknown():
    expected = hg.tl.concordance(_both(), "label", k=())
    tables = _both()
    for table in tables:
        table.layers["counts"], table.X = table.X, table.layers["log"].copy()
        table.layers["measured"] = hg.stats.log_normalise(table.layers["counts"])
    found = hg.tl.concordance(tables, "label", measured="counts", measured_scale="counts", k=())
    pd.testing.assert_frame_equal(found, expected)
    with pytest.warns(UserWarning, match="not adjusted for the depth of the spots.* raw counts of every spot into X$"):
        hg.tl.concordance(tables, "label", measured="measured", k=())


def test_concordance_survives_zarr_and_can_be_plotted(tmp_path):
    tables = _both()
    table = hg.tl.concordance(tables, "label")
    tables[0].write_zarr(tmp_path / "t.zarr")
    back = anndata.read_zarr(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(hg.get.concordance(back), table, check_dtype=False)
    ax = hg.pl.concordance(back, "tumour", genes="g0")
    assert [len(c.get_offsets()) for c in ax.collections] == [30, 30]
    assert ax.texts[0].get_text() == "g0"
    assert "Spearman: reliable" in ax.get_title()
    with pytest.raises(ValueError, match=r"`group` \['no'\] was not compared"):
        hg.pl.concordance(back, "no")
    with pytest.raises(ValueError, match=r"`group` is \[\]; a list of texts, at least 1, is needed"):
        hg.pl.concordance(back, [])
    with pytest.raises(ValueError, match="`ncols` is 0; a whole number from 1 is needed"):
        hg.pl.concordance(back, ncols=0)


# ----------------------------------------------------------------------------------------------- enrichment


def test_scores_of_gene_sets_equal_decoupler(tmp_path):
    import decoupler as dc

    tables = patients()
    result = markers(tables)
    net = pd.DataFrame({"source": ["up"] * 5 + ["not"] * 6, "target": [f"g{i}" for i in range(11)]})
    scores = hg.tl.enrichment(tables, net)
    top = scores[scores["group"] == "tumour"].iloc[0]
    assert top["source"] == "up"
    assert top["n_targets"] == 5
    wide = result.pivot(index="group", columns="names", values="scores")
    expected, adjusted = dc.mt.ulm(data=wide, net=net, tmin=5)
    assert top["score"] == pytest.approx(expected.loc["tumour", "up"], rel=1e-5)
    assert top["pvals_adj"] == pytest.approx(adjusted.loc["tumour", "up"], rel=1e-3)
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("\n".join(f"{s}\tnone\t" + "\t".join(part["target"]) for s, part in net.groupby("source")))
    of_frame = hg.tl.enrichment(result, gmt)
    assert of_frame["pvals_adj_samples"].isna().all()
    pd.testing.assert_frame_equal(*(frame.drop(columns="pvals_adj_samples") for frame in (of_frame, scores)))
    assert top["pvals_adj_samples"] < 0.01
    tables[0].write_zarr(tmp_path / "t.zarr")
    pd.testing.assert_frame_equal(hg.get.enrichment(anndata.read_zarr(tmp_path / "t.zarr")), scores, check_dtype=False)


@pytest.mark.slow
def test_sets_of_coexpressed_genes_are_tested_over_samples():
    from he2gene_sc.tl._biomarkers.enrichment import _test_over_samples

    genes, names = [f"g{i}" for i in range(200)], ["coexpressed", "apart"]
    net = pd.DataFrame({"source": np.repeat(names, 20), "target": genes[:20] + genes[50:70]})
    results = pd.DataFrame({"group": "a", "source": names})
    found = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        effects = rng.normal(size=(6, 200))
        effects[:, :20] = np.sqrt(0.5) * (effects[:, :20] + rng.normal(size=(6, 1)))
        frame = pd.DataFrame({"group": "a", "names": genes})
        record = {"samples": {"group": ["a"] * 6}, "genes": genes, "sample_effects": effects}
        found += [_test_over_samples(results[i : i + 1], frame, net, record).iloc[0] for i in (0, 1)]
    rates = (np.reshape(found, (-1, 2)) < 0.05).mean(axis=0)
    assert (rates < 0.09).all(), rates
    assert (
        _test_over_samples(results, frame, net, record | {"sample_effects": effects + 3 * (np.arange(200) < 20)})[0]
        < 0.01
    )
    few = {name: values[:2] if name != "genes" else values for name, values in record.items() if name != "samples"}
    assert _test_over_samples(results, frame, net, few | {"samples": {"group": ["a"] * 2}}).isna().all()


def test_the_background_of_an_overrepresentation_is_the_tested_genes():
    from scipy.stats import fisher_exact

    names = [f"g{i}" for i in range(200)]
    frame = pd.DataFrame({"group": "a", "names": names, "scores": np.random.default_rng(0).normal(size=200)})
    top = frame["scores"].nlargest(100).index
    a = (top < 30).sum()
    found, of_many = (
        hg.tl.enrichment(frame, {"some": names[:30]}, method="ora", n_up=100, **background)["pvals_adj"].item()
        for background in ({}, {"n_bg": 20_000})
    )
    assert found == pytest.approx(fisher_exact([[a, 100 - a], [30 - a, 70 + a]]).pvalue, rel=1e-3)
    assert of_many < 1e-10
    with pytest.warns(UserWarning, match="`method` 'ora': without `n_up` decoupler 2.2 selects the upper 95 %"):
        hg.tl.enrichment(frame, {"some": names[:30]}, method="ora")


def test_gene_sets_of_circular_biomarkers_are_circular():
    net = pd.DataFrame({"source": ["up"] * 5 + ["not"] * 6, "target": [f"g{i}" for i in range(11)]})
    tables = [as_predicted(t, annotation=t.obs["label"]) for t in patients(4)]
    assert not hg.tl.enrichment(markers(tables, "label", layer=None), net)["circular"].any()
    with pytest.warns(UserWarning, match="marked circular"):
        markers(tables, "he2gene_annotation", layer="he2gene")
    with pytest.warns(UserWarning, match="the biomarkers are circular"):
        scores = hg.tl.enrichment(tables, net)
    assert scores["circular"].all()


def test_enrichment_raises_for_invalid_arguments():
    tables = patients(3)
    net = pd.DataFrame({"source": "a", "target": [f"x{i}" for i in range(6)]})
    with pytest.raises(ValueError, match="run hg.tl.biomarkers first"):
        hg.tl.enrichment(tables, net)
    markers(tables)
    with pytest.raises(ValueError, match="`net`: no set has 5 of the 60 genes tested"):
        hg.tl.enrichment(tables, net)
    with pytest.raises(ValueError, match="`net` has no column 'target'"):
        hg.tl.enrichment(tables, net[["source"]])
    with pytest.raises(ValueError, match="`net`: file .* does not exist"):
        hg.tl.enrichment(tables, "no.gmt")
    for method in ("no", "consensus", "decouple", "show"):
        with pytest.raises(ValueError, match=f"`method` '{method}' is not a method of decoupler, valid: .*'ulm'"):
            hg.tl.enrichment(tables, net, method=method)
    with pytest.raises(ValueError, match=r"`group` is empty; name some of \['stroma', 'tumour'\], or None for all"):
        hg.tl.enrichment(tables, net, group=[])
    with pytest.raises(ValueError, match="`data`: the biomarkers have no row with a group"):
        hg.tl.enrichment(hg.get.biomarkers(tables).head(0), net)
    with pytest.raises(ValueError, match="`statistic`"):
        hg.tl.enrichment(tables, net, statistic="no")


def test_invalid_gene_sets_raise_or_are_left_out():
    result = markers(patients())
    net = pd.DataFrame({"source": ["up"] * 5 + ["not"] * 6, "target": [f"g{i}" for i in range(11)]})
    expected = hg.tl.enrichment(result, net)
    nowhere = pd.DataFrame({"source": [None] * 6, "target": [f"g{i}" for i in range(6)]})
    whole = pd.DataFrame({"source": "all", "target": result["names"].unique()})
    pd.testing.assert_frame_equal(hg.tl.enrichment(result, pd.concat([net, nowhere, whole])), expected)
    twice = pd.concat([net.assign(weight=1.0), net.head(1).assign(weight=-1.0)])
    with pytest.raises(ValueError, match="`net` names gene 'g0' twice in set 'up', with different weights"):
        hg.tl.enrichment(result, twice)
    with pytest.raises(ValueError, match="`net` has two columns 'source'; rename or drop one"):
        hg.tl.enrichment(result, pd.concat([net, net[["source"]]], axis=1))
    with pytest.raises(ValueError, match="occurs twice in group"):
        hg.tl.enrichment(pd.concat([result, result.head(1)]), net)
    with pytest.raises(ValueError, match="`data`: 'scores' is infinite for"):
        hg.tl.enrichment(result.assign(scores=result["scores"].mask(result["names"] == "g3", np.inf)), net)
    with pytest.raises(ValueError, match="`data`: 'scores' is the same for all genes"):
        hg.tl.enrichment(result.assign(scores=1.0), net)


def test_genes_of_diseases_come_from_omnipath(monkeypatch):
    """The answer of OmniPath is in its format; decoupler reads it, and the call is that of the docstring."""
    import decoupler

    module = sys.modules["decoupler.op._resource"]
    rows = [("breast cancer", f"g{i}") for i in range(5)] + [("asthma", f"g{i}") for i in range(5, 11)]
    lines = ["uniprot\tgenesymbol\tentity_type\tsource\tlabel\tvalue\trecord_id"]
    for i, (disease, gene) in enumerate(rows):
        for label, value in (("disease", disease), ("score", "0.5"), ("source", "CTD_human")):
            lines.append(f"P{i}\t{gene}\tprotein\tDisGeNet\t{label}\t{value}\t{i}")
    monkeypatch.setattr(module, "_download", lambda url, **options: io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(module, "show_resources", lambda: pd.DataFrame({"name": ["DisGeNet"]}))
    (call,) = re.findall(r"``(decoupler\.op\.resource.*?)``", hg.tl.enrichment.__doc__, re.DOTALL)
    net = eval(call, {"decoupler": decoupler})
    scores = hg.tl.enrichment(markers(patients()), net, group="tumour")
    assert scores["source"].tolist() == ["breast cancer", "asthma"]
    assert scores["pvals_adj"].iloc[0] < 0.01


def test_marker_sets_are_genes_of_the_bundled_model():
    net = hg.datasets.breast_markers()
    assert list(net) == ["source", "target", "reference"]
    assert not net.duplicated(["source", "target"]).any()
    known = hg.models.load().genes.index
    assert net["target"].isin(known).mean() > 0.8


# ----------------------------------------------------------------------------------------------- sizes, real data


@pytest.mark.slow
@pytest.mark.parametrize("method", ["means", "mixed"])
def test_the_error_rate_without_planted_genes_is_the_level(method):
    genes = 3000 if method == "means" else 300
    tables = patients(8, genes=genes, shift=0.0, seed=3)
    for i, table in enumerate(tables):
        rng = np.random.default_rng(i)
        for side in ("tumour", "stroma"):
            table.layers["log"][table.obs["label"] == side] += rng.normal(0, 0.1, genes)
    rate = (rows_of(markers(tables, method=method))["pvals"] < 0.05).mean()
    assert (0.035 < rate < 0.065) if method == "means" else rate < 0.085


@pytest.fixture(scope="module", params=[True, False], ids=["trend", "one prior"])
def eight_patients(request, her2st):
    with warnings.catch_warnings(action="ignore"):
        tables = [her2st(name)["table"].copy() for name in ("A1", "B1", "C1", "D1", "E1", "F1", "G2", "H1")]
    found_in = markers(
        tables,
        "pathologist",
        layer=None,
        groups="invasive cancer",
        reference="connective tissue",
        min_mean=0.1,
        join="outer",
        trend=request.param,
    )
    return request.param, rows_of(found_in, "invasive cancer")


@pytest.mark.slow
@pytest.mark.data
def test_measured_invasive_cancer_against_connective_tissue_in_eight_patients(eight_patients):
    _, result = eight_patients
    significant = result[result["pvals_adj"] < 0.05]
    # Genes in both directions: a deeper group does not appear as higher expression.
    assert 100 < (significant["effect_size"] > 0).sum() < 600
    assert 100 < (significant["effect_size"] < 0).sum() < 900
    assert (result.loc[MARKERS, "effect_size"] > 0).all()


@pytest.mark.slow
@pytest.mark.data
def test_cancer_markers_are_significant_in_eight_patients(eight_patients):
    _, result = eight_patients
    assert (result.loc[MARKERS, "pvals_adj"] < 0.05).all()


def test_concordance_accepts_an_iterator_of_objects():
    tables = [as_predicted(table) for table in patients(3)]
    listed = hg.tl.concordance(tables, "label", groups="tumour", k=(5,))
    pd.testing.assert_frame_equal(hg.tl.concordance(iter(tables), "label", groups="tumour", k=(5,)), listed)
