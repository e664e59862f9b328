"""Kill or fail `hg.io.save` at each of its file operations; a program that forks itself, for tests and benchmarks.

    python tests/helpers/saving_faults.py STORE {kill,cut,error,full}[,…] [STRIDE] [no-exchange]

Prints a JSON object per trial: the operation, and the content of the store afterwards ("old", "new") or the problem. `cut`
is a power cut: data that was not synchronised is lost. With a stride, all operations that readers can see are tried, and
some of the others. Folders are not exchanged atomically in a mode like `cut-no-exchange`, or in all modes with `no-exchange`.
"""

import contextlib
import errno
import gc
import importlib
import json
import os
import re
import shutil
import sys
import traceback
import warnings
from pathlib import Path

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def small_slide():
    """Return a slide whose table has few files; each column takes several."""
    import numpy as np

    import he2gene_sc as hg

    toy = hg.datasets.toy((3, 4), mpp=4.0)
    table = toy["table"]
    table.obs, table.var = table.obs[["region", "instance_id"]], table.var[[]]
    table.obs["round"] = np.arange(table.n_obs)
    table.uns["count"] = 7
    table.layers["same"] = table.X.copy()
    return toy


class Faults:
    """Count file operations below a folder, and fail at one of them."""

    def __init__(self, folder, mode, last):
        self.folder, self.mode, self.last = str(folder), mode, last
        self.log, self.synced, self.off, self.reached = [], set(), False, False
        self.known = {path.lstat().st_ino for path in [folder, *folder.rglob("*")]}
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.off or (event != "open" and event not in EVENTS):
            return
        paths = [
            os.fsdecode(a) for a in arguments[: 1 if event == "open" else 2] if isinstance(a, str | bytes | os.PathLike)
        ]
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        if not any(path.startswith(self.folder) or not path.startswith("/") for path in paths):
            return
        self.off = True
        try:
            for path in paths:
                for changed in ((Path(path),) if event == "open" else ()) + (Path(path).parent,):
                    if changed.exists():
                        self.synced.discard(changed.stat().st_ino)
        finally:
            self.off = False
        self.step(event, paths, space=event in ("open", "os.mkdir", "os.link"))

    def step(self, event, paths, space=False):
        # Threads of zarr run in any order, so identify an operation by its names, not its number.
        operation = [event, *(re.sub("[0-9a-f]{32}", "*", path.replace(self.folder, "")) for path in paths)]
        operation.append(sum(entry[:-1] == operation for entry in self.log))
        self.log.append(operation)
        self.reached = self.reached or operation == self.last
        if self.mode in ("kill", "cut") and operation == self.last:
            self.off = True
            if self.mode == "cut":
                self.lose()
            os._exit(9)
        if (self.mode == "error" and operation == self.last) or (self.mode == "full" and self.reached and space):
            raise OSError(errno.EIO if self.mode == "error" else errno.ENOSPC, "injected", paths[-1])

    def lose(self):
        """Discard data that was not synchronised: contents of files, and names in new folders."""
        for path in sorted(Path(self.folder).rglob("*"), reverse=True):
            inode = path.lstat().st_ino
            if inode in self.known or inode in self.synced:
                continue
            if path.is_dir():
                for child in path.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
            else:
                os.truncate(path, 0)

    def watch(self, files, no_exchange):
        """Count operations without an audit event."""
        fsync, exchange = os.fsync, files.exchange

        def counted_fsync(descriptor):
            self.step("fsync", [f"fd {Path(f'/proc/self/fd/{descriptor}').readlink()}"])
            fsync(descriptor)
            self.synced.add(os.fstat(descriptor).st_ino)

        def counted_exchange(a, b):
            if no_exchange:
                return False
            self.step("exchange", [str(a), str(b)])
            return exchange(a, b)

        os.fsync, files.exchange = counted_fsync, counted_exchange


