"""`hg.datasets.hest` on a small folder in the layout of HEST-1k."""

import gc
import re
import shutil
import warnings
import weakref
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.datasets import _hest
from he2gene_sc.io._tiled import TiledImage
from he2gene_sc.tl._train.options import TrainingKeys
from he2gene_sc.tl._train.train import read_all
from tests.helpers.hbcis_mini import AMBIGUOUS, GENES
from tests.helpers.hest_mini import CELLS, CONTROLS, HBCIS, HER2ST, PITCH, SAMPLES, SIDE, STAHL, XENIUM, write_hest
from tests.helpers.toy_sections import own

NAMES = tuple(SAMPLES)
pytestmark = pytest.mark.filterwarnings("ignore:2 of 10 samples")


@pytest.fixture(scope="module")
def hest_root(tmp_path_factory):
    return write_hest(tmp_path_factory.mktemp("hest") / "HEST")


@pytest.fixture
def root(hest_root, tmp_path):
    """Copy of the folder, which a test may change."""
    return shutil.copytree(hest_root, tmp_path / "HEST")


@pytest.fixture(scope="module")
def data(hest_root):
    return hg.datasets.hest(hest_root, organ="Breast")


def stored(root, name):
    return anndata.read_h5ad(root / "st" / f"{name}.h5ad")


# ---------------------------------------------------------------------------------------- what a sample holds


def test_a_sample_has_the_shape_of_her2st(data, hest_root):
    sdata = data["SPA130"]
    table, raw = sdata["table"], stored(hest_root, "SPA130")
    assert (list(sdata.images), list(sdata.shapes), list(sdata.tables)) == (["he"], ["spots"], ["table"])
    assert {"array_row", "array_col", "patient", "section", "dataset", "technology"} <= set(table.obs)
    assert set(table.obs["section"]) == {"SPA130"}
    assert set(table.obs["dataset"]) == {HER2ST}
    assert AMBIGUOUS not in table.var_names
    np.testing.assert_array_equal(table.X.toarray(), raw[:, table.var_names].X.toarray())
    np.testing.assert_array_equal(table.obsm["spatial"], raw.obsm["spatial"])
    assert "downscaled_fullres" not in str(table.uns)


@pytest.mark.parametrize(
    ("name", "mpp", "diameter_um"),
    [("SPA130", 200 / 60, 100.0), ("TENX39", 100 / 60, 55.0), ("TENX97", 100 / 60, 100.0), ("TENX99", 100 / 60, 100.0)],
)
def test_the_estimated_resolution_and_the_diameter_are_used(data, name, mpp, diameter_um):
    sdata = data[name]
    slide = resolve(sdata)[0]
    assert slide.mpp == pytest.approx(mpp)
    assert sdata["spots"]["radius"].iloc[0] == pytest.approx(diameter_um / mpp / 2)


def test_spots_off_the_tissue_are_left_out(data, hest_root):
    assert data["TENX39"]["table"].n_obs == SIDE * (SIDE - 1)
    assert stored(hest_root, "TENX39").n_obs == SIDE**2


