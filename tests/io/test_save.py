"""`hg.io.save` writes changed elements, loses nothing, and leaves a complete old or new table after any failure."""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from anndata.io import write_elem
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Scale, get_transformation, set_transformation

import he2gene_sc as hg
from he2gene_sc._core import concurrent_changes, stores
from he2gene_sc.io import _files, _save, _store
from tests.helpers import saving_faults

pytestmark = pytest.mark.slow

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def digest(store):
    """Return names and bytes of all files of a folder."""
    files = sorted(p for p in store.rglob("*") if p.is_file())
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(autouse=True)
def _stores_are_older_than_the_process(monkeypatch):
    """Make stores older than the process, so that changes of an object are its own; `test_save_losses` tests the other case."""
    monkeypatch.setattr(concurrent_changes, "_START", math.inf)


@pytest.fixture
def store(toy, toy_store, tmp_path):
    toy.path = Path(shutil.copytree(toy_store, tmp_path / "slide.zarr"))
    return toy.path


@pytest.fixture
def backed(store):
    return sd.read_zarr(store)


def test_save_to_a_new_path_makes_its_folders(toy, tmp_path):
    path = hg.io.save(toy, tmp_path / "a" / "b" / "slide.zarr")
    assert path == tmp_path / "a" / "b" / "slide.zarr"
    assert toy.path == path
    assert names(path.parent) == ["slide.zarr"]
    np.testing.assert_array_equal(sd.read_zarr(path)["he"], toy["he"])


def test_save_over_the_store_that_was_read(backed, store, tiny_model):
    hg.tl.predict(backed, model=tiny_model)
    assert hg.io.save(backed) == store
    again = sd.read_zarr(store)
    np.testing.assert_array_equal(again["table"].layers["he2gene"], backed["table"].layers["he2gene"])
    assert names(store.parent) == ["slide.zarr"]


def test_the_object_can_be_used_and_saved_again_afterwards(backed, store, tiny_model):
    before = backed["he"].to_numpy()
    for genes in (None, "all"):
        hg.tl.predict(backed, model=tiny_model, genes=genes)
        hg.io.save(backed)
    np.testing.assert_array_equal(backed["he"].to_numpy(), before)
    np.testing.assert_array_equal(sd.read_zarr(store)["he"], before)
    assert sorted(sd.read_zarr(store).tables) == ["he2gene", "table"]


def test_save_replaces_another_store_only_with_overwrite(toy, tmp_path):
    hg.datasets.toy((2, 2), mpp=4.0).write(tmp_path / "slide.zarr")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        hg.io.save(toy, tmp_path / "slide.zarr")
    assert sd.read_zarr(tmp_path / "slide.zarr")["table"].n_obs == 4
    hg.io.save(toy, tmp_path / "slide.zarr", overwrite=True)
    assert sd.read_zarr(tmp_path / "slide.zarr")["table"].n_obs == 30


def test_save_follows_a_link_to_its_store(toy, tmp_path):
    toy.write(tmp_path / "real.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    linked = sd.read_zarr(tmp_path / "link.zarr")
    linked.attrs["note"] = "new"
    hg.io.save(linked)
    assert (tmp_path / "link.zarr").is_symlink()
    assert sd.read_zarr(tmp_path / "real.zarr").attrs["note"] == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.zarr", "real.zarr"]


def test_save_without_a_path_needs_a_store(toy):
    with pytest.raises(ValueError, match="`path` is None"):
        hg.io.save(toy)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_other_folders_and_files_are_not_overwritten(toy, tmp_path, kind):
    place = tmp_path / "thesis"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        if kind == "folder":
            (place / "chapter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`path` .*thesis.* is not a SpatialData zarr store"):
        hg.io.save(toy, place)
    assert place.is_dir() == (kind != "file")
    assert names(tmp_path) == ["thesis"]


def test_saving_to_its_own_store_only_writes_changes(backed, store):
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.rglob("*") if path.is_file()}
    backed["table"].obs["mine"] = 1.0
    hg.io.save(backed)
    written = [str(p.relative_to(store)) for p in store.rglob("*") if p.is_file() and facts(p) != before.get(p)]
    assert {Path(name).parts[0] for name in written} == {"tables", "zarr.json"}
    # Unchanged parts of the table are hard links to the old files.
    same = ("tables/table/X/", "tables/table/layers/c/", "tables/table/obs/annotation/", "tables/table/var/planted/")
    assert not [name for name in written if name.startswith(same)]
    assert (sd.read_zarr(store)["table"].obs["mine"] == 1.0).all()
    assert "tables/table/obs/mine" in zarr.open_group(store, mode="r").metadata.consolidated_metadata.flattened_metadata


