"""Error rates and power of ``hg.tl.biomarkers`` where patients are few or unequal, or genes vary more than others.

python tests/benchmarks/bench_few_patients.py partial hypervariable few_measured differing separated one_direction
python tests/benchmarks/bench_few_patients.py methods tails half slopes small_panels
"""

import sys
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats

import he2gene_sc as hg
from he2gene_sc.stats import log_normalise, paired_moderated_t, prediction_powered_mean

GROUPS = ("invasive cancer", "connective tissue")


def few_measured(replicates=100_000, repeats=10, n_more=50):
    """Coverage, and how often p-values are small, with few measured patients; nothing differs."""
    rng = np.random.default_rng(0)
    for n in (3, 4, 5, 6, 8, 10, 15):
        for r in (0.0, 0.5, 0.9):
            covered, small = [], []
            for _ in range(repeats):
                y = rng.standard_normal((n + n_more, replicates))
                f = r * y + np.sqrt(1 - r**2) * rng.standard_normal(y.shape)
                result = prediction_powered_mean(y[:n], f[:n], f[n:])
                covered.append(((result.ci_low <= 0) & (result.ci_high >= 0)).mean())
                p = 2 * stats.t.sf(np.abs(result.scores), result.df)
                small.append([(p < 1e-3).mean() / 1e-3, (p < 1e-4).mean() / 1e-4])
            times = np.mean(small, axis=0).round(1)
            print(
                f"ppi, {n} measured, r {r}: covers {np.mean(covered):.1%}, p < .001 {times[0]} times, < .0001 {times[1]}"
            )


def _planted_counts(i, rng, profile, effects, spread, sizes):
    """Overdispersed counts of a patient whose first group is deeper; genes differ by `effects` and by chance."""
    label = np.repeat(GROUPS, sizes)
    gap = effects + rng.standard_normal(len(profile)) * spread
    rates = np.stack([profile * np.exp(gap / 2), profile * np.exp(-gap / 2)])
    rates /= rates.sum(1, keepdims=True)
    depth = rng.lognormal(np.log(5000), 0.4, len(label)) * np.where(label == GROUPS[0], 1.8, 1)
    mean = depth[:, None] * rates[(label == GROUPS[1]).astype(int)]
    values = rng.poisson(mean * rng.gamma(5, 1 / 5, mean.shape)).astype(np.float32)
    obs = pd.DataFrame({"patient": f"P{i}", "label": label}, index=[f"P{i}-{j}" for j in range(len(label))])
    table = AnnData(values, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(len(profile))]))
    table.obsm["spatial"] = np.column_stack([np.arange(len(label)), np.zeros(len(label))])
    return table


