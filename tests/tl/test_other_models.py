"""Layers of other models, in tables without a prediction of ``hg.tl.predict``, work with every function for trust."""

import warnings

import numpy as np
import pytest
from scipy.stats import pearsonr

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise
from tests.helpers.patients import slides


def test_every_verb_takes_a_layer_without_a_record_of_ours():
    table = slides()
    hg.tl.evaluate(table, layer="other_model", annotation_key="label", n_splits=2)
    hg.tl.biomarkers(table, "label", groups="left", layer="other_model")
    hg.tl.concordance(table, "label", groups="left", layer="other_model", k=(5,))
    hg.tl.domain_preservation(table, "label", layer="other_model", n_seeds=1, n_perms=20, clustering="kmeans")
    genes = hg.get.evaluation(table, "genes").query(
        "scope == 'section' and section == 'P1' and predictor == 'other_model'"
    )
    here, log = (table.obs["patient"] == "P1").to_numpy(), log_normalise(table.X)
    expected = [pearsonr(table.layers["other_model"][here, j], log[here, j])[0] for j in range(table.n_vars)]
    np.testing.assert_allclose(genes["pearson"], expected, rtol=1e-5)
    assert genes["skill"].isna().all()
    predictors = hg.get.evaluation(table, "predictors").set_index("predictor")
    assert "another model predicted it" in predictors.loc["other_model", "seen"]
    assert predictors.loc["class mean", "computed"]
    assert set(hg.get.evaluation(table)["panel"]) == {"all genes"}
    best = hg.get.biomarkers(table).sort_values("pvals")["names"][:5]
    assert set(best) == {f"g{i}" for i in range(5)}
    agreement = hg.get.concordance(table).set_index(["predictor", "genes"])["sign_agreement_significant"]
    assert agreement["other_model", "all"] > 0.9
    domains = hg.get.domains(table)
    assert {"predicted", "measured"} <= set(domains["labels"])
    assert "he2gene" not in table.uns


def test_agreement_in_chance_differences_gives_a_warning():
    table = slides()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg.tl.concordance(table, "label", groups="left", layer="other_model", k=(5,))
    assert not [w for w in caught if "share chance differences" in str(w.message)]
    table.obs["label"] = np.random.default_rng(0).permutation(table.obs["label"])
    with pytest.warns(UserWarning, match="no measured gene is significant in 'left'. .* share chance differences"):
        hg.tl.concordance(table, "label", groups="left", layer="other_model", k=(5,))
    found = hg.get.concordance(table).query("predictor == 'other_model' and genes == 'all'")
    assert found["n_significant"].item() == 0
    # With the same spots, noise agrees too.
    assert found["spearman"].item() > 0.2


@pytest.mark.parametrize("verb", ["evaluate", "concordance", "domain_preservation", "compare"])
def test_every_verb_warns_of_a_layer_equal_to_the_measured_values(verb):
    table = slides(n_patients=3)
    table.layers["copy"] = log_normalise(table.X)
    run = {
        "evaluate": lambda: hg.tl.evaluate(table, layer="copy", n_splits=1),
        "concordance": lambda: hg.tl.concordance(table, "label", groups="left", layer="copy", k=(5,)),
        "compare": lambda: hg.tl.compare(table, "copy", protocols="section"),
        "domain_preservation": lambda: hg.tl.domain_preservation(
            table, "label", layer="copy", n_seeds=1, n_perms=5, clustering="kmeans"
        ),
    }
    with pytest.warns(UserWarning, match="`layer` 'copy' is a copy of the measured values") as caught:
        run[verb]()
    (told,) = [w for w in caught if "is a copy of the measured values" in str(w.message)]
    assert told.filename == __file__


def test_predicted_counts_are_compared_with_layer_scale_counts():
    table = slides(2)
    table.layers["counts"] = (
        np.random.default_rng(1).poisson(np.expm1(table.layers["other_model"]) / 5).astype(np.float32)
    )
    with pytest.raises(ValueError, match="`layer`: layer 'counts' looks like raw counts.*layer_scale='counts'"):
        hg.tl.evaluate(table, layer="counts")
    hg.tl.evaluate(table, layer="counts", layer_scale="counts", baselines="total counts")
    pooled = hg.get.evaluation(table, "genes").query("scope == 'pooled' and predictor == 'counts'")
    expected = pearsonr(log_normalise(table.layers["counts"])[:, 0], log_normalise(table.X)[:, 0])[0]
    assert pooled["pearson"].iloc[0] == pytest.approx(expected, rel=1e-5)


def test_colour_is_a_baseline_for_the_layer_of_another_model():
    slide = hg.datasets.toy((6, 6), mpp=2.0)
    slide["table"].layers["other"] = log_normalise(slide["table"].X) + 0.1
    hg.tl.evaluate(slide, layer="other", baselines="mean colour")
    summary = hg.get.evaluation(slide).set_index("predictor")["pearson_mean"]
    assert summary["other"] == pytest.approx(1)
    assert np.isfinite(summary["mean colour"])