def facts(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_saving_an_unchanged_object_writes_nothing(backed, store):
    before = {path: facts(path) for path in store.rglob("*") if path.is_file()}
    hg.io.save(backed)
    assert {path: facts(path) for path in store.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.obs.insert(0, "new", "text"),
        lambda t: t.layers.__setitem__("new", t.X.copy()),
        lambda t: t.X.data.__setitem__(0, 77),
        lambda t: t.uns.__setitem__("new", {"a": [1, 2], "b": {"c": "d"}}),
        lambda t: t.obsm.__setitem__("new", pd.DataFrame({"a": range(t.n_obs)}, index=t.obs_names)),
        lambda t: t.obs.__setitem__("annotation", t.obs["annotation"].astype(str).astype("category").cat.as_ordered()),
        lambda t: t.var.__setitem__("symbol", pd.array(t.var_names, dtype="string")),
        lambda t: setattr(t, "raw", t.copy()),
    ],
)
def test_every_change_in_a_table_is_saved(backed, store, change):
    change(backed["table"])
    hg.io.save(backed)
    again = sd.read_zarr(store)
    assert not _difference(store, backed)
    before = {path: facts(path) for path in store.rglob("*") if path.is_file()}
    hg.io.save(again)
    assert {path: facts(path) for path in store.rglob("*") if path.is_file()} == before


def _difference(store, sdata):
    from he2gene_sc._core.differences import table_difference

    return table_difference(store / "tables" / "table", sdata["table"])


def test_elements_that_were_not_read_and_user_files_are_kept(toy, store):
    hg.pp.tissue(toy)
    toy.write_element("he_tissue")
    (store / "notes.txt").write_text("mine")
    part = sd.read_zarr(store, selection=("tables",))
    part["table"].obs["new"] = 1
    hg.io.save(part)
    assert sorted(name for _, name, _ in sd.read_zarr(store).gen_elements()) == ["he", "he_tissue", "spots", "table"]
    assert (store / "notes.txt").read_text() == "mine"


def test_a_store_keeps_its_zarr_format_and_its_pixels(toy, tmp_path):
    from spatialdata._io.format import SpatialDataContainerFormatV01

    path = tmp_path / "old.zarr"
    toy.write(path, sdata_formats=[SpatialDataContainerFormatV01()])
    pixels = toy["he"].to_numpy().copy()
    sdata = sd.read_zarr(path)
    for value in (1, 2):
        sdata["table"].obs["round"] = value
        hg.pp.tissue(sdata)
        hg.io.save(sdata)
        np.testing.assert_array_equal(sdata["he"].to_numpy(), pixels)
    again = sd.read_zarr(path)
    assert not list(path.rglob("zarr.json"))
    np.testing.assert_array_equal(again["he"].to_numpy(), pixels)
    assert (again["table"].obs["round"] == 2).all()
    assert "he_tissue" in again
    assert "tables/table/obs/round/.zarray" in json.loads((path / ".zmetadata").read_text())["metadata"]


