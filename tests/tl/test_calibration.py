"""``hg.pl.calibration``: the spots and the table that it uses."""

import numpy as np
import pytest
import scipy.sparse

import he2gene_sc as hg
from tests.helpers.toy_sections import toy, train


@pytest.fixture(scope="module")
def model():
    return train([toy(i, shape=(7, 7)) for i in range(3)], n_target_genes=12)


@pytest.fixture(scope="module")
def slide(model):
    sdata = toy(7, shape=(9, 9))
    hg.tl.predict(sdata, model=model, device="cpu")
    return sdata


@pytest.fixture
def table(slide):
    return slide["table"].copy()


def found(*args, **kwargs):
    (line,) = [x for x in hg.pl.calibration(*args, **kwargs).lines if "mean over" in x.get_label()]
    return line.get_ydata()


@pytest.mark.slow
def test_spots_without_counts_are_left_out(table, model):
    counts = table.X.toarray()
    counts[:20] = 0
    table.X = counts
    np.testing.assert_allclose(found(table, model=model), found(table[20:].copy(), model=model))


def test_unmeasured_values_are_left_out(table, model):
    log = np.log1p(1e4 * table.X.toarray() / table.X.toarray().sum(1, keepdims=True))
    log[:20] = np.nan
    table.layers["log"] = log
    rest = found(table[20:].copy(), model=model, measured="log", measured_scale="log")
    np.testing.assert_allclose(found(table, model=model, measured="log", measured_scale="log"), rest)


def test_an_adapted_layer_is_checked_on_spots_that_it_was_not_fitted_on(table):
    mask = np.arange(81) % 2 == 0
    hg.tl.adapt(table, mask)
    hg.tl.intervals(table, layer="he2gene_adapted", coverage=0.8)
    low, high = (table.layers[f"he2gene_adapted_{end}"][~mask] for end in ("lower", "upper"))
    counts = table.X.toarray()[~mask]
    truth = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    expected = ((truth >= low) & (truth <= high)).mean()
    assert found(table, layer="he2gene_adapted", coverages=[0.8])[0] == pytest.approx(expected, abs=1e-3)


def test_a_table_of_all_genes_is_compared_with_the_measured_one(model):
    sdata = toy(7, shape=(9, 9))
    hg.tl.predict(sdata, model=model, device="cpu", genes="all", key_added="he2gene")
    beside = found(sdata, model=model)
    hg.tl.predict(sdata, model=model, device="cpu")
    np.testing.assert_allclose(beside, found(sdata["table"], model=model), atol=1e-6)


def test_too_few_spots_raise(table, model):
    with pytest.raises(
        ValueError, match="no section has at least 10 spots that were both predicted and measured; found 9"
    ):
        hg.pl.calibration(table[:9].copy(), model=model)
    hg.tl.adapt(table, np.arange(81) > 8)
    with pytest.raises(ValueError, match="at least 10"):
        hg.pl.calibration(table, layer="he2gene_adapted", coverages=[0.8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coverages": []}, "`coverages` is empty"),
        ({"coverages": 0.9}, r"`coverages` is 0\.9; a list is needed, such as \[0\.9\]"),
        ({"coverages": [0.5, 2]}, "`coverages` is 2"),
        ({"measured": "he2gene", "measured_scale": "log"}, "is the prediction itself"),
        ({"layer": "no"}, "`layer` 'no'"),
        ({"prediction_key": "no"}, "holds no prediction 'no'"),
    ],
)
def test_bad_input_is_refused(table, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        hg.pl.calibration(table, model=model, **arguments)


def test_a_table_without_prediction_or_flags_raises(table, model):
    bare = table.copy()
    del bare.uns["he2gene"]
    for verb in (hg.pl.calibration, hg.tl.intervals):
        with pytest.raises(ValueError, match="holds no prediction 'he2gene'"):
            verb(bare, model=model)
    del table.var["he2gene_predicted"]
    for verb in (hg.pl.calibration, hg.tl.intervals):
        with pytest.raises(ValueError, match="var has no 'he2gene_predicted'"):
            verb(table, model=model)


def test_sparse_predictions_have_intervals_too(table, model):
    hg.tl.intervals(table, model=model)
    sparse = table.copy()
    sparse.layers["he2gene"] = scipy.sparse.csr_matrix(table.layers["he2gene"])
    hg.tl.intervals(sparse, model=model)
    np.testing.assert_array_equal(sparse.layers["he2gene_upper"], table.layers["he2gene_upper"])
    np.testing.assert_allclose(found(sparse, model=model), found(table, model=model))


def test_the_column_of_symbols_is_remembered(model):
    sdata = toy(7, shape=(6, 6))
    sdata["table"].var["symbol"] = sdata["table"].var_names
    sdata["table"].var_names = [f"probe{i}" for i in range(sdata["table"].n_vars)]
    hg.tl.predict(sdata, model=model, device="cpu", gene_symbols="symbol")
    assert sdata["table"].uns["he2gene"]["gene_symbols"] == "symbol"
    hg.tl.intervals(sdata, model=model)
    assert np.isfinite(sdata["table"].layers["he2gene_upper"]).all()
    found(sdata, model=model)


def test_the_grouping_of_residuals_is_recorded(table, model):
    hg.tl.intervals(table, model=model, layer="he2gene")
    assert table.uns["he2gene_intervals"]["by"] == "annotation"
    hg.tl.intervals(table, model=model, by=None)
    assert table.uns["he2gene_intervals"]["by"] == "none"
    del table.obs["he2gene_annotation"]
    with pytest.warns(UserWarning, match=r"obs\['he2gene_annotation'\], which hg.tl.predict wrote, is missing"):
        hg.tl.intervals(table, model=model)
    assert table.uns["he2gene_intervals"]["by"] == "none"
    assert table.uns["he2gene_intervals"]["classes"] == []
