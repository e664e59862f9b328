"""Invalid input of ``hg.tl.train`` and its errors."""

import errno
import shutil
from collections import namedtuple
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise
from he2gene_sc.tl._train.measured import MeasuredSection, totals_of
from tests.helpers.toy_sections import (
    SPEC,
    Power,
    network,
    own,
    renamed,
    same_model,
    toy,
    toys,
    train,
    with_table,
    without_genes,
)

pytestmark = pytest.mark.slow


def assert_raises(sections, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        train(sections, **options)


def counted(change, i=0):
    """Two sections, one with changed counts."""
    parts = [toy(0), toy(1, "B")]
    table = parts[i]["table"]
    table.X = change(table.X.toarray())
    return parts


# Counts


def test_log_normalised_values_raise_and_the_raw_layer_is_named():
    parts = [toy(0), toy(1, "B")]
    for s in parts:
        s["table"].layers["raw_counts"] = s["table"].X.copy()
        s["table"].X = log_normalise(s["table"].X)
    assert_raises(
        parts,
        r"`layer`: X does not hold raw counts.*fractions.*log-normalised.*pass keys=hg.SectionKeys\(layer='raw_counts'\)",
    )


def test_log_normalised_values_raise_and_explain_how_to_pass_raw_counts():
    assert_raises(
        counted(log_normalise),
        r"`layer`: X does not hold raw counts.*put raw counts into a layer and pass keys=hg.SectionKeys\(layer=",
    )


def with_first(value):
    def change(x):
        x = x.astype(np.float32)
        x[2, 3] = value
        return x

    return change


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "negative values, down to -1"), (np.nan, "NaN"), (np.inf, "infinite"), (2.5, "fractions")],
)
@pytest.mark.parametrize("i", [0, 1])
def test_values_that_are_not_counts_raise(value, message, i):
    assert_raises(
        counted(with_first(value), i), rf"`layer`: X does not hold raw counts \(whole numbers from 0\) but .*{message}"
    )


def test_an_unknown_layer_and_an_empty_x_raise():
    parts = toys()
    parts[0]["table"].layers["counts"] = parts[0]["table"].X.copy()
    assert_raises(parts, r"`layer` 'raw' is not a layer, valid: \['counts'\]", layer="raw")
    parts[0]["table"].X = None
    assert_raises(parts, r"`layer`: X is empty; name a layer, one of \['counts'\]")


def test_a_section_without_counts_raises():
    assert_raises(counted(np.zeros_like), "no spot of 'spots' lies in the image and has counts")


# Genes


def test_duplicate_genes_raise():
    parts = [renamed(toy(0), {"FTL": "ACTB"}), toy(1, "B")]
    assert_raises(parts, r"genes \['ACTB'\] occur more than once")


def test_a_symbol_and_its_own_id_are_duplicates():
    parts = [renamed(toy(0), {"FTL": "ENSG00000075624.17"}), toy(1, "B")]
    assert_raises(parts, r"genes \['ACTB'\] occur more than once", ensembl_ids={"ACTB": "ENSG00000075624"})


def test_sections_with_few_common_genes_raise_and_genes_of_both_are_named():
    other = renamed(toy(1, "B"), {g: f"mouse-{g}" for g in toy(0)["table"].var_names[3:]})
    assert_raises([toy(0), other], r"section 'S0' shares only 3 of 40 genes.*'ACTB'.*'mouse-ACTB'.*ensembl_ids=")


def test_symbols_and_ids_without_a_mapping_raise():
    other = renamed(toy(1, "B"), {g: f"ENSG{i:011d}" for i, g in enumerate(toy(0)["table"].var_names)})
    assert_raises([toy(0), other], r"shares only 0 of 40 genes.*ENSG00000000000.*ensembl_ids=", ensembl_ids={})


