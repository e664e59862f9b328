"""`hg.io.save` leaves the old store or the new one, whole, whatever happens."""

import errno
import hashlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import spatialdata as sd

import he2gene_sc as hg
from he2gene_sc.io import _save

LOOP = """
import sys, itertools, numpy as np, spatialdata as sd, he2gene_sc as hg
sdata = sd.read_zarr(sys.argv[1])
print("ready", flush=True)
for i in itertools.count(1):
    sdata["table"].obsm["round"] = np.full((sdata["table"].n_obs, 1), i)
    sdata["table"].uns["round"] = i
    hg.io.save(sdata)
    print(i, flush=True)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def digest(store):
    """Names and bytes of all files of a folder."""
    files = sorted(p for p in store.rglob("*") if p.is_file())
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def store(toy, tmp_path):
    toy.write(tmp_path / "slide.zarr")
    return tmp_path / "slide.zarr"


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


def test_save_replaces_another_store_only_when_told(toy, tmp_path):
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
def test_what_is_no_store_is_not_overwritten(toy, tmp_path, kind):
    place = tmp_path / "thesis"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        if kind == "folder":
            (place / "chapter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`path` .*thesis.* is no SpatialData zarr store"):
        hg.io.save(toy, place)
    assert place.is_dir() == (kind != "file")
    assert names(tmp_path) == ["thesis"]


def half_write(original, error):
    def write(self, path, **kwargs):
        original(self, path, **kwargs)
        (path / "zarr.json").unlink()
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_store_and_no_leftovers(backed, store, monkeypatch, error):
    before = digest(store)
    backed["table"].uns["new"] = 1
    monkeypatch.setattr(sd.SpatialData, "write", half_write(sd.SpatialData.write, error))
    with pytest.raises(type(error)):
        hg.io.save(backed)
    assert digest(store) == before
    assert names(store.parent) == ["slide.zarr"]
    assert backed.path == store


def test_a_failure_while_writing_to_a_new_path_leaves_nothing(toy, tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sd.SpatialData, "write", half_write(sd.SpatialData.write, error))
    with pytest.raises(OSError, match="No space"):
        hg.io.save(toy, tmp_path / "slide.zarr")
    assert names(tmp_path) == []
    assert toy.path is None


def test_a_failure_of_the_swap_leaves_the_old_store(backed, store, monkeypatch):
    before = digest(store)

    def fail(a, b):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(_save, "_exchange", fail)
    with pytest.raises(OSError, match="input/output"):
        hg.io.save(backed)
    assert digest(store) == before
    assert names(store.parent) == ["slide.zarr"]


def test_without_an_atomic_swap_the_store_is_replaced_too(backed, store, monkeypatch):
    monkeypatch.setattr(_save, "_exchange", lambda a, b: False)
    backed["table"].obsm["new"] = np.ones((30, 1))
    hg.io.save(backed)
    assert "new" in sd.read_zarr(store)["table"].obsm
    assert names(store.parent) == ["slide.zarr"]


def test_without_an_atomic_swap_a_failed_rename_puts_the_old_store_back(backed, store, monkeypatch):
    before = digest(store)
    original = type(store).rename

    def rename(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "input/output error")
        return original(self, target)

    monkeypatch.setattr(_save, "_exchange", lambda a, b: False)
    monkeypatch.setattr(type(store), "rename", rename)
    with pytest.raises(OSError, match="input/output"):
        hg.io.save(backed)
    assert digest(store) == before
    assert names(store.parent) == ["slide.zarr"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no atomic exchange there")
def test_exchange_swaps_two_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _save._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "b") == ["a"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no atomic exchange there")
def test_a_kill_at_any_moment_leaves_a_whole_store(store):
    """The store at the path reads at once after each kill, and holds the last round that was done or the next."""
    rng = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOOP, str(store)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        sdata = sd.read_zarr(store)
        table = sdata["table"]
        assert sdata["he"].to_numpy().shape == (3, 600, 700)
        assert table.X.sum() > 0
        if "round" in table.uns:
            found = int(table.uns["round"])
            assert (table.obsm["round"] == found).all()
            if said:
                assert found in (said[-1], said[-1] + 1)
        else:
            assert not said
