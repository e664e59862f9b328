"""Sizes, power, speed and memory of the spatial test on simulated genes at real spots with real labels.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py sizes 5000 A1 C5
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py sizes 2000 B1 D1
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py layouts 1000 A1 C5 B1 D1
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py power 1000 A1 C5
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py large 2000
    python tests/benchmarks/bench_spatial_test.py variances 500
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py stretched 1000 D1 hex/exponential
    python tests/benchmarks/bench_spatial_test.py serial 5000
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py tails 500 D1
    python tests/benchmarks/bench_spatial_test.py ranges 1000
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_spatial_test.py depth 400 D1
    python tests/benchmarks/bench_spatial_test.py speed 14000

The second argument is the number of genes a cell; `A1/cancer in situ` is one label of a section. Ranges are in shares of the longer side of the tissue; the
exponential field is exp(-d / range), the Gaussian exp(-(d / range)^2). `lags` is Dutilleul's modified t-test with 13
classes of equal width over all distances, as SpatialPack computes it, `wilcoxon` scanpy's. Labels are the pathologist's
(C5: `label_warp`), each class of at least three spots against all others.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import cdist

from he2gene_sc.stats import spatial_test, wilcoxon_test

ALPHA = 0.05


def section(name):
    """Array positions and labels of the annotated spots that have counts."""
    root = Path(os.environ["HE2GENE_DATA_DIR"]) / "her2st"
    counted = pd.read_csv(root / f"ST-cnts/{name}.tsv.gz", sep="\t", usecols=[0]).iloc[:, 0]
    if name == "C5":
        table = pd.read_csv(root / f"ST-pat/lbl_transferred/{name}_transferred.tsv", sep="\t")
        table["label"] = table["label_warp"]
    else:
        table = pd.read_csv(root / f"ST-pat/lbl/{name}_labeled_coordinates.tsv", sep="\t")
    table = table.dropna(subset=["x", "y", "label"])
    table[["x", "y"]] = table[["x", "y"]].round().astype(int)
    table["spot"] = table["x"].astype(str) + "x" + table["y"].astype(str)
    table = table[table["spot"].isin(counted)].drop_duplicates("spot")
    return table[["x", "y"]].to_numpy(float), table["label"].to_numpy(str)


def covariance(xy, kind, share, *, ratio=1, angle=0.0):
    reach = share * np.ptp(xy, axis=0).max()
    if reach == 0:
        return np.eye(len(xy))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = xy @ turn / np.sqrt([ratio, 1 / ratio]) / reach
    distance = cdist(points, points)
    if kind == "exponential":
        return np.exp(-distance)
    if kind == "gaussian":
        return np.exp(-(distance**2))
    if kind == "matern32":
        return (1 + np.sqrt(3) * distance) * np.exp(-np.sqrt(3) * distance)
    if kind == "matern52":
        distance = distance * np.sqrt(5)
        return (1 + distance + distance**2 / 3) * np.exp(-distance)
    raise ValueError(kind)


def draw(cov, genes, rng):
    values, vectors = np.linalg.eigh(cov)
    return vectors @ (np.sqrt(np.maximum(values, 0))[:, None] * rng.standard_normal((len(cov), genes)))


def counts(field, rng, level):
    """Log-normalised counts of genes whose log rates follow the field, spots being of different depth."""
    n, genes = field.shape
    depth = rng.gamma(4, 0.25, n)[:, None]
    rate = depth * np.exp(rng.normal(level, 1, genes) + 0.8 * field)
    # divided by the total of 5,000 other counts a spot, so that the simulated genes do not depend on one another
    drawn = rng.poisson(rate)
    return np.log1p(1e4 * drawn / rng.poisson(5000 * depth + 1)).astype(np.float32)


def basic_fields(xy):
    yield "none", np.eye(len(xy))
    for kind in ("exponential", "gaussian"):
        for name, share in (("1/16", 1 / 16), ("1/8", 1 / 8), ("1/4", 1 / 4)):
            yield f"{kind} {name}", covariance(xy, kind, share)
    yield "exponential 1/4 + as much noise", covariance(xy, "exponential", 1 / 4) + np.eye(len(xy))


def other_fields(xy, genes, rng):
    n = len(xy)
    yield "matern 5/2, 1/8", draw(covariance(xy, "matern52", 1 / 8), genes, rng)
    yield "matern 5/2, 1/4", draw(covariance(xy, "matern52", 1 / 4), genes, rng)
    short, long = covariance(xy, "exponential", 1 / 16), covariance(xy, "gaussian", 1 / 4)
    yield "exponential 1/16 + gaussian 1/4", draw(short + long, genes, rng)
    for degrees in (0, 60, 90):
        cov = covariance(xy, "exponential", 1 / 8, ratio=3, angle=np.radians(degrees))
        yield f"anisotropic 3:1, {degrees} degrees", draw(cov, genes, rng)
    standard = (xy - xy.mean(0)) / xy.std(0)
    yield (
        "linear trend + as much noise",
        standard @ rng.normal(0, np.sqrt(0.5), (2, genes)) + rng.normal(size=(n, genes)),
    )
    yield "counts, exponential 1/8", counts(draw(covariance(xy, "exponential", 1 / 8), genes, rng), rng, 0)
    yield "sparse counts, gaussian 1/4", counts(draw(covariance(xy, "gaussian", 1 / 4), genes, rng), rng, -2.5)


def real_labels(labels):
    for name, size in pd.Series(labels).value_counts().items():
        if 3 <= size <= len(labels) - 3:
            yield name, labels == name


def layouts(xy, rng):
    """Layouts that real labels do not show."""
    n = len(xy)
    for name, axis in (("half, left", 0), ("half, top", 1)):
        yield name, xy[:, axis] < np.median(xy[:, axis])
    for name, centre, size in (("blob of 30", xy[rng.integers(n)], 30), ("corner of 5", xy[xy.sum(1).argmin()], 5)):
        order = np.argsort(np.linalg.norm(xy - centre, axis=1), kind="stable")
        yield name, np.isin(np.arange(n), order[:size])
    for size in (3, 10, n // 3):
        yield f"scattered {size}", np.isin(np.arange(n), rng.choice(n, size, replace=False))


def lag_classes(values, group, xy, n_classes=13):
    """Modified t-test whose correlogram has classes of equal width."""
    distance = cdist(xy, xy)
    classes = np.ceil(distance / distance.max() * n_classes).astype(int)
    label = group - group.mean()
    centred = values - values.mean(0)
    together = np.zeros(values.shape[1])
    for code in range(n_classes + 1):
        pairs = (classes == code).astype(float)
        together += (label @ pairs @ label) * np.einsum("ij,ij->j", pairs @ centred, centred) / pairs.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        r = label @ centred / np.sqrt((label @ label) * np.square(centred).sum(0))
    size = 1 + (label @ label) * np.square(centred).sum(0) / np.maximum(together, 1e-9)
    df = np.maximum(size - 2, 1e-3)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * stats.t.sf(np.abs(r) * np.sqrt(df / (1 - r**2)), df)


def known(values, group, cov, *, efficient=True):
    """Test by one who knows the covariance: generalised least squares, or the plain difference of means."""
    design = np.column_stack([np.ones(len(group)), group])
    left = design.T @ np.linalg.inv(cov) if efficient else design.T
    solve = np.linalg.inv(left @ design)
    effect = (solve @ left @ values)[1]
    error = np.sqrt((solve @ left @ cov @ left.T @ solve)[1, 1])
    return 2 * stats.norm.sf(np.abs(effect) / error)


def share(pvalues):
    return f"{100 * np.mean(pvalues[np.isfinite(pvalues)] < ALPHA):5.1f}"


def lowest(pvalues):
    """How many times as often as it should p < .001 comes."""
    return f"{(pvalues[np.isfinite(pvalues)] < 0.001).mean() / 0.001:.1f}"


def sizes(genes, names):
    print("section | label | field | spatial | spatial unchecked | check | lags | wilcoxon  (% of genes with p < 0.05)")
    for argument in names:
        name, _, only = argument.partition("/")
        xy, labels = section(name)
        fields = list(basic_fields(xy))
        values = np.hstack([draw(cov, genes, np.random.default_rng(i)) for i, (_, cov) in enumerate(fields)])
        for label, group in real_labels(labels):
            if only not in label:
                continue
            test = spatial_test(values, group, xy, check_top=values.shape[1], n_perms=499)
            unchecked = 2 * stats.t.sf(np.abs(test.scores), test.df)
            ranks, lags = wilcoxon_test(values, group)[1], lag_classes(values, group, xy)
            for i, (field, _) in enumerate(fields):
                part = slice(i * genes, (i + 1) * genes)
                results = (test.pvalues[part], unchecked[part], test.pvalues_check[part], lags[part], ranks[part])
                print(f"{name} | {label} | {field} | " + " | ".join(map(share, results)), flush=True)


def other(genes, names):
    print("section | label | field | spatial | lags | wilcoxon  (% of genes with p < 0.05)")
    worst = 0.0
    for name in names:
        xy, labels = section(name)
        rng = np.random.default_rng(0)
        cases = [*real_labels(labels), *layouts(xy, rng)]
        basic = [(field, draw(cov, genes, rng)) for field, cov in basic_fields(xy)]
        fields, values = zip(*basic, *other_fields(xy, genes, rng), strict=True)
        values = np.hstack(values)
        for label, group in cases:
            results = spatial_test(values, group, xy, check_top=0).pvalues, lag_classes(values, group, xy)
            results += (wilcoxon_test(values, group)[1],)
            for i, field in enumerate(fields):
                row = [share(pvalues[i * genes : (i + 1) * genes]) for pvalues in results]
                worst = max(worst, float(row[0]))
                print(f"{name} | {label} | {field} | " + " | ".join(row), flush=True)
    print(f"largest: {worst:.1f}")


def power(genes, names):
    print("section | label | field | effect in SD | spatial | lags | known, difference of means | known, GLS")
    for argument in names:
        name, _, only = argument.partition("/")
        xy, labels = section(name)
        cells = [(field, cov, effect) for field, cov in basic_fields(xy) for effect in (0.5, 1.0)]
        noise = np.hstack([draw(cov, genes, np.random.default_rng(0)) for _, cov, _ in cells])
        size = np.repeat([effect * np.sqrt(cov[0, 0]) for _, cov, effect in cells], genes)
        for label, group in real_labels(labels):
            if only not in label:
                continue
            values = noise + np.outer(group, size)
            found = spatial_test(values, group, xy, check_top=values.shape[1], n_perms=499).pvalues
            lags = lag_classes(values, group, xy)
            for i, (field, cov, effect) in enumerate(cells):
                part = slice(i * genes, (i + 1) * genes)
                cov = cov + 1e-8 * np.eye(len(cov))
                truth = [known(values[:, part], group, cov, efficient=efficient) for efficient in (False, True)]
                row = " | ".join(map(share, (found[part], lags[part], *truth)))
                print(f"{name} | {label} | {field} | {effect} | {row}", flush=True)


def large(genes, _):
    print("1,980 spots of a hexagonal grid, in blocks | label | field | spatial | wilcoxon")
    rows, columns = np.divmod(np.arange(1980), 44)
    xy = np.column_stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)]) * 100.0
    rng = np.random.default_rng(0)
    cases = [*layouts(xy, rng)]
    for field, cov in basic_fields(xy):
        values = draw(cov, genes, rng)
        for label, group in cases:
            results = spatial_test(values, group, xy, check_top=0).pvalues, wilcoxon_test(values, group)[1]
            print(f"{label} | {field} | " + " | ".join(map(share, results)), flush=True)


def variances(genes, _):
    print(
        "306 spots of a hexagonal grid | label | field | SD in the group | spatial | Welch  (% of genes with p < 0.05)"
    )
    rows, columns = np.divmod(np.arange(306), 18)
    xy = np.column_stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)])
    rng = np.random.default_rng(0)
    distance = cdist(xy, xy)
    order = np.argsort(distance[102], kind="stable")
    cases = {
        "scattered 76": np.isin(np.arange(306), rng.choice(306, 76, replace=False)),
        "blob of 76": np.isin(np.arange(306), order[:76]),
        "corner of 30": np.isin(np.arange(306), np.argsort(xy.sum(1), kind="stable")[-30:]),
        "scattered 3": np.isin(np.arange(306), rng.choice(306, 3, replace=False)),
    }
    fields = {
        "none": np.eye(306),
        "exponential, 2 pitches": np.exp(-distance / 2),
        "gaussian, 4 pitches": np.exp(-((distance / 4) ** 2)),
    }
    for label, group in cases.items():
        for field, cov in fields.items():
            for sd in (0.5, 1, 2):
                values = draw(cov, genes, rng) * np.where(group, sd, 1)[:, None]
                welch = stats.ttest_ind(values[group], values[~group], equal_var=False).pvalue
                results = spatial_test(values, group, xy, check_top=0).pvalues, welch
                print(f"{label} | {field} | {sd} | " + " | ".join(map(share, results)), flush=True)


def margins(xy):
    """Layouts that follow the outline of the tissue, and scattered fragments."""
    centred = (xy - xy.mean(0)) / np.ptp(xy, axis=0)
    away, across = np.linalg.norm(centred, axis=1), centred.sum(1)
    yield "rim", away > np.quantile(away, 0.7)
    yield "corner", across < np.quantile(across, 0.1)
    yield "half", centred[:, 0] < np.median(centred[:, 0])
    starts = np.random.default_rng(3).choice(len(xy), 5, replace=False)
    nearest = np.argsort(cdist(xy[starts], xy), axis=1)[:, : max(3, len(xy) // 25)]
    yield "fragments", np.isin(np.arange(len(xy)), nearest)


def stretched(genes, names):
    """Matérn fields that are longer in one direction; `hex` is a hexagonal grid of 4,992 spots."""
    rows, columns = np.divmod(np.arange(4992), 64)
    fields = [("matern32", 0.3, 1, 0), ("matern32", 0.3, 3, 0), ("matern32", 0.3, 5, 90), ("exponential", 0.3, 5, 0)]
    fields += [("matern52", 0.3, 5, 45), ("matern52", 0.15, 3, 60), ("matern32", 0.15, 5, 30)]
    for argument in names:
        name, _, only = argument.partition("/")
        xy = np.column_stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)]) if name == "hex" else section(name)[0]
        values, used = [], [(i, field) for i, field in enumerate(fields) if only in field[0]]
        for i, (kind, share_of_side, ratio, degrees) in used:
            cov = covariance(xy, kind, share_of_side, ratio=ratio, angle=np.radians(degrees))
            noise = np.random.default_rng(i).standard_normal((len(xy), genes))
            values.append(np.linalg.cholesky(cov + 1e-6 * np.eye(len(xy))) @ noise)
        for label, group in margins(xy):
            found = spatial_test(np.hstack(values), group, xy, check_top=0).pvalues.reshape(len(used), genes)
            for (_, (kind, share_of_side, ratio, degrees)), pvalues in zip(used, found, strict=True):
                field = f"{kind} {share_of_side}, {ratio}:1 at {degrees}°"
                row = (name, label, field, share(pvalues).strip(), lowest(pvalues))
                print(f"| {' | '.join(row)} |", flush=True)


def serial(genes, _):
    """Sections of one patient that share a part of their field; 143 spots each."""
    xy = np.argwhere(np.ones((11, 13))).astype(float)
    n, blob = len(xy), np.linalg.norm(xy - [3, 4], axis=1)
    layouts_of = {"blob": blob <= np.sort(blob)[47], "half": xy[:, 0] < 5}
    for number, kind, shared, layout in (
        (2, "matern32", 0.0, "blob"),
        (2, "matern32", 0.8, "blob"),
        (2, "matern32", 1.0, "half"),
        (2, "exponential", 1.0, "blob"),
    ):
        rng = np.random.default_rng(1)
        root = np.linalg.cholesky(covariance(xy, kind, 0.2) + 1e-6 * np.eye(n))
        common = np.sqrt(shared) * root @ rng.standard_normal((n, genes))
        own = [np.sqrt(1 - shared) * root @ rng.standard_normal((n, genes)) for _ in range(number)]
        values = np.vstack([common + field + 0.3 * rng.standard_normal((n, genes)) for field in own])
        group, places, sections = (
            np.tile(layouts_of[layout], number),
            np.tile(xy, (number, 1)),
            np.repeat(range(number), n),
        )
        found = [spatial_test(values[:n], group[:n], xy, check_top=0).pvalues]
        for samples in (sections, np.zeros(len(sections))):
            found.append(spatial_test(values, group, places, sections, samples=samples, check_top=0).pvalues)
        row = [f"{share(pvalues).strip()} ({lowest(pvalues)})" for pvalues in found]
        print(f"| {number} | {kind}, {layout} | {shared:.0%} | {' | '.join(map(str.strip, row))} |", flush=True)


def tails(genes, names):
    """Fields that are not Gaussian; % of genes with p < .05 and, in brackets, how many times as often p < .001 comes."""
    for name in names:
        xy, labels = section(name)
        rng = np.random.default_rng(0)
        field = draw(covariance(xy, "exponential", 1 / 8), genes, rng)
        cases = {
            "exp(field)": np.exp(field),
            "t of 3 df at every spot, neighbours alike": stats.t.ppf(stats.norm.cdf(field), 3),
            "field + noise of t, 3 df": field + rng.standard_t(3, field.shape) / np.sqrt(3),
            "field, one spot in 50 ten times as far": field * np.where(rng.random(field.shape) < 0.02, 10, 1),
        }
        for label, group in [*real_labels(labels), *margins(xy)]:
            found = spatial_test(np.hstack([*cases.values()]), group, xy, check_top=0).pvalues
            for case, pvalues in zip(cases, found.reshape(len(cases), genes), strict=True):
                row = (name, label, str(group.sum()), case, f"{share(pvalues).strip()} ({lowest(pvalues)})")
                print(f"| {' | '.join(row)} |", flush=True)


def ranges(genes, _):
    """Exponential fields with another range in the group than outside (Paciorek and Schervish 2006), or a break at its border."""
    rows, columns = np.divmod(np.arange(306), 18)
    xy = np.column_stack([columns + 0.5 * (rows % 2), rows * np.sqrt(0.75)])
    side, distance = np.ptp(xy, axis=0).max(), cdist(xy, xy)
    for label, group in list(margins(xy))[:3]:
        row = []
        pairs = ((1 / 8, 1 / 8), (1 / 16, 1 / 8), (1 / 8, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 1 / 16), (1 / 8, 1 / 8))
        for i, (inside, outside) in enumerate(pairs):
            reach = np.where(group, inside, outside) * side
            squares = np.add.outer(reach**2, reach**2) / 2
            cov = np.outer(reach, reach) / squares * np.exp(-distance / np.sqrt(squares))
            cov[np.logical_xor.outer(group, group)] *= i < len(pairs) - 1  # the last pair: a break
            pvalues = spatial_test(draw(cov, genes, np.random.default_rng(0)), group, xy, check_top=0).pvalues
            row.append(f"{share(pvalues).strip()} ({lowest(pvalues)})")
        print(f"| {label} ({group.sum()}) | {' | '.join(row)} |", flush=True)


def depth(genes, names):
    """Size of ``hg.tl.biomarkers(method="spatial")`` in layers that follow the real depth of the spots; no gene differs."""
    import warnings

    from anndata import AnnData

    import he2gene_sc as hg

    for name in names:
        table = hg.datasets.her2st(name)["table"]
        label = table.obs["pathologist"].astype(object)
        table = table[label.isin(["invasive cancer", "connective tissue"]).to_numpy()].copy()
        totals = np.asarray(table.X.sum(1), float).ravel()
        xy, inside = table.obsm["spatial"], (table.obs["pathologist"] == "invasive cancer").to_numpy()
        rng, z = np.random.default_rng(0), np.log(totals) - np.log(totals).mean()
        between = np.where(inside, z[inside].mean(), z[~inside].mean())
        nearest = np.argsort(cdist(xy, xy), axis=1, kind="stable")
        cases = {f"{share:.0%} of depth between the groups": z + (share - 1) * between for share in (1, 0.5, 0)}
        cases |= {f"depth averaged over {k} spots": z[nearest[:, :k]].mean(1) for k in (5, 13)}
        slope, noise = rng.normal(0.3, 0.15, genes), draw(covariance(xy, "exponential", 1 / 8), genes, rng)
        for case, seen in cases.items():
            row = []
            for used in (totals, totals[nearest[:, :7]].mean(1), None):
                obs = pd.DataFrame({"patient": name, "label": inside.astype(str)}, index=table.obs_names)
                layer = AnnData(obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
                layer.obs["total"] = totals if used is None else used
                layer.layers["guess"] = (6 + seen[:, None] * slope + 0.3 * noise).astype(np.float32)
                layer.obsm["spatial"] = xy
                design = hg.Design(depth=None if used is None else "total")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    hg.tl.biomarkers(
                        layer, "label", groups="True", layer="guess", layer_scale="log", method="spatial", design=design
                    )
                pvalues = hg.get.biomarkers(layer)["pvals"].to_numpy()
                said = any("depth predicts a" in str(warning.message) for warning in caught)
                row += [f"{share(pvalues).strip()} ({lowest(pvalues)}){', warned of' if said else ''}"]
            print(f"| {name} | {case} | {' | '.join(row)} |", flush=True)


def speed(genes, _):
    import resource

    xy = np.argwhere(np.ones((50, 100))).astype(float)
    values = np.random.default_rng(0).standard_normal((len(xy), genes), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    spatial_test(values, xy[:, 0] < 20, xy)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer = values.nbytes / 2**20
    print(f"{genes} genes x {len(xy)} spots: {wall:.0f} s ({cpu:.0f} s of CPU), layer {layer:.0f} MiB, process at most")
    print(f"{after / 1024:.0f} MiB ({after / 1024 / layer:.2f} x the layer), {before / 1024:.0f} MiB of them before")


if __name__ == "__main__":
    tables = {
        "sizes": sizes,
        "layouts": other,
        "power": power,
        "large": large,
        "variances": variances,
        "speed": speed,
    } | {"stretched": stretched, "serial": serial, "tails": tails, "depth": depth, "ranges": ranges}
    tables[sys.argv[1]](int(sys.argv[2]), sys.argv[3:])