@pytest.mark.parametrize("order", ["ABC", "ACB", "CAB"])
def test_gene_lists_are_checked_in_any_order_of_the_sections(order):
    names = toy(0)["table"].var_names
    parts = {
        "A": without_genes(toy(0), names[20:]),
        "B": without_genes(toy(1, "B"), names[:20]),
        "C": toy(2),
    }
    match = "no gene was measured in all 3 sections.*missing_genes_are_zero=True"
    assert_raises([parts[name] for name in order], match)
    assert_raises((parts[name] for name in order), match)
    assert_raises([parts["C"], parts["A"]], "no gene of `genes` was measured in all 2 sections", genes=list(names[20:]))


def test_genes_without_a_symbol_keep_their_name(caplog):
    parts = toys()
    for s in parts:
        table = s["table"]
        table.var["symbol"] = table.var_names.astype(object)
        table.var_names = [f"ENSG{i:011d}" for i in range(table.n_vars)]
        table.var.iloc[[3, 5, 6], table.var.columns.get_loc("symbol")] = [None, np.nan, " "]
    model = train(parts, gene_symbols="symbol", ensembl_ids={}, min_spot_share=0.0)
    assert {"ENSG00000000003", "ENSG00000000005", "ENSG00000000006"} <= set(model.genes.index)
    assert not {"None", "nan", ""} & set(model.genes.index)
    assert "3 of 40 genes have no name in var['symbol']" in caplog.text


def without_counts_of_the_first_gene():
    parts = toys()
    for s in parts:
        table = s["table"].copy()
        matrix = table.X.tolil()
        matrix[:, 0] = 0
        table.X = matrix.tocsr()
        with_table(s, table)
    return parts


def test_a_requested_gene_without_counts_has_no_skill():
    parts = without_counts_of_the_first_gene()
    names = parts[0]["table"].var_names
    genes = train(parts, genes=list(names[:5])).genes
    assert np.isnan(genes.loc[names[0], "skill"])
    assert not genes.loc[names[0], "reliable"]
    assert genes.loc[names[1:5], "skill"].notna().all()


def test_genes_can_be_requested_by_symbol_or_id():
    names = toy(0)["table"].var_names[:3]
    ids = {gene: f"ENSG{i:011d}" for i, gene in enumerate(names)}
    for parts in (toys(), [renamed(s, ids) for s in toys()]):
        model = train(parts, genes=[ids[names[0]] + ".4", names[1]], ensembl_ids=ids)
        assert set(model.genes.index) == set(names[:2])


def test_counts_on_disk_and_in_half_precision_are_read(tmp_path):
    import anndata as ad

    parts = toys()
    expected = train(parts)
    for layout in ("csr", "csc", "float16"):
        for i, s in enumerate(parts):
            table = toy(i)["table"]
            matrix = table.X.toarray().astype(np.float16) if layout == "float16" else table.X.asformat(layout)
            if layout == "float16":
                s["table"].X = matrix
            else:
                ad.AnnData(matrix).write_h5ad(tmp_path / f"{layout}{i}.h5ad")
                s["table"].layers["raw"] = ad.read_h5ad(tmp_path / f"{layout}{i}.h5ad", backed="r").X
        found = train(parts, layer=None if layout == "float16" else "raw")
        for key, value in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[key], value, err_msg=f"{layout} {key}")


