"""Many slides: throughput by workers, and what killed workers, damaged slides and Ctrl-C leave.

python tests/benchmarks/bench_cohort.py rate FOLDER [SLIDES] [ROWS]  # 12 slides of 12 x 12 spots on one and two workers
python tests/benchmarks/bench_cohort.py faults FOLDER [SLIDES]       # a killed worker, a damaged slide, one that kills its workers
python tests/benchmarks/bench_cohort.py interrupt FOLDER [SLIDES]    # Ctrl-C of `he2gene predict`, and the same command again
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

from distributed import WorkerPlugin

warnings.simplefilter("ignore")


def make(folder, n, rows):
    """Write slides; return their paths."""
    import he2gene_sc as hg

    stores = [folder / f"slide{i:02d}.zarr" for i in range(n)]
    for i, store in enumerate(stores):
        shutil.rmtree(store, ignore_errors=True)
        hg.datasets.toy((rows, rows), mpp=2.0, seed=i).write(store)
    return stores


def rate(folder, n=12, rows=12):
    import he2gene_sc as hg
    from he2gene_sc.cohort._cluster import local_client, workers_here

    stores, cores = make(folder, n, rows), os.cpu_count()
    two = workers_here(n, 2, "cpu")
    clusters = {"one worker of all cores": workers_here(n, 1, "cpu"), "two workers": two, "one of the two": two[:1]}
    print(f"{n} slides of {rows * rows} spots; load average {os.getloadavg()[0]:.1f} on {cores} cores")
    seconds = {}
    for name, environments in clusters.items():
        with local_client(environments) as client:
            # What a worker imports once is no part of a slide.
            warm = make(folder / "warm", len(environments), 3)
            hg.cohort.predict(warm, client, show_progress_bar=False)
            before = sum(client.run(time.process_time).values())
            start = time.perf_counter()
            frame = hg.cohort.predict(stores, client, overwrite=True, show_progress_bar=False)
            took = seconds[name] = time.perf_counter() - start
            work = sum(client.run(time.process_time).values()) - before
        assert (frame["status"] == "predicted").all()
        print(
            f"{name}, {environments[0]['OMP_NUM_THREADS']} threads each: {took:.1f} s, {60 * n / took:.1f} slides a minute, "
            f"{frame['seconds'].sum():.1f} s in slides, {work:.1f} s of CPU in workers, load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    for name in ("one of the two", "one worker of all cores"):
        print(f"two workers against {name}: {seconds[name] / seconds['two workers']:.2f} times the throughput")


class Poison(WorkerPlugin):
    """Ends the process of a worker that is about to predict ``poison.zarr``."""

    def setup(self, worker):
        from he2gene_sc.cohort import _predict

        before = _predict.predict_slide

        def predict_slide(job, model):
            if job.path.name == "poison.zarr":
                os.kill(os.getpid(), signal.SIGKILL)
            return before(job, model)

        _predict.predict_slide = predict_slide


def faults(folder, n=12):
    import spatialdata as sd

    import he2gene_sc as hg
    from he2gene_sc.cohort._cluster import local_client, workers_here

    stores, summary = make(folder, n, 4), folder / "summary.csv"
    poison, damaged = folder / "poison.zarr", folder / "damaged.zarr"
    for bad in (poison, damaged):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(stores[0], bad)
    for part in (damaged / "images").rglob("zarr.json"):
        part.write_bytes(b"{")
    killed = []

    def kill_one(client):
        while not summary.is_file() or "predicted" not in summary.read_text():
            time.sleep(0.2)
        for pid in list(client.run(os.getpid).values())[:1]:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    summary.unlink(missing_ok=True)
    with local_client(workers_here(n, 2, "cpu")) as client:
        client.register_plugin(Poison())
        threading.Thread(target=kill_one, args=(client,), daemon=True).start()
        frame = hg.cohort.predict([poison, damaged, *stores], client, summary=summary, show_progress_bar=False)
    print(frame[["status", "spots", "seconds"]].assign(path=frame["path"].map(lambda p: Path(p).name)))
    for path, error in zip(frame["path"], frame["error"], strict=True):
        print(f"{Path(path).name}: {error[:150]}" if error else "", end="\n" if error else "")
    assert killed
    assert frame["status"].tolist()[:2] == ["failed", "failed"]
    # A worker that was killed may have saved its slide: it is found finished.
    assert set(frame["status"][2:]) <= {"predicted", "skipped"}
    assert all("he2gene" in sd.read_zarr(store)["table"].layers for store in stores)
    assert "he2gene" not in sd.read_zarr(poison)["table"].layers
    shutil.rmtree(stores[3])
    make(folder / "again", 4, 4)[3].rename(stores[3])
    again = hg.cohort.predict(stores, n_workers=1, show_progress_bar=False)
    assert again["status"].tolist() == ["skipped"] * 3 + ["predicted"] + ["skipped"] * (n - 4)
    print(f"{n} slides right beside a killed worker, a damaged slide and one that kills its workers; the rerun did one")


def interrupt(folder, n=12):
    import pandas as pd
    import spatialdata as sd

    stores, summary = make(folder, n, 4), folder / "summary.csv"
    summary.unlink(missing_ok=True)
    code = "from he2gene_sc.cli import main\nif __name__ == '__main__': main()\n"
    (folder / "he2gene.py").write_text(code)
    command = [sys.executable, folder / "he2gene.py", "predict", *stores, "--workers", "2", "--summary", summary]
    running = subprocess.Popen(command, start_new_session=True)
    while not summary.is_file() or summary.read_text().count("predicted") < 2:
        assert running.poll() is None
        time.sleep(0.2)
    # As a terminal does it: to every process of the group.
    start = time.perf_counter()
    os.killpg(running.pid, signal.SIGINT)
    code = running.wait(120)
    print(f"interrupted: exit status {code} after {time.perf_counter() - start:.1f} s")
    assert code != 0
    found = pd.read_csv(summary)["status"].value_counts().to_dict()
    layers = ["he2gene" in sd.read_zarr(store)["table"].layers for store in stores]
    print(f"summary {found}, stores with a prediction {sum(layers)} of {n}, all open")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    print(again.stdout.splitlines()[-2])
    assert again.stdout.count("Finished before") == sum(layers)


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    {"rate": rate, "faults": faults, "interrupt": interrupt}[what](Path(place).resolve(), *map(int, numbers))
