"""Kill or fail `hg.io.save` at each of its file operations; a program that forks itself, for tests and benchmarks.

    python tests/helpers/saving_faults.py STORE {kill,cut,error,full}[,…] [STRIDE]

Prints a JSON object per trial: the operation, and the content of the store afterwards ("old", "new") or the problem. `cut`
is a power cut: data that was not synchronised is lost. With a stride, all operations that readers can see are tried, and
some of the others. Folders are not exchanged atomically in a mode like `cut-no-exchange`.

A kill leaves the files as they are, so one save is run for all kills, and the files are noted before each operation. Errors
need a save each, all of one object. Each content of the folder is read, and cleared as the next save does first; the rest of
the next save is run once for each content that this leaves.
"""

import asyncio
import contextlib
import errno
import gc
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from stat import S_ISDIR

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
SPACE = ("open", "os.mkdir", "os.link")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
RANDOM = re.compile("[0-9a-f]{32}")


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


# --- Files -----------------------------------------------------------------------------------------------------------


def files(folder):
    """Return inode, permissions, time and content of each file and folder below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content = None if S_ISDIR(stat.st_mode) else path.read_bytes()
        found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_mode, stat.st_mtime_ns, content)
    return found


def digest(found):
    """Return a digest of names, permissions and contents."""
    facts = sorted((RANDOM.sub("*", name), mode, content) for name, (_, mode, _, content) in found.items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def put(found, folder):
    """Write files and folders, with their permissions and times."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, (_, mode, _, content) in found.items():
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
        (folder / name).chmod(mode)
    for name, (_, _, time, _) in reversed(found.items()):
        os.utime(folder / name, ns=(time, time))


def after_power_cut(found, safe):
    """Discard data whose inode is not ``safe``: contents of files, and names in folders."""
    left = {}
    for name, (inode, mode, time, content) in found.items():
        parents = [str(parent) for parent in Path(name).parents][:-1]
        if all(found[parent][0] in safe for parent in parents):
            left[name] = (inode, mode, time, b"" if content is not None and inode not in safe else content)
    return left


# --- Faults ----------------------------------------------------------------------------------------------------------


class Faults:
    """Count file operations below a folder, and note the files before some of them, or fail at one of them."""

    def __init__(self, folder, mode, no_exchange):
        self.folder, self.mode, self.no_exchange, self.off = str(folder), mode, no_exchange, True
        self.known = {path.lstat().st_ino for path in [folder, *folder.rglob("*")]}
        self.synced, self.noted, self.contents = set(), {}, {}
        without_threads()
        sys.addaudithook(self.hook)
        self.watch()

    @contextlib.contextmanager
    def at(self, wanted):
        """Note the files before the ``wanted`` operations, or fail at them, while the block runs."""
        self.wanted, self.log, self.count, self.reached, self.off = wanted, [], Counter(), False, False
        try:
            yield
        finally:
            self.off = True

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
        self.step(event, paths, space=event in SPACE)
        for path in paths:
            for changed in ((Path(path),) if event == "open" else ()) + (Path(path).parent,):
                with contextlib.suppress(FileNotFoundError):
                    self.synced.discard(changed.stat().st_ino)

    def step(self, event, paths, *, space):
        names = (event, *(RANDOM.sub("*", path.replace(self.folder, "")) for path in paths))
        operation = (*names, self.count[names])
        self.count[names] += 1
        self.log.append(operation)
        if operation in self.wanted:
            self.reached = True
            if self.mode in ("kill", "cut"):
                self.note(operation)
        if (self.mode == "error" and operation in self.wanted) or (self.mode == "full" and self.reached and space):
            raise OSError(errno.EIO if self.mode == "error" else errno.ENOSPC, "injected", paths[-1])

    def note(self, operation):
        """Note what a kill or a power cut leaves; files of the same content are noted once."""
        self.off = True
        found = files(Path(self.folder).parent)
        if self.mode == "cut":
            found = after_power_cut(found, self.known | self.synced | {Path(self.folder).stat().st_ino})
        self.noted[operation] = {
            name: (*facts, self.contents.setdefault(content, content)) for name, (*facts, content) in found.items()
        }
        self.off = False

    def watch(self):
        """Count operations without an audit event."""
        from he2gene_sc.io import _files

        fsync, exchange = os.fsync, _files.exchange

        def counted_fsync(descriptor):
            self.step("fsync", [f"fd {Path(f'/proc/self/fd/{descriptor}').readlink()}"], space=False)
            fsync(descriptor)
            self.synced.add(os.fstat(descriptor).st_ino)

        def counted_exchange(a, b):
            if self.no_exchange:
                return False
            self.step("exchange", [str(a), str(b)], space=False)
            return exchange(a, b)

        os.fsync, _files.exchange = counted_fsync, counted_exchange


