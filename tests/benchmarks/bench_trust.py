"""Whether what a model says of itself holds: reliable genes, permuted spots, intervals, slides unlike the training data.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_trust.py PART... [--cache DIR]

Parts:
  bundled    reliable genes and 90 % intervals of the bundled model on C5, which it has not seen
  promise    the same of models trained here: C2-C5 one by one by one of the other three and A1, A2 (a known patient); A1
             and A2 by a model of C2-C5, C2-C5 by one of A1 and A2 (an unknown patient)
  permuted   the counts of A1, A2, C2, C3 and C4 handed to other spots of their section: how many genes are called reliable
  guard      C5 by the bundled model as it is, with a wrong µm/px, recoloured, rescaled, and replaced by what is no tissue;
             A1 and A2 with a wrong µm/px, and by a model of C2-C4 alone

Only patients A (3.2 µm/px) and C (0.69 µm/px) have images here.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import spatialdata as sd
from bench_training import recoloured, rescaled
from shapely import Point

import he2gene_sc as hg
from he2gene_sc._slide import resolve
from he2gene_sc.stats import log_normalise, pearson
from he2gene_sc.training._predictability import RELIABLE_PCC

A, C = ("A1", "A2"), ("C2", "C3", "C4", "C5")
COVERAGE = 0.9


def train(names, cache, change=lambda sdata: sdata):
    return hg.tl.train(
        (change(hg.datasets.her2st(name)) for name in names),
        cache=cache,
        annotation_key="annotation",
        missing_genes_are_zero=True,
        device="cpu",
        dtype="float32",
        show_progress_bar=False,
    )


def promised(model, name, title):
    """Reliable genes that keep their promise, and the share of values inside their interval, gene by gene."""
    sdata = hg.datasets.her2st(name)
    hg.tl.predict(sdata, model=model, device="cpu", dtype="float32", show_progress_bar=False)
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
    missing = int(model.genes["reliable"].sum() - reliable.sum())
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
    return inside.mean()


def bundled(cache):
    promised(hg.models.load(), "C5", "the bundled model")


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
        hg.tl.predict(
            sdata, model=model, mpp=mpp, genes=["ERBB2"], device="cpu", dtype="float32", show_progress_bar=False
        )
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["bundled", "promise", "permuted", "guard"])
    parser.add_argument("--cache", type=Path, help="folder for the encoder's features; default: a temporary one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        for part in arguments.parts:
            {"bundled": bundled, "promise": promise, "permuted": permuted, "guard": guard}[part](
                arguments.cache or Path(temporary)
            )


if __name__ == "__main__":
    main()