def test_a_share_that_no_gene_reaches_names_the_largest_share():
    parts = toys("AB")
    for i, s in enumerate(parts):
        counts = s["table"].X.toarray()
        counts[:, :] = np.eye(*counts.shape)[np.arange(len(counts)) // 3 * 3]
        table = s["table"].copy()
        table.X = type(s["table"].X)(counts)
        parts[i] = with_table(s, table)
    assert_raises(parts, "`min_spot_share` is 0.9, .* largest share is 0.1; pass a smaller one", min_spot_share=0.9)


def test_names_of_genes_with_control_characters_raise():
    assert_raises(
        [renamed(s, {"ERBB2": "ERBB2\nHER2"}) for s in toys()], r"`sdatas`: names of genes \['ERBB2\\nHER2'\]"
    )


def test_a_name_like_an_ensembl_id_is_not_stored_as_one(tmp_path):
    model = train([renamed(s, {"ERBB2": "ENSG like"}) for s in toys()], ensembl_ids={})
    assert model.genes.loc["ENSG like", "ensembl_id"] == ""
    assert "ENSG like" in hg.models.load(model.save(tmp_path / "model"), encoder=own()).genes.index


def test_genes_missing_in_all_sections_raise():
    assert_raises(toys(), r"`genes` \['NOPE'\] are not in any section", genes=["ERBB2", "NOPE"])


@pytest.mark.parametrize("genes", [[], "ERBB2"])
def test_genes_must_be_a_list(genes):
    assert_raises(toys(), "`genes` is .* a list of genes", genes=genes)


@pytest.mark.parametrize("windows_um", [100, (), (0, 100)])
def test_windows_must_be_a_list_of_sides(windows_um):
    assert_raises(toys(), "`windows_um` is .* a list of sides", windows_um=windows_um)


def test_the_image_can_be_named():
    assert_raises(toys(), "`image_key`", image_key="nope")


def test_an_unknown_gene_column_raises():
    assert_raises(toys(), "`gene_symbols` 'symbol' is not a column of var, valid: .*planted", gene_symbols="symbol")


# Columns, sections, patients, labels


@pytest.mark.parametrize("parameter", ["annotation_key", "sample_key", "section_key"])
def test_missing_columns_raise_and_valid_ones_are_named(parameter):
    match = f"`{parameter}` 'nope' is not a column of obs, valid: .*patient"
    assert_raises(
        toys(),
        match + (".*need the column too" if parameter == "annotation_key" else ""),
        **{parameter: "nope"},
    )


def test_a_column_missing_in_one_section_raises():
    parts = toys()
    del parts[2]["table"].obs["annotation"]
    assert_raises(parts, "`annotation_key` 'annotation' is not a column of obs")


def test_two_sections_with_one_name_raise():
    assert_raises([toy(0), toy(1, "B", section="S0")], "two sections are named 'S0'")


def test_a_section_with_two_patients_or_names_raises():
    for key in ("patient", "section"):
        parts = toys()
        parts[0]["table"].obs[key] = np.repeat(["X", "Y"], 15)
        assert_raises(parts, r"must be of one section of one patient, found .*'X', 'Y'")


@pytest.mark.parametrize("key", ["patient", "section"])
def test_spots_without_a_patient_or_section_raise(key):
    """Missing names could join several patients or sections in one group."""
    parts = toys()
    parts[0]["table"].obs[key] = np.nan
    assert_raises(parts, rf"`{'sample' if key == 'patient' else key}_key`.*missing")


def test_an_unknown_label_in_classes_raises():
    assert_raises(
        toys(),
        r"`classes` names labels \['tumor'\] that no spot has, valid: \['adipose', ",
        classes={"tumor": "cancer"},
    )


def never_encoded():
    """Make an encoder that fails if it encodes an image."""
    network, spec = own()
    network.register_forward_hook(lambda module, inputs, output: pytest.fail("encoded") if len(output) > 1 else None)
    return network, spec


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"tumour": "in/situ"}, "class name 'in/situ' cannot be stored.*`classes`"),
        ({"tumour": "Stroma"}, "'Stroma' and 'stroma' differ only in case.*`classes`"),
    ],
)
def test_class_names_that_zarr_cannot_store_raise_before_encoding(labels, message):
    assert_raises(toys(), message, classes=labels, encoder=never_encoded())
    parts = toys()
    column = parts[0]["table"].obs["annotation"].astype(str).replace(labels)
    parts[0]["table"].obs["annotation"] = column
    assert_raises(parts, message, encoder=never_encoded())


