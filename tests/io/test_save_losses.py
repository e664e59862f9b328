"""`hg.io.save` raises if elements, rows, columns or transformations would be lost, or if files of images are missing."""

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from anndata.io import write_elem
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel
from spatialdata.transformations import Scale, get_transformation, set_transformation

import he2gene_sc as hg
from he2gene_sc._core import concurrent_changes
from he2gene_sc._core.equality import is_same_value, same_column
from he2gene_sc.io import _files

pytestmark = pytest.mark.slow


def small_toy(mpp):
    """Make a slide whose table has few columns, since each is several files."""
    sdata = hg.datasets.toy((3, 4), mpp=mpp)
    table = sdata["table"]
    table.obs, table.var = table.obs[["region", "instance_id", "annotation"]], table.var[[]]
    return sdata


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """Store that each test copies."""
    path = tmp_path_factory.mktemp("small") / "slide.zarr"
    sdata = small_toy(2.0)
    sdata.points["cells"] = PointsModel.parse(pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}))
    sdata.write(path)
    return path


@pytest.fixture
def store(small_store, tmp_path):
    return Path(shutil.copytree(small_store, tmp_path / "slide.zarr"))


def test_a_store_that_was_moved_is_not_replaced_by_a_black_image(store, tmp_path):
    sdata = sd.read_zarr(store)
    store.rename(tmp_path / "old.zarr")
    with pytest.raises(FileNotFoundError, match="slide.zarr', does not exist: was it moved"):
        hg.io.save(sdata)
    for path in (store, tmp_path / "new.zarr"):
        with pytest.raises(FileNotFoundError, match=r"images\['he'\] reads .*slide\.zarr.*which does not exist"):
            hg.io.save(sdata, path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.zarr"]


def test_an_image_with_missing_files_is_neither_predicted_nor_saved(store, tiny_model, monkeypatch):
    sdata = sd.read_zarr(store)
    (store / "images" / "he").rename(store.parent / "he")
    monkeypatch.setattr("he2gene_sc.tl._predict._predict_slide", pytest.fail)
    for verb in (
        lambda: hg.tl.predict(sdata, model=tiny_model),
        lambda: hg.pp.tissue(sdata),
        lambda: hg.io.save(sdata),
    ):
        with pytest.raises(FileNotFoundError, match=r"images\['he'\] reads .*which does not exist"):
            verb()
    assert not (store / "images" / "he").exists()


def test_a_relative_store_is_not_created_in_another_working_folder(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sdata = sd.read_zarr("slide.zarr")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has the working folder changed"):
        hg.io.save(sdata)
    assert not list(Path().iterdir())


def test_a_name_that_differs_only_in_case_is_refused(store):
    sdata = sd.read_zarr(store)
    spots = sdata["spots"]
    del sdata.shapes["spots"], sdata.tables["table"]
    sdata.shapes["Spots"] = spots
    with pytest.raises(
        ValueError, match="shapes 'Spots' cannot be saved: the store has shapes 'spots', which differs only"
    ):
        hg.io.save(sdata)
    assert "spots" in sd.read_zarr(store)


@pytest.mark.parametrize("name", ["he", "spots", "cells"])
def test_an_alignment_that_another_tool_wrote_is_not_lost(store, name):
    mine, theirs = sd.read_zarr(store), sd.read_zarr(store)
    set_transformation(theirs[name], Scale([0.5, 0.5], axes=("x", "y")), "by_hand", write_to_sdata=theirs)
    mine["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=rf"{name}: transformations\['by_hand'\]"):
        hg.io.save(mine)
    assert "by_hand" in get_transformation(sd.read_zarr(store)[name], get_all=True)
    hg.io.save(mine, overwrite=True)
    assert set(get_transformation(sd.read_zarr(store)[name], get_all=True)) == {"global"}


def test_a_column_of_shapes_that_another_tool_wrote_is_not_lost(store):
    mine, theirs = sd.read_zarr(store), sd.read_zarr(store)
    spots = theirs["spots"].assign(by_hand="x")
    del theirs.shapes["spots"]
    theirs.delete_element_from_disk("spots")
    theirs.shapes["spots"] = spots
    theirs.write_element("spots")
    mine["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=r"shapes/spots: spots\['by_hand'\]"):
        hg.io.save(mine)
    assert "by_hand" in sd.read_zarr(store)["spots"]


def test_rows_of_shapes_and_points_are_removed_only_with_overwrite(store):
    sdata = sd.read_zarr(store)
    sdata.shapes["spots"] = sdata["spots"].iloc[:5]
    sdata.points["cells"] = PointsModel.parse(sdata["cells"].compute().iloc[:1])
    with pytest.raises(FileExistsError, match="2 of 3 rows of cells.*7 of 12 rows of spots"):
        hg.io.save(sdata)
    assert len(sd.read_zarr(store)["spots"]) == 12
    hg.io.save(sdata, overwrite=True)
    assert [len(sd.read_zarr(store)[name]) for name in ("spots", "cells")] == [5, 1]


def test_a_grid_that_is_made_again_needs_no_overwrite(store):
    sdata = sd.read_zarr(store)
    hg.pp.tissue(sdata)
    hg.pp.grid(sdata, key_added="grid")
    hg.io.save(sdata)
    sdata = sd.read_zarr(store)
    n = len(sdata["grid"])
    hg.pp.grid(sdata, pitch_um=200, key_added="grid")
    hg.io.save(sdata)
    sdata = sd.read_zarr(store)
    assert 1 < len(sdata["grid"]) < n
    sdata.shapes["grid"] = sdata["grid"].iloc[:1]
    with pytest.raises(FileExistsError, match="rows of grid"):
        hg.io.save(sdata)


def test_numpy_attributes_are_saved_and_values_that_json_lacks_are_named(store, tmp_path):
    sdata = sd.read_zarr(store)
    sdata.attrs["mine"] = {1: np.int64(3), "b": np.arange(2), "c": np.float32(0.5)}
    hg.io.save(sdata)
    plain = {"1": 3, "b": [0, 1], "c": 0.5}
    assert sdata.attrs["mine"] == sd.read_zarr(store).attrs["mine"] == plain
    hg.io.save(sdata)
    assert sdata.attrs["mine"] == plain
    for value in ({"where": Path("x")}, {1, 2}):
        sdata.attrs["mine"] = value
        for path in (None, tmp_path / "new.zarr"):
            with pytest.raises(ValueError, match=r"attrs\['mine'\] cannot be saved: it holds .*of type"):
                hg.io.save(sdata, path)
    assert not (tmp_path / "new.zarr").exists()
    assert sd.read_zarr(store).attrs["mine"] == plain


def test_a_deleted_attribute_of_another_process_stays_deleted(store):
    first, second = sd.read_zarr(store), sd.read_zarr(store)
    second.attrs["theirs"] = 1
    hg.io.save(second)
    hg.io.save(first)
    assert first.attrs["theirs"] == 1
    del first.attrs["theirs"]
    with pytest.raises(FileExistsError, match="theirs"):
        hg.io.save(first)
    hg.io.save(first, overwrite=True)
    assert "theirs" not in sd.read_zarr(store).attrs


def test_a_relative_path_that_leads_to_another_store_is_refused(tmp_path, monkeypatch):
    for name in ("a", "b"):
        hg.datasets.toy((3, 4), mpp=2.0, seed=len(name) + ord(name)).write(tmp_path / name / "slide.zarr")
    before = sd.read_zarr(tmp_path / "b" / "slide.zarr")["table"].to_df()
    for known in (True, False):
        monkeypatch.chdir(tmp_path / "a")
        sdata = sd.read_zarr("slide.zarr")
        if known:
            hg.pp.tissue(sdata)
        monkeypatch.chdir(tmp_path / "b")
        for verb in (hg.io.save, hg.pp.tissue):
            with pytest.raises(
                FileNotFoundError, match="was read from the store .*/a/" if known else "counts of another slide"
            ):
                verb(sdata)
    pd.testing.assert_frame_equal(sd.read_zarr(tmp_path / "b" / "slide.zarr")["table"].to_df(), before)
    sdata = sd.read_zarr("slide.zarr")
    table = sdata["table"]
    table.X = np.log1p(table.X.toarray())
    table.var_names = [f"{name}-x" for name in table.var_names]
    hg.io.save(sdata, overwrite=True)


def test_counts_that_were_replaced_before_the_first_verb_are_saved_as_the_error_says(store, monkeypatch):
    monkeypatch.chdir(store.parent)
    sdata, other = sd.read_zarr("slide.zarr"), sd.read_zarr("slide.zarr")
    zeros = sdata["table"].X.toarray() == 0
    for each in (sdata, other):
        each["table"].X = zeros.astype(np.float32)
        with pytest.raises(FileNotFoundError, match=r"changed the counts yourself: sdata\.path = Path\('/"):
            hg.pp.tissue(each)
    other.path = store
    hg.pp.tissue(other)
    hg.io.save(sdata, overwrite=True)
    np.testing.assert_array_equal(sd.read_zarr(store)["table"].X, zeros)


@pytest.mark.parametrize("name", ["slide.zarr", "images", "tables", "attrs"])
def test_an_attribute_that_another_tool_changed_is_not_put_back(store, name):
    store = store.rename(store.parent / name)
    zarr.open_group(store, mode="r+").attrs["qc"] = 1
    sdata = sd.read_zarr(store)
    hg.pp.tissue(sdata)
    hg.io.save(sdata)
    zarr.open_group(store, mode="r+").attrs["qc"] = 2
    sdata["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=r"attrs \(another process saved it after you read it\): .*attrs\['qc'\]"):
        hg.io.save(sdata)
    assert sd.read_zarr(store).attrs["qc"] == 2
    sdata.attrs["qc"] = 2
    hg.io.save(sdata)
    sdata.attrs["qc"] = 3
    hg.io.save(sdata)
    assert sd.read_zarr(store).attrs["qc"] == 3


def test_own_changes_written_by_spatialdata_and_saved_may_be_changed_again(store):
    sdata = sd.read_zarr(store)
    hg.pp.tissue(sdata)
    hg.io.save(sdata)
    set_transformation(sdata["spots"], Scale([0.5, 0.5], axes=("x", "y")), "by_hand", write_to_sdata=sdata)
    hg.io.save(sdata)
    set_transformation(sdata["spots"], {"global": Scale([1.0, 1.0], axes=("x", "y"))}, set_all=True)
    with pytest.raises(
        FileExistsError, match=r"spots: transformations\['by_hand'\]$|spots: transformations\['by_hand'\]\. "
    ):
        hg.io.save(sdata)
    sdata["spots"]["radius"] *= 2
    set_transformation(sdata["spots"], Scale([0.5, 0.5], axes=("x", "y")), "by_hand")
    hg.io.save(sdata)


@pytest.mark.parametrize("inside", ["x.zarr", "tables/x.zarr"])
def test_a_path_inside_a_store_or_around_the_own_store_is_refused(store, tmp_path, inside):
    sdata = sd.read_zarr(store)
    with pytest.raises(ValueError, match=r"lies inside the zarr store .*slide\.zarr' and would become"):
        hg.io.save(sdata, store / inside)
    with pytest.raises(ValueError, match=r"holds the store of `sdata`"):
        hg.io.save(sdata, tmp_path, overwrite=True)


def test_an_image_that_was_replaced_on_disk_is_not_read_with_the_old_shape(store):
    sdata = sd.read_zarr(store)
    other = sd.read_zarr(store)
    other.images["he"] = Image2DModel.parse(np.zeros((3, 50, 60), np.uint8), dims=("c", "y", "x"))
    hg.io.save(other, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"as an array of shape \[3, .*which now has shape \[3, 50, 60\]"):
        hg.pp.tissue(sdata)


@pytest.mark.parametrize("verb", [hg.pp.tissue, lambda sdata: hg.get.genes(sdata), lambda sdata: hg.pl.tissue(sdata)])
def test_values_that_others_change_after_the_first_call_are_not_lost(store, verb):
    sdata = sd.read_zarr(store)
    with contextlib.suppress(ValueError):
        verb(sdata)
    theirs = sd.read_zarr(store)
    theirs["table"].obs["annotation"] = "by hand"
    theirs.delete_element_from_disk("table")
    theirs.write_element("table")
    with pytest.raises(FileExistsError, match=r"another process saved it after you read it.*obs\['annotation'\]"):
        hg.io.save(sdata)


MISSING = {
    "texts": np.array(["a", None, "b", np.nan] * 3, object),
    "flags": np.array([True, None, False, False] * 3, object),
    "counts": np.array([1, None, 2, 3] * 3, object),
    "nothing": np.full(12, None, object),
    "shares": np.array([1.5, pd.NA, None, 2] * 3, object),
    "grades": pd.Categorical(np.array([1, None, 2, 3] * 3, object), pd.Index([1, 2, 3], dtype=object)),
}


def test_missing_values_among_objects_stay_missing_in_the_store(store, tmp_path):
    sdata = sd.read_zarr(store)
    table = sdata["table"]
    table.obs = table.obs.assign(**MISSING)
    table.obsm["frame"] = pd.DataFrame(MISSING, index=table.obs_names)
    table.uns["mine"] = {"texts": MISSING["texts"][:3], "numbers": [1, 2, np.nan]}
    table.uns["counts"] = np.array([1, 2], object)
    table.uns["ranks"] = np.array([("a", 1.0)], dtype=[("group", "U3"), ("score", "f8")])
    table.raw = table
    table.raw.var["texts"] = np.resize(MISSING["texts"], table.n_vars)
    for path in (None, tmp_path / "new.zarr"):
        again = sd.read_zarr(hg.io.save(sdata, path))["table"]
        for frame in (again.obs, again.obsm["frame"]):
            for name, values in MISSING.items():
                assert [None if pd.isna(value) else value for value in frame[name]] == [
                    None if pd.isna(value) else value for value in values
                ]
        assert pd.isna(again.uns["mine"]["texts"]).tolist() == [False, True, False]
        np.testing.assert_array_equal(again.uns["mine"]["numbers"], [1, 2, np.nan])
        assert again.uns["counts"].tolist() == [1, 2]
        assert pd.isna(again.raw.var["texts"]).sum() == table.n_vars // 2
    before = (tmp_path / "new.zarr" / "tables" / "table").stat().st_ino
    hg.io.save(sdata)
    assert (tmp_path / "new.zarr" / "tables" / "table").stat().st_ino == before  # nothing differs


@pytest.mark.parametrize(
    ("slot", "name", "value", "message"),
    [
        (
            "obs",
            "mixed",
            ["a", 1, 2.5] * 4,
            r"sdata\['table'\]\.obs\['mixed'\] holds .* \(mixed-integer: float, int, str\)",
        ),
        (
            "obs",
            "mixed",
            pd.Categorical([1, "a", None] * 4),
            r"obs\['mixed'\] holds .* \(mixed-integer: int, str\); make .*astype\('string'\)",
        ),
        (
            "obs",
            "large",
            np.array([2**63, None, 1] * 4, object),
            r"obs\['large'\] holds whole numbers .* up to 9223372036854775808",
        ),
        ("uns", "flags", [0, True], r"uns\['flags'\] holds .*bool, int"),
        ("obs", 5, 1, r"sdata\['table'\]\.obs has a column named 5"),
        ("obs", "when", pd.date_range("2020", periods=12), "DatetimeArray.*writing key 'when'"),
        ("uns", "mixed", {"of": [1, None, "a"]}, r"uns\['mixed'\]\['of'\] holds .*NoneType, int, str"),
        ("uns", "numbered", {0: "a"}, r"uns\['numbered'\] has the key 0, which is not a text"),
        ("uns", "where", Path("x"), "PosixPath.*writing key 'where'"),
        ("uns", "mine", {"": 1}, r"uns\['mine'\] has the key '', which cannot be the name of a folder"),
        ("uns", "mine", {"a": {"b/c": 1}}, r"uns\['mine'\]\['a'\] has the key 'b/c', which cannot"),
        ("layers", "objects", None, r"layers\['objects'\] holds objects, which would become texts"),
        ("layers", "masked", None, r"layers\['masked'\] is a masked array"),
    ],
)
def test_values_that_a_store_cannot_hold_are_named_and_change_nothing(store, slot, name, value, message):
    sdata = sd.read_zarr(store)
    if slot == "layers":
        ones = np.ones(sdata["table"].shape)
        value = ones.astype(object) if name == "objects" else np.ma.array(ones, mask=np.eye(*ones.shape))
    getattr(sdata["table"], slot)[name] = value
    with pytest.raises(ValueError, match=message):
        hg.io.save(sdata)
    assert name not in getattr(sd.read_zarr(store)["table"], slot)


@pytest.mark.parametrize("place", ["obs", "obsm", "layers", "uns", "tables"])
def test_a_name_that_is_too_long_for_a_store_is_named_and_nothing_is_written(store, tmp_path, place):
    sdata, name = sd.read_zarr(store), "é" * 128
    table = sdata["table"]
    if place == "obs":
        table.obs[name] = 1
    elif place == "obsm":
        table.obsm["proba"] = pd.DataFrame({name: np.ones(table.n_obs)}, table.obs_names)
    elif place == "tables":
        sdata.tables[name] = table.copy()
    else:
        getattr(table, place)[name] = np.ones(table.shape)
    before = sorted(store.rglob("*"))
    for path in (store, tmp_path / "new.zarr"):
        with pytest.raises(ValueError, match=rf"{place}.* has .* 'é+'…, a name of 128 characters \(256 bytes\)"):
            hg.io.save(sdata, path)
    assert sorted(store.rglob("*")) == before
    assert not (tmp_path / "new.zarr").exists()


def test_a_table_whose_parts_have_other_rows_is_named(store):
    sdata = sd.read_zarr(store)
    sdata["table"].obsm["frame"] = pd.DataFrame({"a": range(12)}, index=sdata["table"].obs_names)
    sdata["table"].obs.index = [f"other{i}" for i in range(12)]
    with pytest.raises(
        ValueError, match=r"parts of sdata\['table'\] do not fit together.*sdata\['table'\]\.obs_names ="
    ):
        hg.io.save(sdata)


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_permissions_of_a_shared_store_stay(store):
    for path in (store, *store.rglob("*")):
        path.chmod(0o775 if path.is_dir() else 0o664)
    sdata = sd.read_zarr(store)
    sdata["table"].obs["n"] = 1
    hg.io.save(sdata)
    element = store / "tables" / "table"
    modes = {path.stat().st_mode & 0o777 for path in (element, *element.rglob("*")) if path.is_dir()}
    assert modes == {0o775}
    files = [store / "zarr.json", *(path for path in element.rglob("*") if path.is_file())]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o664}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sdata, folder: hg.io.save(sdata, 5), "`path` is 5; a path is needed"),
        (lambda sdata, folder: hg.io.save(sdata, " "), "`path` is ' '; a path is needed"),
        (lambda sdata, folder: hg.io.save(sdata, folder / "file" / "x.zarr"), "`path` .* lies in a file"),
        (lambda sdata, folder: hg.io.save(sdata["table"], folder / "x.zarr"), "`sdata` is an AnnData"),
    ],
)
def test_invalid_paths_and_objects_are_named(store, tmp_path, call, message):
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, TypeError), match=message):
        call(sd.read_zarr(store), tmp_path)


