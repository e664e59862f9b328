"""`hg.datasets.hbcis` on a small folder in the layout of Mendeley 29ntw7sh4r."""

import gzip
import inspect
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.datasets._split import PatientSplit
from he2gene_sc.io import _st
from tests.helpers.hbcis_mini import AMBIGUOUS, DOWN, GENES, SECTIONS, UP

NAMES = [f"{patient}_{replicate}" for patient, replicates in SECTIONS.items() for replicate in replicates]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:section .* spots without counts")]


@pytest.fixture
def root(hbcis_root, tmp_path):
    """Copy of the folder, which a test may change."""
    return shutil.copytree(hbcis_root, tmp_path / "HBCIS")


@pytest.fixture(scope="module")
def section(hbcis_root):
    with warnings.catch_warnings(action="ignore"):
        return hg.datasets.hbcis(hbcis_root)["BC23901_C2"]


def read_counts(root, name):
    return pd.read_csv(root / f"{name}_stdata.tsv.gz", sep="\t", index_col=0)


def read_spots(root, name):
    (path,) = root.glob(f"spots_*{name[2:]}.csv.gz")
    return pd.read_csv(path, index_col=0), path


def write_labels(root, name, lines):
    with gzip.open(root / f"{name}_Coords.tsv.gz", "wt", newline="") as stream:
        stream.write("xcoord\tycoord\tlab\ttumor\t\r" + "\r".join(lines) + "\r")


# --------------------------------------------------------------------------------------- what a section holds


def test_a_section_has_the_shape_of_her2st(section):
    table = section["table"]
    assert list(section.images) == ["he"]
    assert list(section.shapes) == ["spots"]
    assert list(section.tables) == ["table"]
    assert list(table.obs.columns[:4]) == ["array_row", "array_col", "patient", "section"]
    assert {"subtype", "pathologist", "annotation", "annotation_source"} <= set(table.obs)
    assert set(table.obs["patient"]) == {"BC23901"}
    assert set(table.obs["section"]) == {"BC23901_C2"}
    assert set(table.obs["subtype"]) == {"Luminal_A"}
    assert table.X.dtype == np.float32
    assert section["he"].dtype == np.uint8
    assert section["he"].dims == ("c", "y", "x")
    (slide,) = resolve(section)
    assert slide.inside.all()
    assert slide.diameter_um == pytest.approx(100)
    np.testing.assert_array_equal(slide.centres, table.obsm["spatial"])


@pytest.mark.parametrize(("name", "pitch"), [("BC23901_C2", 50), ("BC23209_C1", 57), ("BC23270_E1", 64)])
def test_the_resolution_of_each_section_comes_from_its_pitch(hbcis_root, name, pitch):
    (slide,) = resolve(hg.datasets.hbcis(hbcis_root)[name])
    assert slide.mpp == pytest.approx(200 / pitch)


def test_spots_are_those_of_both_files_in_the_order_of_the_spot_file(hbcis_root, section):
    counts, (spots, _) = read_counts(hbcis_root, "BC23901_C2"), read_spots(hbcis_root, "BC23901_C2")
    expected = [name for name in spots.index if name in counts.index]
    assert list(section["table"].obs_names) == expected
    assert len(expected) == 36 == len(spots) - 1 < len(counts)
    assert list(counts.index[counts.index.isin(expected)]) != expected


def test_counts_and_pixels_are_those_of_the_spot(hbcis_root, section):
    counts, (spots, _) = read_counts(hbcis_root, "BC23901_C2"), read_spots(hbcis_root, "BC23901_C2")
    table = section["table"]
    pd.testing.assert_frame_equal(
        table.to_df().astype(int), counts.loc[table.obs_names, table.var_names], check_names=False, check_dtype=False
    )
    np.testing.assert_array_equal(table.obsm["spatial"], spots.loc[table.obs_names, ["X", "Y"]])
    x, y = zip(*(name.split("x") for name in table.obs_names), strict=True)
    assert table.obs["array_col"].tolist() == [int(i) for i in x]
    assert table.obs["array_row"].tolist() == [int(i) for i in y]


def test_genes_are_the_ensembl_ids_of_the_file_without_ambiguous_reads(hbcis_root, section):
    columns = read_counts(hbcis_root, "BC23901_C2").columns
    assert AMBIGUOUS in columns
    assert section["table"].var_names.tolist() == [c for c in columns if c != AMBIGUOUS]
    assert set(section["table"].var_names) < set(GENES.values())