def test_blank_labels_are_missing():
    parts = toys()
    for s in parts:
        column = s["table"].obs["annotation"].astype(str)
        s["table"].obs["annotation"] = column.where(column != "tumour", "  ")
    assert "tumour" not in train(parts).card.classes


def test_labels_can_be_numbers():
    parts = toys()
    for s in parts:
        s["table"].obs["annotation"] = s["table"].obs["annotation"].astype("category").cat.codes
    assert set(train(parts, classes={0: "first", 1: "second", 2: None}).card.classes) <= {"first", "second"}


def test_an_error_names_the_section_and_comes_before_encoding():
    parts = toys()
    table = parts[1]["table"]
    table.X = table.X.toarray() - 1.0
    assert_raises(parts, r"negative values.*\(object 2 of `sdatas`\)", encoder=never_encoded())
    assert_raises(iter(parts), r"negative values.*\(object 2 of `sdatas`\)")


def test_a_section_with_few_spots_is_left_out(caplog):
    found = train([*toys(), toy(3, "C", shape=(1, 3))])
    assert "section S3 is left out: it has 3 spots" in caplog.text
    same_model(found, train(toys()))


def test_an_image_with_equal_features_in_all_spots_raises():
    parts = toys()
    image = parts[1]["he"]
    image.data[:] = 255
    assert_raises(parts, r"`image_key` 'he' is blank at all spots.*\(object 2 of `sdatas`\)")


def test_no_sections_and_no_table_raise():
    assert_raises([], "`sdatas` is empty")
    assert_raises(iter(()), "`sdatas` is empty")
    bare = toy(0)
    del bare.tables["table"]
    assert_raises([bare], "a section has no table")


def test_too_few_spots_for_blocks_raise():
    assert_raises(toy(0, shape=(2, 2)), "`sdatas` is one section with 4 spots; at least 5 are needed")


def test_only_sections_with_few_spots_raise():
    assert_raises(toy(0, shape=(1, 3)), "`sdatas` has no section of 4 spots")


def test_a_lazy_sequence_is_read_once():
    class Lazy(Sequence):
        asked = []

        def __len__(self):
            return 3

        def __getitem__(self, i):
            if i >= len(self):
                raise IndexError
            self.asked.append(i)
            return toy(i, "ABA"[i])

    train(Lazy())
    assert Lazy.asked == [0, 1, 2]


# Arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"annotation_key": ["a"] * 30}, "`annotation_key` is of type list; a text"),
        ({"annotation_key": pd.Series(["a"])}, "`annotation_key` is of type Series"),
        ({"sample_key": None}, "`sample_key` is of type NoneType"),
        ({"annotation_key": None, "classes": {"tumour": "x"}}, "`classes` names labels, but `annotation_key` is None"),
        ({"limitations": "None."}, "`limitations` is the text"),
        ({"preset": "best"}, r"`preset` is 'best', valid: \['default', 'he2gene-base', 'he2gene-spat'\]"),
        ({"validation": "leaky"}, r"`validation` is 'leaky', valid: \['grouped', 'random'\]"),
        ({"n_target_genes": 0}, "`n_target_genes` is 0; a whole number from 1"),
        ({"n_target_genes": 2.5}, "`n_target_genes` is 2.5"),
        ({"n_latent": 0}, "`n_latent` is 0"),
        ({"n_recoloured": -1}, "`n_recoloured` is -1; a whole number from 0 is needed"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": -3}, "`batch_size` is -3"),
        ({"batch_size": "8"}, "`batch_size` is '8'"),
        ({"min_spot_share": 1.0}, "`min_spot_share` is 1.0"),
        ({"min_spot_share": -0.1}, "`min_spot_share` is -0.1"),
        ({"stages": (0,)}, r"`stages` is \(0,\); valid for this encoder: None"),
        ({"stages": [2, 4, 2]}, "`stages`: positions are duplicated: 2"),
        ({"name": " "}, "`name` is ' '"),
        ({"version": ""}, "`version` is ''"),
        ({"limitations": ["One.", 1]}, r"`limitations` holds \[1\]; a list of texts"),
        ({"ensembl_ids": {"ERBB2": "ENSG 1"}}, "`ensembl_ids` has {'ERBB2': 'ENSG 1'}"),
        ({"cache": "features", "preset": "he2gene-base"}, "`cache`.*no features to cache"),
        ({"windows_um": (0.0,)}, "windows"),
        ({"windows_um": (-100.0, 200.0)}, "windows"),
        ({"device": "gpu"}, "valid here"),
        ({"dtype": "float8"}, "`dtype`"),
        ({"encoder": "no-such-net"}, "'no-such-net' is unknown"),
        ({"encoder": (torch.nn.Identity(), SPEC)}, "one vector per image"),
    ],
)
def test_invalid_arguments_raise(options, match):
    assert_raises([toy(0, shape=(3, 3)), toy(1, "B", shape=(3, 3))], match, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ignore": "tumour"}, r"`ignore` is the text 'tumour'; a list is needed: \['tumour'\]"),
        ({"ignore": None}, "`ignore` is None"),
        ({"colors": {"tumour": "no colour"}}, "`colors` has"),
        ({"colors": ["red"]}, "`colors` is of type list"),
        ({"merge": ["tumour"]}, "`classes` is of type list"),
    ],
)
def test_invalid_classes_raise(options, match):
    with pytest.raises(ValueError, match=match):
        hg.Classes(**options)