def partial(genes=3000, repeats=6):
    """Power, FDR and size of the default test of counts, a tenth of the genes planted; few, unequal, hypervariable."""
    equal, poor = (60, 60), (3, 3)
    designs = [([equal] * n, 0.5, False) for n in (3, 4, 8)]
    designs += [([(150, 150), (10, 80), (60, 8), (100, 40)], 0.5, False)]
    designs += [([(150, 150), (3, 80), (60, 4), (5, 5)], 0.5, False), ([(150, 150)] * 4 + [poor] * 2, 0.3, False)]
    designs += [([equal] * n, effect, True) for n, effect in ((3, 0.5), (3, 1.0), (4, 0.5), (6, 0.5))]
    for sizes, effect, extra in designs:
        rows = []
        for repeat in range(repeats):
            rng = np.random.default_rng([len(sizes), repeat, extra])
            profile = rng.lognormal(0, 1.2, genes)
            effects = effect * rng.choice([-1, 1], genes) * (np.arange(genes) < genes // 10)
            spread = 0.12 * np.where(rng.random(genes) < 0.05 * extra, 4.5, 1)
            tables = [_planted_counts(i, rng, profile, effects, spread, size) for i, size in enumerate(sizes)]
            result = hg.tl.biomarkers(tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=None)
            planted = effects[result["names"].str[4:].astype(int)] != 0
            hit, null = result["pvals_adj"].to_numpy() < 0.05, result["pvals"][~planted]
            false = (hit & ~planted).sum() / max(hit.sum(), 1)
            rows.append((hit[planted].mean(), false, (null < 0.05).mean(), (null < 0.001).mean() / 0.001))
        power, false, low, lowest = np.mean(rows, axis=0)
        error = np.std([row[1] for row in rows]) / np.sqrt(repeats)
        print(
            f"| {', '.join(f'{a} : {b}' for a, b in sizes)}{'; 5 % hypervariable' * extra}; effect {effect} | {power:.1%} | "
            f"{false:.1%} ({error:.1%}) | {low:.1%} | {lowest:.1f} |",
            flush=True,
        )


def one_direction(repeats=8):
    """Size and median effect of genes that do not differ, where others are all higher in the group."""
    designs = [(40, 0.25, 1.0, 6), (100, 0.25, 0.7, 8), (100, 0.4, 1.0, 6), (1000, 0.25, 0.7, 4), (1000, 0.4, 0.3, 8)]
    for genes, share, effect, n in [*designs, (100, 0.5, 1.0, 6)]:
        rows = []
        for repeat in range(repeats):
            rng = np.random.default_rng([genes, n, repeat])
            profile = rng.lognormal(0, 1.2, genes)
            effects = effect * (np.arange(genes) < share * genes)
            tables = [_planted_counts(i, rng, profile, effects, 0.12, (60, 60)) for i in range(n)]
            result = hg.tl.biomarkers(tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=None)
            null = result[effects[result["names"].str[4:].astype(int)] == 0]
            warned = bool(tables[0].uns["he2gene_biomarkers"]["params"].get("doubts"))
            rows.append(((null["pvals"] < 0.05).mean(), null["effect_size"].median(), warned))
        (low, middle, warned), (error, *_) = np.mean(rows, axis=0), np.std(rows, axis=0) / np.sqrt(repeats)
        print(
            f"| {genes} | {share:.0%} by {effect} | {n} | {low:.1%} ({error:.1%}) | {middle:+.3f} | {warned:.0%} |",
            flush=True,
        )


def hypervariable(genes=8000, repeats=4, patients=(3, 4, 6), factor=20):
    """FDR, power and size where one gene in twenty varies 20 times as much between patients; one in ten is planted."""
    planted = np.arange(genes) < genes // 10
    for n in patients:
        for robust in (False, True):
            rng = np.random.default_rng(n)
            rows = []
            for _ in range(repeats):
                variance = rng.lognormal(0, 0.6, genes)
                between = 0.03 * variance * np.where(rng.random(genes) < 0.05, factor, 1)
                noise = np.sqrt(between + variance / 20) * rng.standard_normal((n, genes))
                alike = variance * rng.chisquare(200, genes) / 200
                test = paired_moderated_t(0.5 * np.sqrt(variance) * planted + noise, alike=alike, robust=robust)
                hit = stats.false_discovery_control(test.pvalues) < 0.05
                null = test.pvalues[~planted]
                rows.append((hit[planted].mean(), (hit & ~planted).sum() / max(hit.sum(), 1), (null < 0.05).mean()))
            power, false, size = np.mean(rows, axis=0)
            error = np.std([row[1] for row in rows]) / np.sqrt(repeats)
            print(
                f"hypervariable times {factor}, {genes} genes, {n} patients, robust={robust}: {power:.1%} found, FDR {false:.1%} "
                f"({error:.1%}), size {size:.1%}",
                flush=True,
            )


def small_panels():
    """The same with panels of few genes, and without hypervariable genes (factor 1)."""
    for genes, repeats in ((20, 400), (50, 400), (100, 400), (200, 300), (400, 200), (800, 100)):
        for factor in (20, 1):
            hypervariable(genes, repeats, patients=(3,), factor=factor)
    hypervariable(100, 200, patients=(2, 4))


def _poisson_counts(i, rng, profile, between, sizes, depth):
    """Poisson counts of a patient; rates of the group and the reference differ by a factor of SD `between`."""
    label = np.repeat(GROUPS, sizes)
    gap = between * rng.standard_normal(len(profile)) / 2
    rates = np.stack([profile * np.exp(gap), profile * np.exp(-gap)])
    rates /= rates.sum(1, keepdims=True)
    total = depth * rng.lognormal(0, 0.3, len(label))
    values = rng.poisson(total[:, None] * rates[(label == GROUPS[1]).astype(int)]).astype(np.float32)
    obs = pd.DataFrame({"patient": f"P{i}", "label": label}, index=[f"P{i}-{j}" for j in range(len(label))])
    return AnnData(values, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(len(profile))]))


