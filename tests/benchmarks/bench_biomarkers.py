"""Error rates, power, coverage, speed of ``hg.tl.biomarkers``, and what it finds in her2st.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py size mixed
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py power
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py circular
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py measured
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py small
    python tests/benchmarks/bench_biomarkers.py ppi skewed sections
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py counts
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_biomarkers.py shown_depth
    python tests/benchmarks/bench_biomarkers.py speed

Simulated patients: spots and labels (invasive cancer, connective tissue) of real sections, genes drawn as Gaussian random
fields of variance 1 and covariance exp(-d / range), ranges as shares of the longer side of the tissue, to which each
patient adds an effect (SD 1) and each patient × group another (SD 0.3; estimated from the eight annotated patients of
her2st it is 0.13 in the median gene and 0.25 at the 90th percentile, `measured` prints it). `A1, C5`: each four times; C5 has
the labels `label_warp`. `eight`: A1, B1, C1, D1, E1, F1, G2, H1. In `spread` the scale of the genes differs, log-normal with
SD 0.5, so that their variances do too. Everything goes through the public function.
"""

import sys
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse, stats
from scipy.spatial.distance import cdist

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise, prediction_powered_mean

EIGHT = ("A1", "B1", "C1", "D1", "E1", "F1", "G2", "H1")
GROUPS = ("invasive cancer", "connective tissue")
RANGES = {"none": 0, "1/8": 1 / 8, "1/4": 1 / 4}
GENES = 5000


def load(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hg.datasets.her2st(name)["table"]


def sites(names):
    """Array positions and labels of the spots of both groups, a section a patient."""
    out = []
    for name in names:
        obs = load(name).obs
        label = obs["label_warp" if name == "C5" else "pathologist"].astype(str)
        kept = label.isin(GROUPS).to_numpy()
        out.append((obs.loc[kept, ["array_col", "array_row"]].to_numpy(float), label[kept].to_numpy()))
    return out


def root(xy, share):
    """Cholesky factor of the covariance of the spots."""
    reach = share * np.ptp(xy, axis=0).max()
    cov = np.exp(-cdist(xy, xy) / reach) if reach else np.eye(len(xy))
    return np.linalg.cholesky(cov + 1e-9 * np.eye(len(xy)))


def simulate(places, share, rng, *, genes=GENES, interaction=0.3, shift=0.0, spread=0.0):
    """Eight patients; the first tenth of the genes is `shift` SD higher in the first group."""
    scale = rng.lognormal(0, spread, genes)
    planted = np.arange(genes) < genes // 10
    tables = []
    for i, (xy, label) in enumerate(places):
        inside = label == GROUPS[0]
        values = root(xy, share) @ rng.standard_normal((len(xy), genes))
        values += rng.normal(0, 1, genes)
        for side in (inside, ~inside):
            values[side] += rng.normal(0, interaction, genes)
        values[np.ix_(inside, planted)] += shift
        obs = pd.DataFrame({"patient": f"P{i}", "label": label}, index=[f"P{i}-{j}" for j in range(len(xy))])
        table = AnnData(obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(genes)]))
        # Far above 0 and below 30, as logarithms are.
        table.layers["simulated"] = np.clip(15 + scale * values * min(1, 3 / scale.max()), 0, 29).astype(np.float32)
        table.obsm["spatial"] = xy
        tables.append(table)
    return tables, planted


def test(tables, method):
    return hg.tl.biomarkers(
        tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer="simulated", method=method
    ).set_index("names")


def places_of():
    return {"A1, C5": sites(["A1", "C5"]) * 4, "eight": sites(EIGHT)}


def cells(seed, spreads=(0.0, 0.5)):
    """Every combination of sections, range and spread with its name and a generator of its own."""
    for where, places in places_of().items():
        for name, share in RANGES.items():
            for spread in spreads:
                cell = f"{where}, range {name}{', spread' * bool(spread)}"
                yield cell, places, share, spread, np.random.default_rng([seed, zlib.crc32(cell.encode())])