def test_gene_symbols_are_added_if_their_table_is_installed(section, hbcis_root, monkeypatch):
    from he2gene_sc.datasets import _sections

    monkeypatch.setattr(_sections, "_symbols", lambda: {v: k for k, v in GENES.items() if k != "MUC1"})
    var = hg.datasets.hbcis(hbcis_root)["BC23901_C2"]["table"].var
    assert var.loc[GENES["ERBB2"], "gene_symbols"] == "ERBB2"
    assert var.loc[GENES["MUC1"], "gene_symbols"] == GENES["MUC1"]
    monkeypatch.setattr(_sections, "_symbols", dict)
    assert "gene_symbols" not in hg.datasets.hbcis(hbcis_root)["BC23901_C2"]["table"].var


def test_sections_leave_different_genes_out(hbcis_root):
    genes = [set(sdata["table"].var_names) for sdata in hg.datasets.hbcis(hbcis_root)]
    assert len(set.union(*genes)) > len(set.intersection(*genes)) >= len(UP) + len(DOWN)


def test_labels_are_joined_by_rounded_position_and_missing_ones_stay_missing(hbcis_root, section):
    with gzip.open(hbcis_root / "BC23901_C2_Coords.tsv.gz", "rt") as stream:
        rows = [line.split("\t") for line in stream.read().splitlines()[1:]]
    expected = {
        f"{round(float(x))}x{round(float(y))}": "tumour" if label == "tumor" else "normal" for _, x, y, _, label in rows
    }
    obs = section["table"].obs
    assert obs["annotation"].dropna().astype(str).to_dict() == expected
    assert set(expected.values()) == {"tumour", "normal"}
    assert obs["annotation"].isna().sum() == 1
    assert obs["pathologist"].equals(obs["annotation"])
    assert (obs["annotation_source"].notna() == obs["annotation"].notna()).all()
    assert set(obs["annotation_source"].dropna()) == {"pathologist"}


@pytest.mark.parametrize(
    ("written", "read"), [("tumor", "tumour"), ("Yes", "tumour"), ("non", "normal"), ("no", "normal"), ("NA", None)]
)
def test_labels_in_all_spellings_are_read(root, written, read):
    write_labels(root, "BC23209_C1", [f"C1_7_10\t7\t10\tL1\t{written}", "C1_8_10\t8\t10\tL1\ttumor"])
    label = hg.datasets.hbcis(root)["BC23209_C1"]["table"].obs.loc["7x10", "annotation"]
    assert label == read if read else pd.isna(label)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("xcoord\tycoord\tlab\ttumor\t\rC1_7_10\t7\t10\ttumor\r", "5 fields per line are needed"),
        ("C1_7_10\t7\t10\tL1\ttumor\rC1_8_10\t8\t10\tL1\tnon\r", "the first line .* is not a header"),
        ("C1_7_10\tnan\tnan\t\t\rC1_8_10\t8\t10\tL1\tnon\r", "the first line .* is not a header"),
        ("xcoord\tycoord\tlab\ttumor\t\r", "has no labels"),
        ("", "has no labels"),
    ],
)
def test_label_files_in_another_format_are_refused_by_name(root, content, problem):
    with gzip.open(root / "BC23209_C1_Coords.tsv.gz", "wt", newline="") as stream:
        stream.write(content)
    with pytest.raises(ValueError, match=rf"BC23209_C1_Coords.tsv.gz.*{problem}"):
        hg.datasets.hbcis(root)["BC23209_C1"]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"x\ty\xff\xfe\r"), b"no gzip", gzip.compress(b"x" * 99)[:-12]],
    ids=["no text", "no gzip", "torn"],
)
def test_label_files_that_are_damaged_are_refused_by_name(root, content):
    (root / "BC23209_C1_Coords.tsv.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"BC23209_C1_Coords.tsv.gz is damaged"):
        hg.datasets.hbcis(root)["BC23209_C1"]


# ------------------------------------------------------------------------------------------- the sequence


def test_sections_come_in_the_order_of_the_metadata_and_can_be_read_again(hbcis_root):
    data = hg.datasets.hbcis(hbcis_root)
    assert len(data) == len(NAMES)
    assert data.names == tuple(NAMES)
    assert data.patients == tuple(SECTIONS)
    for _ in range(2):
        assert [sdata["table"].obs["section"].iloc[0] for sdata in data] == NAMES
    assert repr(data) == f"HBCIS: 6 sections of 4 patients in {str(hbcis_root)!r}"


def test_indexing_by_position_slice_and_name(hbcis_root):
    data = hg.datasets.hbcis(hbcis_root)
    assert data[-1]["table"].obs["section"].iloc[0] == NAMES[-1]
    assert data[1:3].names == tuple(NAMES[1:3])
    assert data["BC23270_D2"]["table"].obs["patient"].iloc[0] == "BC23270"
    with pytest.raises(IndexError):
        data[6]
    with pytest.raises(KeyError, match="section 'D9' is unknown, valid: BC23901_C2"):
        data["D9"]


def test_an_image_is_decoded_when_its_section_is_accessed(hbcis_root, monkeypatch):
    decoded = []
    decode = _st.decode
    monkeypatch.setattr(_st, "decode", lambda path: decoded.append(path.name) or decode(path))
    data = hg.datasets.hbcis(hbcis_root)
    assert (len(data), data.names[0], decoded) == (6, "BC23901_C2", [])
    sections = iter(data)
    next(sections)
    assert decoded == ["HE_BT23901_C2.jpg"]
    next(sections)
    data[2]
    assert decoded == ["HE_BT23901_C2.jpg", "HE_BT23901_D1.jpg", "HE_BC23209_C1.jpg"]


def test_iterating_does_not_keep_sections(hbcis_root):
    sections = iter(hg.datasets.hbcis(hbcis_root))
    next(sections)
    assert not any(hasattr(value, "images") for value in inspect.getgeneratorlocals(sections).values())


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"patients": ["BC23270"]}, ["BC23270_D2", "BC23270_E1"]),
        ({"patients": ("BC23287", "BC23209")}, ["BC23209_C1", "BC23287_C1"]),
        ({"patients": "BC23287"}, ["BC23287_C1"]),
        ({"sections": ["BC23270_E1", "BC23901_C2"]}, ["BC23901_C2", "BC23270_E1"]),
        ({"patients": ["BC23270"], "sections": ["BC23270_E1", "BC23901_C2"]}, ["BC23270_E1"]),
    ],
)
def test_patients_and_sections_are_selected(hbcis_root, chosen, names):
    assert list(hg.datasets.hbcis(hbcis_root, **chosen).names) == names