def save(store, faults=None, no_exchange=False):
    import numpy as np
    import spatialdata as sd

    import he2gene_sc as hg
    from he2gene_sc._core import stores
    from he2gene_sc.io import _files

    state = stores.fingerprints(store)
    sdata = sd.read_zarr(store)
    # The store is younger than this program, so changes here could not be distinguished from those of others.
    stores.remember(sdata, state)
    table = sdata["table"] if "table" in sdata else sdata["table-he2gene-new"]
    table.obs["round"] = np.arange(table.n_obs) + 1000
    table.layers["round"] = np.ones(table.shape, np.float32)
    table.uns["round"] = 1
    if faults is not None:
        faults = Faults(store, *faults)
        faults.watch(_files, no_exchange)
    try:
        hg.io.save(sdata)
    finally:
        if faults is not None:
            faults.off = True
            store.with_name("log.json").write_text(json.dumps(faults.log))


def check(store):
    """Return "old" or "new"; raise if the store holds neither, or if the next save does not leave a complete store."""
    import spatialdata as sd

    sdata = sd.read_zarr(store)
    table = sdata["table"] if "table" in sdata else sdata["table-he2gene-new"]
    new = "round" in table.uns
    assert (int(table.uns["round"]) == 1) if new else int(table.uns["count"]) == 7
    assert (table.obs["round"].iloc[0] == 1000) == new
    assert ("round" in table.layers) == new
    if new:
        assert (table.layers["round"] == 1).all()
    assert table.X.sum() == table.layers["same"].sum() > 0
    assert sdata["he"].to_numpy().any()
    assert len(sdata["spots"]) == table.n_obs
    save(store)
    left = [str(path) for path in store.parent.rglob("*he2gene*")]
    assert not left, left
    assert int(sd.read_zarr(store)["table"].uns["round"]) == 1
    return "new" if new else "old"


def forked(job):
    """Run a job in a copy of this process; return its exit status and result."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        try:
            result, status = job(), 0
        except BaseException:  # noqa: BLE001 - the parent prints it
            result, status = traceback.format_exc(), 1
        with os.fdopen(writer, "w") as stream:
            json.dump(result, stream)
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(text) if text else None


def trials(log, stride):
    """Return the operations to try: all that readers can see or that move files, the last one, and some others."""
    seen = [
        number
        for number, (event, *paths, _) in enumerate(log)
        if event == "exchange"
        or (event in ("os.rename", "open") and not all("he2gene" in path or path[:1] != "/" for path in paths))
    ]
    near = {n + d for n in seen for d in (0, 1)} if stride > 1 else set()
    return sorted(n for n in near | {len(log) - 1} | set(range(0, len(log), stride)) if n < len(log))


def main(template, modes, stride=1, no_exchange=False):
    warnings.simplefilter("ignore")
    import anndata  # noqa: F401
    import dask
    import filelock  # noqa: F401
    import spatialdata  # noqa: F401

    import he2gene_sc.io._save  # noqa: F401

    dask.config.set(scheduler="synchronous")
    place = Path(template).parent / f"faults-{modes}{'-no-exchange' * no_exchange}"
    store = place / "slide.zarr"

    def fresh():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, store)

    # Import all modules of a save once here, and not in each fork.
    fresh()
    status, message = forked(lambda: (check(store), sorted(sys.modules))[1])
    assert status == 0, message
    for name in message:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    for mode in modes.split(","):
        kind, slow = mode.removesuffix("-no-exchange"), no_exchange or mode.endswith("-no-exchange")
        for outcome in attempts(store, fresh, kind, stride, slow):
            print(json.dumps({"mode": mode, **outcome}), flush=True)
    shutil.rmtree(place)


def attempts(store, fresh, mode, stride, no_exchange):
    """Save once for each operation that is tried, and yield the outcome."""
    fresh()
    status, message = forked(lambda: save(store, ("count", None), no_exchange))
    assert status == 0, message
    log = json.loads(store.with_name("log.json").read_text())
    for number in trials(log, stride):
        fresh()
        status, message = forked(lambda n=number: save(store, (mode, log[n]), no_exchange))
        outcome = {"number": number, "operation": log[number], "status": status}
        if mode in ("error", "full") and status and "injected" not in str(message):
            outcome["wrong"] = message
        status, held = forked(lambda: check(store))
        if status == 0 and mode == "full" and outcome["status"] and held != "old":
            status, held = 1, "the save failed for want of space, and the store holds the new table"
        yield outcome | ({"held": held} if status == 0 else {"wrong": held})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int((sys.argv[3:4] or ["1"])[0]), "no-exchange" in sys.argv)