# --- Changes by others between the reading of an object and its first call of hg -------------------------------------


def _shapes(store):
    sdata = sd.read_zarr(store, selection=("shapes",))
    sdata["spots"]["radius"] *= 2
    sdata.delete_element_from_disk("spots")
    sdata.write_element("spots")


def _points(store):
    sdata = sd.read_zarr(store, selection=("points",))
    cells = PointsModel.parse(sdata["cells"].compute().assign(x=9.0))
    del sdata.points["cells"]
    sdata.delete_element_from_disk("cells")
    sdata.points["cells"] = cells
    sdata.write_element("cells")


def _in_table(key, value):
    place, name = ("tables/table/" + key).rsplit("/", 1)
    return lambda store: write_elem(zarr.open_group(store / place, mode="r+"), name, value)


THEIRS = {
    "obs": (_in_table("obs/annotation", np.array(["by hand"] * 12)), r"tables/table: obs\['annotation'\]"),
    "layer": (_in_table("layers/mine", np.full((12, 2), 7.0)), r"layers\['mine'\]"),
    "uns": (_in_table("uns/mine/a", 2), r"uns\['mine'\]\['a'\]"),
    "shapes": (_shapes, r"shapes/spots: spots\['radius'\]"),
    "points": (_points, r"points/cells: cells\['x'\]"),
    "labels": (
        lambda store: zarr.open_array(store / "labels/mask/s0", mode="r+").__setitem__(slice(0, 2), 9),
        "labels/mask: pixels",
    ),
    "transformation": (
        lambda store: set_transformation(
            (theirs := sd.read_zarr(store))["spots"], Scale([3, 3], ("x", "y")), write_to_sdata=theirs
        ),
        r"shapes/spots: transformations\['global'\]",
    ),
    "attrs": (lambda store: zarr.open_group(store, mode="r+").attrs.__setitem__("qc", 2), r"attrs: attrs\['qc'\]"),
}