@pytest.mark.parametrize("values", [[True, False], ["True", "False"], ["1", "0"], [1.0, 0.0]])
@pytest.mark.parametrize("dtype", [None, "category"])
def test_all_spellings_of_in_tissue_are_read(root, values, dtype):
    table = stored(root, "SPA0")
    table.obs["in_tissue"] = pd.Series(np.repeat(values, [10, 15]), index=table.obs_names, dtype=dtype)
    table.write_h5ad(root / "st/SPA0.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert hg.datasets.hest(root, ids="SPA0")[0]["table"].n_obs == 10


def test_xenium_samples_are_squares_without_controls(data, hest_root):
    table = data["TENX97"]["table"]
    assert set(table.var_names) == set(GENES)
    assert set(CONTROLS) <= set(stored(hest_root, "TENX97").var_names)
    assert table.n_obs == SIDE**2


def test_cells_of_xenium_are_summed_into_squares(data, hest_root):
    table, cells = data["TENX99"]["table"], stored(hest_root, "TENX99")
    spots = pd.Series(cells.X[:, cells.var_names == "ACTB"].toarray().ravel())
    at = np.floor((cells.obsm["spatial"] - cells.obsm["spatial"].min(axis=0)) / PITCH).astype(int)
    planted = spots.groupby([f"{row:04d}x{column:04d}" for column, row in at]).sum()
    found = table.to_df()["ACTB"]
    assert len(table) < len(cells)
    pd.testing.assert_series_equal(found, planted, check_names=False, check_dtype=False, check_index_type=False)
    step = np.diff(np.unique(table.obsm["spatial"][:, 0]))
    np.testing.assert_allclose(step, PITCH)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_columns_of_one_gene_are_summed(root):
    table = stored(root, "SPA130")
    table.var_names = ["ACTB" if name == "GAPDH" else name for name in table.var_names]
    table.write_h5ad(root / "st/SPA130.h5ad")
    found = hg.datasets.hest(root, ids="SPA130")[0]["table"]
    assert found.var_names.is_unique
    expected = table.X[:, table.var_names == "ACTB"].toarray().sum(axis=1)
    np.testing.assert_array_equal(found[:, "ACTB"].X.toarray().ravel(), expected)


def test_patients_are_unique_over_data_sets(data):
    patient = dict(zip(data.names, data.metadata["patient"], strict=True))
    assert patient["SPA118"] == f"{HBCIS}: BC23287"
    assert (patient["TENX99"], patient["TENX97"]) == (f"{CELLS}: patient 1", f"{XENIUM}: patient 1")
    assert patient["SPA0"] == patient["SPA1"] == STAHL
    assert data["SPA118"]["table"].obs["patient"].unique().tolist() == [patient["SPA118"]]


def test_a_patient_of_her2st_that_is_one_of_hbcis_has_one_name(data, hest_root):
    patient = data.metadata["patient"]
    assert hg.datasets.HER2ST_IN_HBCIS["E"] == "BC23567"
    assert patient["SPA130"] == patient["SPA102"] == f"{HBCIS}: BC23567"
    assert len(data.patients) == 6


# ----------------------------------------------------------------------------------------------- the sequence


def test_samples_come_in_the_order_of_the_table_and_are_read_on_access(hest_root, monkeypatch):
    read = []
    monkeypatch.setattr(_hest, "_open", lambda path, f=_hest._open: read.append(path.stem) or f(path))
    data = hg.datasets.hest(hest_root, organ="Breast")
    assert (data.names, len(data), read) == (NAMES, 8, [])
    assert data[1:3].names == NAMES[1:3]
    assert data[-1]["table"].obs["section"].iloc[0] == NAMES[-1]
    assert read == ["SPA0"]
    assert repr(data) == f"HEST-1k: 8 sections of 6 patients in {str(hest_root)!r}"
    with pytest.raises(KeyError, match="section 'D9' is unknown, valid: TENX99"):
        data["D9"]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"ids": "SPA0"}, ("SPA0",)),
        ({"ids": ("SPA0", "TENX99")}, ("TENX99", "SPA0")),
        ({"technology": "xenium"}, ("TENX99", "TENX97")),
        ({"technology": ["Xenium", "Visium"], "species": "human"}, ("TENX99", "TENX97", "TENX39")),
        ({"organ": "breast", "technology": "ST", "ids": ["SPA0", "TENX99"]}, ("SPA0",)),
        ({"species": "Homo sapiens", "organ": "Breast"}, NAMES),
    ],
)
def test_samples_are_selected(hest_root, chosen, names):
    assert hg.datasets.hest(hest_root, **chosen).names == names


def test_json_files_of_the_samples_replace_the_table(root, data):
    for path in root.glob("HEST_v*.csv"):
        path.unlink()
    found = hg.datasets.hest(root, organ="Breast")
    assert sorted(found.names) == sorted(NAMES)
    assert found.metadata["patient"].to_dict() == data.metadata["patient"].to_dict()
    assert resolve(found["TENX39"])[0].mpp == pytest.approx(100 / 60)
    (root / "metadata/SPA0.json").write_text("{", encoding="utf-8")
    with pytest.raises(OSError, match=r"SPA0.json is damaged or not JSON"):
        hg.datasets.hest(root)