def size():
    """Share of genes with p < .05 by means where nothing is planted."""
    for cell, places, share, spread, rng in cells(0):
        rate = (test(simulate(places, share, rng, spread=spread)[0], "means")["pvals"] < 0.05).mean()
        print(f"size, {cell}, means: {rate:.1%} of {GENES}", flush=True)


def mixed(genes=2000):
    """Share of genes with p < .05 by the mixed model where nothing is planted."""
    for cell, places, share, _, rng in cells(5, spreads=(0.0,)):
        rate = (test(simulate(places, share, rng, genes=genes)[0], "mixed")["pvals"] < 0.05).mean()
        print(f"size, {cell}, mixed: {rate:.1%} of {genes}", flush=True)


def power(repeats=8):
    """Share of planted genes found, and share of false ones among those found, at FDR 5 %."""
    for cell, places, share, spread, rng in cells(1):
        found, false = [], []
        for _ in range(repeats):
            tables, planted = simulate(places, share, rng, shift=1.0, spread=spread)
            result = test(tables, "means")
            hit = result["pvals_adj"].to_numpy() < 0.05
            truth = pd.Series(planted, index=tables[0].var_names)[result.index].to_numpy()
            found.append(hit[truth].mean())
            false.append((hit & ~truth).sum() / max(hit.sum(), 1))
        print(
            f"power, {cell}: {np.mean(found):.1%} found, FDR {np.mean(false):.1%} "
            f"({repeats} x {GENES} genes, a tenth planted at one SD)",
            flush=True,
        )


def ppi(replicates=20_000, n=30, n_more=300):
    """Coverage of the 95 % interval of a mean that is 0, and its width against that of the measured samples alone."""
    rng = np.random.default_rng(2)
    for name in ("good", "useless", "biased", "shrunken"):
        r = 0.0 if name == "useless" else 0.8
        y = rng.standard_normal((n + n_more, replicates))
        f = r * y + np.sqrt(1 - r**2) * rng.standard_normal(y.shape)
        f = {"biased": f + 2, "shrunken": 0.3 * f}.get(name, f)
        result = prediction_powered_mean(y[:n], f[:n], f[n:])
        covered = ((result.ci_low <= 0) & (result.ci_high >= 0)).mean()
        alone = 2 * stats.t.ppf(0.975, n - 1) * y[:n].std(0, ddof=1) / np.sqrt(n)
        width = (result.ci_high - result.ci_low).mean() / alone.mean()
        print(
            f"ppi, {name}: covers {covered:.2%}, width {width:.3f} of measured-only, weight {result.weight.mean():.2f}"
        )


def skewed(replicates=20_000, n_more=300):
    """Do the same for outcomes that are exponential, less their mean; r is .8."""
    rng = np.random.default_rng(6)
    for n in (10, 30, 100):
        y = rng.exponential(1, (n + n_more, replicates)) - 1
        f = 0.8 * y + 0.6 * rng.standard_normal(y.shape)
        result = prediction_powered_mean(y[:n], f[:n], f[n:])
        covered = ((result.ci_low <= 0) & (result.ci_high >= 0)).mean()
        half = stats.t.ppf(0.975, n - 1) * y[:n].std(0, ddof=1) / np.sqrt(n)
        alone = (np.abs(y[:n].mean(0)) <= half).mean()
        print(f"ppi, skewed, {n} measured: covers {covered:.1%}, measured alone {alone:.1%}")


def sections(genes=1000, patients=6, spots=100):
    """Two sections a patient, labels 90 : 10 in one and 10 : 90 in the other; sections differ, the groups do not."""
    rng = np.random.default_rng(7)
    gap = np.exp(rng.normal(0, 0.5, genes))
    for shares in ((0.9, 0.1), (0.5, 0.5)):
        tables = []
        for i in range(patients):
            for j, share in enumerate(shares):
                counts = rng.poisson(20 * gap**j, (spots, genes)).astype(np.float32)
                label = np.where(rng.random(spots) < share, *GROUPS)
                obs = pd.DataFrame({"patient": f"P{i}", "section": f"{i}-{j}", "label": label})
                table = AnnData(counts, obs.set_index(obs["section"] + "-" + obs.index.astype(str)))
                table.obsm["spatial"] = np.indices((10, 10)).reshape(2, -1).T[:spots].astype(float)
                tables.append(table)
        result = hg.tl.biomarkers(tables, "label", groups=GROUPS[0], layer=None)
        print(f"sections, labels {shares}: {(result['pvals_adj'] < 0.05).mean():.1%} of the genes at FDR 5 %")