def without_threads():
    """Let zarr work in this thread: file operations take place one after another, always in the same order."""
    loop = asyncio.new_event_loop()

    async def call(function, *arguments, **options):
        return function(*arguments, **options)

    def run(coroutine, _):
        future = Future()
        try:
            future.set_result(loop.run_until_complete(coroutine))
        except Exception as error:  # noqa: BLE001 - zarr raises it from the future
            future.set_exception(error)
        return future

    asyncio.to_thread, asyncio.run_coroutine_threadsafe = call, run


# --- One save --------------------------------------------------------------------------------------------------------


def read(store):
    """Read a store and its table, also one that was renamed but not yet back in place."""
    import spatialdata as sd

    sdata = sd.read_zarr(store)
    return sdata, sdata["table"] if "table" in sdata else sdata["table-he2gene-new"]


def changed(store):
    """Return the object of a store, changed."""
    import numpy as np

    from he2gene_sc._core import stores

    state = stores.fingerprints(store)
    sdata, table = read(store)
    # The store is younger than this program, so changes here could not be distinguished from those of others.
    stores.remember(sdata, state)
    table.obs["round"] = np.arange(table.n_obs) + 1000
    table.layers["round"] = np.ones(table.shape, np.float32)
    table.uns["round"] = 1
    return sdata


def look(store):
    """Read a store and clear it as the next save does first; return "old" or "new", and a digest of what is left."""
    from he2gene_sc.io._store import STAGING, locked

    interrupted = (store / STAGING).exists()
    sdata, table = read(store)
    new = "round" in table.uns
    assert (int(table.uns["round"]) == 1) if new else int(table.uns["count"]) == 7
    assert (table.obs["round"].iloc[0] == 1000) == new
    assert ("round" in table.layers) == new
    if new:
        assert (table.layers["round"] == 1).all()
    assert table.X.sum() == table.layers["same"].sum() > 0
    assert sdata["he"].to_numpy().any()
    assert len(sdata["spots"]) == table.n_obs
    with locked(store):
        pass
    left = [str(path) for path in store.parent.rglob("*he2gene*")]
    assert not left, left
    return "new" if new else "old", f"{digest(files(store.parent))} {interrupted}"


def save_again(store):
    """Save to a store; raise if it does not hold the new table afterwards, whole."""
    import he2gene_sc as hg

    hg.io.save(changed(store))
    left = [str(path) for path in store.parent.rglob("*he2gene*")]
    assert not left, left
    sdata, table = read(store)
    assert "table" in sdata
    assert int(table.uns["round"]) == 1
    assert (table.layers["round"] == 1).all()
    assert table.X.sum() == table.layers["same"].sum() > 0
    assert sdata["he"].to_numpy().any()


