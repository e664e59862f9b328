import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData

import he2gene_sc as hg
from he2gene_sc._core.expression import log_expression, summarize_values
from he2gene_sc._core.matrix import values_of
from he2gene_sc._core.names import names_of
from he2gene_sc._core.ownership import check_free
from he2gene_sc._core.results import write_result
from he2gene_sc._core.spots import get_table, sections_of, spots_of
from he2gene_sc.stats import pitch_of


@pytest.fixture
def table():
    counts = np.random.default_rng(0).poisson(3, (6, 4)).astype(np.float32)
    made = AnnData(scipy.sparse.csr_matrix(counts), obs=pd.DataFrame(index=[f"s{i}" for i in range(6)]))
    made.layers["log"] = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    made.obsm["spatial"] = np.stack(np.meshgrid([0.0, 100, 200], [0.0, 100]), -1).reshape(-1, 2)
    return made


def test_counts_and_logs_give_the_same_values(table):
    counted = log_expression(table, None, expected="counts")
    np.testing.assert_allclose(counted, log_expression(table, "log", expected="log"), rtol=1e-6)
    part = log_expression(table, None, genes=np.array([2, 0]), expected="counts")
    np.testing.assert_allclose(part, counted[:, [2, 0]])


def test_values_on_another_scale_are_refused_unless_stated(table):
    with pytest.raises(
        ValueError, match=r"`measured`: layer 'log' looks like log-transformed values.*measured_scale='log'"
    ):
        log_expression(table, "log", expected="counts", parameter="measured")
    with pytest.raises(ValueError, match=r"X looks like raw counts.*layer_scale='counts'"):
        log_expression(table, None, expected="log")
    stated = log_expression(table, None, expected="log", scale="counts")
    np.testing.assert_allclose(stated, table.layers["log"], rtol=1e-5)
    with pytest.raises(ValueError, match="is 'counts', but layer 'log' holds fractions"):
        log_expression(table, "log", expected="counts", scale="counts")
    with pytest.raises(ValueError, match="valid: "):
        log_expression(table, None, expected="counts", scale="cpm")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([[0, 3], [5, 1]], "counts"),
        ([[0, 0], [0, 0]], "counts"),
        ([[0.5, 3], [np.nan, 1]], "log"),
        ([[-0.5, 3], [1, 1]], "other"),
        ([[0.5, 3000], [1, 1]], "other"),
    ],
)
def test_scales_are_recognised(values, scale):
    assert summarize_values(np.array(values, float)).kind == scale
    assert summarize_values(scipy.sparse.csr_array(np.array(values, float))).kind == scale


def test_masked_values_are_refused(table):
    counts = table.X.toarray()
    table.layers["whole"] = np.ma.masked_array(counts)
    np.testing.assert_array_equal(values_of(table, "whole"), counts)
    table.layers["masked"] = np.ma.masked_array(counts, mask=counts == 3)
    with pytest.raises(ValueError, match=r"`layer`: layer 'masked' is a masked array with \d+ masked values"):
        values_of(table, "masked")


@pytest.mark.parametrize("dtype", [np.float16, ">f4", ">i8"])
def test_half_precision_and_non_native_byte_order_are_read(table, dtype):
    counts = table.X.toarray()
    table.layers["odd"] = counts.astype(dtype)
    found = values_of(table, "odd")
    assert scipy.sparse.csr_array(found).sum() == counts.sum()


def test_duplicate_sparse_entries_are_summed(table):
    whole = table.X.copy()
    whole.data[:] = 3
    parts = (np.tile([1.5, 1.5], whole.nnz), np.repeat(whole.indices, 2), 2 * whole.indptr)
    table.layers["parts"] = scipy.sparse.csr_matrix(parts, shape=whole.shape)
    assert summarize_values(table.layers["parts"]).kind == "counts"
    np.testing.assert_array_equal(values_of(table, "parts").toarray(), whole.toarray())
    assert table.layers["parts"].nnz == 2 * whole.nnz


def test_missing_layers_are_named(table):
    with pytest.raises(ValueError, match=r"`measured` 'no' is not a layer, valid: \['log'\]"):
        values_of(table, "no", "measured")
    table.X = None
    with pytest.raises(ValueError, match="X is empty"):
        values_of(table, None)


def test_spots_and_their_pitch(table):
    assert pitch_of(spots_of(table)) == 100
    table.obsm["spatial"][0, 0] = np.nan
    with pytest.raises(ValueError, match="for 1 spots"):
        spots_of(table)
    del table.obsm["spatial"]
    with pytest.raises(ValueError, match=r"no obsm\['spatial'\]"):
        spots_of(table)
    with pytest.raises(ValueError, match="at least 2"):
        pitch_of(np.zeros((1, 2)))