def _null(designs, mean, genes=2000, repeats=3):
    for sizes, n, between, depth in designs:
        rows = []
        for repeat in range(repeats):
            rng = np.random.default_rng([n, repeat])
            profile = rng.lognormal(0, mean, genes)
            tables = [_poisson_counts(i, rng, profile, between, sizes, depth) for i in range(n)]
            result = hg.tl.biomarkers(tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=None)
            p = result["pvals"]
            up, found = (result["effect_size"] > 0).mean(), (result["pvals_adj"] < 0.05).sum()
            rows.append(((p < 0.05).mean(), (p < 0.001).mean() / 0.001, up, found, p.min()))
        low, lowest, up, found, _ = np.mean(rows, axis=0)
        least = min(row[-1] for row in rows)
        print(
            f"| {sizes[0]} : {sizes[1]} | {n} | {between} | {low:.1%} | {lowest:.1f} | {up:.1%} | {found:.1f} | {least:.0e} |",
            flush=True,
        )


def differing():
    """Size and direction of the default test of counts where patients differ and nothing does on average."""
    designs = [((10, 100), 8, t, 4000) for t in (0.3, 0.5, 0.8)] + [((100, 10), 8, t, 4000) for t in (0.3, 0.5, 0.8)]
    designs += [
        ((60, 60), 8, 0.8, 4000),
        ((10, 100), 20, 0.5, 4000),
        ((100, 10), 20, 0.8, 4000),
        ((60, 60), 20, 0.5, 4000),
    ]
    _null(designs, 1.2)


def separated():
    """The same, of few counts: some genes have all of theirs in the larger group."""
    _null([((10, 100), 3, 0.2, 700), ((10, 100), 4, 0.15, 600), ((5, 100), 6, 0.2, 700), ((100, 10), 4, 0.2, 600)], 0.8)


def methods(genes=200, repeats=4):
    """Size of every method over few patients; no gene differs, one group is 1.8 times as deep."""
    for n in (3,):
        for method in ("pseudobulk", "deseq2", "means", "mixed"):
            rows = []
            for repeat in range(repeats):
                rng = np.random.default_rng([n, repeat])
                profile = rng.lognormal(0, 1.2, genes)
                tables = [_planted_counts(i, rng, profile, np.zeros(genes), 0.12, (60, 60)) for i in range(n)]
                for table in tables:
                    table.layers["log"] = log_normalise(table.X)
                layer = "log" if method in ("means", "mixed") else None
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = hg.tl.biomarkers(
                        tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=layer, method=method
                    )
                p = result["pvals"].dropna()
                rows.append(((p < 0.05).mean(), (p < 0.001).mean() / 0.001, (result["effect_size"] > 0).mean()))
            (low, lowest, up), error = np.mean(rows, axis=0), np.std([row[0] for row in rows]) / np.sqrt(repeats)
            print(f"| {method} | {n} | {low:.1%} ({error:.1%}) | {lowest:.1f} | {up:.1%} |", flush=True)


