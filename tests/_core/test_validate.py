from pathlib import Path

import numpy as np
import pytest

import he2gene_sc as hg
from he2gene_sc._core import validate


def test_one_of_lists_valid_and_similar_values():
    assert validate.one_of("leiden", ["leiden", "kmeans"], "clustering") == "leiden"
    with pytest.raises(
        ValueError, match=r"`clustering` is 'Leidn', valid: \['leiden', 'kmeans'\]; near 'Leidn': \['leiden'\]"
    ):
        validate.one_of("Leidn", ["leiden", "kmeans"], "clustering")


@pytest.mark.parametrize("value", [True, 1.0, None, np.array([1, 2]), ["a"], {}])
def test_one_of_refuses_values_of_another_type(value):
    with pytest.raises(ValueError, match="`n`"):
        validate.one_of(value, [1, 2], "n")


def test_key_in_lists_available_names():
    assert validate.key_in("patient", ["patient"], "sample_key") == "patient"
    with pytest.raises(
        ValueError, match=r"`layer` 'cnts' is not a layer, valid: \['counts'\]; near 'cnts': .*\(None: X\)"
    ):
        validate.key_in("cnts", ["counts"], "layer", what="a layer", hint=" (None: X)")
    with pytest.raises(ValueError, match="and 80 more"):
        validate.key_in("x", [f"column {i}" for i in range(100)], "groupby")
    with pytest.raises(ValueError, match="`groupby`"):
        validate.key_in(["patient"], ["patient"], "groupby")


def test_missing_and_ambiguous_names_raise_with_valid_ones():
    assert validate.existing_key("spots", {"spots": 1, "bins": 2}, "shapes_key") == "spots"
    with pytest.raises(ValueError, match=r"`shapes_key` 'x' not found, valid keys: \['bins', 'spots'\]; make them"):
        validate.existing_key("x", ["spots", "bins"], "shapes_key", "; make them")
    validate.not_ambiguous(["one"], "table_key")
    with pytest.raises(ValueError, match=r"`table_key` is ambiguous, candidates: \['a', 'b'\]"):
        validate.not_ambiguous(["b", "a"], "table_key")
    validate.all_in(["a"], ["a", "b"], "group", "was not tested")
    with pytest.raises(ValueError, match=r"`group` \['tumor'\] was not tested, valid: \['tumour'\]; near 'tumor'"):
        validate.all_in(["tumour", "tumor"], ["tumour", "tumour"], "group", "was not tested")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, float("nan")])
def test_whole_number_only_accepts_whole_numbers(value):
    with pytest.raises(ValueError, match="`n_splits` is .*; a whole number from 1 is needed"):
        validate.whole_number(value, "n_splits")


@pytest.mark.parametrize("value", [True, 1, {"ERBB2": 1}, [["ERBB2"]], [None], b"ERBB2"])
def test_lists_of_names_hold_names(value):
    with pytest.raises(ValueError, match="`genes` is .*; a list of genes is needed"):
        validate.names(value, "genes", one=True)
    assert validate.names("ERBB2", "genes", one=True) == ["ERBB2"]
    assert validate.names((name for name in ["a", "b"]), "genes") == ["a", "b"]


def test_seeds_that_no_library_accepts_are_refused():
    def verb(*, seed: int = 0) -> None:
        """Nothing."""

    validate.arguments(verb, {"seed": 2**31 - 1})
    with pytest.raises(ValueError, match="`seed` is 2147483648; a whole number from 0 to 2,147,483,647 is needed"):
        validate.arguments(verb, {"seed": 2**31})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_limit", "1GB"),
        ("memory_limit", float("nan")),
        ("memory_limit", -1),
        ("n_readers", 0),
        ("n_readers", 1.5),
        ("show_progress_bar", "yes"),
        ("device", None),
        ("data_dir", 3),
        ("memorylimit", 1),
    ],
)
def test_settings_are_checked_when_they_are_set(name, value):
    before = vars(hg.settings).copy()
    with pytest.raises(ValueError, match=name):
        setattr(hg.settings, name, value)
    assert vars(hg.settings) == before


def test_whole_number_and_in_range_return_the_value():
    assert validate.whole_number(np.int64(3), "n") == 3
    assert validate.in_range(0.5, "share", least=0, below=1) == 0.5
    assert validate.in_range(0, "share", least=0, below=1) == 0


@pytest.mark.parametrize("value", [-0.1, 1, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_in_range_states_its_bounds(value):
    with pytest.raises(ValueError, match="`share` is .*; a share from 0 and below 1 is needed"):
        validate.in_range(value, "share", least=0, below=1, what="a share")


def test_flags_names_and_paths():
    assert validate.flag(np.True_, "trend")
    assert validate.names(("a", 1), "genes") == ["a", 1]
    assert validate.folder_or_file("a", "cache") == Path("a")
    for wrong in (1, None, "True"):
        with pytest.raises(ValueError, match="True or False is needed"):
            validate.flag(wrong, "trend")
    with pytest.raises(ValueError, match=r"`genes` is the text 'ERBB2'; a list is needed: \['ERBB2'\]"):
        validate.names("ERBB2", "genes")
    for wrong in ({}, 1, None, [None], [["a"]]):
        with pytest.raises(ValueError, match="`genes`"):
            validate.names(wrong, "genes")
    with pytest.raises(ValueError, match="at least 1"):
        validate.names([], "genes", least=1)
    with pytest.raises(ValueError, match="a path is needed"):
        validate.folder_or_file(" ", "cache")
    with pytest.raises(ValueError, match="a name is needed"):
        validate.name(" ", "key_added")
    with pytest.raises(TypeError, match="`net` is of type int; a DataFrame is needed"):
        validate.instance(1, str, "net", "a DataFrame")


def test_unique_names_duplicates():
    validate.all_different(["a", "b"], "genes")
    with pytest.raises(ValueError, match="`genes`: genes are duplicated: 'a'$"):
        validate.all_different(["a", "b", "a", "a"], "genes", "genes")


def test_long_lists_are_counted():
    assert validate.format_list("ab") == "a, b"
    assert validate.format_list(range(7), 3) == "0, 1, 2, … (7 in all)"


def verb(data: object, layer: str | None = None, key_added: str = "he2gene", copy: bool = False, seed: int = 0) -> None:
    """Take arguments as the verbs do."""
    validate.arguments(verb, locals())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layer": ["a"]}, "`layer` is of type list; a text"),
        ({"key_added": None}, "`key_added` is of type NoneType; a text"),
        ({"copy": 1}, "`copy` is 1; True or False"),
        ({"copy": None}, "`copy` is None; True or False"),
        ({"seed": -1}, "`seed` is -1; a whole number from 0"),
        ({"seed": True}, "`seed` is True; a whole number from 0"),
    ],
)
def test_arguments_of_another_type_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        verb([1], **wrong)


def test_arguments_as_annotated_pass():
    verb(object(), layer=None, key_added="x", copy=True, seed=np.int64(3))
    verb(object(), "counts")


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), np.float64("nan"), "1", True])
def test_nan_is_refused_as_a_number_in_any_argument(value):
    with pytest.raises(ValueError, match="`pitch_um` is .*; a number is needed"):
        validate.arguments(hg.pp.grid, {"pitch_um": value})
    validate.arguments(hg.pp.grid, {"pitch_um": 10**400, "mpp": None})


@pytest.mark.parametrize("path", ["a\0b", "a" * 300, "~nobody-here/x", " "])
def test_a_path_that_no_file_system_accepts_is_named(path):
    with pytest.raises(ValueError, match="^`place` "):
        validate.folder_or_file(path, "place")
