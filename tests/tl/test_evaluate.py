"""``hg.tl.evaluate``: predicted against measured expression."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData, read_zarr
from scipy.stats import linregress, pearsonr, spearmanr

import he2gene_sc as hg
from he2gene_sc.stats import (
    calibration_error,
    ceiling_of_neighbours,
    class_scores,
    log_normalise,
    neighbour_weights,
    noise_ceiling,
    ssim_on_grid,
)
from tests.helpers.objects import two_regions

GENES = ["G0", "G1", "G2", "G3", "G4", "unknown"]
CLASSES = ["fat", "stroma", "tumour"]
SHAPES = {"a": (8, 9), "b": (6, 7)}


def make(seed=0, shapes=SHAPES):
    """Return a table as predict writes it: sections on square lattices, with a prediction of medium accuracy."""
    rng = np.random.default_rng(seed)
    parts = [[(s, r, c) for r in range(h) for c in range(w)] for s, (h, w) in shapes.items()]
    obs = pd.DataFrame([spot for part in parts for spot in part], columns=["section", "array_row", "array_col"])
    obs.index = obs["section"] + obs["array_row"].astype(str) + "x" + obs["array_col"].astype(str)
    n = len(obs)
    rate = np.exp(rng.normal(2, 0.6, (n, 6)) + np.sin(obs["array_row"].to_numpy() / 2)[:, None])
    counts = rng.poisson(rate * rng.lognormal(0, 0.3, n)[:, None])
    table = AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    log = log_normalise(counts)
    layer = (0.5 * log + rng.normal(0, 0.4, log.shape) + 3).astype(np.float32)
    layer[:, 5] = np.nan
    table.layers["he2gene"], table.layers["log"] = layer, log
    table.obsm["spatial"] = obs[["array_col", "array_row"]].to_numpy(float) * 100
    table.var["he2gene_predicted"] = np.arange(6) < 5
    table.var["he2gene_reliable"] = np.arange(6) < 2
    table.var["he2gene_pcc"] = 0.1
    table.var["he2gene_mean"] = np.where(np.arange(6) < 5, 7.0, np.nan)
    table.uns["he2gene"] = {"model": "mine", "weights_sha256": "x", "layer": "he2gene"}
    proba = rng.dirichlet(np.ones(3), n)
    table.obsm["he2gene_annotation_proba"] = pd.DataFrame(proba, columns=CLASSES, index=obs.index)
    table.obs["label"] = np.where(rng.random(n) < 0.6, np.array(CLASSES)[proba.argmax(1)], rng.choice(CLASSES, n))
    table.obs["patient"] = table.obs["section"].map({"a": "p", "b": "q"})
    return table


@pytest.fixture
def table():
    return make()


def genes_of(data, scope="section", section="a", predictor="he2gene"):
    frame = hg.get.evaluation(data, "genes")
    chosen = frame[(frame.scope == scope) & (frame.section == section) & (frame.predictor == predictor)]
    return chosen.assign(gene=chosen["gene"].astype(str)).set_index("gene")


def both(table, rows):
    return np.asarray(table.layers["he2gene"])[rows][:, :5], table.layers["log"][rows][:, :5]


# Metrics


@pytest.mark.parametrize(("scope", "section"), [("section", "a"), ("section", "b"), ("pooled", "all sections")])
def test_each_metric_is_computed_over_the_spots_of_its_scope(table, scope, section):
    hg.tl.evaluate(table)
    found = genes_of(table, scope, section)
    rows = np.flatnonzero((table.obs["section"] == section) | (scope == "pooled"))
    p, m = both(table, rows)
    depth = np.log(table.X.toarray().sum(1)[rows])
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert found.index.tolist() == GENES[:5]
    np.testing.assert_allclose(found["pearson"], [pearsonr(p[:, j], m[:, j])[0] for j in range(5)], **close)
    np.testing.assert_allclose(found["spearman"], [spearmanr(p[:, j], m[:, j])[0] for j in range(5)], **close)
    np.testing.assert_allclose(found["slope"], [linregress(p[:, j], m[:, j]).slope for j in range(5)], **close)
    np.testing.assert_allclose(found["sd_ratio"], p.std(0) / m.std(0), **close)
    np.testing.assert_allclose(found["skill"], 1 - ((p - m) ** 2).sum(0) / ((7 - m) ** 2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(
        found["depth_correlation"], [pearsonr(m[:, j] - p[:, j], depth)[0] for j in range(5)], rtol=1e-4, atol=1e-5
    )
    ceiling = noise_ceiling(table.X[rows])[:5]
    np.testing.assert_allclose(found["ceiling_high"], ceiling, **close)
    assert (found["ceiling"] <= found["ceiling_high"]).all()
    np.testing.assert_allclose(found["ceiling_share"], found["pearson"] / ceiling, **close)
    assert (found["n_spots"] == len(rows)).all()


def test_the_ceiling_of_overdispersed_counts_is_an_interval():
    """G0: only counting noise; G1, G2: random differences of spots; G3: a smooth pattern; G4: both in equal parts."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.mgrid[:20, :20], -1).reshape(-1, 2).astype(float)
    smooth = 0.6 * np.sin(xy @ [0.5, 0.2])
    log_rates = np.column_stack([np.zeros((400, 4)), smooth, smooth + rng.normal(0, smooth.std(), 400)])
    rates = 6 * np.exp(log_rates[:, 1:])
    rates[:, 1], rates[:, 2] = (6 * rng.gamma(1 / d, d, 400) for d in (0.5, 2.0))
    counts = rng.poisson(rates)
    counts = np.column_stack([counts, 8000 - counts.sum(1)])
    made = AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=[f"G{i}" for i in range(6)])
    )
    weights = neighbour_weights(xy, 1.0)
    low, chance = ceiling_of_neighbours(log_normalise(made.X), weights)
    high = noise_ceiling(made.X)
    truth = [np.corrcoef(log_normalise(made.X)[:, i], smooth)[0, 1] for i in (3, 4)]
    assert (low[:3] < 0.25).all()
    assert (high[1:3] > 0.7).all()
    assert (low[3:5] > chance).all()
    assert (truth < high[3:5] + 0.02).all()
    np.testing.assert_allclose(low[3:5], truth, atol=0.08)


