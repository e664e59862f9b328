import warnings

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from anndata import AnnData, read_h5ad

from he2gene_sc._core.expression import (
    as_logs,
    count_totals,
    log_expression,
    scale_problem,
    summarize_values,
)
from he2gene_sc._core.matrix import matrix_of, values_of

KINDS = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": scipy.sparse.csr_matrix,
    "csc": scipy.sparse.csc_array,
    "dask": lambda x: da.from_array(x, chunks=(7, 5)),
    "dask of csr": lambda x: da.from_array(x, chunks=(7, x.shape[1])).map_blocks(scipy.sparse.csr_matrix),
}


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 2, (30, 1))
    return rng.poisson(depth * rng.gamma(0.5, 4, 60)).astype(np.float32)


def logs(counts, total=1e4, base=np.e):
    total = np.median(counts.sum(1)) if total is None else total
    return (np.log1p(total * counts / counts.sum(1, keepdims=True)) / np.log(base)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_is_summarised_and_normalised_equally(counts, kind, monkeypatch):
    monkeypatch.setattr("he2gene_sc._core.matrix._BLOCK", 120)
    genes = np.array([3, 1, 59])
    np.testing.assert_allclose(as_logs(KINDS[kind](counts), "counts", genes), logs(counts)[:, genes], rtol=1e-6)
    assert summarize_values(KINDS[kind](counts)) == summarize_values(counts)
    assert scale_problem(KINDS[kind](logs(counts))) == ""
    odd = counts.copy()
    odd[29, 59], odd[3, 2], odd[4, 4], odd[5, 5] = -1, 0.5, np.nan, np.inf
    found = summarize_values(KINDS[kind](odd))
    assert (found.n_negative, found.n_fractions, found.n_nan, found.n_infinite) == (1, 1, 1, 1)
    assert (found.n_nan_spots, found.n_empty_spots, found.low) == (1, 0, -1)


def test_tables_on_disk_are_read_by_blocks(counts, tmp_path, monkeypatch):
    monkeypatch.setattr("he2gene_sc._core.matrix._BLOCK", 120)
    for name, matrix in (
        ("dense", counts),
        ("csr", scipy.sparse.csr_matrix(counts)),
        ("csc", scipy.sparse.csc_matrix(counts)),
    ):
        AnnData(matrix).write_h5ad(tmp_path / f"{name}.h5ad")
        table = read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        np.testing.assert_allclose(log_expression(table, None, expected="counts"), logs(counts), rtol=1e-6)
        table.file.close()


def test_one_odd_value_among_millions_is_found():
    counts = np.ones((1500, 1000), np.float32)
    counts[1234, 567] = 0.5
    assert summarize_values(counts).kind == "log"
    assert summarize_values(counts).problem.startswith("1 fractions, up to 1")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.nan, "1 NaN and 0 infinite"),
        (np.inf, "0 NaN and 1 infinite"),
        (-2, "1 negative values, down to -2"),
        (0.5, "1 fractions"),
    ],
)
def test_values_that_are_not_counts_are_described(counts, value, problem):
    counts[3, 4] = value
    assert summarize_values(scipy.sparse.csr_array(counts)).problem.startswith(problem)


def test_counts_with_nan_are_refused_unless_whole_spots_were_not_measured(counts):
    counts[3, 4] = np.nan
    table = AnnData(counts)
    with pytest.raises(ValueError, match="X holds 1 NaN, in 1 spots: their total is unknown"):
        log_expression(table, None, expected="counts")
    table.X[3] = np.nan
    with pytest.raises(ValueError, match="60 NaN, in 1 spots"):
        log_expression(table, None, expected="counts")
    found = log_expression(table, None, expected="counts", unmeasured_spots=True)
    assert np.isnan(found[3]).all()
    assert np.isfinite(np.delete(found, 3, 0)).all()


def test_counts_that_are_all_zero_are_refused(counts):
    with pytest.raises(ValueError, match="X is 0 for every gene and spot"):
        log_expression(AnnData(0 * counts), None, expected="counts")