# ------------------------------------------------------------------------------------------ other layouts


def test_the_data_may_be_in_the_folder_of_the_archive(root, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.move(root, outer / "Human breast cancer in situ capturing transcriptomics")
    assert len(hg.datasets.hbcis(outer)) == 6


def test_unpacked_files_are_found(root, section):
    for path in root.glob("*BT23901_C2*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    for path in root.glob("BC23901_C2*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    again = hg.datasets.hbcis(root)["BC23901_C2"]["table"]
    assert (again.X != section["table"].X).nnz == 0
    assert again.obs["annotation"].equals(section["table"].obs["annotation"])


def test_further_columns_and_the_other_name_of_the_labels_are_accepted(root):
    frame = pd.read_csv(root / "metadata.csv").rename(columns={"tumor_annotation": "tumor"})
    frame.assign(age=50)[::-1].to_csv(root / "metadata.csv", index=False)
    assert hg.datasets.hbcis(root).names == tuple(NAMES[::-1])


def test_names_of_spots_written_as_floats_are_the_same_spots(root, section):
    counts = read_counts(root, "BC23901_C2")
    counts.index = [f"{x}.0x{y}.0" for x, y in (name.split("x") for name in counts.index)]
    counts.to_csv(root / "BC23901_C2_stdata.tsv.gz", sep="\t")
    assert (hg.datasets.hbcis(root)["BC23901_C2"]["table"].X != section["table"].X).nnz == 0


# -------------------------------------------------------------------------------------- errors and warnings


def test_a_missing_root_and_a_root_without_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match="`root` .*nowhere.*: no such folder"):
        hg.datasets.hbcis(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="`root` .* has no metadata.csv.*29ntw7sh4r"):
        hg.datasets.hbcis(tmp_path)


@pytest.mark.parametrize(
    ("dropped", "problem"),
    [("patient", r"lacks the columns \['patient'\]; it has"), ("tumor_annotation", "tumor_annotation or tumor")],
)
def test_missing_columns_of_the_metadata_are_named(root, dropped, problem):
    pd.read_csv(root / "metadata.csv").drop(columns=dropped).to_csv(root / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hbcis(root)


def test_an_empty_field_and_a_repeated_section_of_the_metadata(root):
    frame = pd.read_csv(root / "metadata.csv")
    pd.concat([frame, frame[:1]]).to_csv(root / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"names sections twice: \['BC23901_C2'\]"):
        hg.datasets.hbcis(root)
    frame.loc[2, "count_matrix"] = None
    frame.to_csv(root / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"empty fields in the lines \[4\]"):
        hg.datasets.hbcis(root)


def test_all_missing_files_are_named(root):
    (root / "HE_BT23901_C2.jpg").unlink()
    (root / "BC23209_C1_stdata.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        hg.datasets.hbcis(root)
    problem = str(caught.value)
    assert "2 files" in problem
    assert "BC23901_C2: histology_image, looked for as HE_BT23901_C2.jpg" in problem
    assert "BC23209_C1: count_matrix, looked for as BC23209_C1_stdata.tsv.gz or BC23209_C1_stdata.tsv" in problem
    assert len(hg.datasets.hbcis(root, patients="BC23270")) == 2


@pytest.mark.parametrize("parameter", ["patients", "sections"])
def test_unknown_patients_and_sections_are_named_with_the_known(hbcis_root, parameter):
    with pytest.raises(ValueError, match=rf"`{parameter}` \['BC1'\] are not in metadata.csv, which has BC23901"):
        hg.datasets.hbcis(hbcis_root, **{parameter: ["BC1"]})


def test_an_empty_selection_is_an_error(hbcis_root):
    with pytest.raises(ValueError, match="no section is left"):
        hg.datasets.hbcis(hbcis_root, patients=["BC23270"], sections=["BC23901_C2"])
    with pytest.raises(ValueError, match="no section is left"):
        hg.datasets.hbcis(hbcis_root, patients=[])


def test_spots_without_counts_and_rows_without_coordinates_give_one_warning(root):
    write_labels(
        root,
        "BC23209_C1",
        ["C1_7_10\t7.4\t10\tL1\ttumor", "C1_7_10\t6.6\t10\tL2\tnon", "C1_?\t\t\tL1\tnon", "C1_8_10\t8\t10\tL1\tnon"],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        obs = hg.datasets.hbcis(root)["BC23209_C1"]["table"].obs
    problem = [str(w.message) for w in caught if "section" in str(w.message)]
    assert problem == [
        "section 'BC23209_C1': 1 spots without counts are dropped; 1 rows of labels without coordinates are dropped; "
        "1 spots with two different labels are left without one"
    ]
    assert obs["annotation"].dropna().to_dict() == {"8x10": "normal"}


def break_counts(root, name, change):
    frame = change(read_counts(root, name))
    frame.to_csv(root / f"{name}_stdata.tsv.gz", sep="\t")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda f: f.set_axis([f"{i + 90}x90" for i in range(len(f))]),
            "0 of 37 spots .* check that the files belong together",
        ),
        (lambda f: f.set_axis([f"spot{i}" for i in range(len(f))]), r"rows have to be named .* found \['spot0'"),
        (lambda f: f.set_axis([*f.index[:-1], f.index[0]]), "names spots twice"),
        (lambda f: f.set_axis([*f.columns[:-1], f.columns[0]], axis=1), r"duplicated genes: \['ENSG00000141736'\]"),
        (lambda f: f + 0.5, "are not raw counts"),
    ],
)
def test_invalid_counts_are_refused(root, change, problem):
    break_counts(root, "BC23209_C1", change)
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hbcis(root)["BC23209_C1"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.rename(columns={"X": "x"}), r"lacks the columns \['X'\]; it has \['x', 'Y'\]"),
        (lambda f: f.assign(X=f["X"].where(f.index != "8x10")), r"spots \['8x10'\] have no pixels"),
        (lambda f: f.sample(frac=1, random_state=0).set_axis(f.index), "px from the array positions"),
        (lambda f: f[:6], "one row or column"),
        (lambda f: f + 300, "spots lie outside HE_BC23209_C1.jpg"),
    ],
)
def test_invalid_spot_files_are_refused(root, change, problem):
    frame, path = read_spots(root, "BC23209_C1")
    change(frame).to_csv(path)
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hbcis(root)["BC23209_C1"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("C1_7_10\t7\t10\tL1\tmaybe", r"has the labels \['maybe'\], valid"),
        ("C1_7_10\tL1\t7\t10\ttumor", "second and third field have to be array positions"),
        ("C1_7_10\t7\t10\tL1\ttumor\tmore", r"5 fields per line are needed .* see the lines \[2\]"),
        ("C1_90_90\t90\t90\tL1\ttumor", "no label of .* belongs to a spot of the counts"),
    ],
)
def test_invalid_label_files_are_refused(root, line, problem):
    write_labels(root, "BC23209_C1", [line])
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hbcis(root)["BC23209_C1"]


