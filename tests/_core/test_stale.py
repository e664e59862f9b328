"""Results that were computed from a prediction are removed when the prediction changes."""

import warnings

import numpy as np
import pytest

import he2gene_sc as hg
from he2gene_sc._core.matrix import layer_names
from tests.helpers.toy_sections import toy, train


@pytest.fixture(scope="module")
def model():
    return train([toy(i, shape=(6, 6)) for i in range(3)], n_target_genes=12)


@pytest.fixture
def sdata(model):
    """Slide with intervals, an evaluation, an adapted layer with intervals, and an entry of the user."""
    made = toy(7, shape=(8, 8))
    hg.tl.predict(made, model=model, device="cpu")
    table = made["table"]
    hg.tl.intervals(made, model=model)
    hg.tl.evaluate(made, baselines=[])
    hg.tl.adapt(made, np.arange(64) % 2 == 0)
    hg.tl.intervals(made, layer="he2gene_adapted", coverage=0.8)
    table.layers["own"] = table.layers["he2gene"].copy()
    table.uns["own"] = {"params": {"layer": "he2gene"}}
    return made


DERIVED = ["he2gene_adapted", "he2gene_adapted_intervals", "he2gene_eval", "he2gene_intervals"]


def test_a_changed_prediction_removes_results_computed_from_it(sdata, model):
    with pytest.warns(UserWarning, match="removed.*he2gene_adapted', 'he2gene_adapted_intervals', 'he2gene_eval'"):
        hg.tl.predict(sdata, model=model, device="cpu", mpp=2.4)
    table = sdata["table"]
    assert not set(DERIVED) & set(table.uns)
    assert set(layer_names(table)) == {"he2gene", "own"}
    assert not [name for name in table.var if "eval" in name or "halfwidth" in name or "gain" in name]
    assert "own" in table.uns


def test_the_same_prediction_again_removes_nothing(sdata, model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*removed")
        hg.tl.predict(sdata, model=model, device="cpu")
    assert set(DERIVED) <= set(sdata["table"].uns)
    assert "he2gene_adapted_upper" in sdata["table"].layers


def test_an_interrupted_prediction_changes_nothing(sdata, model, monkeypatch):
    table = sdata["table"]
    before = {name: table.layers[name].copy() for name in layer_names(table)}
    var = table.var.copy()

    real = type(table.obsm).__setitem__
    calls = []

    def interrupted(self, key, value):
        if key == "X_he2gene" and not calls:
            calls.append(key)
            raise KeyboardInterrupt
        return real(self, key, value)

    monkeypatch.setattr(type(table.obsm), "__setitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hg.tl.predict(sdata, model=model, device="cpu", mpp=2.4)
    assert set(DERIVED) <= set(table.uns)
    assert before.keys() == set(layer_names(table))
    for name, values in before.items():
        np.testing.assert_array_equal(table.layers[name], values)
    assert table.var.equals(var)


def test_another_prediction_removes_nothing(sdata, model):
    hg.tl.predict(sdata, model=model, device="cpu", mpp=2.4, key_added="v2")
    assert set(DERIVED) <= set(sdata["table"].uns)


def test_adapting_again_removes_the_intervals_of_the_adapted_layer(sdata):
    with pytest.warns(UserWarning, match=r"removed.*\['he2gene_adapted_intervals'\]"):
        hg.tl.adapt(sdata, np.arange(64) % 3 == 0)
    table = sdata["table"]
    assert "he2gene_adapted_upper" not in table.layers
    assert "he2gene_adapted" in table.layers
    assert {"he2gene_intervals", "he2gene_eval"} <= set(table.uns)


def test_results_of_the_annotation_and_of_results_are_removed_too(sdata, model):
    table = sdata["table"]
    hg.tl.biomarkers(table, groupby="he2gene_annotation", method="wilcoxon", layer="own", layer_scale="log")
    table.uns["he2gene_enrichment"] = {"verb": "enrichment", "params": {"key": "he2gene_biomarkers"}, "written": {}}
    with pytest.warns(UserWarning, match="removed.*he2gene_biomarkers.*he2gene_enrichment"):
        hg.tl.predict(sdata, model=model, device="cpu", mpp=2.4)
    assert "he2gene_biomarkers" not in table.uns
