"""What `hg.tl.train` reaches on her2st, held out section by section and patient by patient, and what it costs.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_training.py PART... [--cache DIR]

Parts:
  sections   leave one section out over C2-C5: `default`, the reference ridge, colour alone, the noise ceiling
  base       the same folds: `he2gene-base` with the encoder of `default` (hours on two cores; --held-out C5 for one fold)
  across     train on C2-C5, predict A1 and A2, and the other way round
  robust     C5 recoloured with A1's stain statistics, and rescaled; trained on C2-C4
  orientations  the best held-out correlation over penalties and ranks, of a section of a known patient and of a patient held
             out, where training sees each spot under one, two or four orientations
  labels     calibration of the annotation on the held-out sections, against a perfectly calibrated model
  cost       time and memory of training with cached features, without recoloured copies, at 1, 4 and 16 times the spots, all
             with four folds (by itself, 4 and 16 times the sections would be put into ten)

Figures are mean Pearson per gene over the 250 genes of highest mean / the 50 most variable within sections, chosen on
the training sections. Only patients A and C have images here, at different resolution (3.2 and 0.69 µm/px).
"""

import argparse
import contextlib
import dataclasses
import functools
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

import he2gene_sc as hg
from he2gene_sc import training
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.inference import Encoder, Part, cached_features
from he2gene_sc.models._encoders.load import encoder_sha256, load_encoder
from he2gene_sc.models._network import FeatureExtractor
from he2gene_sc.stats import calibration_error, log_normalise, noise_ceiling, pearson
from he2gene_sc.tl._train import fit as _train_default
from he2gene_sc.training._closed_form import build as _build
from he2gene_sc.training._closed_form import validate as _validate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.pictures import read_all

C, A = ("C2", "C3", "C4", "C5"), ("A1", "A2")
SHARED = {
    "annotation_key": "annotation",
    "genes": hg.GeneSelection(missing_genes_are_zero=True),
    "device": "cpu",
    "show_progress_bar": False,
}


def expression(sdata):
    table = sdata["table"]
    return pd.DataFrame(log_normalise(table.X), index=table.obs_names, columns=table.var_names)


def panels(measured):
    mean = pd.concat(measured).fillna(0).mean()
    variance = pd.concat([frame.var(ddof=0) for frame in measured], axis=1).fillna(0).mean(axis=1)
    order = (frame.sort_values(ascending=False, kind="stable").index for frame in (mean, variance))
    return [genes[:n] for genes, n in zip(order, (250, 50), strict=True)]


def score(predicted, truth, genes):
    r = pearson(
        predicted.reindex(columns=genes, fill_value=0).to_numpy(), truth.reindex(columns=genes, fill_value=0).to_numpy()
    )
    return np.nan_to_num(r).mean()


def predicted(sdata, model, **options):
    hg.tl.predict(sdata, model=model, genes="all", device="cpu", show_progress_bar=False, **options)
    frame = sdata["he2gene"].to_df("he2gene")
    return frame.dropna(how="all")


def train(names, cache, **options):
    return hg.tl.train((hg.datasets.her2st(name) for name in names), cache=cache, **{**SHARED, **options})


def both(values):
    return " / ".join(f"{value:.3f}" for value in values)


def reference(names, cache):
    """Features of windows of 150, 300 and 600 px, and mean and SD of colour in them."""
    network, spec = load_encoder("efficientnet-lite0")
    extractor, sha256 = FeatureExtractor(network, spec), encoder_sha256(network)
    features, colours = {}, {}
    for name in names:
        (slide,) = resolve(hg.datasets.her2st(name))
        windows = tuple(px * slide.mpp for px in (150, 300, 600))
        reader = PatchReader(slide.pyramid, slide.centres, slide.mpp, windows_um=windows, input_px=spec.input_px)
        how = Encoder(sha256, ((0, False),), torch.device("cpu"), torch.float32)
        found = cached_features(Part(extractor, reader), how, cache)
        features[name] = np.array(found[:, 0, : 3 * 1280])
        patches = read_all(reader)
        colours[name] = np.hstack([stat(window, axis=(2, 3)) for window in patches for stat in (np.mean, np.std)])
    return features, colours