def tails(genes=2000, repeats=3):
    """Size of the default test of counts where patients differ by other than normal numbers; nothing differs on average."""
    drawn = {
        "normal": lambda rng, n: rng.standard_normal(n),
        "t, 3 df": lambda rng, n: rng.standard_t(3, n) / np.sqrt(3),
        "exponential": lambda rng, n: rng.exponential(1, n) - 1,
    }
    for name, draw in drawn.items():
        for n in (3, 4, 8, 20):
            rows = []
            for repeat in range(repeats):
                rng = np.random.default_rng([n, repeat])
                profile = rng.lognormal(0, 1.2, genes)
                tables = [_planted_counts(i, rng, profile, 0.4 * draw(rng, genes), 0.0, (60, 60)) for i in range(n)]
                result = hg.tl.biomarkers(tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=None)
                p = result["pvals"]
                found = (result["pvals_adj"] < 0.05).sum()
                rows.append(((p < 0.05).mean(), (p < 0.001).mean() / 0.001, found))
            low, lowest, found = np.mean(rows, axis=0)
            print(f"| {name} | {n} | {low:.1%} | {lowest:.1f} | {found:.1f} |", flush=True)


def slopes(genes=400, spots=60):
    """Size of method="means" on a layer that follows depth within the groups, and between them in part; one is 1.9 times as deep."""
    for share in (2.0, 1.0, 0.5, 0.0):
        for n in (3, 8):
            rng = np.random.default_rng(n)
            slope, tables = rng.normal(0.3, 0.15, genes), []
            for i in range(n):
                label = np.repeat(GROUPS, spots)
                inside, z = label == GROUPS[0], rng.normal(0, 0.4, 2 * spots)
                seen = z + share * inside * np.log(1.9)
                values = 3 + seen[:, None] * slope + rng.normal(0, 0.5, (2 * spots, genes))
                values += rng.normal(0, 0.3, genes) + inside[:, None] * rng.normal(0, 0.1, genes)
                obs = pd.DataFrame({"patient": f"P{i}", "label": label}, index=[f"P{i}-{j}" for j in range(2 * spots)])
                obs["total"] = 5000 * np.exp(z + inside * np.log(1.9))
                table = AnnData(obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(genes)]))
                table.layers["guess"] = np.maximum(values, 0).astype(np.float32)
                table.obsm["spatial"] = np.column_stack([np.arange(2 * spots), np.zeros(2 * spots)])
                tables.append(table)
            low, said = [], False
            for depth in ("total", None):
                design = hg.Design(depth=depth)
                options = {"groups": GROUPS[0], "reference": GROUPS[1], "layer": "guess", "design": design}
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    result = hg.tl.biomarkers(tables, "label", **options)
                low.append(f"{(result['pvals'] < 0.05).mean():.1%}")
                said = [str(w.message) for w in caught if "depth predicts a" in str(w.message)] if depth else said
            print(f"| {share:.0%} | {n} | {low[0]} | {low[1]} | {'yes' if said else 'no'} |", flush=True)


def half(genes=100, n=6, repeats=8):
    """Of genes that do not differ while others are all twice as high: this test and DESeq2 on the same sums."""
    for share in (0.25, 0.4, 0.5):
        for method in ("pseudobulk", "deseq2"):
            rows = []
            for repeat in range(repeats):
                rng = np.random.default_rng([genes, n, repeat])
                profile = rng.lognormal(0, 1.2, genes)
                effects = 1.0 * (np.arange(genes) < share * genes)
                tables = [_planted_counts(i, rng, profile, effects, 0.12, (60, 60)) for i in range(n)]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = hg.tl.biomarkers(
                        tables, "label", groups=GROUPS[0], reference=GROUPS[1], layer=None, method=method
                    )
                null = result[effects[result["names"].str[4:].astype(int)] == 0]
                rows.append(((null["pvals"] < 0.05).mean(), null["effect_size"].median()))
            (low, middle), (error, _) = np.mean(rows, axis=0), np.std(rows, axis=0) / np.sqrt(repeats)
            print(f"| {share:.0%} | {method} | {low:.1%} ({error:.1%}) | {middle:+.3f} |", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:]:
        globals()[part]()
