"""Time of the metrics of hg.tl.evaluate on 14,000 genes x 5,000 spots, and the most memory that was used.

    taskset -c 0,1 python tests/benchmarks/bench_evaluate.py [pearson spearman moran ssim ceiling evaluate]
    python tests/benchmarks/bench_evaluate.py verbs SPOTS GENES [evaluate intervals biomarkers domains] [--seeds N]

`verbs`: hg.tl.evaluate, intervals, biomarkers(method="spatial") and domain_preservation whole, one after the other, each in a
process of its own: CPU seconds, and the most memory beyond the table. `--seeds`: clusterings of domain_preservation.

Expression is random, a third of the counts are not 0. Spots lie on a hexagonal lattice, as those of Visium. The
issue asks for Pearson in under 2 s and Spearman in under 60 s on 2 cores; the best of three runs is printed for
Pearson, one run for the rest. ``evaluate`` is hg.tl.evaluate whole, on a table without an image.
"""

import argparse
import resource
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import scipy.sparse

from he2gene_sc.stats import (
    log_normalise,
    moran,
    neighbour_weights,
    noise_ceiling,
    pearson,
    spearman,
    ssim_on_grid,
)

N_SPOTS, N_GENES = 5000, 14_000


def timed(name, function, n=1):
    seconds = []
    for _ in range(n):
        start, cpu = time.perf_counter(), time.process_time()
        function()
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, cpu = min(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<16} {wall:7.2f} s ({cpu:.2f} s of CPU), peak memory {peak:.2f} GB", flush=True)


def data():
    """Counts (csr, float32), prediction, and a hexagonal lattice."""
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.poisson(0.4, (N_SPOTS // 10, N_GENES)).astype(np.float32) for _ in range(10)])
    predicted = rng.random((N_SPOTS, N_GENES), np.float32)
    rows, columns = (x.ravel()[:N_SPOTS] for x in np.mgrid[:72, :70])
    columns = 2 * columns + rows % 2
    xy = np.column_stack([columns * 50.0, rows * 86.6])
    return scipy.sparse.csr_matrix(counts), predicted, rows, columns, xy


def whole(counts, predicted, rows, columns, xy):
    """Return a call of hg.tl.evaluate on a table as predict leaves it."""
    from anndata import AnnData

    import he2gene_sc as hg

    n = counts.shape[1]
    table = AnnData(counts, obs=pd.DataFrame({"array_row": rows, "array_col": columns}, index=map(str, range(N_SPOTS))))
    table.var["he2gene_predicted"], table.var["he2gene_reliable"] = True, np.arange(n) % 2 == 0
    table.var["he2gene_pcc"], table.var["he2gene_mean"] = 0.1, 0.5
    table.layers["he2gene"] = predicted
    table.obsm["spatial"] = xy
    table.uns["he2gene"] = {"layer": "he2gene", "model": "none", "weights_sha256": ""}
    return lambda: hg.tl.evaluate(table)


def of_size(n_spots, n_genes, *, patient="P0", seed=0):
    """Return a table of four domains, with counts and the layer of a model that sees a third of what varies."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n_spots)))
    rows, columns = (x.ravel()[:n_spots] for x in np.mgrid[:side, :side])
    domain = 2 * (rows > side / 2) + (columns > side / 2)
    level = rng.gamma(2, 0.2, (4, n_genes)).astype(np.float32)
    parts, layer = [], np.empty((n_spots, n_genes), np.float32)
    for start in range(0, n_spots, 2000):
        here = slice(start, start + 2000)
        counts = rng.poisson(level[domain[here]]).astype(np.float32)
        parts.append(scipy.sparse.csr_matrix(counts))
        layer[here] = np.log1p(1e4 * (level[domain[here]] + 0.5 * counts) / (1.5 * level.sum(1).mean()))
    names = [f"S{seed}-{i}" for i in range(n_spots)]
    obs = pd.DataFrame({"array_row": rows, "array_col": columns, "domain": domain.astype(str)}, index=names)
    obs["group"] = np.where(columns > side / 3, "a", "b")
    table = AnnData(scipy.sparse.vstack(parts, format="csr"), obs=obs.assign(patient=patient, section=f"S{seed}"))
    table.layers["model"] = layer
    table.obsm["spatial"] = np.column_stack([columns, rows]) * 100.0
    return table


def verb(name, n_spots, n_genes, seeds):
    import he2gene_sc as hg

    warnings.simplefilter("ignore")
    other = {"layer": "model", "prediction_key": None}
    calibration = None
    if name == "intervals":
        small = [of_size(200, n_genes, patient=f"P{i}", seed=i) for i in range(1, 4)]
        calibration = hg.tl.calibrate(small, layer="model")
    table = of_size(n_spots, n_genes)
    hg.settings.memory_limit = 2**34
    run = {
        "evaluate": lambda: hg.tl.evaluate(table, **other),
        "intervals": lambda: hg.tl.intervals(table, layer="model", calibration=calibration),
        "biomarkers": lambda: hg.tl.biomarkers(table, "group", layer="model", method="spatial"),
        "domains": lambda: hg.tl.domain_preservation(table, "domain", layer="model", n_seeds=seeds),
    }[name]
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run()
    cpu, peak = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{name:<11} {n_spots:>7,} spots x {n_genes:>6,} genes: {cpu:7.0f} s of CPU, peak {peak / 2**20:.1f} GB, "
        f"{(peak - before) / 2**20:.1f} beyond the table (its layer: {4 * n_spots * n_genes / 2**30:.1f})",
        flush=True,
    )


def verbs(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("spots", type=int)
    parser.add_argument("genes", type=int)
    parser.add_argument("names", nargs="*", default=["evaluate", "intervals", "biomarkers", "domains"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--here", action="store_true", help="in this process, as the others are started")
    given = parser.parse_args(arguments)
    for name in given.names:
        if given.here:
            verb(name, given.spots, given.genes, given.seeds)
        else:
            sizes = [str(given.spots), str(given.genes)]
            command = [sys.executable, __file__, "verbs", *sizes, name, "--seeds", str(given.seeds), "--here"]
            subprocess.run(command, check=True)


def main():
    if sys.argv[1:2] == ["verbs"]:
        verbs(sys.argv[2:])
        return
    counts, predicted, rows, columns, xy = data()
    measured = log_normalise(counts)
    weights = neighbour_weights(xy, 100.0)
    runs = {
        "pearson": lambda: pearson(predicted, measured),
        "spearman": lambda: spearman(predicted, measured),
        "moran": lambda: moran(predicted, weights),
        "ssim": lambda: ssim_on_grid(predicted, measured, rows, columns),
        "ceiling": lambda: noise_ceiling(counts),
        "evaluate": whole(counts, predicted, rows, columns, xy),
    }
    for name in sys.argv[1:] or runs:
        timed(name, runs[name], n=3 if name == "pearson" else 1)


if __name__ == "__main__":
    main()
