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

``designs`` needs no data: simulated sections of 16 × 16 spots, half of them tumour, measured in a corner, a half plane, one class,
and so on; squared error on the spots that are not measured over that of the prediction, mean over the seeds (with its standard
error), the gain that is claimed, and the share of draws that warned.

Coverage is that of the 90 % intervals that ``residual_quantiles`` make, on the unmeasured spots.
"""

import argparse
import warnings

import anndata as ad
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


SIDE = 16
DESIGNS = (
    "corner of 12",
    "corner of 40",
    "half plane",
    "30 %, half plane",
    "only tumour",
    "only stroma",
    "rim",
    "12 at random",
    "30 % at random",
)
WORLDS = ("good", "offset", "too high in tumour", "permuted")


def smooth(rng, xy, n, share):
    distance = np.sqrt(3) * np.sqrt(np.square(xy[:, None] - xy[None]).sum(-1)) / (share * SIDE)
    root = np.linalg.cholesky((1 + distance) * np.exp(-distance) + 1e-6 * np.eye(len(xy)))
    return root @ rng.standard_normal((len(xy), n))


def simulated(rng, world, share, n_genes=60):
    """Positions, tumour, truth and prediction."""
    xy = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2).astype(float)
    level, domain = rng.normal(3, 0.6, n_genes), smooth(rng, xy, 1, 0.5)[:, 0]
    tumour = domain > np.median(domain)
    truth = (
        level
        + smooth(rng, xy, 6, share) @ rng.normal(0, 0.35, (6, n_genes))
        + np.outer(tumour, rng.normal(0, 0.3, n_genes))
    )
    predicted = level + 0.8 * (truth - level) + 0.2 * smooth(rng, xy, n_genes, share)
    if world == "offset":
        predicted = predicted + 0.5 + rng.normal(0, 0.3, n_genes)
    elif world == "too high in tumour":
        predicted = predicted + 0.6 * tumour[:, None]
    elif world == "permuted":
        predicted = predicted[rng.permutation(len(xy))]
    return xy, tumour, truth, np.clip(predicted, 0, None)


def drawn(rng, design, xy, tumour):
    """Mask of measured spots."""
    n, angle = len(xy), rng.uniform(0, 2 * np.pi)
    rank = np.argsort(np.argsort((xy - xy.mean(0)) @ [np.cos(angle), np.sin(angle)]))
    out = np.argsort(np.argsort(-np.square(xy - xy.mean(0)).sum(1)))
    first = {"corner of 12": 12, "corner of 40": 40, "half plane": n // 2, "30 %, half plane": round(0.3 * n)}
    if design in first:
        return rank < first[design]
    if design.startswith("only"):
        return tumour if design.endswith("tumour") else ~tumour
    return out < n // 4 if design == "rim" else rng.permutation(n) < (12 if design.startswith("12") else 0.3 * n)


def designs(n_seeds):
    print(
        f"squared error of the other spots, adapted over unadapted (standard error); gain claimed; warned; {n_seeds} seeds"
    )
    for design in DESIGNS:
        for world in WORLDS:
            for share in (0.2, 0.6):
                ratios, gains, warned = [], [], []
                for seed in range(n_seeds):
                    rng = np.random.default_rng(seed)
                    xy, tumour, truth, predicted = simulated(rng, world, share)
                    mask = drawn(rng, design, xy, tumour)
                    table = ad.AnnData(np.zeros(truth.shape, np.float32))
                    table.obs["he2gene_annotation"] = np.where(tumour, "tumour", "stroma")
                    table.obsm["spatial"] = xy
                    table.layers["he2gene"] = predicted.astype(np.float32)
                    noisy = np.clip(truth + rng.standard_normal(truth.shape), 0, None)
                    table.layers["measured"] = np.where(mask[:, None], noisy, np.nan)
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        hg.tl.adapt(table, "measured", measured_scale="log")
                    warned.append(any("do not represent" in str(w.message) for w in caught))
                    after, before = (
                        np.square(table.layers[k] - truth)[~mask].mean() for k in ("he2gene_adapted", "he2gene")
                    )
                    ratios.append(after / before)
                    gains.append(float(np.nanmean(table.var["he2gene_adapted_gain"])))
                error = np.std(ratios, ddof=1) / np.sqrt(n_seeds)
                print(
                    f"  {design:<16} {world:<18} range {share}: {np.mean(ratios):.3f} ({error:.3f}), claimed {np.mean(gains):+.2f}, "
                    f"warned {np.mean(warned):.0%}",
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
    if not args.cases or "designs" in args.cases:
        designs(args.seeds)
        if args.cases == ["designs"]:
            return
    sdata = hg.datasets.her2st("C5")
    hg.tl.predict(sdata, show_progress_bar=False)
    table = sdata["table"]
    known = set(hg.get.genes(sdata))
    genes = [gene for gene in training_mean().index if gene in known][: args.genes]
    found = cases(table, genes)
    for name in args.cases or found:
        if name == "designs":
            continue
        run(*found[name], genes, args.seeds)


if __name__ == "__main__":
    main()
