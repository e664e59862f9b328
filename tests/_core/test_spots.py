import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_matrix

import he2gene_sc as hg
from he2gene_sc._core import spots as spots_module
from he2gene_sc._core.names import clean_name, clean_name_argument, clean_names, names_of
from he2gene_sc._core.spots import read_spots, samples_of, sections_of, unique_section_names
from tests.helpers.patients import pool


def table_of(**columns):
    n = len(next(iter(columns.values())))
    made = AnnData(np.ones((n, 3), np.float32), obs=pd.DataFrame(columns, index=[f"s{i}" for i in range(n)]))
    made.obsm["spatial"] = np.arange(2.0 * n).reshape(n, 2)
    return made


@pytest.mark.parametrize("value", [b"P1", "P1", "P1 ", " P1", "P1\u00a0", "\ufeffP1", "P1\t\n"])
def test_blanks_around_a_name_are_dropped(value):
    assert clean_name(value) == "P1"


@pytest.mark.parametrize("value", [3, 3.0, "3", "3.0", " 3 ", np.int8(3), np.float32(3)])
def test_a_number_is_the_same_name_in_any_type(value):
    assert clean_name(value) == "3"


@pytest.mark.parametrize(
    "value", [None, np.nan, pd.NA, pd.NaT, "", "  ", "nan", "NaN", "None", "<NA>", "NA", "n/a", "null", " nan "]
)
def test_texts_of_missing_values_are_missing(value):
    assert clean_name(value) is None


@pytest.mark.parametrize("dtype", [object, "category", "string", "str"])
def test_columns_of_every_type_give_the_same_names(dtype):
    column = pd.Series(["P1", "P2 ", None, "nan"]).astype(dtype)
    assert clean_names(column).tolist()[:2] == ["P1", "P2"]
    assert clean_names(column).tolist()[3] is None
    assert clean_names(pd.Series([1.0, np.nan, 2.0])).tolist() == ["1", None, "2"]
    assert clean_names(pd.Series([1, None, 2], dtype="Int64")).tolist() == ["1", None, "2"]
    assert clean_names(pd.Series([True, False])).tolist() == ["True", "False"]


@pytest.mark.parametrize("odd", ["tumour", "TUMOUR", "Tumour "])
def test_names_that_differ_only_in_case_are_refused_with_their_rows(odd):
    table = table_of(label=["Tumour", "stroma", "Tumour", odd])
    if clean_name(odd) == "Tumour":
        assert names_of(table, "label", "groupby").tolist()[3] == "Tumour"
        return
    with pytest.raises(
        ValueError, match=rf"'Tumour' \(2 spots, from 's0'\) and '{odd}' \(1 spots, from 's3'\) differ only in case"
    ):
        names_of(table, "label", "groupby")


@pytest.mark.parametrize(
    ("first", "second"), [("P1", "P 1"), ("P-1", "P\u20131"), ("01", 1), ("P1", "P001"), ("in situ", "in  situ")]
)
def test_names_that_differ_in_blanks_dashes_or_leading_zeros_are_refused(first, second):
    with pytest.raises(ValueError, match="differ only in"):
        names_of(table_of(label=[first, "x", first, second]), "label", "sample_key")


@pytest.mark.parametrize(("first", "second"), [("P1", "P-1"), ("P_1", "P1"), ("P-1", "P 1"), ("a_b2", "ab2")])
def test_samples_that_differ_in_dashes_or_underscores_are_refused(first, second):
    table = table_of(label=[first, "x", first, second])
    with pytest.raises(ValueError, match="differ only in dashes, underscores, blanks or case; spell them alike"):
        names_of(table, "label", "sample_key", what="samples")
    # Labels may: HER2- is not HER2.
    assert len(set(names_of(table, "label", "groupby"))) > 2 or " " in second


def test_numbers_that_are_joined_differently_are_other_samples():
    for pair in (("P1-1", "P11"), ("1_2", "12"), ("S1-2", "S1_2x")):
        assert set(names_of(table_of(label=[*pair, *pair]), "label", "sample_key", what="samples")) == set(pair)