def ridge(x, y, x_test, penalty):
    mean, sd = x.mean(0), x.std(0) + 1e-9
    x, x_test = (x - mean) / sd, (x_test - mean) / sd
    dual = x @ x.T + penalty * x.shape[1] * np.eye(len(x))
    return x_test @ x.T @ np.linalg.solve(dual, y - y.mean(0)) + y.mean(0)


def sections(cache, held_out):
    features, colours = reference(C, cache)
    measured = {name: expression(hg.datasets.her2st(name)) for name in C}
    rows = []
    for test in held_out:
        names = [name for name in C if name != test]
        genes = panels([measured[name] for name in names])
        together = genes[0].union(genes[1])
        y = pd.concat([measured[name].reindex(columns=together, fill_value=0) for name in names])
        sdata = hg.datasets.her2st(test)
        model = train(names, cache)
        ceiling = pd.Series(noise_ceiling(sdata["table"].X), index=sdata["table"].var_names).fillna(0)
        frames = {"default": predicted(sdata, model)}
        for title, x, penalties in (
            ("reference ridge", features, (30,)),
            ("colour alone", colours, (0.3, 1, 3, 10, 30)),
        ):
            tried = [
                pd.DataFrame(
                    ridge(np.concatenate([x[name] for name in names]), y.to_numpy(), x[test], penalty),
                    index=measured[test].index,
                    columns=together,
                )
                for penalty in penalties
            ]
            frames[title] = max(tried, key=lambda frame: score(frame, measured[test], genes[0]))
        row = {title: [score(frame, measured[test], g) for g in genes] for title, frame in frames.items()}
        row["noise ceiling"] = [ceiling.reindex(g).fillna(0).mean() for g in genes]
        rows.append(row)
        print(f"{test}: " + ", ".join(f"{title} {both(value)}" for title, value in row.items()), flush=True)
    mean = {title: np.mean([row[title] for row in rows], axis=0) for title in rows[0]}
    print(f"mean over {', '.join(held_out)}, a known patient: " + ", ".join(f"{k} {both(v)}" for k, v in mean.items()))
    for title in ("reference ridge", "colour alone"):
        print(
            f"default is {both(mean['default'] / mean[title])} times {title} (its penalty chosen on the held-out section)"
            if title == "colour alone"
            else f"default is {both(mean['default'] / mean[title])} times {title}"
        )