def test_a_damaged_image_is_an_error_that_names_it(root):
    path = root / "HE_BC23209_C1.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="HE_BC23209_C1.jpg"):
        hg.datasets.hbcis(root)["BC23209_C1"]


def test_an_image_of_another_size_is_refused(root):
    Image.new("RGB", (100, 100)).save(root / "HE_BC23209_C1.jpg")
    with pytest.raises(ValueError, match=r"36 spots lie outside .*100 × 100"):
        hg.datasets.hbcis(root)["BC23209_C1"]


# ------------------------------------------------------------------------------------------------ the split


def test_the_split_of_the_paper_has_18_and_5_different_patients():
    split = hg.datasets.HE2GENE_SPLIT
    assert (len(split.train), len(split.test), len(split.patients)) == (18, 5, 23)
    assert set(split.test) == {"BC23377", "BC23268", "BC23508", "BC23903", "BC23287"}
    assert not set(split.train) & set(split.test)
    assert list(split.patients) == sorted({*split.train, *split.test})
    with pytest.raises(AttributeError):
        split.train = ()


def test_a_split_with_a_patient_on_both_sides_is_refused():
    with pytest.raises(ValueError, match=r"\['a'\] are named twice"):
        PatientSplit(train=("a", "b"), test=("a",))


# ----------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_a_model_trained_on_hbcis_finds_the_tumour_of_another_patient(hbcis_root, small_lite0):
    # Stain and resolution vary between patients; outside the range of training, a slide is out of distribution.
    data = hg.datasets.hbcis(hbcis_root, patients=["BC23901", "BC23270", "BC23287"])
    model = hg.tl.train(
        data,
        annotation_key="annotation",
        preset=hg.DefaultRecipe(windows_um=(150.0,), n_recoloured=0),
        genes=hg.GeneSelection(missing_genes_are_zero=True, n_target_genes=20, ensembl_ids={}),
        device="cpu",
    )
    assert set(model.card.classes) == {"normal", "tumour"}
    assert set(model.card.training["sections"]) == set(NAMES) - {"BC23209_C1"}
    assert {GENES[name] for name in (*UP, *DOWN)} <= set(model.genes.index)
    test = hg.datasets.hbcis(hbcis_root, patients="BC23209")[0]
    hg.tl.predict(test, model=model)
    obs = test["table"].obs
    known = obs["annotation"].notna()
    assert (obs["annotation"].astype(str) == obs["he2gene_annotation"].astype(str))[known].mean() > 0.75
    predicted = test["table"].to_df("he2gene")[GENES["ERBB2"]]
    measured = test["table"].to_df()[GENES["ERBB2"]]
    assert np.corrcoef(predicted, measured)[0, 1] > 0.3


