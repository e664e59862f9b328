"""What `hg.io.save` writes, and what a kill leaves: bytes beside those of spatialdata and anndata, kills at random moments.

python tests/benchmarks/bench_save.py bytes FOLDER [MB_OF_IMAGE]  # a layer of 20,000 x 250, an image of 900 MB
python tests/benchmarks/bench_save.py kills FOLDER [N]            # at least 200 kills
python tests/benchmarks/bench_save.py faults FOLDER               # a fault at each file operation, in four ways
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

warnings.simplefilter("ignore")


def files(place):
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in place.rglob("*") if p.is_file()}


def written(place, job):
    """Return what a job writes, in MB, and its wall time: files that are not the same as before."""
    before, start = files(place), time.perf_counter()
    job()
    seconds = time.perf_counter() - start
    return sum(facts[2] for path, facts in files(place).items() if before.get(path) != facts) / 1e6, seconds


def bytes_written(folder, megabytes=900):
    import spatialdata as sd
    import zarr
    from anndata import AnnData
    from anndata.io import write_elem
    from spatialdata.models import Image2DModel, TableModel

    import he2gene_sc as hg

    store, rng = folder / "bytes.zarr", np.random.default_rng(0)
    side = int((megabytes * 1e6 / 3) ** 0.5)
    pixels = rng.integers(0, 255, (3, side, side), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), chunks=(3, 2048, 2048))
    table = AnnData(rng.poisson(1, (20_000, 250)).astype(np.float32))
    sd.SpatialData(images={"he": image}, tables={"table": TableModel.parse(table)}).write(store)
    size = sum(facts[2] for facts in files(store).values()) / 1e6
    print(f"store of {size:,.0f} MB, layer of 20,000 x 250")

    sdata = sd.read_zarr(store)
    sdata["table"].layers["new"] = rng.normal(size=(20_000, 250)).astype(np.float32)
    other = sd.SpatialData(tables={"table": sdata["table"]})
    other.write(folder / "other.zarr")
    other.delete_element_from_disk("table")
    whole, whole_s = written(folder / "other.zarr", lambda: other.write_element("table"))
    group = zarr.open_group(folder / "elem.zarr", mode="w")
    elem, elem_s = written(folder / "elem.zarr", lambda: write_elem(group, "new", sdata["table"].layers["new"]))
    ours, ours_s = written(store, lambda: hg.io.save(sdata))
    for name, megabyte, seconds in (
        ("sdata.write_element", whole, whole_s),
        ("anndata write_elem", elem, elem_s),
        ("hg.io.save", ours, ours_s),
    ):
        print(f"  {name:20s} {megabyte:8.1f} MB  {seconds:6.1f} s  {megabyte / whole:5.2f} x write_element")


def kills(folder, n=200):
    import spatialdata as sd

    import he2gene_sc as hg

    store, rng, seen = folder / "kills.zarr", random.Random(0), Counter()
    hg.datasets.toy((5, 6), mpp=4.0).write(store)
    done = 0
    while done < n:
        # One process is loaded and forks: each copy saves until it is killed.
        process = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while done < n:
            kind = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            process.stdin.write(f"{int(kind)} {rng.uniform(0.0, 1.0)}\n")
            process.stdin.flush()
            said = int(process.stdout.readline())
            sdata = sd.read_zarr(store)
            table = sdata["table"]
            found = int(table.uns.get("round", 0))
            whole = found == 0 or ((table.obsm["round"] == found).all() and (table.layers["round"] == found).all())
            if not whole or not sdata["he"].to_numpy().any() or table.X.sum() == 0:
                seen["torn"] += 1
            elif found < said:
                seen["lost"] += 1
            else:
                seen["as said" if found == said else "the next"] += 1
            seen["leftovers"] += any(store.glob(".he2gene*"))
            done += 1
        process.stdin.close()
        process.wait()
    hg.io.save(sd.read_zarr(store))
    print(
        f"{done} kills (KILL, TERM, INT): {dict(seen)}; after one more save: {[p.name for p in store.glob('.he2gene*')]}"
    )


FORKS = """
import os, signal, sys, time, warnings, itertools
warnings.simplefilter("ignore")
import importlib
import numpy as np, spatialdata as sd, dask, he2gene_sc as hg, anndata.io, filelock, zarr.storage
from pathlib import Path
from he2gene_sc._core import stores
import he2gene_sc.io._save, he2gene_sc.io._update, ome_zarr.reader, ome_zarr.io, spatialdata._io.format
dask.config.set(scheduler="synchronous")
for line in sys.stdin:
    number, wait = line.split()
    reader, writer = os.pipe()
    if not (child := os.fork()):
        sys.stderr.close()
        # What a killed save left is younger than this process: what is changed here would not be known from it.
        state = stores.fingerprints(Path(sys.argv[1]))
        sdata = sd.read_zarr(sys.argv[1])
        stores.remember(sdata, state)
        table = sdata["table"]
        first = int(table.uns.get("round", 0))
        os.write(writer, f"{first}\\n".encode())
        for i in itertools.count(first + 1):
            table.obsm["round"] = np.full((table.n_obs, 3), i)
            table.layers["round"] = np.full(table.shape, i, np.float32)
            table.uns["round"] = i
            hg.io.save(sdata)
            os.write(writer, f"{i}\\n".encode())
    os.close(writer)
    stream = os.fdopen(reader)
    last = stream.readline()
    time.sleep(float(wait))
    os.kill(child, int(number))
    for _ in range(50):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        # Python drops a Ctrl-C that comes while it runs a finaliser.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    rest = stream.read().split()
    print(rest[-1] if rest else last.strip(), flush=True)
"""


def faults(folder):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.helpers import saving_faults

    saving_faults.small_slide().write(folder / "faults.zarr")
    modes, held = "kill,cut,cut-no-exchange,full,error", {}
    with subprocess.Popen(
        [sys.executable, saving_faults.__file__, folder / "faults.zarr", modes], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            trial = json.loads(line)
            held.setdefault(trial["mode"], Counter())[trial.get("held", "WRONG")] += 1
            if "wrong" in trial:
                print(line.strip())
    for mode, found in held.items():
        print(f"{mode:16s} {found.total()} file operations: {dict(found)}")
    times = os.times()
    print(f"{(times.children_user + times.children_system) / 60:.0f} minutes of CPU time")
    sys.exit(process.returncode)


if __name__ == "__main__":
    if os.name == "nt" or len(sys.argv) < 3:
        sys.exit(__doc__)
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    for leftover in place.glob("*.zarr"):
        shutil.rmtree(leftover)
    {"bytes": bytes_written, "kills": kills, "faults": faults}[sys.argv[1]](place, *map(int, sys.argv[3:4]))