@pytest.mark.parametrize(
    ("first", "second"), [("C1 1", "C11"), ("1.05", "1.5"), ("0,05", "0,5"), ("P10", "P1"), ("+", "-")]
)
def test_different_names_stay_different(first, second):
    names = names_of(table_of(label=[first, second, first, second]), "label", "groupby")
    assert names.tolist() == [first, second] * 2


@pytest.mark.parametrize("odd", ["-", "none", "Null", "n.a.", "?"])
def test_some_texts_are_labels_but_not_samples(odd):
    table = table_of(label=["a", "b", "a", odd])
    assert names_of(table, "label", "groupby").tolist()[3] in (odd, None)
    with pytest.raises(ValueError, match="missing for 1 of 4 spots"):
        names_of(table, "label", "sample_key", what="samples", required=True)


def test_an_unknown_sample_among_others_is_warned_of(slides):
    for table in slides[:2]:
        table.obs["patient"] = "unknown"
    with pytest.warns(UserWarning, match="'unknown' counts as one of 2 samples"):
        read_spots(slides[:3], None, "groupby")
    with pytest.warns(UserWarning, match="'unknown' counts as one of 1 samples"):
        read_spots(slides[:2], None, "groupby")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_spots(slides[0], None, "groupby")


def test_texts_of_missing_values_are_logged(caplog):
    assert names_of(table_of(label=["a", "nan", None]), "label", "groupby").tolist() == ["a", None, None]
    assert "1 spots have the text of a missing value, for example 'nan'" in caplog.text


def test_a_missing_name_argument_is_refused():
    with pytest.raises(
        ValueError, match=r"`sample_key` 'patient' is missing for 2 of 3 spots, for example \['s1', 's2'\]"
    ):
        names_of(table_of(patient=["a", "nan", ""]), "patient", "sample_key", required=True)
    with pytest.raises(ValueError, match="`groups` holds 'nan'"):
        clean_name_argument("nan", "groups")
    assert clean_name_argument(3.0, "groups") == "3"


def test_a_section_that_is_missing_for_some_spots_is_refused():
    with pytest.raises(ValueError, match="'section' is missing for 1 of 3 spots"):
        sections_of(table_of(section=["a", None, "a"]))
    assert set(sections_of(table_of(section=[None, None, None]))) == {"section"}
    assert sections_of(table_of(slide=["a", "b ", "b"]), "slide").tolist() == ["a", "b", "b"]


@pytest.fixture
def slides():
    made = [hg.datasets.toy((6, 6), seed=seed)["table"] for seed in range(4)]
    for number, table in enumerate(made):
        table.obs["patient"] = f"P{number}"
    return made


def test_a_patient_is_the_same_in_all_spellings_of_tables(slides):
    for name in ("P0 ", "P0\u00a0"):
        slides[1].obs["patient"] = name
        assert set(pool(slides, "pathologist", layer=None).samples) == {"P0", "P2", "P3"}
    slides[1].obs["patient"] = "p0"
    with pytest.raises(
        ValueError, match=r"`sample_key` 'patient': the samples 'P0' \(36 spots, .*object 0\) and 'p0' .*object 1\)"
    ):
        pool(slides, "pathologist", layer=None)


def test_a_missing_patient_is_not_a_patient(slides):
    for missing in ("nan", "", "None", None, np.nan):
        column = slides[2].obs["patient"].astype(object)
        column.iloc[::4] = missing
        table = slides[2].copy()
        table.obs["patient"] = column
        with pytest.raises(ValueError, match="`sample_key` 'patient' is missing for 9 of 36 spots"):
            pool([slides[0], slides[1], table], "pathologist", layer=None)


def test_labels_are_the_same_in_all_spellings_of_tables(slides):
    plain = pool(slides, "pathologist", layer=None).labels
    slides[1].obs["pathologist"] = [f"{label} " for label in slides[1].obs["pathologist"].astype(str)]
    np.testing.assert_array_equal(pool(slides, "pathologist", layer=None).labels, plain)
    slides[1].obs["pathologist"] = slides[1].obs["pathologist"].str.title()
    with pytest.raises(
        ValueError, match=r"`groupby` 'pathologist': the labels .* object 0\) and .* object 1\) differ only in case"
    ):
        pool(slides, "pathologist", layer=None)