# ------------------------------------------------------------------------------------------- command line


@pytest.fixture
def train(train_by_file, tmp_path, hbcis_root):
    (tmp_path / "HBCIS").symlink_to(hbcis_root, target_is_directory=True)
    return train_by_file


def test_a_training_file_names_the_folder_relative_to_itself_and_patients(train):
    sdatas, options = train(
        '[data]\nhbcis = "HBCIS"\npatients = ["BC23270"]\n[train.genes]\nmissing_genes_are_zero = true\n'
    )
    assert sdatas.names == ("BC23270_D2", "BC23270_E1")
    assert options == {"genes": hg.GeneSelection(missing_genes_are_zero=True)}
    assert train('[data]\nhbcis = "HBCIS"\n')[0].names == tuple(NAMES)
    assert train('[data]\nhbcis = "HBCIS"\nsections = ["BC23287_C1"]\n')[0].names == ("BC23287_C1",)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_training_file_may_name_the_split(train, part, monkeypatch):
    split = PatientSplit(train=("BC23209", "BC23270"), test=("BC23287",))
    monkeypatch.setattr(hg.datasets, "HE2GENE_SPLIT", split)
    assert train(f'[data]\nhbcis = "HBCIS"\npatients = "HE2GENE_SPLIT.{part}"\n')[0].patients == getattr(split, part)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[data]\nhbcis = "HBCIS"\npatients = "BC23270"\n',
            r"`patients` is 'BC23270', valid: \['HE2GENE.*; or pass a list",
        ),
        ('[data]\npatients = ["BC23270"]\n', r"\[data\] lacks `stores`, .* or `hbcis`"),
        ('[data]\nhbcis = "HBCIS"\nother = 1\n', "config.toml is not valid: `data.other` is not a field"),
        ('sections = ["C5"]\n[data]\nhbcis = "HBCIS"\n', r"either a list `sections` or a table \[data\]"),
        ("[train]\n", r"either a list `sections` or a table \[data\]"),
        ('[data]\nhbcis = "elsewhere"\n', "`root` .*elsewhere.*: no such folder"),
    ],
)
def test_a_training_file_without_data_is_refused(train, text, problem):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        train(text)