def test_none_keeps_the_classes():
    classes = hg.Classes(merge=None, colors=None)
    assert (classes.merge, classes.colors) == ({}, {})


def test_keys_and_card_must_be_dataclasses():
    assert_raises([], r"`keys` is of type dict; hg.SectionKeys\(...\) is needed", TypeError, keys={"layer": "counts"})
    assert_raises([], r"`card` is of type str; hg.CardText\(...\) is needed", TypeError, card="2")


@pytest.mark.parametrize(
    ("kind", "field"), [(hg.DefaultRecipe, "max_epochs"), (partial(hg.PaperRecipe, "he2gene-base"), "stages")]
)
def test_a_recipe_rejects_fields_of_the_other_recipe(kind, field):
    with pytest.raises(TypeError, match=field):
        kind(**{field: 3})


@pytest.mark.parametrize("sdatas", [None, 3, "C5", ["C5"]])
def test_other_types_raise(sdatas):
    with pytest.raises((ValueError, TypeError), match="sdata"):
        train(sdatas)


def test_arguments_are_checked_before_anything_is_read():
    def never():
        raise AssertionError("read")
        yield

    assert_raises(never(), "`validation`", validation="none")


def test_a_model_rejects_a_network_with_equal_weights_and_another_output(tmp_path):
    path = train(toys(), encoder=(Power(network(), 1.0), SPEC)).save(tmp_path / "model")
    assert hg.models.load(path, encoder=(Power(network(), 1.0), SPEC)).network is not None
    with pytest.raises(ValueError, match="has the same weights but another output"):
        _ = hg.models.load(path, encoder=(Power(network(), 0.25), SPEC)).network


# The machine