def test_text_matrices_are_refused(counts):
    table = AnnData(counts)
    table.layers["text"] = counts.astype(str).astype(object)
    with pytest.raises(ValueError, match="layer 'text' holds object; numbers are needed"):
        values_of(table, "text")


def test_raw_counts_are_not_taken_as_logarithms(counts):
    with pytest.raises(ValueError, match=r"`layer_scale` is 'log', but X looks like raw counts.*layer_scale='counts'"):
        log_expression(AnnData(counts), None, scale="log", expected="counts")


@pytest.mark.parametrize("genes", [slice(None), slice(0, 25)], ids=["all genes", "a list of genes"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_logarithms_of_counts_per_10000_give_no_warning(counts, genes, dtype):
    table = AnnData(logs(counts)[:, genes].astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_expression(table, None, scale="log", expected="counts")


@pytest.mark.parametrize(
    ("options", "genes", "message"),
    [
        ({"total": 1e6}, slice(None), "sums to 1,000,000, not to 10,000"),
        ({"total": None}, slice(None), "sums to"),
        ({"total": 300}, slice(None), "sums to 300, not"),
        ({"base": 2}, slice(None), "logarithms to base 2"),
        ({"base": 2}, slice(0, 25), "logarithms to base 2"),
        ({"base": 10}, slice(None), "logarithms to base 10"),
        ({"base": 10}, slice(0, 25), "logarithms to base 10"),
        ({"total": 1e6}, slice(0, 25), "sums to"),
    ],
)
def test_logarithms_of_another_total_or_base_are_warned_of(counts, options, genes, message):
    table = AnnData(logs(counts, **options)[:, genes])
    with pytest.warns(UserWarning, match=f"X does not hold natural logarithms of .*10,000.*{message}.*target_sum=1e4"):
        found = log_expression(table, None, scale="log", expected="counts")
    np.testing.assert_array_equal(found, table.X)


@pytest.mark.parametrize("genes", [slice(None), slice(0, 25)], ids=["all genes", "a list of genes"])
def test_logarithms_of_raw_counts_are_warned_of(counts, genes):
    table = AnnData(np.log1p(counts)[:, genes])
    with pytest.warns(UserWarning, match="X does not hold natural .*logarithms of whole numbers"):
        log_expression(table, None, scale="log", expected="counts")


def test_genes_that_were_scaled_to_one_are_warned_of(counts):
    scaled = logs(counts)
    with pytest.warns(UserWarning, match="each gene was scaled to values from 0 to 1"):
        log_expression(AnnData(scaled / scaled.max(0).clip(1e-9)), None, scale="log", expected="counts")


def test_totals_beyond_half_precision_are_summed():
    counts = np.full((2, 72), 1000, np.float16)
    assert np.isinf(counts.sum(1)).all()
    np.testing.assert_allclose(as_logs(counts, "counts"), np.log1p(1e4 / 72), rtol=1e-6)
    np.testing.assert_array_equal(count_totals(counts), 72_000)


def test_scaled_values_are_warned_of(counts):
    scaled = logs(counts)
    scaled = (scaled - scaled.mean(0)) / scaled.std(0).clip(0.1)
    with pytest.warns(UserWarning, match="X ranges from -.*scaled or not log-transformed"):
        log_expression(AnnData(scaled), None, scale="log", expected="counts")


def test_totals_of_predictions_are_not_checked(counts):
    table = AnnData(logs(counts, total=1e6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_expression(table, None, expected="log", predicted=True)


def test_layers_are_found_by_name(counts):
    table = AnnData(counts, var=pd.DataFrame(index=[f"g{i}" for i in range(60)]))
    with pytest.raises(ValueError, match=r"`measured` 'no' is not a layer, valid: \[\] \(None: X\)"):
        matrix_of(table, "no", "measured")


def test_a_spot_with_an_unknown_total_gets_nan_for_all_genes(counts):
    counts[3, 4] = np.nan
    assert np.isnan(as_logs(counts, "counts", np.array([0, 1]))[3]).all()