def test_a_rechunked_image_is_read_on_after_saving(backed, store, tmp_path):
    pixels = backed["he"].to_numpy().copy()
    backed.images["he"] = backed["he"].chunk({"c": 3, "y": 100, "x": 100})
    inodes = {path: facts(path) for path in (store / "images").rglob("*")}
    hg.io.save(backed)
    np.testing.assert_array_equal(backed["he"].to_numpy(), pixels)
    assert {path: facts(path) for path in (store / "images").rglob("*")} == inodes
    hg.io.save(backed, tmp_path / "other.zarr")
    hg.io.save(backed, store, overwrite=True)
    np.testing.assert_array_equal(backed["he"].to_numpy(), pixels)
    np.testing.assert_array_equal(sd.read_zarr(store)["he"].to_numpy(), pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.obs.drop(columns="annotation", inplace=True), r"obs\['annotation'\]"),
        (lambda t: t.layers.pop("mine"), r"layers\['mine'\]"),
        (lambda t: t.uns["mine"].pop("a"), r"uns\['mine'\]\['a'\]"),
    ],
)
def test_data_that_the_object_lacks_is_removed_only_with_overwrite(toy, tmp_path, change, message):
    toy["table"].layers["mine"] = toy["table"].X.copy()
    toy["table"].uns["mine"] = {"a": 1, "b": 2}
    path = tmp_path / "slide.zarr"
    toy.write(path)
    sdata = sd.read_zarr(path)
    change(sdata["table"])
    before = digest(path)
    with pytest.raises(FileExistsError, match=message):
        hg.io.save(sdata)
    assert digest(path) == before
    hg.io.save(sdata, overwrite=True)
    assert not _difference(path, sdata)


def test_missing_rows_are_removed_only_with_overwrite(backed, store):
    backed.tables["table"] = backed["table"][:10].copy()
    with pytest.raises(FileExistsError, match="20 of 30 rows of obs"):
        hg.io.save(backed)
    assert sd.read_zarr(store)["table"].n_obs == 30


def test_results_that_verbs_remove_need_no_overwrite(backed, store, tiny_model):
    hg.tl.predict(backed, model=tiny_model)
    table = backed["table"]
    table.uns["he2gene_intervals"] = {
        "verb": "intervals",
        "params": {"layer": "he2gene"},
        "written": {"layers": ["low"]},
    }
    table.layers["low"] = table.layers["he2gene"] - 1
    hg.io.save(backed)
    del table.uns["he2gene_intervals"], table.layers["low"], table.obs["he2gene_annotation"]
    hg.io.save(backed)
    assert "low" not in sd.read_zarr(store)["table"].layers


@pytest.mark.parametrize("change", ["added", "altered"])
def test_changes_that_another_process_saved_are_not_lost(store, change):
    first, second = sd.read_zarr(store), sd.read_zarr(store)
    first["table"].obs["by_hand" if change == "added" else "annotation"] = "an afternoon's work"
    hg.io.save(first)
    second["table"].obs["other"] = 1
    before = digest(store)
    with pytest.raises(FileExistsError, match="another process saved it after you read it.*Read the store again"):
        hg.io.save(second)
    assert digest(store) == before
    hg.io.save(second, overwrite=True)
    assert "other" in sd.read_zarr(store)["table"].obs
    with pytest.raises(FileExistsError, match="another process saved it"):
        hg.io.save(first)


def test_two_that_change_different_elements_may_both_save(store):
    first, second = sd.read_zarr(store), sd.read_zarr(store)
    hg.pp.tissue(first)
    first.attrs["note"] = 1
    hg.io.save(first)
    second["table"].obs["other"] = 1
    second.attrs["other"] = 2
    hg.io.save(second)
    assert second.attrs["note"] == 1
    hg.io.save(second)
    again = sd.read_zarr(store)
    assert "he_tissue" in again
    assert "other" in again["table"].obs
    assert (again.attrs["note"], again.attrs["other"]) == (1, 2)
    second.attrs["note"] = 3
    hg.io.save(second)
    first.attrs["note"] = 4
    with pytest.raises(FileExistsError, match=r"attrs\['note'\]"):
        hg.io.save(first)


def test_a_layer_that_other_tools_wrote_since_is_not_lost(backed, store):
    group = zarr.open_group(store / "tables" / "table", mode="r+", use_consolidated=False)
    write_elem(group["layers"], "theirs", np.ones(backed["table"].shape, np.float32))
    backed["table"].obs["other"] = 1
    with pytest.raises(FileExistsError, match=r"layers\['theirs'\]"):
        hg.io.save(backed)


def test_values_that_other_tools_changed_are_detected_if_the_reading_was_recorded(store):
    state = stores.fingerprints(store)
    sdata = sd.read_zarr(store)
    stores.remember(sdata, state)
    group = zarr.open_group(store / "tables" / "table", mode="r+", use_consolidated=False)
    write_elem(group, "X", np.ones(sdata["table"].shape, np.float32))
    with pytest.raises(FileExistsError, match="another process saved it after you read it"):
        hg.io.save(sdata)