def test_sections_of_rows_are_found(table):
    assert set(sections_of(table)) == {"section"}
    table.obs["section"] = ["a"] * 3 + ["b"] * 3
    assert sections_of(table).tolist() == ["a"] * 3 + ["b"] * 3
    table.obs["slide"] = ["x"] * 2 + ["y"] * 4
    assert sections_of(table, "slide").tolist() == ["x"] * 2 + ["y"] * 4
    with pytest.raises(ValueError, match="`section_key` 'no' is not a column"):
        sections_of(table, "no")


def test_tables_are_found_in_objects(toy, tiny_model):
    assert get_table(toy) is toy["table"]
    assert get_table(toy["table"]) is toy["table"]
    with pytest.raises(ValueError, match="holds no prediction"):
        get_table(toy, prediction_key="he2gene")
    hg.tl.predict(toy, model=tiny_model, genes="all")
    assert get_table(toy) is toy["table"]
    assert get_table(toy, "he2gene") is toy["he2gene"]
    with pytest.raises(TypeError, match="is a list"):
        get_table([1])


def test_results_are_written_and_replaced_as_a_whole(table):
    table.obs["mine"] = 1
    write_result(table, "verb", "key", params={"a": 1, "b": None}, obs={"key_x": np.arange(6), "key_y": np.arange(6)})
    assert table.uns["key"]["params"] == {"a": 1}
    write_result(table, "verb", "key", params={}, obs={"key_x": np.ones(6)}, facts={"n": 3})
    assert "key_y" not in table.obs
    assert table.obs["key_x"].sum() == 6
    assert table.uns["key"]["n"] == 3
    assert (table.obs["mine"] == 1).all()


def test_a_failure_while_writing_leaves_everything_unchanged(table):
    write_result(table, "verb", "key", params={}, obs={"key_x": np.arange(6)})
    with pytest.raises(ValueError, match="6"):
        write_result(table, "verb", "key", params={}, obs={"key_x": np.ones(6)}, layers={"bad": np.ones((2, 2))})
    assert table.obs["key_x"].tolist() == list(range(6))
    assert "bad" not in table.layers


def test_entries_of_other_tools_are_not_overwritten(table):
    table.obs["key_x"] = 1
    with pytest.raises(ValueError, match=r"obs\['key_x'\] exists and was not written by hg.tl.verb"):
        check_free(table, "verb", "key", obs=["key_x"])
    del table.obs["key_x"]
    write_result(table, "verb", "key", params={}, obs={"key_x": np.ones(6)})
    check_free(table, "verb", "key", obs=["key_x"])
    with pytest.raises(ValueError, match=r"uns\['key'\] exists and was not written by hg.tl.other"):
        check_free(table, "other", "key")
    table.layers["mine"] = table.layers["log"]
    with pytest.raises(ValueError, match=r"layers\['mine'\]"):
        check_free(table, "verb", "key", layers=["mine"])


def test_a_written_table_is_kept_by_zarr(table, tmp_path):
    import anndata

    frame = pd.DataFrame({"gene": ["a", "b"], "r": [0.5, np.nan]})
    write_result(table, "verb", "key", params={"genes": ["a"]}, facts={"table": frame}, obs={"key_x": np.ones(6)})
    table.write_zarr(tmp_path / "t.zarr")
    back = anndata.read_zarr(tmp_path / "t.zarr")
    assert back.uns["key"]["verb"] == "verb"
    assert list(back.uns["key"]["written"]["obs"]) == ["key_x"]
    check_free(back, "verb", "key", obs=["key_x"])
    assert back.uns["key"]["table"]["r"].tolist()[0] == 0.5


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["a", "", "nan", None, np.nan, "<NA>"], ["a", None, None, None, None, None]),
        ([1, 0, np.nan, 1, 0, np.nan], ["1", "0", None, "1", "0", None]),
        (pd.array([1, 0, None, 1, 0, 1], "Int64"), ["1", "0", None, "1", "0", "1"]),
        (pd.Categorical(["a", "b", None, " ", "a", "nan"]), ["a", "b", None, None, "a", None]),
        ([True, False] * 3, ["True", "False"] * 3),
    ],
)
def test_labels_are_texts_and_invalid_ones_are_missing(table, column, expected):
    table.obs["label"] = column
    assert names_of(table, "label", "groupby").tolist() == expected


def test_fractions_and_unknown_columns_are_refused_as_labels(table):
    table.obs["label"] = np.linspace(0, 1, 6)
    with pytest.raises(ValueError, match="`domain_key` 'label' holds fractions"):
        names_of(table, "label", "domain_key")
    with pytest.raises(ValueError, match="`groupby` 'no' is not a column"):
        names_of(table, "no", "groupby")


def test_a_table_is_found_by_its_layer(toy):
    toy["table"].layers["mine"] = toy["table"].X
    assert get_table(toy, layer="mine") is toy["table"]
    with pytest.raises(ValueError, match="`layer` 'no' is not in any table of `data`.*: run hg.tl.predict first"):
        get_table(toy, layer="no")