def test_missing_weights_raise_and_explain_how_to_get_them(monkeypatch):
    import timm

    def create_model(*_, pretrained, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    assert_raises(
        toys(), "weights of encoder 'resnet50'.*no route to host.*efficientnet-lite0", RuntimeError, encoder="resnet50"
    )


def test_a_full_disk_raises_before_encoding(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with pytest.raises(OSError, match="the disk is full") as raised:
        train(toys(), cache=tmp_path / "cache")
    assert raised.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").iterdir())


def test_too_little_memory_raises_before_reading(monkeypatch):
    monkeypatch.setattr("he2gene_sc.training._memory.memory_of_machine", lambda: 400_000)
    parts = toys()
    parts[0]["table"].X = parts[0]["table"].X.toarray() - 1  # would be refused when read
    assert_raises(
        parts, "features a spot need .* GiB.*`windows_um` or `stages`", MemoryError, encoder="efficientnet-lite0"
    )


def test_an_error_does_not_change_the_input():
    parts = toys()
    table = parts[1]["table"]
    table.obs["section"] = "S0"
    before = table.copy()
    assert_raises(parts, "two sections are named")
    assert parts[1]["table"] is table
    pd.testing.assert_frame_equal(table.obs, before.obs)
    assert sorted(parts[1].tables) == ["table"]


def test_a_gene_without_counts_is_not_learned():
    parts = without_counts_of_the_first_gene()
    model = train(parts, min_spot_share=0.0)
    assert parts[0]["table"].var_names[0] not in model.genes.index
    assert len(model.genes) == 39
    assert isinstance(model, hg.models.HE2Gene)


# Names and labels


def test_patient_names_can_be_numbers_or_text():
    parts = toys()
    for part, patient in zip(parts, (3, 3.0, "4 "), strict=True):
        part["table"].obs["patient"] = pd.Series([patient] * part["table"].n_obs, index=part["table"].obs_names)
    patients = {facts["patient"] for facts in train(parts).card.training["sections"].values()}
    assert patients == {"3", "4"}


def test_missing_labels_as_text_are_missing_and_undetermined_is_not_a_class(caplog):
    parts = toys()
    labels = parts[0]["table"].obs["annotation"].astype(object)
    labels.iloc[:8] = np.nan
    parts[0]["table"].obs["annotation"] = labels.fillna("nan")
    labels = parts[1]["table"].obs["annotation"].astype(object)
    labels.iloc[:8] = "Undetermined"
    parts[1]["table"].obs["annotation"] = labels
    model = train(parts, annotation_key="annotation")
    assert not {"nan", "Undetermined"} & set(model.card.classes)
    assert "S0: 8 labels are missing values converted to text" in caplog.text


def test_missing_labels_in_all_spots_give_a_warning(caplog):
    parts = toys()
    for part in parts:
        part["table"].obs["annotation"] = pd.Series(np.nan, index=part["table"].obs_names, dtype=object)
    assert train(parts, annotation_key="annotation").card.classes == ()
    assert "`annotation_key`: no spot has a label in 'annotation'" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda parts: {"classes": {"tumuor": "cancer"}}, r"`classes` names labels \['tumuor'\]"),
        (
            lambda parts: parts[2]["table"].obs.__setitem__("section", "S0"),
            "two sections are named 'S0'.* also in object 1",
        ),
        (lambda parts: parts[1]["table"].obs.__setitem__("patient", np.nan), r"`sample_key`: values .*\(object 2 of"),
    ],
)
def test_a_list_of_sections_is_checked_before_encoding(monkeypatch, spoil, match):
    parts = toys()
    options = spoil(parts) or {}
    monkeypatch.setattr(
        "he2gene_sc.tl._train.fit.encode_section", lambda *_, **__: pytest.fail("a section was encoded")
    )
    assert_raises(parts, match, annotation_key="annotation", **options)