@pytest.fixture
def slide(tmp_path):
    """Slide of few genes, whose store is younger than this process."""
    sdata = small_toy(4.0)
    sdata.tables["table"] = sdata["table"][:, :2].copy()
    sdata["table"].layers["mine"] = np.ones((12, 2))
    sdata["table"].uns["mine"] = {"a": 1}
    sdata.labels["mask"] = Labels2DModel.parse(np.ones((6, 8), np.uint8), dims=("y", "x"))
    sdata.points["cells"] = PointsModel.parse(pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}))
    sdata.attrs["qc"] = 1
    sdata.write(tmp_path / "young.zarr")
    return sdata


def _read(path):
    """Read a store, with lazy arrays in memory."""
    sdata = sd.read_zarr(path)
    sdata.labels["mask"] = Labels2DModel.parse(sdata["mask"].to_numpy(), dims=("y", "x"))
    sdata.points["cells"] = PointsModel.parse(sdata["cells"].compute())
    return sdata


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", THEIRS)
def test_values_that_others_change_before_the_first_call_are_not_lost(slide, what):
    change, message = THEIRS[what]
    mine = _read(slide.path)
    change(slide.path)
    mine["table"].obs["n"] = 1
    with pytest.raises(
        FileExistsError, match=rf"{message} \(another process may have changed it.*newer than this Python process"
    ):
        hg.io.save(mine)
    assert "n" not in sd.read_zarr(slide.path)["table"].obs
    hg.io.save(mine, overwrite=True)
    assert "n" in sd.read_zarr(slide.path)["table"].obs