def circular(genes=2000, repeats=4):
    """Predicted labels and genes that share nothing but the errors of one model: how often a gene is called."""
    rng = np.random.default_rng(3)
    places = sites(EIGHT)
    rates = {"predicted labels": [], "true labels": [], "cross-fitted labels": []}
    for _ in range(repeats):
        tables = []
        weights = rng.normal(size=(5, genes)) * 0.3
        for i, (xy, label) in enumerate(places):
            inside = label == GROUPS[0]
            # What the model sees beside the truth: five fields, which move both of its heads.
            seen = root(xy, 1 / 8) @ rng.standard_normal((len(xy), 5))
            wrong = (2 * inside - 1) + 1.5 * seen[:, 0] > 0
            predicted = 15 + seen @ weights + rng.normal(0, 0.3, genes)
            # Tested genes are measured without a difference; others, by which labels are assigned, have one.
            marks = rng.poisson(np.where(inside, 6, 2)[:, None], (len(xy), 60))
            counts = np.hstack([rng.poisson(3, (len(xy), genes)), marks]).astype(np.float32)
            names = [f"gene{j}" for j in range(genes)] + [f"mark{j}" for j in range(60)]
            table = AnnData(counts, var=pd.DataFrame(index=names))
            table.obs_names = [f"P{i}-{j}" for j in range(len(xy))]
            table.obs["patient"] = f"P{i}"
            table.obs["true"] = label
            table.obs["he2gene_annotation"] = np.where(wrong, *GROUPS)
            table.var["he2gene_reliable"] = np.arange(counts.shape[1]) < genes
            table.layers["he2gene"] = np.hstack([predicted, np.full((len(xy), 60), 15.0)]).astype(np.float32)
            table.uns["he2gene"] = {"weights_sha256": "0", "layer": "he2gene"}
            table.obsm["spatial"] = xy
            tables.append(table)
        for name, key, fit in (
            ("predicted labels", "he2gene_annotation", False),
            ("true labels", "true", False),
            ("cross-fitted labels", "he2gene_annotation", True),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    result = hg.tl.biomarkers(tables, key, groups=GROUPS[0], cross_fit=fit)
                except ValueError as error:
                    print(f"circular, {name}: {error}")
                    continue
            rates[name].append((result["pvals"] < 0.05).mean())
    for name, rate in ((name, rate) for name, rate in rates.items() if rate):
        print(f"circular, {name}: {np.mean(rate):.1%} of genes at p < .05 ({repeats} × {genes} genes)")


def measured():
    """Size of the patient × group effect, and every group against the rest, in the eight annotated patients."""
    tables = [load(name) for name in EIGHT]
    effects(tables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = hg.tl.biomarkers(tables, "pathologist", layer=None)
    for group, part in every.groupby("group", sort=False):
        print(
            f"  {group} against the rest: {(part['pvals_adj'] < 0.05).sum()} of {len(part)} at FDR 5 %, "
            f"{part['n_samples'].iloc[0]} patients"
        )


def small():
    """Few spots, drawn at random, against all others, as counted: nothing is there to be found."""
    for method, names, repeats in (("spatial", ("B1",), 6), ("pseudobulk", EIGHT, 2)):
        for n in (3, 5, 10, 30):
            drawn(method, names, n, repeats)


def drawn(method, names, n, repeats):
    """Test `n` spots of each section, `repeats` times."""
    rng = np.random.default_rng(n)
    tables = {name: load(name) for name in names}
    results = []
    for _ in range(repeats):
        for table in tables.values():
            label = np.full(table.n_obs, "others", object)
            label[rng.permutation(len(label))[:n]] = "drawn"
            table.obs["drawn"] = label
        options = {"groups": "drawn", "layer": None, "method": method, "sample_key": "patient"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results.append(hg.tl.biomarkers(list(tables.values()), "drawn", **options))
            except ValueError as error:
                print(f"small, {method}, {', '.join(names)}, {n} spots: {error}", flush=True)
                return
    every = pd.concat(results)
    low = every["pvals"] < 0.05
    print(
        f"small, {method}, {', '.join(names)}, {n} spots: {len(every) / repeats:.0f} genes tested, p < .05 "
        f"{100 * low.mean():.1f} % ({100 * (low & (every['effect_size'] > 0)).mean():.1f} above), p < .001 "
        f"{100 * (every['pvals'] < 0.001).mean():.2f} %, found at FDR 5 % in each draw "
        f"{[int((result['pvals_adj'] < 0.05).sum()) for result in results]}",
        flush=True,
    )


def effects(tables):
    """SD of the patient × group effect in units of the SD within spots, by moments."""
    common = sorted(set.intersection(*(set(table.var_names) for table in tables)))
    gaps, within, error, means = [], [], [], []
    for table in tables:
        values = pd.DataFrame(log_normalise(table.X), columns=table.var_names)[common].to_numpy()
        sides = [values[(table.obs["pathologist"] == group).to_numpy()] for group in GROUPS]
        gaps.append(sides[0].mean(0) - sides[1].mean(0))
        within.append(np.average([side.var(0) for side in sides], axis=0, weights=[len(side) for side in sides]))
        error.append(sum(side.var(0) / len(side) for side in sides))
        means.append(np.mean([side.mean(0) for side in sides], axis=0))
    excess = np.maximum(np.var(gaps, axis=0, ddof=1) - np.mean(error, axis=0), 0) / 2
    ratio = np.sqrt(excess / np.mean(within, axis=0))[np.mean(means, axis=0) > 0.1]
    print(
        "measured, SD of patient × group over SD within spots, quantiles 10, 50, 90 %:",
        np.quantile(ratio, [0.1, 0.5, 0.9]).round(2),
    )


def speed(spots=5000, genes=14_000):
    """Wall and CPU time, and peak memory of numpy as a multiple of the layer, for one group of four."""
    rng = np.random.default_rng(4)
    obs = pd.DataFrame({"patient": [f"P{i % 8}" for i in range(spots)], "label": rng.choice(list("abcd"), spots)})
    table = AnnData(
        obs=obs.set_index(obs.index.astype(str)), var=pd.DataFrame(index=[f"gene{j}" for j in range(genes)])
    )
    table.layers["log"] = rng.random((spots, genes), dtype=np.float32)
    table.obsm["spatial"] = rng.random((spots, 2))
    hg.tl.biomarkers(table[:, :20].copy(), "label", layer="log")
    wall, cpu = time.perf_counter(), time.process_time()
    hg.tl.biomarkers(table, "label", layer="log", method="means", groups="a")
    print(
        f"speed, {genes} genes x {spots} spots: {time.perf_counter() - wall:.1f} s, CPU {time.process_time() - cpu:.1f} s"
    )
    tracemalloc.start()
    hg.tl.biomarkers(table, "label", layer="log", method="means", groups="a")
    print(f"speed, peak memory {tracemalloc.get_traced_memory()[1] / table.layers['log'].nbytes:.2f} x the layer")
    cpu = time.process_time()
    hg.tl.biomarkers(table[:, :300].copy(), "label", layer="log", method="mixed", groups="a")
    print(f"speed, mixed: CPU {(time.process_time() - cpu) / 300 * 1e3:.0f} ms a gene")


def _composition_null(table, seed):
    """Poisson counts of the mean profile of a section at its own totals: no gene differs in composition."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(table.X.toarray() if hasattr(table.X, "toarray") else table.X, float)
    depth = counts.sum(1)
    null = table.copy()
    null.X = sparse.csr_matrix(rng.poisson(depth[:, None] * counts.sum(0) / depth.sum()).astype(np.float32))
    return null


def two_groups():
    """Spots of both groups of the eight annotated patients, genes of every section."""
    tables = [load(name) for name in EIGHT]
    genes = sorted(set.intersection(*(set(table.var_names) for table in tables)))
    return [table[table.obs["pathologist"].isin(GROUPS).to_numpy(), genes].copy() for table in tables]


def counts(repeats=3):
    """Default test of counts: the composition null at real totals and labels, and what it shares with DESeq2."""
    tables = two_groups()
    options = {"groups": GROUPS[0], "reference": GROUPS[1], "layer": None}
    start = time.perf_counter()
    mine = hg.tl.biomarkers(tables, "pathologist", **options).set_index("names")
    wall = time.perf_counter() - start
    hit = mine["pvals_adj"] < 0.05
    up = mine["effect_size"] > 0
    print(f"counts: {hit.sum()} of {len(mine)} genes, {(hit & up).sum()} above, {wall:.1f} s", flush=True)
    print(
        f"  first above: {', '.join(mine.index[hit & up][:12])}; below: {', '.join(mine.index[hit & ~up][::-1][:12])}"
    )
    for gene in ("ERBB2", "EPCAM", "CD24", "CDH1"):
        row = mine.loc[gene]
        print(f"  {gene}: {row['effect_size']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}], {row['pvals_adj']:.3g}")
    for i in range(repeats):
        null = [_composition_null(table, [i, j]) for j, table in enumerate(tables)]
        result = hg.tl.biomarkers(null, "pathologist", **options)
        print(
            f"counts, composition null {i}: p < .05 {(result['pvals'] < 0.05).mean():.1%}, < .001 "
            f"{(result['pvals'] < 0.001).mean():.2%} of {len(result)}, {(result['effect_size'] > 0).mean():.1%} above 0, "
            f"{(result['pvals_adj'] < 0.05).sum()} at FDR 5 %",
            flush=True,
        )
    theirs = hg.tl.biomarkers(tables, "pathologist", method="deseq2", **options).set_index("names")
    found = theirs["pvals_adj"] < 0.05
    for side, name in ((1, "above"), (-1, "below")):
        part = theirs.index[found & (np.sign(theirs["effect_size"]) == side)]
        same = hit[part] & (np.sign(mine.loc[part, "effect_size"]) == side)
        print(f"counts, DESeq2 {name}: {len(part)} genes, {same.sum()} of them found", flush=True)


def shown_depth(genes=400):
    """Size of method="means" on layers that follow the real depth of the eight patients, or its mean over k nearest spots."""
    tables = two_groups()
    for k in (1, 5, 13):
        rng = np.random.default_rng(0)
        slope, layers = rng.normal(0.3, 0.15, genes), []
        for table in tables:
            xy, label = table.obsm["spatial"], table.obs["pathologist"].astype(str).to_numpy()
            total = np.asarray(table.X.sum(1), float).ravel()
            nearest = np.argsort(cdist(xy, xy), axis=1, kind="stable")
            seen = np.log(total)[nearest[:, :k]].mean(1)
            values = 3 + (seen - seen.mean())[:, None] * slope
            values += 0.3 * root(xy, 1 / 8) @ rng.standard_normal((len(xy), genes))
            values += rng.normal(0, 0.05, genes) * (label == GROUPS[0])[:, None]
            obs = pd.DataFrame({"patient": str(table.obs["patient"].iloc[0]), "label": label}, index=table.obs_names)
            layer = AnnData(obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
            layer.obs["total"], layer.obs["smooth"] = total, total[nearest[:, :7]].mean(1)
            layer.layers["simulated"], layer.obsm["spatial"] = values.astype(np.float32), xy
            layers.append(layer)
        for depth in ("total", "smooth", None):
            options = {"groups": GROUPS[0], "reference": GROUPS[1], "layer": "simulated", "layer_scale": "log"}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = hg.tl.biomarkers(layers, "label", design=hg.Design(depth=depth), **options)
            said = any("depth predicts a" in str(warning.message) for warning in caught)
            low, up = (result["pvals"] < 0.05).mean(), (result["effect_size"] > 0).mean()
            lowest = (result["pvals"] < 0.001).mean() / 0.001
            print(f"| {k} | {depth} | {low:.1%} | {lowest:.1f} | {up:.1%} | {'yes' if said else 'no'} |", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:]:
        globals()[part]()