def test_a_short_gene_list_does_not_increase_the_level_of_its_genes(caplog):
    """One section lists only a few genes, so counts per 10,000 of these genes are too high."""
    parts = toys()
    whole = train(parts)
    genes = whole.genes.sort_values("mean", ascending=False).index
    kept = [*genes[::2]]
    places = parts[1]["table"].var_names.get_indexer(kept)
    full = log_normalise(parts[1]["table"].X).mean(0)[places]
    short = without_genes(parts[1], [gene for gene in genes if gene not in kept])
    model = train([parts[0], short, parts[2]])
    assert "section S1 measures only part of the genes" in caplog.text
    np.testing.assert_allclose(model.genes.loc[kept, "mean"], whole.genes.loc[kept, "mean"], atol=0.1)
    # Without rescaling, they would be too high.
    as_it_stands = log_normalise(short["table"].X).mean(0)[short["table"].var_names.get_indexer(kept)]
    assert (as_it_stands - full).mean() > 0.4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"windows_um": ["100"]}, "`windows_um` is"),
        ({"windows_um": [np.nan]}, "`windows_um` is"),
        ({"min_spot_share": "a"}, "`min_spot_share` is 'a'"),
        ({"seed": -1}, "`seed` is -1"),
        ({"genes": 5}, "`genes` is 5"),
        ({"classes": ["tumour"], "annotation_key": "annotation"}, "`classes` is of type list"),
        ({"classes": {"tumour": 1}, "annotation_key": "annotation"}, "`classes` maps labels to"),
        ({"windows_um": (um for um in (100.0, 200.0))}, "`windows_um` is"),
        ({"windows_um": {100.0, 200.0}}, "`windows_um` is"),
        ({"ensembl_ids": ["a"]}, "`ensembl_ids` is of type list"),
        ({"stages": 3}, "`stages` is 3"),
        ({"cache": 5}, "`cache` is 5"),
        ({"cache": ""}, "`cache` is ''"),
        ({"description": 5}, "`description` is of type int"),
        ({"missing_genes_are_zero": "no"}, "`missing_genes_are_zero` is 'no'"),
    ],
)
def test_errors_name_arguments_of_another_type(options, match):
    assert_raises(toys(), match, **options)


def test_errors_name_sections_of_another_type():
    assert_raises({"a": toy(0)}, "`sdatas` is a dict")
    assert_raises("sections.zarr", "`sdatas` is a str")
    assert_raises([toy(0), "sections.zarr"], r"object 2 of `sdatas`", (TypeError, ValueError))


def test_windows_can_be_an_array_and_genes_a_generator():
    parts = toys()
    genes = list(parts[0]["table"].var_names[:12])
    same_model(
        train(parts, windows_um=np.array([100.0, 200.0]), genes=(gene for gene in genes)),
        train(parts, windows_um=[100.0, 200.0], genes=genes),
    )


def test_a_model_with_few_genes_predicts_a_table_with_many():
    parts = toys()
    genes = list(parts[0]["table"].var_names[:2])
    model = train(parts, genes=genes, n_target_genes=2)
    hg.tl.predict(parts[0], model=model, show_progress_bar=False)
    assert parts[0]["table"].var["he2gene_predicted"].sum() == 2


@pytest.mark.parametrize(
    ("options", "match", "error"),
    [
        ({"max_epochs": 2.5}, "`max_epochs` is 2.5", ValueError),
        ({"lr": float("inf")}, "`lr` is inf", ValueError),
        ({"lr": "a"}, "`lr` is 'a'", ValueError),
        ({"callbacks": None}, "`callbacks` is None", ValueError),
        ({"callbacks": [1]}, r"`callbacks` is \[1\]", ValueError),
        ({"precision": "bf16-true"}, "`precision` is 'bf16-true', valid", ValueError),
        ({"patches_at_once": 1}, "`patches_at_once` is 1", ValueError),
        ({"resume": True}, "`resume` needs the `checkpoint_dir`", ValueError),
        ({"checkpoint_dir": "/proc/x"}, "`checkpoint_dir` '/proc/x' cannot be written", OSError),
    ],
)
def test_invalid_options_of_gradient_training_raise_before_reading(monkeypatch, options, match, error):
    monkeypatch.setattr("he2gene_sc.tl._train.train.read_all", lambda *_: pytest.fail("a section was read"))
    assert_raises(toys(), match, error, preset="he2gene-base", **options)


def test_a_run_in_the_checkpoint_folder_is_not_overwritten(tmp_path):
    (tmp_path / "last.ckpt").write_text("a run")
    assert_raises(
        toys(), "holds a run; continue it with", FileExistsError, preset="he2gene-base", checkpoint_dir=tmp_path
    )