def test_values_that_others_change_are_not_lost_though_the_times_of_files_are_set_back(slide):
    files = [path for path in (slide.path / "tables").rglob("*") if path.is_file()]
    mine = sd.read_zarr(slide.path)
    hg.io.save(mine)
    before = [(path, path.stat()) for path in files]
    THEIRS["layer"][0](slide.path)
    for path, stat in before:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    mine["table"].layers["mine"] += 1
    with pytest.raises(FileExistsError, match=r"another process saved it after you read it\): layers\['mine'\]"):
        hg.io.save(mine)
    # Hard links and permissions change no values.
    mine = sd.read_zarr(slide.path)
    hg.io.save(mine)
    for path in files:
        os.link(path, slide.path.with_name("link"))
        slide.path.with_name("link").unlink()
        path.chmod(0o600)
    mine["table"].layers["mine"] += 1
    hg.io.save(mine)
    assert (sd.read_zarr(slide.path)["table"].layers["mine"] == 8).all()


def test_values_that_others_change_are_not_lost_though_the_clock_was_set_back(slide, monkeypatch):
    monkeypatch.setattr(concurrent_changes, "_START", time.time() + 3500)
    monkeypatch.setattr(concurrent_changes, "_OFFSET", concurrent_changes._OFFSET + 3600)
    test_values_that_others_change_before_the_first_call_are_not_lost(slide, "layer")