# ------------------------------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ({"ids": ["SPA0", "SPA9"]}, r"`ids` \['SPA9'\] are not in HEST_v1_1_0.csv, .*near 'SPA9'"),
        (
            {"organ": "Brest"},
            r"`organ` \['Brest'\] are not .* which has Breast, Brain, Kidney; near 'Brest': \['Breast'\]",
        ),
        ({"species": ["human", "rat"]}, r"`species` \['rat'\] are not in .* which has Homo sapiens, Mus musculus"),
        ({"technology": "CosMx"}, r"`technology` \['CosMx'\] are not .* Xenium, Visium, Spatial Transcriptomics"),
        ({"technology": 3}, "`technology` is 3; a list of texts is needed"),
        ({"organ": "Brain", "species": "human"}, "no sample of HEST_v1_1_0.csv is left .*`species` 'human'"),
        ({"ids": []}, "no sample of HEST_v1_1_0.csv is left"),
    ],
)
def test_unknown_names_are_refused_with_the_known(hest_root, chosen, problem):
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hest(hest_root, **chosen)


def test_missing_samples_raise_if_named_by_id_and_are_otherwise_warned_of(hest_root):
    with pytest.raises(FileNotFoundError, match=r"MEND1: st.MEND1.h5ad\n.*MEND1: wsis.MEND1.tif"):
        hg.datasets.hest(hest_root, ids=["SPA0", "MEND1"])
    with pytest.warns(UserWarning, match="2 of 10 samples that HEST_v1_1_0.csv lists are not in .* MEND1, NCBI500"):
        assert hg.datasets.hest(hest_root).names == NAMES
    with pytest.raises(FileNotFoundError, match=r"none of the 1 selected samples .*huggingface"):
        hg.datasets.hest(hest_root, organ="Kidney")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hg.datasets.hest(hest_root, organ="Breast")


def test_samples_with_a_missing_value_to_select_by_are_warned_of(root):
    change_table(root, lambda f: f.assign(species=f["species"].where(f["id"] != "SPA1")))
    with pytest.warns(UserWarning, match="1 samples .* have no `species` in HEST_v1_1_0.csv and are left out: SPA1"):
        assert hg.datasets.hest(root, ids=["SPA0", "SPA1"], species="human").names == ("SPA0",)


def test_samples_with_missing_metadata_are_left_out_with_a_warning(root):
    change_table(root, lambda f: f[f["id"] != "SPA0"].assign(species=f["species"].where(f["id"] != "SPA1")))
    change_table(
        root, lambda f: f.assign(pixel_size_um_estimated=f["pixel_size_um_estimated"].where(f["id"] != "TENX39"))
    )
    with pytest.warns(UserWarning, match="left out") as found:
        names = hg.datasets.hest(root, organ="Breast", species="human").names
    assert set(NAMES) - set(names) == {"SPA0", "SPA1", "TENX39"}
    problem = [str(warning.message) for warning in found]
    for message, expected in zip(
        problem,
        [
            "are not in HEST_v1_1_0.csv.*: SPA0;",
            "have no `species` in .*: SPA1;",
            "no `pixel_size_um_estimated` .*: TENX39;",
        ],
        strict=True,
    ):
        assert re.search(expected, message)
    # A sample that is named by id raises when it is read.
    with pytest.raises(ValueError, match="sample 'TENX39': `pixel_size_um_estimated` is nan"):
        hg.datasets.hest(root, ids="TENX39")[0]


def test_samples_of_several_species_are_warned_of(root):
    change_table(root, lambda f: f.assign(species=f["species"].where(f["id"] != "SPA1", "Mus musculus")))
    with pytest.warns(UserWarning, match=r"of 2 species \(Homo sapiens 7, Mus musculus 1\).*species='human'"):
        hg.datasets.hest(root, organ="Breast")


def test_names_of_patients_ignore_case(root):
    change_table(
        root, lambda f: f.assign(patient=f["patient"].mask(f["id"] == "SPA0", "p1").mask(f["id"] == "SPA1", "P1"))
    )
    patient = hg.datasets.hest(root, organ="Breast").metadata["patient"]
    assert patient["SPA0"] == patient["SPA1"] == f"{STAHL}: P1"