def test_a_label_in_classes_is_not_ignored():
    parts = toys()
    for part in parts:
        labels = part["table"].obs["annotation"].astype(object)
        labels.iloc[:8] = "Undetermined"
        part["table"].obs["annotation"] = labels
    assert "fat" in train(parts, annotation_key="annotation", classes={"Undetermined": "fat"}).card.classes


def test_numeric_labels_are_named_as_in_the_column():
    parts = toys()
    for part in parts:
        part["table"].obs["annotation"] = np.arange(part["table"].n_obs) % 3 + 0.0
        part["table"].obs.iloc[0, part["table"].obs.columns.get_loc("annotation")] = np.nan
    model = train(
        parts, annotation_key="annotation", classes=hg.Classes(merge={0.0: "none", "1 ": "one"}, ignore=(2.0,))
    )
    assert model.card.classes == ("none", "one")


def test_other_containers_are_accepted():
    parts = toys()
    genes = parts[0]["table"].var_names
    ids = pd.Series([f"ENSG{i:011d}" for i in range(len(genes))], index=genes)
    model = train(
        parts,
        annotation_key="annotation",
        ensembl_ids=ids,
        classes=hg.Classes(ignore={"undetermined"}, colors={"tumour": "red"}),
        limitations=np.array(["None of it is real."]),
        version=2,
        missing_genes_are_zero=np.True_,
    )
    assert model.card.version == "2"
    assert dict(zip(model.card.classes, model.card.class_colors, strict=True))["tumour"] == "#ff0000"
    assert model.genes["ensembl_id"].iloc[0].startswith("ENSG")


def test_a_missing_patient_as_text_is_missing():
    parts = toys()
    parts[1]["table"].obs["patient"] = "nan"
    assert_raises(parts, r"`sample_key`: values of 'patient' are missing")


def test_two_sections_that_are_left_out_can_share_a_name(caplog):
    small = [toy(7, shape=(1, 3), section="rest"), toy(8, shape=(1, 3), section="rest")]
    # Sections that are left out need not share genes.
    renamed(small[0], {gene: f"other-{gene}" for gene in small[0]["table"].var_names})
    assert set(train([*toys(), *small]).card.training["sections"]) == {"S0", "S1", "S2"}
    assert caplog.text.count("section rest is left out") == 2


def test_gene_lists_with_few_common_counts_are_not_rescaled(caplog):
    def part(name, genes, counts):
        return MeasuredSection(
            name=name,
            patient=name,
            mpp=1.0,
            slide=None,
            centres=np.zeros((len(counts), 2)),
            genes=pd.Index(genes),
            counts=scipy.sparse.csr_array(counts),
            labels=np.full(len(counts), None, object),
        )

    rng = np.random.default_rng(0)
    parts = [part(name, ["X", f"{name}1", f"{name}2"], rng.poisson((2, 50, 80), (20, 3))) for name in "ABC"]
    chosen = hg.GeneSelection()
    for found, section in zip(totals_of(parts, chosen), parts, strict=True):
        np.testing.assert_array_equal(found, section.counts.sum(axis=1))
    assert "the genes that all sections measured have only" in caplog.text
    parts = [part(name, ["X", f"{name}1"], rng.poisson((100, 50), (200, 2))) for name in "ABC"]
    for found, section in zip(totals_of(parts, chosen), parts, strict=True):
        # Each lists genes with 150 of the 250 counts of a spot.
        assert (found / section.counts.sum(axis=1)).mean() == pytest.approx(250 / 150, rel=0.02)


def test_windows_with_few_pixels_raise_before_encoding():
    assert_raises(
        toys(),
        r"`windows_um`: a window of 10 µm is .* px in section '.*' \(.*\), but at least 8 px .*preset=hg\.",
        windows_um=[10.0, 400.0],
    )
