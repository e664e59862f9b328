"""Time of the metrics of hg.tl.evaluate on 14,000 genes x 5,000 spots, and the most memory that was used.

    taskset -c 0,1 python tests/benchmarks/bench_evaluate.py [pearson spearman moran ssim ceiling evaluate]

Expression is random, a third of the counts are not 0. Spots lie on a hexagonal lattice, as those of Visium. The
issue asks for Pearson in under 2 s and Spearman in under 60 s on 2 cores; the best of three runs is printed for
Pearson, one run for the rest. ``evaluate`` is hg.tl.evaluate whole, on a table without an image.
"""

import resource
import sys
import time

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


def main():
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