def test_a_layer_of_another_model_beside_our_prediction_needs_prediction_key_none():
    table = slides(2)
    table.layers["he2gene"] = table.layers["other_model"]
    table.uns["he2gene"] = {"model": "mine", "weights_sha256": "x", "layer": "he2gene"}
    for name, value in (("predicted", True), ("reliable", True), ("mean", 1.0)):
        table.var[f"he2gene_{name}"] = value
    with pytest.raises(
        ValueError, match=r"valid: \['he2gene'\]; if another model predicted it, pass prediction_key=None"
    ):
        hg.tl.evaluate(table, layer="other_model")
    hg.tl.evaluate(table, layer="other_model", prediction_key=None, baselines="total counts")
    assert hg.get.evaluation(table)["skill_mean"].isna().all()
    with pytest.raises(
        ValueError, match=r"`layer` 'he2gene' is of prediction 'he2gene' .* pass prediction_key='he2gene'"
    ):
        hg.tl.evaluate(table, prediction_key=None)
    with pytest.raises(ValueError, match="`layer` 'nothing' is not a layer, valid: "):
        hg.tl.evaluate(table, layer="nothing", prediction_key=None)
    with pytest.raises(ValueError, match=r"`model` is only for predictions of hg\.tl\.predict"):
        hg.tl.evaluate(table, layer="other_model", prediction_key=None, model="breast-her2st")
    with pytest.raises(ValueError, match="`layer_scale` is None, valid: "):
        hg.tl.evaluate(table, layer="other_model", prediction_key=None, layer_scale=None)


def test_spots_that_a_layer_of_another_model_was_adapted_to_are_left_out():
    table = slides(2)
    fitted = np.zeros(table.n_obs, bool)
    fitted[::3] = True
    table.layers["other_model_adapted"] = np.where(fitted[:, None], log_normalise(table.X), table.layers["other_model"])
    table.obs["other_model_adapted_measured"] = fitted
    table.uns["other_model_adapted"] = {"verb": "adapt", "params": {"layer": "other_model"}}
    hg.tl.evaluate(table, layer="other_model_adapted", baselines="total counts")
    pooled = hg.get.evaluation(table, "genes").query("scope == 'pooled' and predictor == 'other_model_adapted'")
    expected = pearsonr(table.layers["other_model"][~fitted, 0], log_normalise(table.X)[~fitted, 0])[0]
    assert pooled["pearson"].iloc[0] == pytest.approx(expected, rel=1e-5)
    assert (pooled["n_spots"] == (~fitted).sum()).all()
    seen = hg.get.evaluation(table, "predictors").set_index("predictor")["seen"]["other_model_adapted"]
    assert f"expression of {fitted.sum()} measured spots of this slide, which are left out" in seen


def test_genes_are_ranked_by_an_evaluation_of_the_layer():
    table = slides(3)
    with pytest.raises(ValueError, match="holds no prediction 'he2gene'.*pass key='he2gene_eval'"):
        hg.pl.predictability(table)
    hg.tl.evaluate(table, layer="other_model", baselines="total counts", n_splits=2)
    ax = hg.pl.predictability(table, key="he2gene_eval", genes=3)
    genes = hg.get.evaluation(table, "genes").query("predictor == 'other_model'")
    mean = genes[genes["scope"] == "mean"].set_index("gene")["pearson"].sort_values(ascending=False)
    (points,) = [each for each in ax.collections if len(each.get_offsets()) == table.n_vars]
    np.testing.assert_allclose(points.get_offsets()[:, 1], mean)
    assert {text.get_text() for text in ax.texts} == set(mean.index[:3])
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert legend == {"lowest to highest of 3 sections", "genes (20)", "noise ceiling"}
    with pytest.raises(ValueError, match="pass the object that has it as `model`"):
        hg.pl.predictability(key="he2gene_eval")


def test_genes_without_metrics_are_left_out_unless_dropna_is_false():
    table = slides(2)
    counts = table.X.toarray()
    counts[:48, 0], table.layers["other_model"][:48, 0] = 0, 0
    table.X = counts
    hg.tl.evaluate(table, layer="other_model", baselines="total counts", n_splits=2)
    here = "scope == 'section' and section == 'P0' and predictor == 'other_model' and gene == 'g0'"
    assert hg.get.evaluation(table, "genes").query(here).empty
    (row,) = hg.get.evaluation(table, "genes", dropna=False).query(here).to_dict("records")
    assert np.isnan(row["pearson"])
    assert not hg.get.evaluation(table, "genes")["pearson"].isna().all()