def test_values_that_other_tools_changed_while_a_slide_was_predicted_are_not_lost(backed, store, tiny_model):
    hg.tl.predict(backed, model=tiny_model)
    group = zarr.open_group(store / "tables" / "table", mode="r+", use_consolidated=False)
    theirs = np.ones(backed["table"].shape, np.float32)
    write_elem(group, "X", theirs)
    with pytest.raises(FileExistsError, match="another process saved it after you read it"):
        hg.io.save(backed)
    np.testing.assert_array_equal(sd.read_zarr(store)["table"].X, theirs)


def test_an_image_is_replaced_only_with_overwrite(backed, store):
    truth = backed["he"].to_numpy().copy()
    backed.images["he"] = Image2DModel.parse(truth, dims=("c", "y", "x"), c_coords=["r", "g", "b"])
    hg.io.save(backed)
    backed.images["he"] = 255 - sd.read_zarr(store)["he"]
    with pytest.raises(FileExistsError, match="images/he: pixels"):
        hg.io.save(backed)
    hg.io.save(backed, overwrite=True)
    np.testing.assert_array_equal(backed["he"].to_numpy(), 255 - truth)
    np.testing.assert_array_equal(sd.read_zarr(store)["he"].to_numpy(), 255 - truth)


def test_labels_that_changed_are_written_and_read_again(backed, store):
    for value in (1, 2):
        backed.labels["mask"] = Labels2DModel.parse(np.full((400, 500), value, np.uint8), dims=("y", "x"))
        hg.io.save(backed)
        assert (sd.read_zarr(store)["mask"].to_numpy() == value).all()
    backed.labels["mask"] = sd.read_zarr(store)["mask"] + 1
    hg.io.save(backed)
    assert (backed["mask"].to_numpy() == 3).all()


@pytest.mark.parametrize("name", ["he", "spots"])
def test_a_new_alignment_is_saved_without_the_data(backed, store, name):
    kind = "images" if name == "he" else "shapes"
    inodes = {path: facts(path) for path in (store / kind / name).rglob("*") if path.name != "zarr.json"}
    set_transformation(backed[name], Scale([2, 2], axes=("x", "y")), "aligned")
    hg.io.save(backed)
    again = sd.read_zarr(store)
    moved = get_transformation(again[name], "aligned").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_array_equal(moved, np.diag([2, 2, 1]))
    assert set(get_transformation(again[name], get_all=True)) == {"global", "aligned"}
    assert {path: facts(path) for path in (store / kind / name).rglob("*") if path.name != "zarr.json"} == inodes


def test_attributes_are_saved_and_not_lost(backed, store):
    backed.attrs["note"] = {"a": 1}
    hg.io.save(backed)
    again = sd.read_zarr(store)
    assert again.attrs["note"] == {"a": 1}
    assert again.attrs["he2gene"]["mpp"] == {"he": 2.0}
    del again.attrs["note"]
    with pytest.raises(FileExistsError, match=r"attrs\['note'\]"):
        hg.io.save(again)


def test_a_name_that_another_kind_has_is_refused(store):
    part = sd.read_zarr(store, selection=("tables",))
    part.labels["he"] = Labels2DModel.parse(np.ones((4, 4), np.uint8), dims=("y", "x"))
    with pytest.raises(ValueError, match="the store has images of that name"):
        hg.io.save(part)


def test_a_concurrent_save_is_refused(backed, store):
    before = digest(store)
    backed["table"].obs["new"] = 1
    with _store.locked(store), pytest.raises(BlockingIOError, match="another process is saving to the store"):
        hg.io.save(backed)
    assert digest(store) == before
    hg.io.save(backed)
    assert names(store.parent) == ["slide.zarr"]


def test_one_of_two_saves_to_the_same_new_path_is_refused(tmp_path):
    slides = [hg.datasets.toy((2, 2), mpp=4.0, seed=seed) for seed in range(2)]
    barrier, outcomes = threading.Barrier(2), [None, None]

    def work(number):
        slides[number]["table"].uns["who"] = number
        barrier.wait()
        try:
            hg.io.save(slides[number], tmp_path / "new.zarr")
            outcomes[number] = "saved"
        except OSError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("saved") == 1
    assert int(sd.read_zarr(tmp_path / "new.zarr")["table"].uns["who"]) == outcomes.index("saved")
    assert names(tmp_path) == ["new.zarr"]