def forked(job):
    """Run a job in a copy of this process; return its exit status and result."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        try:
            result, status = job(), 0
        except BaseException:  # noqa: BLE001 - the parent prints it
            result, status = traceback.format_exc(), 1
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(result, stream)
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pickle.loads(content) if content else None


# --- All of them -----------------------------------------------------------------------------------------------------


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


class Program:
    """A store that is saved to again and again, and what is known of the contents of its folder."""

    def __init__(self, template, place):
        self.place, self.store = place, place / "slide.zarr"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, self.store)
        self.fresh = files(place)
        self.outcomes, self.saved_again = {}, {}

    def check(self, found):
        """Return "old" or "new" in a dict, or the problem; ``found`` are the files of the folder."""
        key = digest(found)
        if key not in self.outcomes:
            put(found, self.place)
            status, result = forked(lambda: look(self.store))
            if status == 0 and result not in self.saved_again:
                put(found, self.place)
                self.saved_again[result] = forked(lambda: save_again(self.store))
            status, problem = self.saved_again[result] if status == 0 else (status, result)
            self.outcomes[key] = {"held": result[0]} if status == 0 else {"wrong": problem}
        return dict(self.outcomes[key])

    def save_at(self, mode, operations, no_exchange):
        """Save, and return all operations, and the files before each of the given ones."""
        import he2gene_sc as hg

        put(self.fresh, self.place)
        sdata, faults = changed(self.store), Faults(self.store, mode, no_exchange)
        with faults.at(operations):
            hg.io.save(sdata)
        return faults.log, faults.noted

    def fail_at(self, mode, operations, no_exchange):
        """Save one object with a fault at each of some operations; return the error, and the files afterwards."""
        import he2gene_sc as hg

        put(self.fresh, self.place)
        sdata, faults, outcomes = changed(self.store), Faults(self.store, mode, no_exchange), []
        for operation in operations:
            message = ""
            try:
                with faults.at({operation}):
                    hg.io.save(sdata)
            except Exception:  # noqa: BLE001 - it is judged by its text
                message = traceback.format_exc()
            found = files(self.place)
            outcomes.append((message, found))
            if digest(found) != digest(self.fresh):
                put(self.fresh, self.place)
                sdata = changed(self.store)
        hg.io.save(sdata)
        return outcomes

    def attempts(self, mode, stride, no_exchange):
        """Try each operation, and yield the outcome."""
        status, result = forked(lambda: self.save_at("count", set(), no_exchange))
        assert status == 0, result
        log = result[0]
        chosen = {number: log[number] for number in trials(log, stride)}
        if mode in ("kill", "cut"):
            status, result = forked(lambda: self.save_at(mode, set(chosen.values()), no_exchange))
            assert status == 0, result
            for number, operation in chosen.items():
                yield {"number": number, "operation": operation} | self.check(result[1][operation])
            return
        # A full disk matters where space is needed.
        chosen = {n: operation for n, operation in chosen.items() if mode == "error" or operation[0] in SPACE}
        status, result = forked(lambda: self.fail_at(mode, chosen.values(), no_exchange))
        assert status == 0, result
        for (number, operation), (message, found) in zip(chosen.items(), result, strict=True):
            outcome = {"number": number, "operation": operation} | self.check(found)
            if message and "injected" not in message:
                outcome["wrong"] = message
            elif message and mode == "full" and outcome.get("held") == "new":
                outcome["wrong"] = "the save failed for want of space, and the store holds the new table"
            yield outcome


def main(template, modes, stride=1):
    warnings.simplefilter("ignore")
    import anndata  # noqa: F401
    import dask
    import filelock  # noqa: F401
    import spatialdata  # noqa: F401

    import he2gene_sc.io._save  # noqa: F401

    dask.config.set(scheduler="synchronous")
    # Power cuts are simulated, so nothing has to reach the disk.
    os.fsync = lambda descriptor: None
    program = Program(template, Path(template).parent / f"faults-{modes}")
    # Import all modules of a save once here, and not in each fork.
    status, message = forked(lambda: (look(program.store), save_again(program.store), sorted(sys.modules))[2])
    assert status == 0, message
    for name in message:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    for mode in modes.split(","):
        kind, no_exchange = mode.removesuffix("-no-exchange"), mode.endswith("-no-exchange")
        for outcome in program.attempts(kind, stride, no_exchange):
            print(json.dumps({"mode": mode, **outcome}), flush=True)
    shutil.rmtree(program.place)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int((sys.argv[3:4] or ["1"])[0]))