def test_a_sample_with_one_of_two_files_is_an_error(root):
    (root / "wsis/SPA1.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .* are missing .*\n  SPA1: wsis.SPA1.tif"):
        hg.datasets.hest(root, organ="Breast")


def test_a_folder_without_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="`root` .*nowhere.*: no such folder"):
        hg.datasets.hest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has neither a table HEST_v1_1_0.csv nor .*huggingface"):
        hg.datasets.hest(tmp_path)


def change_table(root, change):
    path = root / "HEST_v1_1_0.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.drop(columns="organ"), r"lacks the columns \['organ'\]"),
        (lambda f: pd.concat([f, f[:1]]), r"names samples twice: \['TENX99'\]"),
        (lambda f: f.assign(id=f["id"].where(f["id"] != "SPA0")), "rows without an id"),
    ],
)
def test_invalid_tables_are_refused(root, change, problem):
    change_table(root, change)
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hest(root)


def test_a_sample_without_resolution_is_refused_when_it_is_read(root):
    change_table(root, lambda f: f.assign(pixel_size_um_estimated=np.nan))
    data = hg.datasets.hest(root, ids="SPA0")
    with pytest.raises(ValueError, match="sample 'SPA0': `pixel_size_um_estimated` is nan"):
        data[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.obsm.pop("spatial"), r"SPA0.h5ad lacks obsm\['spatial'\]"),
        (lambda t: t.obsm.update(spatial=t.obsm["spatial"] * 9), r"\d+ of 25 spots lie outside SPA0.tif"),
        (lambda t: t.obsm.update(spatial=np.full((25, 2), np.nan)), "spots .* have no pixels"),
        (lambda t: setattr(t, "X", t.X + t.X * 0.5), "X does not hold raw counts"),
        (
            lambda t: (t.layers.update(raw=t.X), setattr(t, "X", None)),
            r"SPA0.h5ad has no X; .* from a layer of \['raw'\]",
        ),
        (lambda t: setattr(t, "obs_names", ["a"] * t.n_obs), r"names spots twice: \['a'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_invalid_counts_are_refused(root, change, problem):
    table = stored(root, "SPA0")
    change(table)
    table.write_h5ad(root / "st/SPA0.h5ad")
    with pytest.raises(ValueError, match=problem):
        hg.datasets.hest(root, ids="SPA0")[0]


def test_a_damaged_file_is_an_error_that_names_it(root):
    path = root / "st/SPA0.h5ad"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match=r"SPA0.h5ad is damaged"):
        hg.datasets.hest(root, ids="SPA0")[0]


# ------------------------------------------------------------------------------------------------ the split


def test_the_split_of_the_paper_names_the_samples_of_both_sets():
    split = hg.datasets.HE2GENE_SPLIT
    assert (len(split.hest_train), len(split.hest_test), len(split.hest_her2st)) == (53, 15, 36)
    everything = [*split.hest_train, *split.hest_test, *split.hest_her2st]
    assert len(set(everything)) == 104
    assert sorted(split.hest_train + split.hest_test, key=lambda name: int(name[3:])) == [
        f"SPA{i}" for i in range(51, 119)
    ]
    assert "SPA118" in split.hest_test
    assert "SPA102" in split.hest_train
    assert (split.hest_her2st[0], split.hest_her2st[-1]) == ("SPA119", "SPA154")
    assert {*split.hest_ids} == {*split.patients}


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_training_holds_one_image_at_a_time(hest_root, monkeypatch):
    held, images = [], weakref.WeakSet()
    begin = TiledImage.__init__

    def init(self, path, *args):
        images.add(self)
        begin(self, path, *args)

    def read(path, f=_hest._open):
        held.append(len({image.path for image in images}))
        return f(path)

    monkeypatch.setattr(TiledImage, "__init__", init)
    monkeypatch.setattr(_hest, "_open", read)
    data = hg.datasets.hest(hest_root, organ="Breast", technology="ST")
    gc.collect()
    genes = hg.GeneSelection(n_target_genes=20, ensembl_ids=GENES)
    preset = hg.DefaultRecipe(windows_um=(150.0,))
    model = hg.tl.train(data, encoder=own(), preset=preset, genes=genes, device="cpu")
    # The image of a sample is freed before the next one is opened.
    assert held == [0] * 5
    assert set(model.card.training["sections"]) == set(NAMES[3:])
    assert model.card.training["n_patients"] == 3
    # Ensembl ids of one study and symbols of the others refer to the same genes.
    assert set(model.genes.index) <= set(GENES)