def test_a_pattern_of_depth_does_not_raise_the_ceiling():
    """All genes but one have a constant share of the counts; half of the tissue has 20 times the depth."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.mgrid[:20, :20], -1).reshape(-1, 2).astype(float)
    total = rng.lognormal(np.where(xy[:, 0] < 10, 6, 9), 0.3)
    share = np.outer(np.ones(400), [*np.repeat([1e-4, 3e-4, 1e-3, 3e-3], 50), 3e-3])
    share[:, -1] *= np.exp(0.6 * np.sin(xy @ [0.5, 0.2]))
    values = np.log1p(1e4 * rng.poisson(total[:, None] * share) / total[:, None])
    weights = neighbour_weights(xy, 1.0)
    plain, _ = ceiling_of_neighbours(values, weights)
    low, chance = ceiling_of_neighbours(values, weights, np.log(total))
    assert plain[:-1].mean() > 1.5 * chance
    assert (low[:-1] > chance).mean() < 0.1
    assert low[-1] > chance


def test_map_metrics_are_by_section_and_the_pooled_value_is_their_mean(table):
    import squidpy as sq

    hg.tl.evaluate(table)
    for section in "ab":
        part = table[table.obs["section"] == section, GENES[:5]].copy()
        weights = neighbour_weights(part.obsm["spatial"], 100.0)
        part.obsp["spatial_connectivities"] = scipy.sparse.csr_matrix(weights > 0, dtype=float)
        found = genes_of(table, section=section)
        for column, layer in (("moran_measured", "log"), ("moran_predicted", "he2gene")):
            expected = sq.gr.spatial_autocorr(part, mode="moran", layer=layer, n_perms=None, copy=True, n_jobs=1)
            np.testing.assert_allclose(found[column], expected.loc[GENES[:5], "I"], atol=1e-6)
        p, m = part.layers["he2gene"], part.layers["log"]
        expected = ssim_on_grid(p, m, part.obs["array_row"].to_numpy(), part.obs["array_col"].to_numpy())
        np.testing.assert_allclose(found["ssim"], expected, rtol=1e-5)
    pooled, a, b = genes_of(table, "pooled", "all sections"), genes_of(table), genes_of(table, section="b")
    for metric in ("moran_measured", "moran_predicted", "ssim"):
        np.testing.assert_allclose(pooled[metric], (a[metric] + b[metric]) / 2, rtol=1e-5)


def test_array_positions_are_derived_from_spot_centres_if_obs_lacks_them(table):
    hg.tl.evaluate(table)
    before = genes_of(table)["ssim"]
    del table.obs["array_row"]
    hg.tl.evaluate(table)
    np.testing.assert_allclose(genes_of(table)["ssim"], before, rtol=1e-6)


def test_the_mean_is_over_sections_or_over_patients():
    table = make(shapes={"a": (5, 6), "b": (6, 6), "c": (4, 7)})
    table.obs["patient"] = table.obs["section"].map({"a": "p", "b": "p", "c": "q"})
    hg.tl.evaluate(table, sample_key="section")
    a, b, c = (genes_of(table, section=s)["pearson"] for s in "abc")
    np.testing.assert_allclose(genes_of(table, "mean", "all sections")["pearson"], (a + b + c) / 3, rtol=1e-5)
    hg.tl.evaluate(table)
    np.testing.assert_allclose(genes_of(table, "mean", "all sections")["pearson"], ((a + b) / 2 + c) / 2, rtol=1e-5)
    table.obs.loc[table.obs_names[0], "patient"] = "q"
    with pytest.raises(ValueError, match="`sample_key` 'patient': section 'a' has"):
        hg.tl.evaluate(table, sample_key="patient")


def test_patients_of_a_table_without_sections_have_one_section_each():
    table = make(shapes={"a": (5, 6), "b": (6, 6)})
    table.obs["patient"] = table.obs.pop("section")
    hg.tl.evaluate(table)
    assert set(hg.get.evaluation(table, "genes")["section"]) == {"a", "b", "all sections"}


def test_sections_of_several_patients_may_share_a_name():
    table = make(shapes={"a": (5, 6), "b": (6, 6), "c": (4, 7), "d": (5, 5)})
    table.obs["patient"] = table.obs["section"].map({"a": "p", "b": "p", "c": "q", "d": "q"})
    hg.tl.evaluate(table)
    expected = genes_of(table, "mean", "all sections")["pearson"]
    table.obs["section"] = table.obs["section"].map({"a": "1", "b": "2", "c": "1", "d": "2"})
    hg.tl.evaluate(table)
    assert set(hg.get.evaluation(table, "genes")["section"]) == {"p_1", "p_2", "q_1", "q_2", "all sections"}
    np.testing.assert_allclose(genes_of(table, "mean", "all sections")["pearson"], expected, rtol=1e-5)
    table.obs["donor"] = table.obs.pop("patient")
    hg.tl.evaluate(table, sample_key="donor")
    np.testing.assert_allclose(genes_of(table, "mean", "all sections")["pearson"], expected, rtol=1e-5)


def test_means_over_sections_do_not_need_the_default_column():
    table = make(shapes={"a": (5, 6), "b": (6, 6), "c": (4, 7)})
    table.obs["patient"] = table.obs["section"].map({"a": "p", "b": "p", "c": "q"})
    table.obs["slide"] = table.obs.pop("section")
    hg.tl.evaluate(table, section_key="slide", sample_key="section")
    alone = [genes_of(table, section=name)["pearson"] for name in "abc"]
    np.testing.assert_allclose(genes_of(table, "mean", "all sections")["pearson"], sum(alone) / 3, rtol=1e-5)


def test_var_holds_the_pooled_metrics_and_nan_elsewhere(table):
    hg.tl.evaluate(table, genes=["G1", "G3"])
    pooled = genes_of(table, "pooled", "all sections")
    assert table.var["he2gene_eval_pearson"].notna().tolist() == [False, True, False, True, False, False]
    for metric in ("pearson", "skill", "ssim", "ceiling_share"):
        np.testing.assert_array_equal(table.var.loc[["G1", "G3"], f"he2gene_eval_{metric}"], pooled[metric])


def test_the_order_of_spots_does_not_matter(table):
    shuffled = table[np.random.default_rng(1).permutation(table.n_obs)].copy()
    hg.tl.evaluate(table, annotation_key="label")
    hg.tl.evaluate(shuffled, annotation_key="label")
    first, second = (
        hg.get.evaluation(t, "genes").sort_values(["predictor", "scope", "section", "gene"]).reset_index(drop=True)
        for t in (table, shuffled)
    )
    random = ["ceiling", "ceiling_high", "ceiling_share", "ceiling_share_high"]
    pd.testing.assert_frame_equal(first.drop(columns=random), second.drop(columns=random), rtol=1e-4, atol=1e-5)


# What is left out


def left_out(table):
    return hg.get.evaluation(table, "left_out").set_index("what")["n"]


def test_constant_genes_are_nan_and_counted(table):
    table.layers["he2gene"][:, 0] = 2.5
    counts = table.X.toarray()
    counts[:, 1] = 0
    table.X = scipy.sparse.csr_matrix(counts)
    hg.tl.evaluate(table)
    found = genes_of(table)
    for metric in ("pearson", "spearman", "sd_ratio", "slope", "ssim", "ceiling_share"):
        assert found[metric].isna().tolist() == [True, True, False, False, False], metric
    assert np.isnan(found.loc["G0", "moran_predicted"])
    assert np.isnan(found.loc["G1", ["moran_measured", "ceiling", "ceiling_high"]].astype(float)).all()
    assert left_out(table)["genes constant on either side, pooled"] == 2
    row = (
        hg.get.evaluation(table).query("scope == 'section' and predictor == 'he2gene' and panel == 'all genes'").iloc[0]
    )
    assert (row["n_genes"], row["n_constant"]) == (3, 2)
    assert row["pearson_mean"] == pytest.approx(found["pearson"].dropna().mean())


def test_spots_without_prediction_or_counts_are_left_out_and_counted(table):
    kept = np.arange(table.n_obs) >= 5
    hg.tl.evaluate(reference := table[kept].copy())
    table.layers["he2gene"][:3] = np.nan
    counts = table.X.toarray()
    counts[3:5] = 0
    table.X = scipy.sparse.csr_matrix(counts)
    hg.tl.evaluate(table)
    pd.testing.assert_frame_equal(genes_of(table), genes_of(reference))
    counted = left_out(table)
    assert counted["spots not predicted (outside the image)"] == 3
    assert counted["spots without any counts"] == 2
    assert counted["genes not predicted"] == 1


def test_a_gene_without_prediction_in_one_section_is_nan_there(table):
    table.layers["he2gene"][np.ix_(table.obs["section"] == "b", [2])] = np.nan
    hg.tl.evaluate(table)
    assert genes_of(table)["pearson"].notna().all()
    assert genes_of(table, section="b")["pearson"].isna().tolist() == [False, False, True, False, False]
    assert genes_of(table, "mean", "all sections").loc["G2", "pearson"] == genes_of(table).loc["G2", "pearson"]


def test_small_sections_are_left_out_and_too_few_spots_raise():
    table = make(shapes={"a": (6, 6), "b": (3, 3)})
    with pytest.warns(UserWarning, match=r"sections \['b'\] have fewer than 10 spots"):
        hg.tl.evaluate(table)
    assert set(hg.get.evaluation(table)["section"]) == {"a"}
    assert left_out(table)["spots of sections under 10 spots"] == 9
    with pytest.raises(
        ValueError, match=r"no section has at least 10 spots that were both predicted and measured; found 9 spots"
    ):
        hg.tl.evaluate(table[table.obs["section"] == "b"].copy())


# Input


def test_logarithms_raise_without_measured_scale(table):
    with pytest.raises(
        ValueError, match=r"`measured`: layer 'log' looks like log-transformed values.*measured_scale='log'"
    ):
        hg.tl.evaluate(table, measured="log")
    hg.tl.evaluate(table)
    counted = genes_of(table)
    hg.tl.evaluate(table, measured="log", measured_scale="log")
    found = genes_of(table)
    np.testing.assert_allclose(found["pearson"], counted["pearson"], rtol=1e-5)
    assert (
        found[["ceiling", "ceiling_high", "ceiling_share", "ceiling_share_high", "depth_correlation"]]
        .isna()
        .all(axis=None)
    )
    reason = hg.get.evaluation(table, "predictors").set_index("predictor")["reason"]
    assert reason["total counts"] == "no counts are given, only logarithms"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measured": "he2gene"}, "`measured` 'he2gene' is the prediction itself"),
        ({"measured": "none"}, "`measured` 'none' is not a layer"),
        ({"measured_scale": "cpm"}, "`measured_scale` is 'cpm', valid"),
        ({"genes": ["G1", "unknown"]}, r"`genes` \['unknown'\] were not both predicted and measured"),
        ({"genes": []}, "`genes` is empty"),
        ({"baselines": ["oracle"]}, r"`baselines` \['oracle'\] are unknown, valid"),
        ({"baselines": ["mean colour"]}, "'mean colour' cannot be computed: a SpatialData object"),
        ({"baselines": ["class mean"]}, "'class mean' cannot be computed: no `annotation_key`"),
        ({"annotation_key": "none"}, "`annotation_key` 'none' is not a column"),
        ({"annotation_key": "patient"}, "has no label that is a class of the model"),
        ({"sample_key": "none"}, "`sample_key` 'none' is not a column"),
        ({"section_key": "none"}, "`section_key` 'none' is not a column"),
        ({"prediction_key": "other"}, "holds no prediction 'other'"),
        ({"n_splits": 0}, "`n_splits` is 0"),
        ({"key_added": "a/b"}, "`key_added` 'a/b' cannot be stored"),
        ({"gene_symbols": "none"}, "`gene_symbols` 'none' is not a column"),
    ],
)
def test_bad_input_raises_and_nothing_is_changed(table, arguments, message):
    slots = {"uns": set(table.uns), "var": set(table.var)}
    with pytest.raises(ValueError, match=message):
        hg.tl.evaluate(table, **arguments)
    assert slots == {"uns": set(table.uns), "var": set(table.var)}


def test_data_without_measured_values_raise(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    with pytest.raises(ValueError, match="nothing was measured in it"):
        hg.tl.evaluate(toy["he2gene"])
    toy["table"].var_names = [f"other{i}" for i in range(toy["table"].n_vars)]
    with pytest.raises(ValueError, match=r"no measured gene was predicted; predicted: \['ERBB2'"):
        hg.tl.evaluate(toy)


def test_a_prediction_in_its_own_table_is_compared_with_the_measured_table(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    hg.tl.evaluate(toy, annotation_key=None)
    expected = genes_of(toy, section="toy-0")
    other = hg.datasets.toy((5, 6), mpp=2.0)
    rows, columns = np.random.default_rng(0).permutation(30), np.random.default_rng(1).permutation(len(expected) + 1)
    hg.tl.predict(other, model=tiny_model, genes="all")
    other["table"] = other["table"][rows, columns].copy()
    hg.tl.evaluate(other)
    assert "he2gene_eval" in other["he2gene"].uns
    found = genes_of(other, section="toy-0").loc[expected.index]
    drawn = ["ceiling", "ceiling_high", "ceiling_share", "ceiling_share_high"]
    pd.testing.assert_frame_equal(found.drop(columns=drawn), expected.drop(columns=drawn), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.uns.pop("spatialdata_attrs"), "`data`: table of the prediction does not annotate spots"),
        (
            lambda t: t.uns.__setitem__("spatialdata_attrs", {"region": "spots"}),
            "region_key and instance_key are needed",
        ),
        (lambda t: t.obs.__setitem__("instance_id", "1x1"), "`data`: spots of table of the prediction are duplicated"),
    ],
)
def test_tables_without_shared_spots_raise(toy, tiny_model, change, match):
    hg.tl.predict(toy, model=tiny_model, genes="all")
    change(toy["he2gene"])
    with pytest.raises(ValueError, match=match):
        hg.tl.evaluate(toy, model=tiny_model, baselines=[])


def test_sparse_predictions_and_dense_counts_are_read(table):
    hg.tl.evaluate(table, genes=GENES[:5])
    before = genes_of(table)
    table.layers["he2gene"] = scipy.sparse.csr_matrix(np.nan_to_num(table.layers["he2gene"]))
    table.X = table.X.toarray()
    hg.tl.evaluate(table, genes=GENES[:5])
    pd.testing.assert_frame_equal(genes_of(table), before)
    table.X[0, 0] = np.nan
    with pytest.raises(ValueError, match="`measured`: X holds 1 NaN"):
        hg.tl.evaluate(table)


def test_keys_of_others_are_not_overwritten(table):
    table.var["he2gene_eval_pearson"] = 1.0
    with pytest.raises(ValueError, match=r"var\['he2gene_eval_pearson'\] exists"):
        hg.tl.evaluate(table)


# Training mean, panels


def test_without_training_means_skill_is_nan_with_a_warning(table):
    del table.var["he2gene_mean"]
    with pytest.warns(UserWarning, match="skill is NaN: predict again, or name the `model`"):
        hg.tl.evaluate(table)
    assert genes_of(table)["skill"].isna().all()
    assert not hg.get.evaluation(table, "predictors").set_index("predictor").loc["training mean", "computed"]


def test_the_model_gives_training_means_and_panels(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    hg.tl.evaluate(toy)
    expected = genes_of(toy, section="toy-0")["skill"]
    assert set(hg.get.evaluation(toy)["panel"]) == {"all genes", "reliable"}
    del toy["table"].var["he2gene_mean"]
    hg.tl.evaluate(toy, model=tiny_model)
    pd.testing.assert_series_equal(genes_of(toy, section="toy-0")["skill"], expected)
    panels = hg.get.evaluation(toy).query("scope == 'section' and predictor == 'he2gene'").set_index("panel")
    assert (panels["n_genes"] + panels["n_constant"])[["target", "most variable"]].tolist() == [4, 3]
    # Two models that were never saved have no hash of their files.
    unsaved = replace(tiny_model, tensors={**tiny_model.tensors, "genes.bias": tiny_model.tensors["genes.bias"] + 1})
    for other, name in (("breast-her2st", "breast-her2st"), (unsaved, "tiny")):
        with pytest.raises(ValueError, match=f"`model` '{name}' has weights .* the prediction was made by 'tiny'"):
            hg.tl.evaluate(toy, model=other)


def test_a_section_of_the_training_set_gives_a_warning(toy, tiny_model):
    card = replace(tiny_model.card, training={"sections": {"toy-0": {"patient": "toy"}}})
    hg.tl.predict(toy, model=tiny_model)
    with pytest.warns(UserWarning, match=r"sections \['toy-0'\] are in the training set of tiny"):
        hg.tl.evaluate(toy, model=replace(tiny_model, card=card))
    seen = hg.get.evaluation(toy, "predictors").set_index("predictor").loc["he2gene", "seen"]
    assert seen.endswith("toy-0 are among them")


def test_the_evaluation_does_not_change_what_predict_wrote(table):
    before = table.copy()
    hg.tl.evaluate(table)
    pd.testing.assert_frame_equal(table.var[before.var.columns], before.var)
    np.testing.assert_array_equal(table.layers["he2gene"], before.layers["he2gene"])
    np.testing.assert_array_equal(table.X.toarray(), before.X.toarray())


def test_the_summary_is_the_mean_and_median_of_the_genes(table):
    hg.tl.evaluate(table)
    summary = hg.get.evaluation(table).set_index(["scope", "section", "predictor", "panel"])
    for section in "ab":
        found, genes = summary.loc["section", section, "he2gene", "reliable"], genes_of(table, section=section)
        assert found["pearson_mean"] == pytest.approx(genes["pearson"][:2].mean(), rel=1e-5)
        assert found["skill_median"] == pytest.approx(genes["skill"][:2].median(), rel=1e-5)
    assert not summary.index.has_duplicates


# Annotation


def test_annotation_is_scored_by_section_and_pooled(table):
    hg.tl.evaluate(table, annotation_key="label")
    proba = table.obsm["he2gene_annotation_proba"].to_numpy()
    codes = pd.Index(CLASSES).get_indexer(table.obs["label"])
    scores = hg.get.evaluation(table, "annotation").set_index(["scope", "section"])
    for place, rows in ((("section", "a"), table.obs["section"] == "a"), (("pooled", "all sections"), slice(None))):
        expected = class_scores(proba[rows], codes[rows])
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "calibration_error"):
            assert scores.loc[place, name] == pytest.approx(getattr(expected, name))
        assert scores.loc[place, "calibration_error"] == pytest.approx(calibration_error(proba[rows], codes[rows]))
        classes = hg.get.evaluation(table, "classes").set_index(["scope", "section", "class"]).sort_index().loc[place]
        np.testing.assert_allclose(classes["auroc"], expected.auroc)
        confusion = hg.get.evaluation(table, "confusion").set_index(["scope", "section"]).sort_index().loc[place]
        np.testing.assert_array_equal(
            confusion.pivot(index="label", columns="predicted", values="n_spots"), expected.confusion
        )
    both = scores.loc["section", "balanced_accuracy"].mean()
    assert scores.loc[("mean", "all sections"), "balanced_accuracy"] == pytest.approx(both)


def test_unknown_labels_are_left_out_and_counted_with_one_warning(table):
    hg.tl.evaluate(reference := table.copy(), annotation_key="label")
    known = hg.get.evaluation(reference, "annotation").set_index("scope").loc["pooled", "n_labelled"]
    table.obs["label"] = table.obs["label"].astype(object)
    table.obs.iloc[:4, table.obs.columns.get_loc("label")] = "necrosis"
    table.obs.iloc[4:6, table.obs.columns.get_loc("label")] = None
    with pytest.warns(UserWarning, match=r"\{'necrosis': 4\}") as caught:
        hg.tl.evaluate(table, annotation_key="label")
    assert sum("necrosis" in str(w.message) for w in caught) == 1
    assert left_out(table)["labels that the model does not know"] == 4
    assert hg.get.evaluation(table, "annotation").set_index("scope").loc["pooled", "n_labelled"] == known - 6


# Baselines


def test_baselines_are_in_the_same_table(table):
    hg.tl.evaluate(table, annotation_key="label")
    frame = hg.get.evaluation(table, "genes")
    assert list(frame["predictor"].unique()) == [
        "he2gene",
        "training mean",
        "class mean",
        "total counts",
        "coordinates",
        "nearest spots",
    ]
    assert (genes_of(table, predictor="training mean")["skill"] == 0).all()
    assert genes_of(table, predictor="training mean")["pearson"].isna().all()
    predictors = hg.get.evaluation(table, "predictors").set_index("predictor")
    assert predictors.loc["mean colour", "reason"] == "a SpatialData object with the image is needed; `data` is a table"
    assert predictors["computed"].sum() == 6


def test_skill_of_the_class_mean_uses_the_other_spots_of_the_class(table):
    hg.tl.evaluate(table, annotation_key="label", baselines=["class mean"])
    rows = np.flatnonzero(table.obs["section"] == "a")
    _, measured = both(table, rows)
    label = table.obs["label"].to_numpy()[rows]
    predicted = np.array(
        [measured[(label == label[i]) & (np.arange(len(rows)) != i)].mean(0) for i in range(len(rows))]
    )
    expected = 1 - ((predicted - measured) ** 2).sum(0) / ((7 - measured) ** 2).sum(0)
    np.testing.assert_allclose(genes_of(table, predictor="class mean")["skill"], expected, rtol=1e-4)
    reasons = hg.get.evaluation(table, "predictors").set_index("predictor")["reason"]
    assert reasons["total counts"] == "not asked for"


@pytest.mark.parametrize("what", ["summary", "genes", "annotation", "classes", "confusion"])
def test_copies_of_a_single_section_are_left_out(what):
    table = make(shapes={"a": (4, 4)})
    hg.tl.evaluate(table, annotation_key="label", baselines=None)
    scopes = dict(tuple(hg.get.evaluation(table, what, dropna=False).groupby("scope", observed=True)))
    rows = [frame.drop(columns=["scope", "section"]).reset_index(drop=True) for frame in scopes.values()]
    assert len(rows) > 1
    for copy in rows[1:]:
        pd.testing.assert_frame_equal(copy, rows[0])
    found = hg.get.evaluation(table, what)
    assert set(found["scope"]) == {"section"}
    assert found.index.tolist() == list(range(len(found)))


def test_differences_to_baselines_are_paired_by_gene_and_averaged_over_patients(table):
    hg.tl.evaluate(table, baselines=["total counts", "coordinates"])
    frame = hg.get.evaluation(table, "genes", dropna=False)
    for metric in ("pearson", "skill"):
        wide = frame.pivot(index=["scope", "section", "gene"], columns="predictor", values=metric)
        parts = frame.pivot(index=["scope", "section", "gene"], columns="predictor", values=f"{metric}_difference")
        assert parts["he2gene"].isna().all()
        for name in ("total counts", "coordinates"):
            for scope in ("section", "pooled"):
                expected = wide.loc[scope, "he2gene"] - wide.loc[scope, name]
                np.testing.assert_allclose(parts.loc[scope, name], expected, atol=1e-5)
            of_sections = parts.loc["section", name].unstack("section")
            known = of_sections.notna().all(axis=1).to_numpy()
            mean = parts.loc["mean", name].to_numpy()
            np.testing.assert_allclose(mean[known], of_sections.mean(axis=1).to_numpy()[known], atol=1e-5)
    summary = hg.get.evaluation(table).set_index(["scope", "section", "predictor", "panel"])
    pooled = frame[frame["scope"].eq("pooled") & frame["predictor"].eq("coordinates")]
    row = summary.loc[("pooled", "all sections", "coordinates", "all genes")]
    assert row["pearson_difference_mean"] == pytest.approx(pooled["pearson_difference"].mean(), abs=1e-5)


def test_coordinates_explain_a_gradient_but_not_noise(table):
    """Coordinates explain a gene that rises over the section, but not white noise."""
    xy = table.obsm["spatial"]
    rng = np.random.default_rng(0)
    truth = np.tile(rng.normal(3, 0.3, (table.n_obs, 1)), (1, table.n_vars))
    truth[:, 0] = 3 + (xy[:, 0] - xy[:, 0].min()) / np.ptp(xy[:, 0])
    table.layers["truth"] = truth.astype(np.float32)
    hg.tl.evaluate(table, measured="truth", measured_scale="log", baselines="coordinates")
    found = genes_of(table, predictor="coordinates")["pearson"].to_numpy()
    assert found[0] > 0.95
    assert (np.abs(found[1:]) < 0.5).all()


def test_mean_colour_is_read_from_the_image(toy, tiny_model):
    hg.tl.predict(toy, model=tiny_model)
    hg.tl.evaluate(toy, genes=["COL1A1", "ADIPOQ", "EPCAM"])
    assert (genes_of(toy, section="toy-0", predictor="mean colour")["pearson"] > 0.5).all()


def test_mean_colour_is_read_from_the_image_of_each_region(toy, tiny_model):
    both, other = two_regions(toy)
    arguments = {"baselines": ["mean colour"], "genes": ["COL1A1", "ADIPOQ"]}
    hg.tl.predict(both, model=tiny_model, image_key={"spots": "he", "more": "he2"})
    hg.tl.evaluate(both, section_key="region", **arguments)
    for region, slide in (("spots", toy), ("more", other)):
        hg.tl.predict(slide, model=tiny_model)
        hg.tl.evaluate(slide, **arguments)
        alone = genes_of(slide, section=slide["table"].obs["section"].iloc[0], predictor="mean colour")
        found = genes_of(both, section=region, predictor="mean colour")["pearson"]
        np.testing.assert_allclose(found, alone["pearson"], atol=1e-4)


# Writing and reading


@pytest.mark.slow
def test_an_evaluation_is_kept_on_disk_and_replaced(table, tmp_path):
    hg.tl.evaluate(table, annotation_key="label", sample_key="patient", genes=["G0", "G2"])
    table.write_zarr(tmp_path / "t.zarr")
    back = read_zarr(tmp_path / "t.zarr")
    for what in ("summary", "genes", "predictors", "left_out", "annotation", "classes", "confusion"):
        pd.testing.assert_frame_equal(
            hg.get.evaluation(back, what), hg.get.evaluation(table, what), check_dtype=False, check_categorical=False
        )
    hg.tl.evaluate(back)
    with pytest.raises(ValueError, match="`what`: 'annotation' was not evaluated"):
        hg.get.evaluation(back, "annotation")


def test_unknown_tables_and_keys_raise(table, toy):
    with pytest.raises(ValueError, match="`key` 'he2gene_eval': `data` holds no such result; run hg.tl.evaluate first"):
        hg.get.evaluation(table)
    with pytest.raises(ValueError, match="`data` holds no such result"):
        hg.get.evaluation(toy)
    hg.tl.evaluate(table)
    genes = hg.get.evaluation(table, "genes")
    columns = ["gene", "scope", "section", "predictor", "n_spots", "pearson", "skill"]
    columns += ["pearson_difference", "skill_difference"]
    pd.testing.assert_frame_equal(
        hg.get.evaluation(table, "baselines"),
        genes.loc[genes["predictor"] != "he2gene", columns].reset_index(drop=True),
    )
    with pytest.raises(ValueError, match="`what` is 'gene', valid"):
        hg.get.evaluation(table, "gene")
    with pytest.raises(ValueError, match="`key` 'other': `data` holds no such result"):
        hg.get.evaluation(table, key="other")


# Real data


@pytest.mark.data
@pytest.mark.slow
def test_metrics_of_the_held_out_section_agree_with_the_demo(predicted_c5):
    from he2gene_sc.cli.demo import compare

    model, sdata = hg.models.load(), predicted_c5
    hg.tl.evaluate(sdata, annotation_key="annotation")
    genes, panels = compare(sdata, model)
    found = genes_of(sdata, section="C5")
    by_gene = genes.set_index("gene").loc[found.index]
    np.testing.assert_allclose(found["pearson"], by_gene["pearson"], atol=1e-6)
    np.testing.assert_allclose(found["ceiling_high"], by_gene["ceiling"], atol=1e-6)
    summary = hg.get.evaluation(sdata).query("scope == 'section'").set_index(["predictor", "panel"])
    for panel, name in (("target", "highest mean"), ("most variable", "most variable")):
        row = summary.loc[("he2gene", panel)]
        # In the demo, a constant gene has correlation 0.
        mean = row["pearson_mean"] * row["n_genes"] / (row["n_genes"] + row["n_constant"])
        assert mean == pytest.approx(panels.set_index("panel").loc[name, "model"], abs=1e-6)
    assert summary.loc[("he2gene", "target"), "pearson_mean"] > summary.loc[("mean colour", "target"), "pearson_mean"]


def adapted(table, name="he2gene_adapted"):
    """Return the table as adapt writes it; every third spot is measured and has its measurement in the layer."""
    fitted = np.arange(table.n_obs) % 3 == 0
    table.layers[name] = np.where(fitted[:, None], table.layers["log"], table.layers["he2gene"]).astype(np.float32)
    table.layers[name][:, 5] = np.nan
    table.uns[name] = {"verb": "adapt", "params": {"layer": "he2gene"}, "written": {"layers": [name]}}
    table.obs[f"{name}_measured"] = fitted
    return fitted


def test_spots_that_adapt_was_fitted_on_are_left_out(table):
    fitted = adapted(table)
    hg.tl.evaluate(table, layer="he2gene_adapted", baselines=["training mean"])
    left_out = hg.get.evaluation(table, "left_out").set_index("what")["n"]
    assert left_out["spots that hg.tl.adapt was fitted on"] == fitted.sum()
    section = ~fitted & (table.obs["section"] == "a").to_numpy()
    found = genes_of(table, predictor="he2gene_adapted")
    assert (found["n_spots"] == section.sum()).all()
    expected = pearsonr(table.layers["he2gene"][section, 0], table.layers["log"][section, 0])[0]
    assert found.loc["G0", "pearson"] == pytest.approx(expected, abs=1e-6)
    seen = hg.get.evaluation(table, "predictors").set_index("predictor")["seen"]
    assert f"{fitted.sum()} measured spots of this slide, which are left out" in seen["he2gene_adapted"]
    assert "he2gene" not in seen.index


def test_a_layer_adapted_twice_is_compared_on_spots_of_neither_adaptation(table):
    first = adapted(table)
    adapted(table, "again")
    table.uns["again"]["params"]["layer"] = "he2gene_adapted"
    second = np.arange(table.n_obs) % 5 == 1
    table.obs["again_measured"] = second
    hg.tl.evaluate(table, layer="again", baselines="training mean")
    left_out = hg.get.evaluation(table, "left_out").set_index("what")["n"]
    assert left_out["spots that hg.tl.adapt was fitted on"] == (first | second).sum()


def test_neighbours_are_array_neighbours_also_if_spots_are_left_out(table):
    fitted = adapted(table)
    hg.tl.evaluate(table, layer="he2gene_adapted", baselines=["training mean"])
    at = np.flatnonzero(~fitted & (table.obs["section"] == "a").to_numpy())
    expected = hg.stats.moran(table.layers["log"][at][:, :1], neighbour_weights(table.obsm["spatial"][at], 100.0))
    assert genes_of(table, predictor="he2gene_adapted").loc["G0", "moran_measured"] == pytest.approx(
        expected[0], abs=1e-6
    )


def test_an_adapted_layer_of_an_older_version_gives_a_warning(table):
    adapted(table)
    del table.obs["he2gene_adapted_measured"]
    with pytest.warns(UserWarning, match="older version.* are optimistic; run hg.tl.adapt again"):
        hg.tl.evaluate(table, layer="he2gene_adapted", baselines=["training mean"])
    seen = hg.get.evaluation(table, "predictors").set_index("predictor")["seen"]
    assert "which are not left out" in seen["he2gene_adapted"]


def test_a_layer_adapted_at_every_spot_raises(table):
    adapted(table)
    table.obs["he2gene_adapted_measured"] = True
    with pytest.raises(ValueError, match="adapted to all 114 spots"):
        hg.tl.evaluate(table, layer="he2gene_adapted")


def test_the_layer_of_the_prediction_may_be_named(table):
    hg.tl.evaluate(table, layer="he2gene", baselines="training mean")
    named = hg.get.evaluation(table)
    hg.tl.evaluate(table, baselines=["training mean"])
    pd.testing.assert_frame_equal(named, hg.get.evaluation(table))


@pytest.mark.parametrize("layer", ["he2gene_lower", "log", "", "nope"])
def test_layers_that_are_not_predictions_raise(table, layer):
    adapted(table)
    table.layers["he2gene_lower"] = table.layers["he2gene"] - 1
    table.uns["he2gene_intervals"] = {"verb": "intervals", "params": {"layer": "he2gene"}}
    with pytest.raises(ValueError, match=r"`layer` .* valid: \['he2gene', 'he2gene_adapted'\]"):
        hg.tl.evaluate(table, layer=layer)


def test_the_error_names_another_prediction(table):
    table.layers["v2"] = table.layers["he2gene"]
    table.uns["v2"] = {"model": "mine", "weights_sha256": "y", "layer": "v2"}
    with pytest.raises(ValueError, match="pass prediction_key='v2'"):
        hg.tl.evaluate(table, layer="v2")
    with pytest.raises(ValueError, match="`key_added` 'v2' is a prediction.*prediction_key='v2'.*'v2_eval'"):
        hg.tl.evaluate(table, key_added="v2")


def test_a_single_name_equals_a_list_of_one(table):
    hg.tl.evaluate(table, genes="G1", baselines="total counts")
    genes = hg.get.evaluation(table, "genes")
    assert set(genes["gene"]) == {"G1"}
    assert set(genes["predictor"]) == {"he2gene", "total counts"}


@pytest.mark.parametrize("arguments", [{"sample_key": "spot"}, {"section_key": "spot"}])
def test_messages_about_many_values_are_short(table, arguments):
    table.obs["spot"] = [f"spot {i}" for i in range(table.n_obs)]
    with pytest.raises(ValueError, match=r"in all\)") as found:
        hg.tl.evaluate(table, **arguments)
    assert len(str(found.value)) < 300


def test_the_column_of_symbols_is_the_one_that_predict_recorded(toy, tiny_model):
    table = toy["table"]
    table.var["symbol"] = table.var_names.astype(str)
    table.var_names = [f"g{i}" for i in range(table.n_vars)]
    hg.tl.predict(toy, model=tiny_model, gene_symbols="symbol", show_progress_bar=False)
    hg.tl.evaluate(toy, model=tiny_model, gene_symbols="symbol", baselines="training mean")
    stated = hg.get.evaluation(toy)
    table.uns["he2gene"]["gene_symbols"] = "symbol"
    hg.tl.evaluate(toy, model=tiny_model, baselines="training mean")
    pd.testing.assert_frame_equal(hg.get.evaluation(toy), stated)
    assert "target" in set(stated["panel"])
