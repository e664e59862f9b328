"""``hg.tl.adapt`` on held-out C5 by the bundled model, which was trained without it.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_adapt.py [case ...] [--seeds 20] [--genes 1000]

Measured spots are drawn 20 times: 10 % and 30 % at random, and 30 % on one side of a line whose direction the seed
draws. The 1000 predicted genes of highest mean in C2, C3 and C4 are adapted; figures are means over the first 250 of
them, on the spots that are not measured: Pearson (0 for a gene that is constant) and squared error over the variance of
the gene. Beside it: the prediction as it is, and interpolations of the measured spots alone, a Gaussian process
(KernelRidge) and inverse distances (KNeighborsRegressor), tuned by cross-validation on the measured spots. Intervals
are of the paired differences over the seeds, mean ± t SE; the 20 draws are of one section, so they speak of which spots
are measured, not of other sections or patients.

What "never worse" is worth is tried where the answer is known: a prediction permuted over the spots (useless), the
measured values with 0.3 SD of noise (nearly perfect), and spots whose measured values are permuted (nothing to be found).

Coverage is that of the 90 % intervals that ``residual_quantiles`` make, on the unmeasured spots.
"""

import argparse

import numpy as np
import pandas as pd
from scipy.stats import t as student
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsRegressor

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise, pearson

PANEL = 250


def training_mean():
    sums, n = [], 0
    for name in ("C2", "C3", "C4"):
        table = hg.datasets.her2st(name)["table"]
        sums.append(pd.Series(log_normalise(table.X).sum(0), table.var_names))
        n += table.n_obs
    return pd.concat(sums, axis=1).fillna(0).sum(axis=1).sort_values(ascending=False, kind="stable") / n


def masks(kind, share, xy, seed):
    rng = np.random.default_rng(seed)
    n = round(share * len(xy))
    mask = np.zeros(len(xy), bool)
    if kind == "random":
        mask[rng.permutation(len(xy))[:n]] = True
    else:
        angle = rng.uniform(0, 2 * np.pi)
        mask[np.argsort(xy @ [np.cos(angle), np.sin(angle)])[:n]] = True
    return mask


def interpolations(xy, truth, mask):
    """Gaussian process and inverse distances, tuned on the measured spots."""
    at, values = xy[mask], truth[mask]
    folds = KFold(min(10, len(at)), shuffle=True, random_state=0)
    mean = values.mean(0)
    process = GridSearchCV(
        KernelRidge(kernel="rbf"),
        {"gamma": [0.5 / reach**2 for reach in (1, 2, 4, 8)], "alpha": [0.3, 1, 3, 10]},
        cv=folds,
        scoring="neg_mean_squared_error",
    ).fit(at, values - mean)
    distances = GridSearchCV(
        KNeighborsRegressor(weights="distance"),
        {"n_neighbors": [3, 5, 8, 12]},
        cv=folds,
        scoring="neg_mean_squared_error",
    ).fit(at, values)
    return {"Gaussian process": process.predict(xy) + mean, "inverse distances": distances.predict(xy)}


def score(predicted, truth, spots):
    r = np.nan_to_num(pearson(predicted[spots], truth[spots])).mean()
    error = (np.square(predicted - truth)[spots].mean(0) / truth.var(0)).mean()
    return r, error


def paired(difference):
    half = student.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    return f"{difference.mean():+.4f} ({difference.mean() - half:+.4f} to {difference.mean() + half:+.4f})"


def coverage(table, truth, panel, spots):
    record = table.uns["he2gene_adapted"]
    levels = np.asarray(record["residual_levels"])
    low, high = (record["residual_quantiles"][np.argmin(np.abs(levels - q))][panel] for q in (0.05, 0.95))
    adapted = table.layers["he2gene_adapted"][:, panel]
    inside = (truth >= np.maximum(adapted + low, 0)) & (truth <= adapted + high)
    return inside[spots].mean(), np.isfinite(high).mean()


def run(title, table, kind, share, genes, n_seeds):
    panel = table.var_names.get_indexer(genes[:PANEL])
    truth = log_normalise(table.X)[:, panel]
    predicted = table.layers["he2gene"][:, panel]
    xy = table.obsm["spatial"] / 290.0
    rows, covered = [], []
    for seed in range(n_seeds):
        mask = masks(kind, share, xy, seed)
        hg.tl.adapt(table, mask, genes=genes)
        given = {"adapted": table.layers["he2gene_adapted"][:, panel], "unadapted": predicted}
        given |= interpolations(xy, truth, mask)
        rows.append({name: score(values, truth, ~mask) for name, values in given.items()})
        covered.append(coverage(table, truth, panel, ~mask))
    found = pd.DataFrame(rows)
    print(f"\n{title}, {n_seeds} seeds", flush=True)
    for name in found:
        r, error = (found[name].str[i].astype(float) for i in (0, 1))
        line = f"  {name:<18} Pearson {r.mean():.4f}   squared error / variance {error.mean():.3f}"
        if name != "adapted":
            gain = found["adapted"].str[0].astype(float) - r
            line += f"   adapted - this: {paired(gain.to_numpy())}, worst seed {gain.min():+.4f}"
        print(line, flush=True)
    inside, finite = np.mean(covered, axis=0)
    spread = np.std([c for c, _ in covered], ddof=1)
    print(
        f"  90 % intervals cover {inside:.3f} (SD over seeds {spread:.3f}); finite for {finite:.0%} of genes",
        flush=True,
    )


def cases(table, genes):
    """Name to (title, table, how spots are drawn, share)."""
    rng = np.random.default_rng(0)
    permuted, perfect, nothing = table.copy(), table.copy(), table.copy()
    permuted.layers["he2gene"] = table.layers["he2gene"][rng.permutation(table.n_obs)]
    columns = table.var_names.get_indexer(genes)
    truth = log_normalise(table.X)[:, columns]
    perfect.layers["he2gene"][:, columns] = np.maximum(truth + rng.normal(0, 0.3 * truth.std(0), truth.shape), 0)
    nothing.X = table.X[rng.permutation(table.n_obs)]
    found = {"plane30": ("30 % of the spots, a half plane", table, "plane", 0.3)}
    for share in (10, 30):
        found |= {
            f"random{share}": (f"{share} % of the spots at random", table, "random", share / 100),
            f"permuted{share}": (f"Prediction permuted over the spots, {share} %", permuted, "random", share / 100),
            f"perfect{share}": (f"Nearly perfect prediction, {share} %", perfect, "random", share / 100),
            f"nothing{share}": (f"Measured permuted over the spots, {share} %", nothing, "random", share / 100),
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="which; default: all")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--genes", type=int, default=1000)
    args = parser.parse_args()
    sdata = hg.datasets.her2st("C5")
    hg.tl.predict(sdata, show_progress_bar=False)
    table = sdata["table"]
    known = set(hg.get.genes(sdata))
    genes = [gene for gene in training_mean().index if gene in known][: args.genes]
    found = cases(table, genes)
    for name in args.cases or found:
        run(*found[name], genes, args.seeds)


if __name__ == "__main__":
    main()