def test_replacing_another_store_keeps_user_files(toy, tmp_path):
    hg.datasets.toy((2, 2), mpp=4.0).write(tmp_path / "slide.zarr")
    (tmp_path / "slide.zarr" / "notes.txt").write_text("mine")
    hg.io.save(toy, tmp_path / "slide.zarr", overwrite=True)
    assert (tmp_path / "slide.zarr" / "notes.txt").read_text() == "mine"


def test_nullable_text_is_saved(backed, store):
    backed["table"].obs["note"] = pd.array(["a", None] * 15, dtype="string")
    hg.io.save(backed)
    note = sd.read_zarr(store)["table"].obs["note"]
    assert note.isna().sum() == 15
    assert (note.dropna() == "a").all()


def test_values_that_cannot_be_written_are_named_and_change_nothing(backed, store):
    before = digest(store)
    backed["table"].uns["model"] = object()
    with pytest.raises(ValueError, match="`sdata` cannot be written.*the store is unchanged"):
        hg.io.save(backed)
    assert digest(store) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind a superuser")
def test_a_path_that_cannot_be_written_is_named(backed, store):
    store.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            hg.io.save(backed)
    finally:
        store.chmod(0o755)


def test_too_little_disk_space_is_detected_before_writing(backed, store, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(_save.shutil, "disk_usage", lambda path: usage)
    _save.check_place(store, 0)
    with pytest.raises(OSError, match=r"needs at least .* MB"):
        _save.check_place(store, _save.least_bytes(backed, images=True))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_after_the_exchange_leaves_the_old_store(backed, store, monkeypatch, error, exchange):
    before = digest(store)
    backed["table"].uns["new"] = 1
    hg.pp.tissue(backed)

    def fail(self, attrs):
        raise error

    monkeypatch.setattr(_store.RootMetadata, "write", fail)
    if not exchange:
        monkeypatch.setattr(_files, "exchange", lambda a, b: False)
    with pytest.raises(type(error)):
        hg.io.save(backed)
    assert digest(store) == before
    assert names(store.parent) == ["slide.zarr"]


def test_a_failure_while_writing_to_a_new_path_leaves_nothing(toy, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_save, "sync_tree", fail)
    with pytest.raises(OSError, match="No space"):
        hg.io.save(toy, tmp_path / "slide.zarr")
    assert names(tmp_path) == []
    assert toy.path is None


def test_without_an_atomic_exchange_the_store_is_replaced_too(backed, store, monkeypatch):
    monkeypatch.setattr(_files, "exchange", lambda a, b: False)
    backed["table"].obsm["new"] = np.ones((30, 1))
    hg.io.save(backed)
    assert "new" in sd.read_zarr(store)["table"].obsm
    hg.io.save(hg.datasets.toy((2, 2), mpp=4.0), store, overwrite=True)
    assert sd.read_zarr(store)["table"].n_obs == 4
    assert names(store.parent) == ["slide.zarr"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no atomic exchange there")
def test_exchange_swaps_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _files.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "b") == ["a"]


FAULTS = ("cut", "error", "full", "cut-no-exchange")


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Outcomes of saves with a power cut, an error or a full disk, run by one program."""
    path = tmp_path_factory.mktemp("faults") / "slide.zarr"
    saving_faults.small_slide().write(path)
    program = Path(saving_faults.__file__)
    done = subprocess.run([sys.executable, program, path, ",".join(FAULTS), "400"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@LINUX
@pytest.mark.parametrize("mode", FAULTS)
def test_a_fault_at_any_file_operation_leaves_the_old_or_the_new_table(trials, mode):
    """Fail at operations that readers can see, and at some others: by a power cut, an error or a full disk."""
    mine = [trial for trial in trials if trial["mode"] == mode]
    assert [trial for trial in mine if "wrong" in trial] == []
    held = {trial["held"] for trial in mine}
    assert "old" in held
    assert "new" in held or mode == "full"