@pytest.mark.parametrize("what", ["obs", "shapes"])
def test_values_that_could_not_be_compared_may_have_been_changed_by_others(slide, what, monkeypatch):
    change, said = THEIRS[what]
    mine = _read(slide.path)
    change(slide.path)
    with monkeypatch.context() as patch:
        for name in ("table_difference", "spatial_difference"):
            patch.setattr(concurrent_changes, name, lambda *args, **options: 1 / 0)
        hg.pp.tissue(mine)
    with pytest.raises(FileExistsError, match=rf"{said} \(another process may have changed it"):
        hg.io.save(mine)


def test_own_changes_are_saved_if_no_other_process_can_have_changed_the_store(slide, monkeypatch):
    def change(sdata, value):
        sdata["table"].obs["annotation"] = f"round {value}"
        sdata["table"].layers["mine"] = np.full((12, 2), float(value))
        sdata["spots"]["radius"] = float(value)
        sdata.attrs["qc"] = value

    def held():
        sdata = sd.read_zarr(slide.path)
        table = sdata["table"]
        values = table.layers["mine"][0, 0], sdata["spots"]["radius"].iloc[0], sdata.attrs["qc"]
        return [table.obs["annotation"].iloc[0], *values]

    # The store is older than the process.
    with monkeypatch.context() as patch:
        patch.setattr(concurrent_changes, "_START", math.inf)
        sdata = sd.read_zarr(slide.path)
        change(sdata, 2)
        hg.io.save(sdata)
        assert held() == ["round 2", 2, 2, 2]
    # The store is unchanged since the last save, which the object has recorded.
    sdata = sd.read_zarr(slide.path)
    change(sdata, 3)
    hg.io.save(sdata)
    assert held() == ["round 3", 3, 3, 3]
    # The object was used before it was changed, and equalled the store then.
    path = slide.path.with_name("other.zarr")
    slide.write(path)
    sdata = sd.read_zarr(path)
    hg.io.save(sdata)
    change(sdata, 4)
    hg.io.save(sdata)
    assert sd.read_zarr(path).attrs["qc"] == 4
    # A store that we wrote is recorded from the start.
    sdata = sd.read_zarr(hg.io.save(sdata, slide.path.with_name("new.zarr")))
    change(sdata, 5)
    assert sd.read_zarr(hg.io.save(sdata)).attrs["qc"] == 5