def test_a_patient_that_drops_out_of_a_test_is_logged(slides, caplog):
    slides[1].obs["pathologist"] = slides[1].obs["pathologist"].astype(str).replace({"tumour": "cancer"})
    found = hg.tl.biomarkers(slides, "pathologist", groups="tumour", reference="stroma", layer=None)
    assert found["n_samples"].max() == 3
    assert "'tumour' against 'stroma' is tested in 3 of 4 samples" in caplog.text
    assert "'P1' (0 of 'tumour'" in caplog.text


def test_spots_without_counts_are_left_out_of_a_test(slides, caplog):
    labelled = np.flatnonzero(slides[0].obs["pathologist"].notna())
    x = slides[0].X.toarray()
    x[labelled[0]] = 0
    slides[0].X = x
    pooled = pool(slides, "pathologist", layer=None)
    assert labelled[0] not in pooled.rows[0]
    assert "1 labelled spots have no counts and are left out" in caplog.text


def test_a_table_without_patients_is_one_patient_and_section_names_are_unique_by_patient():
    for table in (table_of(section=["a", "b"]), table_of(section=["a", "b"], patient=[None, "nan"])):
        assert samples_of(table).tolist() == ["sample", "sample"]
    with pytest.raises(ValueError, match="`sample_key` 'who' is not a column of obs"):
        samples_of(table_of(patient=["p"]), "who")
    one, both = np.array(["s", "s"], object), np.array(["s", "t"], object)
    patients = np.array(["p", "q"], object)
    assert unique_section_names(one, patients).tolist() == ["p", "q"]
    assert unique_section_names(np.array(["s", "t", "s"], object), np.array(["p", "p", "q"], object)).tolist() == [
        "p_s",
        "p_t",
        "q_s",
    ]
    assert unique_section_names(both, patients) is both
    # "a" with "b_c" and "a_b" with "c" would both be "a_b_c".
    sections, patients = np.array(["b_c", "c", "c"], object), np.array(["a", "a_b", "a"], object)
    assert len(set(unique_section_names(sections, patients))) == 3


def test_sums_with_weights_leave_out_spots_without_a_code(monkeypatch):
    monkeypatch.setattr(spots_module, "_BLOCK", 12)
    rng = np.random.default_rng(0)
    table = AnnData(rng.random((10, 4)).astype(np.float32), obs=pd.DataFrame({"label": list("ab") * 5}))
    table.layers["values"] = table.X
    codes, weights = np.array([0, 1, -1, 0, 1, 1, -1, 0, 0, 1]), rng.normal(size=10)
    spots = read_spots(table, "label", "groupby", layer="values")
    plain, squares, weighted = spots.sums(codes, 2, np.asarray, np.square, weights=weights)
    for code in (0, 1):
        own = codes == code
        np.testing.assert_allclose(plain[code], table.X[own].sum(0), rtol=1e-6)
        np.testing.assert_allclose(squares[code], np.square(table.X[own]).sum(0), rtol=1e-6)
        np.testing.assert_allclose(weighted[code], (table.X[own] * weights[own, None]).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix, csc_matrix])
def test_counts_of_tables_with_other_names_have_the_columns_of_the_genes(monkeypatch, kind):
    monkeypatch.setattr(spots_module, "_BLOCK", 6)
    counts = np.array([[1, 0, 2], [3, np.nan, 0], [0, 5, 4]])
    tables = []
    for names in (["SEPT2", "ERBB2", "X1"], ["ERBB2", "SEPTIN2", "X2"]):
        table = AnnData(kind(counts), obs=pd.DataFrame({"label": list("aba"), "patient": names[0]}))
        table.var_names = names
        tables.append(table)
    spots = replace(read_spots(tables, "label", "groupby"), genes=pd.Index(["SEPT2", "ERBB2", "X1"]))
    (found, _, _), _ = spots.count_sums(np.arange(6), 6)
    known = np.nan_to_num(counts)
    np.testing.assert_array_equal(found, np.vstack([known, np.c_[known[:, 1], known[:, 0], np.zeros(3)]]))
