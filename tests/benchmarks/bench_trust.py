"""Whether what a model says of itself holds: reliable genes, permuted spots, intervals, slides unlike the training data.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_trust.py PART... [--cache DIR]

Parts:
  bundled    reliable genes and 90 % intervals of the bundled model on C5, which it has not seen
  promise    the same of models trained here: C2-C5 one by one by one of the other three and A1, A2 (a known patient); A1
             and A2 by a model of C2-C5, C2-C5 by one of A1 and A2 (an unknown patient)
  levels     coverage of intervals by detection and depth, each `by=`: C5 by C2-C4, B4 by them, B4 by the bundled model
  predicted-depth  whether intervals by level cover shallow spots if predicted depth is told apart too, at best: B4 and A1
  permuted   the counts of A1, A2, C2, C3 and C4 handed to other spots of their section: how many genes are called reliable
  depth      the counts of A1, C2, C3 and C4 drawn anew from one profile a section, so that no gene has a pattern: with the
             total that each spot has, and with the same total everywhere; and as they were measured
  blocks     how often the bootstrap of a mean correlation on the card holds the true one, in simulated fields
  references genes that three simulated patients call reliable, with and without a look at depth, colour and coordinates
  ceiling    the noise ceiling of the serial sections C2-C5 beside what their agreement, spot by spot, allows
  guard      C5 by the bundled model as it is, with a wrong µm/px, recoloured, rescaled, and replaced by what is no tissue;
             A1 and A2 with a wrong µm/px, and by a model of C2-C4 alone

Only patients A (3.2 µm/px) and C (0.69 µm/px) have images here.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import spatialdata as sd
from bench_training import recoloured, rescaled
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from shapely import Point

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.stats import ceiling_of_neighbours, log_normalise, neighbour_weights, noise_ceiling, pearson
from he2gene_sc.training._closed_form.validate import Panel
from he2gene_sc.training._figures import interval
from he2gene_sc.training._predictability import RELIABLE_PCC, is_better, new_patient_bound

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.tiny_sections import held_out_correlations

A, C = ("A1", "A2"), ("C2", "C3", "C4", "C5")
COVERAGE = 0.9


def train(names, cache, change=lambda sdata: sdata):
    return hg.tl.train(
        (change(hg.datasets.her2st(name)) for name in names),
        cache=cache,
        annotation_key="annotation",
        genes=hg.GeneSelection(missing_genes_are_zero=True),
        device="cpu",
        show_progress_bar=False,
    )


def promised(model, name, title, *, known_patient=False):
    """Reliable genes that keep their promise, and the share of values inside their interval, gene by gene."""
    sdata = hg.datasets.her2st(name)
    hg.tl.predict(
        sdata, model=model, known_patient=known_patient, device="cpu", dtype="float32", show_progress_bar=False
    )
    table = sdata["table"]
    hg.tl.intervals(table, coverage=COVERAGE, model=model)
    # A gene that the section never saw is 0 in every spot, as in training.
    known = table.var["he2gene_predicted"].to_numpy(bool)
    truth = log_normalise(table.X)[:, known]
    r = np.nan_to_num(pearson(table.layers["he2gene"][:, known], truth))
    reliable = table.var["he2gene_reliable"].to_numpy(bool)[known]
    low, high = (table.layers[f"he2gene_{end}"][:, known] for end in ("lower", "upper"))
    inside = ((truth >= low) & (truth <= high)).mean(0)
    often = (truth > 0).mean(0) >= 0.5
    missing = int(model.genes["reliable_known_patient" if known_patient else "reliable"].sum() - reliable.sum())
    kept = (
        f", {(r[reliable] > RELIABLE_PCC).mean():.1%} of them above {RELIABLE_PCC} here (mean Pearson {r[reliable].mean():.3f})"
        if reliable.any()
        else ""
    )
    print(
        f"{name} by {title}: {reliable.sum():,} genes reliable{kept}, of the others {(r[~reliable] > RELIABLE_PCC).mean():.1%}; "
        f"{missing} more are not in this table. Coverage at {COVERAGE:.0%}: mean over {len(inside):,} genes {inside.mean():.1%}, "
        f"10th to 90th percentile {np.quantile(inside, 0.1):.1%} to {np.quantile(inside, 0.9):.1%}; {often.sum()} genes seen in "
        f"half of the spots {inside[often].mean():.1%}; reliable genes {inside[reliable].mean():.1%}",
        flush=True,
    )
    shown(table, model)
    return inside.mean()


def shown(table, model):
    """Coverage of all and of expressing spots, by detection of the gene and depth of the spot, of each call that there is."""
    found = {}
    for by in (
        ("annotation", "detected", "level") if "intervals.level_edges" in model.tensors else ("annotation", "detected")
    ):
        hg.tl.intervals(table, coverage=COVERAGE, model=model, by=by)
        found[by] = hg.get.coverage(table).set_index(["detected", "depth", "n_genes"])
    print("| detected in | spots | genes | " + " | ".join(f"`by={by!r}`" for by in found) + " |")
    for row in next(iter(found.values())).index:
        cells = [
            f"{part.loc[row, 'coverage']:.0%} / {part.loc[row, 'coverage_expressing']:.0%}" for part in found.values()
        ]
        if row[0] in ("all", "half or more") or row[1] == "all":
            print(f"| {row[0]} | {row[1]} | {row[2]:,} | {' | '.join(cells)} |", flush=True)


def levels(cache):
    """C5 by C2-C4 (a known patient); B4 by them (a new one), and by the bundled model, which was trained on it."""
    trained, with_model = train(("C2", "C3", "C4"), cache), hg.models.load()
    for name, title, model, known in (
        ("C5", "C2-C4", trained, True),
        ("B4", "C2-C4, a new patient", trained, False),
        ("B4", "the bundled model, trained on it", with_model, True),
    ):
        sdata = hg.datasets.her2st(name)
        hg.tl.predict(sdata, model=model, known_patient=known, device="cpu", dtype="float32", show_progress_bar=False)
        print(f"{name} by {title}, coverage of all / of expressing spots:")
        shown(sdata["table"], model)


def predicted_depth(_):
    for name in ("B4", "A1"):
        sdata = hg.datasets.her2st(name)
        hg.tl.predict(sdata, device="cpu", dtype="float32", show_progress_bar=False)
        table = sdata["table"]
        truth, guess = log_normalise(table.X), table.layers["he2gene"]
        used = np.isfinite(guess).all(0) & ((truth > 0).mean(0) >= 0.5)
        depth, seen = np.log(np.ravel(table.X.sum(1))), np.nanmean(guess, axis=1)
        truth, guess = truth[:, used], guess[:, used]
        residual, thirds = truth - guess, [np.digitize(x, np.quantile(x, [1 / 3, 2 / 3])) for x in (depth, seen)]
        print(
            f"{name}, {used.sum()} genes: depth and mean prediction correlate by {np.corrcoef(depth, seen)[0, 1]:.2f}"
        )
        for title, told in {"level": 0, "level, predicted depth": thirds[1], "level, depth": thirds[0]}.items():
            inside = np.zeros(truth.shape, bool)
            for j in range(truth.shape[1]):
                level = 3 * np.digitize(guess[:, j], np.quantile(guess[:, j], [0.25, 0.5, 0.75])) + told
                for code in np.unique(level):
                    own = residual[level == code, j]
                    low, high = np.quantile(own, [0.05, 0.95])
                    inside[level == code, j] = (own >= min(low, 0)) & (own <= max(high, 0))
            parts = [inside[thirds[0] == k][truth[thirds[0] == k] > 0].mean() for k in range(3)]
            print(
                f"  {title}: expressing spots, from the shallowest third {', '.join(f'{x:.0%}' for x in parts)}",
                flush=True,
            )


def bundled(cache):
    promised(hg.models.load(), "C5", "the bundled model, as a new patient")
    promised(hg.models.load(), "C5", "the bundled model, as the known patient that it is", known_patient=True)


def promise(cache):
    found = [promised(train([n for n in (*A, *C) if n != name], cache), name, "the other five sections") for name in C]
    print(
        f"coverage over C2-C5 held out in turn, a known patient: mean {np.mean(found):.1%}, {min(found):.1%} to {max(found):.1%}"
    )
    for names, tests in ((C, A), (A, C)):
        model = train(names, cache)
        for name in tests:
            promised(model, name, f"a model of {', '.join(names)} (unknown patient)")


def permuted(cache):
    def handed_round(sdata):
        table = sdata["table"]
        order = np.random.default_rng(len(table)).permutation(table.n_obs)
        table.X = table.X[order]
        table.obs["annotation"] = table.obs["annotation"].to_numpy()[order]
        return sdata

    genes = train(("A1", "A2", "C2", "C3", "C4"), cache, handed_round).genes
    print(
        f"spots permuted within A1, A2, C2, C3 and C4: {genes['reliable'].mean():.3%} of {len(genes):,} genes reliable, mean skill "
        f"{genes['skill'].mean():.5f}, mean held-out Pearson {genes['pcc'].mean():.4f}"
    )


def depth(cache):
    def drawn(equal):
        def change(sdata):
            table = sdata["table"]
            counts = np.asarray(table.X.todense() if hasattr(table.X, "todense") else table.X).astype(np.int64)
            totals = counts.sum(1)
            totals = np.full(len(totals), int(np.median(totals))) if equal else totals
            rng = np.random.default_rng(len(table))
            table.X = csr_matrix(rng.multinomial(totals, counts.sum(0) / counts.sum()).astype(np.float32))
            return sdata

        return change

    parts = {
        "as measured": lambda sdata: sdata,
        "no pattern, real totals": drawn(False),
        "no pattern, one total": drawn(True),
    }
    for title, change in parts.items():
        model = train(("A1", "C2", "C3", "C4"), cache, change)
        print(f"{title}: {model.genes['reliable'].sum():,} of {len(model.genes):,} genes called reliable")
        for protocol, figures in model.card.metrics.items():
            for row, values in figures.items():
                if row.startswith(("mean P", "mean p", "noise")) and "target" in row:
                    print(f"  {protocol}, {row}: " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()), flush=True)


def blocks(cache):
    """Fields of white noise that was smoothed, as wide as the title says, on a grid of legacy ST; predicted and measured."""

    def fields(rng, side, n, spots):
        pad = int(4 * spots) + 1
        wide = rng.normal(size=(side + 2 * pad, side + 2 * pad, n))
        found = gaussian_filter(wide, (spots, spots, 0))[pad : pad + side, pad : pad + side].reshape(side**2, n)
        impulse = np.zeros((8 * pad + 1,) * 2)
        impulse[4 * pad, 4 * pad] = 1
        return found / np.linalg.norm(gaussian_filter(impulse, spots))

    side, n_programmes, n_genes, r, share = 14, 5, 50, 0.4, 0.5
    centres = 200.0 * np.stack([np.tile(np.arange(side), side), np.repeat(np.arange(side), side)], axis=1)
    loadings = np.random.default_rng(0).normal(size=(n_programmes, n_genes))
    loadings /= np.linalg.norm(loadings, axis=0)
    for um in (0, 200, 400, 800):
        held = []
        for seed in range(300):
            rng = np.random.default_rng(seed)
            predicted, other = (fields(rng, side, n_programmes, um / 200) @ loadings for _ in range(2))
            measured = np.sqrt(share) * (r * predicted + np.sqrt(1 - r**2) * other)
            measured += np.sqrt(1 - share) * rng.normal(size=measured.shape)
            low, high = interval(Panel(np.arange(n_genes), np.arange(0), predicted, measured), centres)[0]
            held.append(low <= np.sqrt(share) * r <= high)
        print(
            f"{side} x {side} spots, fields of sigma {um} um: the interval holds the truth in {np.mean(held):.0%}",
            flush=True,
        )


def references(_):
    """20 times three patients of 200 spots, 500 genes of a population correlation given depth, and those of what sees no gene."""
    for seen in ((0, 0, 0), (0.1, 0.1, 0.1), (0.2, 0.1, 0.1), (0.2, 0.2, 0.1), (0.3, 0.2, 0.1), (0.2, 0.25, 0.2)):
        cells = []
        for rho in (0.05, 0.1, 0.3):
            fields = dict(zip(("depth", "colour", "coordinates"), seen, strict=True)) | {"colour": seen[1] * rho / 0.3}
            found = []
            for seed in range(20):
                own, given, alone = held_out_correlations(rho, **fields, n_genes=500, seed=seed)
                called = (new_patient_bound(given, np.full(3, 200)) > RELIABLE_PCC) & (own.min(0) > RELIABLE_PCC)
                better = is_better({name: own - r for name, r in zip(fields, alone, strict=True)})
                found.append((called.mean(), (called & better).mean()))
            before, after = np.mean(found, axis=0)
            cells.append(f"{before:.1%} → {after:.1%} ({np.std(found, axis=0)[1] / np.sqrt(20):.1%})")
        print(f"| {' | '.join(f'{r:g}' for r in seen)} | {' | '.join(cells)} |", flush=True)


def ceiling(_):
    """Both ends of the noise ceiling, and the root of the correlation of the same place in two serial sections.

    Half of the 1,000 genes of highest mean say which shift of the lattice puts two sections on each other, the others
    are compared. Layers lie apart and do not fit exactly, so that this is a little less than the ceiling.
    """
    tables = {name: hg.datasets.her2st(name)["table"] for name in C}
    genes = sorted(set.intersection(*(set(table.var_names) for table in tables.values())))
    logs = {name: log_normalise(t.X)[:, t.var_names.get_indexer(genes)] for name, t in tables.items()}
    top = np.argsort(-np.mean([y.mean(0) for y in logs.values()], axis=0))[:1000]
    places, low, high, given_depth = {}, {}, {}, {}
    for name, table in tables.items():
        logs[name] = logs[name][:, top]
        xy = table.obs[["array_col", "array_row"]].to_numpy(float)
        places[name] = np.round(xy).astype(int)
        weights = neighbour_weights(xy, 1.0)
        depth = np.log(table.X.sum(1)).A1
        low[name] = ceiling_of_neighbours(logs[name], weights, depth)[0]
        cubic = np.vander(depth - depth.mean(), 4)
        given_depth[name] = logs[name] - cubic @ np.linalg.lstsq(cubic, logs[name])[0]
        high[name] = noise_ceiling(table.X, genes=table.var_names.get_indexer(genes)[top])
    for i, a in enumerate(C):
        for b in C[i + 1 :]:
            shifts = ((dx, dy) for dx in range(-8, 9) for dy in range(-8, 9))
            pairs = [pair for s in shifts if len((pair := _paired(places[a], places[b] + s))[0]) >= 100]
            r = [np.nanmean(pearson(logs[a][m, ::2], logs[b][n, ::2])) for m, n in pairs]
            m, n = pairs[int(np.argmax(r))]
            serial, beyond = (
                np.sqrt(max(float(np.nanmean(pearson(of[a][m, 1::2], of[b][n, 1::2]))), 0))
                for of in (logs, given_depth)
            )
            ends = [np.sqrt(np.nanmean((of[a] * of[b])[1::2])) for of in (low, high)]
            print(
                f"{a}, {b}: ceiling {ends[0]:.2f} to {ends[1]:.2f}, serial sections {serial:.2f}, given depth {beyond:.2f}",
                flush=True,
            )


def _paired(a, b):
    """Rows of two sections at the same places."""
    at = {tuple(place): i for i, place in enumerate(b)}
    pairs = [(i, at[tuple(place)]) for i, place in enumerate(a) if tuple(place) in at]
    return np.array(pairs, int).reshape(-1, 2).T


def looked_at(title, model, pixels, centres, mpp):
    """Predict every third spot of an image; what the guard says rests on the image alone."""
    centres = centres[::3]
    frame = gpd.GeoDataFrame({"radius": np.full(len(centres), 50 / mpp)}, geometry=[Point(*c) for c in centres])
    sdata = sd.SpatialData(
        images={"image": sd.models.Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        shapes={"spots": sd.models.ShapesModel.parse(frame)},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            hg.tl.predict(
                sdata, model=model, mpp=mpp, genes=["ERBB2"], device="cpu", dtype="float32", show_progress_bar=False
            )
        except ValueError as error:
            print(f"{title}: refused: {error}", flush=True)
            return
    said = [str(w.message) for w in caught if "unlike what" in str(w.message)]
    score = sdata["table"].obs["he2gene_ood"]
    reason = said[0].split("'spots': ", 1)[1].split(" (mpp")[0] if said else "no warning"
    print(
        f"{title}: {(score > 1).mean():.0%} of {len(score)} spots above 1, median {score.median():.2f}; {reason}",
        flush=True,
    )


def pixels_of(sdata):
    (slide,) = resolve(sdata)
    return np.asarray(slide.pyramid.levels[0].array), slide.centres, slide.mpp


def guard(cache):
    model = hg.models.load()
    sdata = hg.datasets.her2st("C5")
    image, centres, mpp = pixels_of(sdata)
    for factor in (1, 0.5, 2, 0.8, 1.25):
        looked_at(f"C5, µm/px times {factor}", model, image, centres, mpp * factor)
    rng = np.random.default_rng(0)
    blue = np.zeros_like(image)
    blue[2] = np.clip(1.2 * (255 - image.mean(0)) - 40, 0, 255)
    changed = {
        "blank glass": np.full_like(image, 245),
        "black": np.zeros_like(image),
        "noise": rng.integers(0, 256, image.shape, np.uint8),
        "C5 inverted": 255 - image,
        "C5 as a nuclear stain on black": blue,
        "C5 in grey": np.repeat(image.mean(0, keepdims=True).astype(np.uint8), 3, axis=0),
    }
    for title, pixels in changed.items():
        looked_at(title, model, pixels, centres, mpp)
    for other in ("A1", "C2"):
        looked_at(f"C5 recoloured as {other}", model, *recoloured(sdata, hg.datasets.her2st(other))[:3])
    for factor in (0.8, 1.25):
        looked_at(f"C5 rescaled by {factor}, its µm/px given", model, *rescaled(sdata, factor)[:3])
    for name in A:
        image, centres, mpp = pixels_of(hg.datasets.her2st(name))
        for factor in (0.5, 2):
            looked_at(f"{name}, µm/px times {factor}", model, image, centres, mpp * factor)
    other = train(("C2", "C3", "C4"), cache)
    for name in A:
        looked_at(f"{name} by a model of C2, C3 and C4", other, *pixels_of(hg.datasets.her2st(name)))


PARTS = {
    "bundled": bundled,
    "promise": promise,
    "levels": levels,
    "predicted-depth": predicted_depth,
    "permuted": permuted,
    "depth": depth,
    "blocks": blocks,
    "references": references,
    "ceiling": ceiling,
    "guard": guard,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--cache", type=Path, help="folder for the encoder's features; default: a temporary one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        for part in arguments.parts:
            PARTS[part](arguments.cache or Path(temporary))


if __name__ == "__main__":
    main()