def test_mirrored_spots_are_warned_of_in_samples_that_are_read_one_by_one(root):
    table = stored(root, "SPA0")
    table.obsm["spatial"][:, 0] = (SIDE + 1) * PITCH - table.obsm["spatial"][:, 0]
    table.write_h5ad(root / "st/SPA0.h5ad")
    data = hg.datasets.hest(root, ids=["SPA0", "SPA1"])
    with pytest.warns(UserWarning, match="x or y of the spots looks mirrored"):
        list(read_all(data, TrainingKeys(None, "patient", "section"), {}, hg.GeneSelection(), hg.Classes()))


def test_a_sample_with_two_ids_is_warned_of(root, caplog):
    shutil.copy(root / "st/SPA0.h5ad", root / "st/SPA1.h5ad")
    data = hg.datasets.hest(root, ids=["SPA0", "SPA1", "SPA102"])
    list(read_all(data, TrainingKeys(None, "patient", "section"), {}, hg.GeneSelection(), hg.Classes()))
    assert "sections SPA1 and SPA0 have the same counts" in caplog.text
    assert caplog.text.count("same counts") == 1


@pytest.fixture
def train(train_by_file, tmp_path, hest_root):
    (tmp_path / "HEST").symlink_to(hest_root, target_is_directory=True)
    return lambda text: train_by_file(text)[0]


def test_a_training_file_names_the_folder_and_selects_samples(train):
    assert train('[data]\nhest = "HEST"\norgan = "Breast"\ntechnology = ["ST", "Visium"]\n').names == NAMES[2:]
    assert train('[data]\nhest = "HEST"\nids = ["SPA0"]\nspecies = "human"\n').names == ("SPA0",)


def test_a_training_file_may_name_the_split(train, monkeypatch):
    split = hg.datasets.HE2GENE_SPLIT
    small = type(split)(("BC23567",), ("BC23287",), {"BC23567": ("SPA102",), "BC23287": ("SPA118",)}, ("SPA130",))
    monkeypatch.setattr(hg.datasets, "HE2GENE_SPLIT", small)
    for part, name in (("hest_train", "SPA102"), ("hest_test", "SPA118"), ("hest_her2st", "SPA130")):
        assert train(f'[data]\nhest = "HEST"\nids = "HE2GENE_SPLIT.{part}"\n').names == (name,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[data]\nhest = "HEST"\nids = "SPA0"\n',
            r"`ids` is 'SPA0', valid: \['HE2GENE_SPLIT.hest_train.*; or pass a list",
        ),
        ('[data]\nhest = "HEST"\nhbcis = "HBCIS"\n', r"\[data\] names \['hbcis', 'hest'\]; one of them is needed"),
        ('[data]\nhest = "HEST"\npatients = ["A"]\n', r"\[data\] \['patients'\] do not go with `hest`, which takes"),
        ('[data]\nhbcis = "HBCIS"\norgan = "Breast"\n', r"\[data\] \['organ'\] do not go with `hbcis`"),
        ('[data]\nhest = "HEST"\norgan = 3\n', "config.toml is not valid: `data.organ"),
        ('[data]\nhest = "HEST"\norgan = "Brest"\n', r"`organ` \['Brest'\] are not in HEST_v1_1_0.csv"),
    ],
)
def test_a_training_file_without_a_valid_selection_is_refused(train, text, problem):
    with pytest.raises(ValueError, match=problem):
        train(text)


def test_the_training_files_in_the_docs_are_valid(train, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    files = re.findall(r"```toml\n(.*?)```", page, re.S)
    asked = []
    monkeypatch.setattr(hg.datasets, "hest", lambda root, **chosen: asked.append(chosen))
    for text in files:
        train(text)
    assert asked[0] == {"ids": hg.datasets.HE2GENE_SPLIT.hest_train}
    assert asked[1] == {"organ": "Breast", "species": "human", "technology": ["Spatial Transcriptomics", "Visium"]}