def base(cache, held_out, options):
    measured = {name: expression(hg.datasets.her2st(name)) for name in C}
    for test in held_out:
        names = [name for name in C if name != test]
        start = time.perf_counter()
        preset = hg.PaperRecipe("he2gene-base", **options)
        model = train(names, None, preset=preset, encoder="efficientnet-lite0")
        frame = predicted(hg.datasets.her2st(test), model)
        genes = panels([measured[name] for name in names])
        facts = model.card.training
        print(
            f"{test}: he2gene-base {both([score(frame, measured[test], g) for g in genes])}, lr {facts['lr']}, batch "
            f"{facts['batch_size']}, {facts['epochs']} epochs, best {facts['best_epoch']}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


def across(cache):
    from sklearn.metrics import roc_auc_score

    measured = {name: expression(hg.datasets.her2st(name)) for name in (*A, *C)}
    for names, tests in ((C, A), (A, C)):
        model = train(names, cache)
        genes = panels([measured[name] for name in names])
        for test in tests:
            sdata = hg.datasets.her2st(test)
            frame = predicted(sdata, model)
            line = f"{names[0][0]} -> {test}: {both([score(frame, measured[test].loc[frame.index], g) for g in genes])}"
            if test == "A1":
                table = sdata["he2gene"]
                proba = table.obsm["he2gene_annotation_proba"]["invasive cancer"]
                label = sdata["table"].obs["pathologist"].reindex(proba.index).astype(object)
                label = label.where(label != "undetermined").dropna()
                near = label[label.isin(["invasive cancer", "connective tissue", "adipose tissue"])]
                line += "; AUROC of invasive cancer against connective and adipose tissue {:.3f}, against all the rest {:.3f}".format(
                    *(roc_auc_score(chosen == "invasive cancer", proba[chosen.index]) for chosen in (near, label))
                )
            print(line, flush=True)


def stain(pixels):
    """Mean and SD of the tissue in CIELAB, of a thumbnail ``(y, x, 3)``."""
    from skimage import color

    lab = color.rgb2lab(pixels)
    tissue = lab[(lab[..., 0] > 8) & (lab[..., 0] < 85) & (np.hypot(lab[..., 1], lab[..., 2]) > 6)]
    return tissue.mean(0), tissue.std(0)


def recoloured(sdata, like):
    """Give an image the stain statistics of another (Reinhard et al., IEEE CG&A 2001)."""
    from skimage import color

    (slide,), (other,) = resolve(sdata), resolve(like)
    image = np.moveaxis(np.asarray(slide.pyramid.levels[0].array), 0, -1)
    theirs = np.moveaxis(np.asarray(other.pyramid.levels[0].array), 0, -1)
    (mean, sd), (new_mean, new_sd) = stain(image[::6, ::6]), stain(theirs[::2, ::2])
    out = np.empty_like(image)
    for start in range(0, len(image), 512):
        rows = image[start : start + 512]
        lab = (color.rgb2lab(rows) - mean) / sd * new_sd + new_mean
        out[start : start + 512] = np.clip(np.rint(color.lab2rgb(lab) * 255), 0, 255)
    return np.moveaxis(out, -1, 0), slide.centres, slide.mpp, sdata


def rescaled(sdata, factor):
    import torch.nn.functional as F

    (slide,) = resolve(sdata)
    image = torch.from_numpy(np.array(slide.pyramid.levels[0].array))[None]
    size = tuple(round(side * factor) for side in image.shape[2:])
    out = F.interpolate(image, size=size, mode="bilinear", antialias=True)[0].numpy()
    return out, slide.centres * factor, slide.mpp / factor, sdata


def slide_of(pixels, centres, mpp, like):
    """Make a SpatialData object with these pixels and the spots and table of another."""
    import geopandas as gpd
    import spatialdata as sd
    from shapely import Point

    ids = resolve(like)[0].spot_ids
    frame = gpd.GeoDataFrame({"radius": np.full(len(ids), 50 / mpp)}, geometry=[Point(*c) for c in centres], index=ids)
    return sd.SpatialData(
        images={"image": sd.models.Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        shapes={like["table"].uns["spatialdata_attrs"]["region"]: sd.models.ShapesModel.parse(frame)},
        tables={"table": like["table"].copy()},
    )


def robust(cache):
    model = train(C[:3], cache)
    genes = panels([expression(hg.datasets.her2st(name)) for name in C[:3]])
    sdata = hg.datasets.her2st("C5")
    truth = expression(sdata)
    changed = {
        "as it is": lambda: sdata,
        "recoloured as A1": lambda: slide_of(*recoloured(sdata, hg.datasets.her2st("A1"))),
        "recoloured as C2": lambda: slide_of(*recoloured(sdata, hg.datasets.her2st("C2"))),
        "rescaled by 0.8": lambda: slide_of(*rescaled(sdata, 0.8)),
        "rescaled by 1.25": lambda: slide_of(*rescaled(sdata, 1.25)),
    }
    first = None
    for title, make in changed.items():
        other = make()
        frame = predicted(
            other, model, mpp=resolve(sdata)[0].mpp / {"0.8": 0.8, "1.25": 1.25}.get(title.split()[-1], 1)
        )
        values = np.array([score(frame, truth, g) for g in genes])
        first = values if first is None else first
        print(f"C5 {title}: {both(values)}, {both(values / first)} of the score", flush=True)


def labels(cache):
    """Pool the held-out sections; the floor is what labels drawn from the probabilities themselves give."""
    probas, codes = [], []
    for test in C:
        sdata = hg.datasets.her2st(test)
        model = train([name for name in C if name != test], cache)
        predicted(sdata, model)
        proba = sdata["he2gene"].obsm["he2gene_annotation_proba"]
        label = sdata["table"].obs["annotation"].astype(object).reindex(proba.index)
        known = label.isin(proba.columns)
        probas.append(proba[known].to_numpy())
        codes.append(proba.columns.get_indexer(label[known]))
    proba, code = np.concatenate(probas), np.concatenate(codes)
    rng = np.random.default_rng(0)
    floor = [
        calibration_error(proba, (proba.cumsum(1) < rng.random((len(proba), 1))).sum(1).clip(max=proba.shape[1] - 1))
        for _ in range(1000)
    ]
    found = calibration_error(proba, code)
    print(
        f"annotation, {len(code)} labelled spots of {', '.join(C)} held out section by section: ECE {found:.4f}, a perfectly "
        f"calibrated model of this size {np.mean(floor):.4f} (simulated), above it by {found - np.mean(floor):.4f}"
    )


def orientations(cache):
    """Print figures of 250 genes for A1, A2, B4, C2-C4 (section, patient) and for C2-C5 (section)."""
    chosen = {}

    def spy(sections, facts, recipe, **_):
        chosen.update(sections=sections, recipe=recipe)
        raise StopIteration

    seen = (*A, "B4", *C)
    four = functools.partial(_train_default.encode_section, symmetries=((0, False), (1, True), (2, False), (3, True)))
    with (
        mock.patch.object(training, "build_model", spy),
        mock.patch.object(_train_default, "encode_section", four),
        contextlib.suppress(StopIteration),
    ):
        train(seen, cache, preset=hg.DefaultRecipe(n_recoloured=0))
    for n in (1, 2, 4):
        parts = [dataclasses.replace(part, features=part.features[:, :n]) for part in chosen["sections"]]
        for used, units in ((seen[:-1], ("section", "patient")), (C, ("section",))):
            of = [part for part in parts if part.name in used]
            grids = {}
            for unit in units:
                folds = _build.folds_of(of, unit)[1]
                fitted = [
                    _validate._fit_fold(of, [codes != fold for codes in folds], chosen["recipe"], 0, 250)
                    for fold in np.unique(np.concatenate(list(folds)))
                ]
                # With neighbours; the first part is without.
                grids[unit] = _validate._head_scores(of, fitted)[-1]
            mean = np.mean(list(grids.values()), axis=0)
            best = np.unravel_index(mean.argmax(), mean.shape)
            found = ", ".join(f"{unit} {grid[best]:.3f}" for unit, grid in grids.items())
            print(f"{n} orientation(s), {', '.join(used)}: mean {mean[best]:.4f} ({found})", flush=True)


def cost(cache):
    def repeated(times):
        for name in C:
            sdata = hg.datasets.her2st(name)
            for i in range(times):
                sdata["table"].obs["section"] = f"{name}-{i}"
                yield sdata

    # The same work a spot, whatever their number.
    _build.MAX_FOLDS = len(C)
    preset = hg.DefaultRecipe(n_recoloured=0)
    train(C, cache, preset=preset)
    for times in (1, 4, 16):
        start = time.perf_counter()
        with own_memory() as own:
            hg.tl.train(repeated(times), cache=cache, preset=preset, **SHARED)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{times:>2} times C2-C5 ({732 * times} spots): {seconds:.1f} s, {1000 * seconds / 732 / times:.0f} ms a spot; peak "
            f"memory {max(own):.2f} GiB, with the files that are mapped, so far, {peak:.2f} GiB",
            flush=True,
        )


@contextlib.contextmanager
def own_memory():
    """Watch the memory that is the process's own, in GiB: pages of mapped files are the system's to take back (Linux)."""
    found, done = [], threading.Event()

    def watch():
        while not done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            found.append(int(status.split("RssAnon:")[1].split()[0]) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


PARTS = {"across": across, "robust": robust, "orientations": orientations, "labels": labels, "cost": cost}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["sections", "base", *PARTS])
    parser.add_argument("--cache", type=Path, help="folder for the encoder's features; default: a temporary one")
    parser.add_argument("--held-out", nargs="+", default=list(C), choices=C)
    parser.add_argument("--lr", type=float, help="of `base`, instead of the paper's 1e-5")
    parser.add_argument("--batch-size", type=int, help="of `base`, instead of the paper's 256")
    parser.add_argument("--max-epochs", type=int, help="of `base`, instead of the paper's 100")
    parser.add_argument("--precision", help="of `base`, as in lightning.Trainer")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    options = {"lr": arguments.lr, "max_epochs": arguments.max_epochs, "precision": arguments.precision}
    options = {key: value for key, value in options.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        for part in arguments.parts:
            if part == "sections":
                sections(cache, arguments.held_out)
            elif part == "base":
                base(cache, arguments.held_out, {**options, "batch_size": arguments.batch_size})
            else:
                PARTS[part](cache)


if __name__ == "__main__":
    main()