def test_own_writes_by_spatialdata_do_not_count_as_changes_by_others(slide, tmp_path):
    slide["table"].obs["note"] = pd.Series(["a", None, np.nan] * 4, slide["table"].obs_names, dtype=object)
    slide.points["many"] = PointsModel.parse(
        pd.DataFrame({"x": np.arange(9.0), "y": 1.0, "gene": pd.Categorical(["a", "b", "c"] * 3)}), npartitions=3
    )
    slide.write(tmp_path / "own.zarr")
    hg.io.save(slide)
    note = sd.read_zarr(slide.path)["table"].obs["note"]
    assert note.isna().sum() == 8
    assert (note.dropna() == "a").all()


def test_changes_by_others_between_a_save_and_the_next_first_call_are_not_lost(slide):
    hg.io.save(slide, slide.path.with_name("saved.zarr"))
    mine = sd.read_zarr(slide.path)
    THEIRS["obs"][0](slide.path)
    mine["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=r"obs\['annotation'\] \(another process may have changed it"):
        hg.io.save(mine)


@pytest.mark.skipif(sys.platform == "win32", reason="times of change are those of creation there")
@pytest.mark.parametrize("what", ["", "tables", "tables/table"])
def test_elements_that_others_move_into_the_store_are_not_lost_though_their_files_are_old(
    slide, tmp_path, monkeypatch, what
):
    other = Path(shutil.copytree(slide.path, tmp_path / "other.zarr"))
    THEIRS["layer"][0](other)
    monkeypatch.setattr(concurrent_changes, "_START", time.time())
    mine = sd.read_zarr(slide.path)
    (slide.path / what).rename(tmp_path / "gone")
    (other / what).rename(slide.path / what)
    mine["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=r"tables/table: layers\['mine'\] \(another process may have changed it"):
        hg.io.save(mine)


def test_a_prediction_that_another_wrote_by_spatialdata_is_not_removed(slide):
    mine, theirs = sd.read_zarr(slide.path), sd.read_zarr(slide.path)
    table = theirs["table"]
    table.layers["low"] = np.zeros((12, 2))
    table.uns["result"] = {"verb": "intervals", "params": {}, "written": {"layers": ["low"]}}
    theirs.delete_element_from_disk("table")
    theirs.write_element("table")
    mine["table"].obs["n"] = 1
    with pytest.raises(FileExistsError, match=r"layers\['low'\]"):
        hg.io.save(mine)


# --- Links, and arrays that were read by a relative path -------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("what", ["tables/table", "tables", "shapes/spots"])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_element_that_is_a_link_stays_a_link(slide, tmp_path, what, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(_files, "exchange", lambda a, b: False)
    real, link = tmp_path / "elsewhere" / "real", slide.path / what
    real.parent.mkdir()
    link.rename(real)
    link.symlink_to(real)
    sdata = sd.read_zarr(slide.path)
    hg.io.save(sdata)
    sdata["table"].obs["n"] = 1
    sdata["spots"]["radius"] *= 2
    hg.io.save(sdata)
    assert link.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    again = sd.read_zarr(slide.path)
    assert (again["table"].obs["n"] == 1).all()
    assert again["spots"]["radius"].equals(sdata["spots"]["radius"])


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_an_element_on_another_file_system_is_refused_by_its_name(slide):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if Path(folder).stat().st_dev == slide.path.stat().st_dev:
            pytest.skip("it is the same file system")
        link = slide.path / "tables" / "table"
        shutil.move(link, Path(folder, "table"))
        link.symlink_to(Path(folder, "table"))
        sdata = sd.read_zarr(slide.path)
        sdata["table"].obs["n"] = 1
        with pytest.raises(ValueError, match=r"tables 'table' .*is a link to '/dev/shm.* on another file system"):
            hg.io.save(sdata)
        assert "n" not in sd.read_zarr(slide.path)["table"].obs


def test_an_image_that_was_read_by_a_relative_path_is_saved(slide, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(slide.path.parent)
    mine = sd.SpatialData(images={"he": sd.read_zarr("young.zarr")["he"]})
    hg.pp.tissue(mine)
    truth = mine["he"].to_numpy()
    slide.images["he"] = 255 - slide["he"]
    slide.write(tmp_path / "b" / "young.zarr")
    monkeypatch.chdir(tmp_path / "b")
    np.testing.assert_array_equal(sd.read_zarr(hg.io.save(mine, tmp_path / "new.zarr"))["he"].to_numpy(), truth)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (np.array([0, 1] * 6), np.array([False, True] * 6, object)),
        (np.array([False, True] * 6), np.array([0, 1] * 6, object)),
        (np.array([0, 1] * 6), np.array([0.0, 1.0] * 6, object)),
        (np.array(["0", "1"] * 6), np.array([0, 1] * 6, object)),
        (pd.Categorical([0, 1] * 6), pd.Categorical(np.array([False, True] * 6, object))),
        (pd.Categorical([0, 1] * 6), pd.Categorical(["0", "1"] * 6)),
        (np.array([0, 1] * 6), np.array([0, 1] * 6, object)),
        (pd.Categorical([0, 1] * 6), pd.Categorical([0, 1] * 6, pd.Index([0, 1], dtype=object))),
    ],
)
def test_a_column_of_another_type_is_different(there, here):
    a, b = pd.Series(there), pd.Series(here)
    kinds = [
        pd.api.types.infer_dtype(s.cat.categories if isinstance(s.dtype, pd.CategoricalDtype) else s) for s in (a, b)
    ]
    assert same_column(a, b) == same_column(b, a) == (kinds[0] == kinds[1])


@pytest.mark.filterwarnings("ignore")
def test_numpy_scalars_do_not_count_as_changes_by_others(slide, tmp_path):
    slide["table"].uns["limits"] = {"low": np.float32(0.1), "n": np.int32(3), "high": np.array(2, np.float32)}
    slide.write(tmp_path / "other.zarr")
    table = slide.path / "tables" / "table"
    before = table.stat().st_ino
    hg.io.save(slide)
    assert table.stat().st_ino == before
    assert not is_same_value(np.float32(1), 1)
    assert not is_same_value(np.int8(1), True)
