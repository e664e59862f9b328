"""What the bundled model says of slides that it was not made for, and of patients that were held out.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_strangers.py [PART...] [--slides FILE.py] [--cache DIR]
        [--spots N] [--only WORDS]

Parts:
  altered   a crop of C5 and of B4 as it is, stained otherwise, blurred, noisy, compressed, with a wrong µm/px: share of the
            spots that are flagged, in total and by cause, by the bundled model
  unseen    the same of a section of each patient, A1, B4 and C5, by a model of the two other patients
  held-out  models of all patients but one: balanced accuracy, calibration error and share flagged of the one held out;
            mean Pearson over the 250 genes of highest mean / the 50 most variable, of the model, of a plain ridge on the
            same features, standardised within the slide, beside the mean of the neighbours (penalty 100 times the
            features), and of colour, alone and so; the model minus the ridge with its 95 % interval over squares of tissue
  coarse    B4, C2, C3 and C5 at the µm/px of A, by the bundled model: share of the spots that are flagged, verdict
  photos    photographs and an IHC picture of scikit-image, as if at 0.5 µm/px
  placed    share of the spots of her2st on tissue as they are, mirrored, turned, swapped, and shifted by a tenth and a fifth
  passing   what alterations that are not flagged cost on C5: mean Pearson over 250 genes, agreement of the annotation
  slides    the slides of a Python file of your own, with `ITEMS` (names) and `load(name)` (SpatialData with an image "he",
            perhaps shapes "spots", and `attrs["stranger"]["mpp"]`)
"""

import argparse
import contextlib
import functools
import io
import runpy
import tempfile
import types
import warnings
from pathlib import Path
from unittest import mock

import bench_training
import numpy as np
import pandas as pd
import skimage.data
import torch
from bench_trust import pixels_of
from PIL import Image
from scipy.ndimage import gaussian_filter, median_filter, uniform_filter1d
from skimage.color import hed2rgb, hsv2rgb, rgb2hed, rgb2hsv
from sklearn.neighbors import radius_neighbors_graph
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel

import he2gene_sc as hg
from he2gene_sc._core.placement import mirror_matrices, shift_matrix, tissue_shares
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import MIN_TISSUE
from he2gene_sc.models import _ood
from he2gene_sc.models._embedding import N_COLOUR
from he2gene_sc.models._encoders.load import encoder_sha256, load_encoder
from he2gene_sc.models._encoders.stages import default_stages
from he2gene_sc.models._network import FeatureExtractor
from he2gene_sc.stats import calibration_error, log_normalise, pearson
from he2gene_sc.tl._train.fit import encode_section
from he2gene_sc.tl._train.options import WINDOWS_UM

SECTIONS = ("A1", "A2", "B4", "C2", "C3", "C4", "C5")
#: Side of the crops that are altered, pixels, and spots that are read at most.
SIDE, MOST = 3000, 60
#: Coarsest µm/px that a window of 100 µm can be read at.
COARSEST = 12.5


def stained(change):
    def altered(image):
        hed = change(rgb2hed(np.moveaxis(image, 0, -1)))
        return np.moveaxis((np.clip(hed2rgb(hed), 0, 1) * 255).astype(np.uint8), -1, 0)

    return altered


def dab(hed):
    return np.stack([hed[..., 0], np.zeros_like(hed[..., 1]), hed[..., 1] + np.clip(hed[..., 2], 0, None)], axis=-1)


def fluorescence(image):
    out = np.zeros_like(image)
    out[2] = np.clip(1.2 * (255 - image.mean(0)) - 40, 0, 255)
    return out


def blurred(sigma):
    return lambda image: np.stack([gaussian_filter(x.astype(np.float32), sigma) for x in image]).astype(np.uint8)


def moved(n):
    return lambda image: uniform_filter1d(image.astype(np.float32), n, axis=2).astype(np.uint8)


def noisy(sd, channels=3):
    def altered(image):
        noise = np.random.default_rng(0).normal(0, sd, (channels, *image.shape[1:]))
        return np.clip(image + noise, 0, 255).astype(np.uint8)

    return altered


def compressed(quality):
    def altered(image):
        stream = io.BytesIO()
        Image.fromarray(np.moveaxis(image, 0, -1)).save(stream, "JPEG", quality=quality)
        return np.moveaxis(np.asarray(Image.open(stream)), -1, 0).copy()

    return altered


def spotted(share):
    def altered(image):
        rng = np.random.default_rng(0)
        wrong = rng.random(image.shape[1:]) < share
        return np.where(wrong, 255 * rng.integers(0, 2, image.shape[1:]), image).astype(np.uint8)

    return altered


ALTERED = {
    "as it is": lambda image: image,
    "eosin removed": stained(lambda hed: hed * [1, 0, 1]),
    "haematoxylin removed": stained(lambda hed: hed * [0, 1, 1]),
    "DAB instead of eosin": stained(dab),
    "fluorescence": fluorescence,
    "inverted": lambda image: 255 - image,
    **{f"blur {s} px": blurred(s) for s in (2, 4, 6)},
    "motion 9 px": moved(9),
    "blur 4 px, then JPEG 50": lambda image: compressed(50)(blurred(4)(image)),
    **{f"noise {s}": noisy(s) for s in (20, 40)},
    "noise 40, the same in all channels": noisy(40, 1),
    "JPEG 5": compressed(5),
    "red and green exchanged": lambda image: image[[1, 0, 2]],
    "median 7 px": lambda image: median_filter(image, (1, 7, 7)),
    "blur 2 px, then noise 5": lambda image: noisy(5)(blurred(2)(image)),
    "salt and pepper 2 %": spotted(0.02),
    "reduced by two, pixels copied": lambda image: image[:, ::2, ::2].repeat(2, 1).repeat(2, 2),
    "eight levels a channel": lambda image: image // 32 * 32,
    "sharpened, radius 2 px": lambda image: np.clip(3 * image.astype(float) - 2 * blurred(2)(image), 0, 255).astype(
        np.uint8
    ),
    "gamma 0.4": lambda image: (255 * (image / 255) ** 0.4).astype(np.uint8),
    "a third of the eosin": stained(lambda hed: hed * [1, 0.33, 1]),
}


@contextlib.contextmanager
def recorded_results():
    """Record for each predicted slide the share of tissue spots flagged by each cause, and the octaves of each window."""
    found, sides, assess, apparent = [], [], _ood.OODDetector.assess, _ood.apparent_sides

    def measured(*arguments):
        sides.append(apparent(*arguments))
        return sides[-1]

    def recorded(*arguments):
        sides.clear()
        result = assess(*arguments)
        flagged = ", ".join(f"{cause} {share:.1%}" for cause, share in result.causes.items() if share)
        found.append(f"{flagged or 'none'}; octaves {np.round(np.mean(sides, axis=0), 2)}")
        return result

    with mock.patch.object(_ood.OODDetector, "assess", recorded), mock.patch.object(_ood, "apparent_sides", measured):
        yield found


def said(title, sdata, mpp, **options):
    """Print a row: spots, share on tissue, share flagged, by cause, verdict, classes of the spots that are called.

    Return whether the slide was predicted.
    """
    with warnings.catch_warnings(record=True) as caught, recorded_results() as found:
        warnings.simplefilter("always")
        options = {"genes": ["ERBB2"], "device": "cpu", "dtype": "float32", "show_progress_bar": False, **options}
        try:
            hg.tl.predict(sdata, mpp=mpp, **options)
        except ValueError as error:
            print(f"| {title} | refused: {error} |", flush=True)
            return False
    reasons = [str(w.message).split(" (mpp")[0] for w in caught if "unlike what" in str(w.message)]
    table = next(iter(sdata.tables.values()))
    obs, record = table.obs, table.uns["he2gene"]
    tissue = obs["he2gene_tissue"] >= MIN_TISSUE
    flagged = (obs["he2gene_ood"][tissue] > 1).mean()
    classes = obs["he2gene_annotation"].value_counts(normalize=True).round(2).to_dict()
    print(
        f"| {title} | {len(obs)} | {tissue.mean():.0%} | {flagged:.0%} | {'; '.join(found)} | {record['verdict']} | {classes} | "
        f"{reasons[0] if reasons else ''} |",
        flush=True,
    )
    return True


def slide(image, centres, mpp, um=100):
    return SpatialData(
        images={"he": Image2DModel.parse(image, dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(centres, geometry=0, radius=um / 2 / mpp)},
    )


def altered(arguments, names=("C5", "B4"), model_for=lambda name: "breast-her2st"):
    for name in names:
        model = model_for(name)
        image, centres, mpp = pixels_of(hg.datasets.her2st(name))
        low = np.maximum(np.median(centres, axis=0).astype(int) - SIDE // 2, 0)
        crop = image[:, low[1] : low[1] + SIDE, low[0] : low[0] + SIDE]
        inside = centres[((centres > low + 50) & (centres < low + SIDE - 50)).all(1)][: arguments.spots] - low
        for title, change in ALTERED.items():
            if arguments.only in title:
                said(f"{name}, {title}", slide(change(crop), inside, mpp), mpp, model=model)
        for factor in (0.5, 2) if arguments.only in "µm/px" else ():
            said(f"{name}, µm/px times {factor}", slide(crop, inside, mpp), mpp * factor, model=model)


def unseen(arguments):
    altered(arguments, ("A1", "B4", "C5"), lambda name: model_without(name[0], arguments.cache))


@functools.cache
def model_without(patient, cache):
    """Train on all patients but one."""
    return hg.tl.train(
        (hg.datasets.her2st(name) for name in SECTIONS if name[0] != patient),
        cache=cache,
        annotation_key="annotation",
        classes=hg.Classes(ignore=("undetermined", "breast glands")),
        genes=hg.GeneSelection(missing_genes_are_zero=True),
        device="cpu",
        show_progress_bar=False,
    )


def held_out(arguments):
    for patient in "ABC":
        names = [name for name in SECTIONS if name[0] != patient]
        model = model_without(patient, arguments.cache)
        for name in (name for name in SECTIONS if name[0] == patient):
            sdata = hg.datasets.her2st(name)
            with recorded_results() as found:
                hg.tl.predict(sdata, model=model, device="cpu", dtype="float32", show_progress_bar=False)
            table = sdata["table"]
            proba = table.obsm["he2gene_annotation_proba"]
            codes = proba.columns.get_indexer(table.obs["annotation"].astype(str))
            known, guessed = codes >= 0, proba.to_numpy().argmax(1)
            recall = [(guessed[codes == c] == c).mean() for c in np.unique(codes[known])]
            expression(name, names, table, arguments.cache)
            print(
                f"| {name} by {', '.join(names)} | balanced accuracy {np.mean(recall):.2f} | calibration error "
                f"{calibration_error(proba.to_numpy()[known], codes[known]):.2f} | flagged "
                f"{(table.obs['he2gene_ood'] > 1).mean():.1%} ({found[0]}) | {table.uns['he2gene']['verdict']} |",
                flush=True,
            )


@functools.cache
def read(name, cache):
    """Features of the encoder, of colour, positions in µm and measured expression of a section."""
    network, spec = load_encoder("efficientnet-lite0")
    extractor = FeatureExtractor(network, spec, stages=default_stages(network))
    sdata = hg.datasets.her2st(name)
    (slide,) = resolve(sdata)
    section = types.SimpleNamespace(name=name, slide=slide, centres=slide.centres)
    engine = (32, torch.device("cpu"), torch.float32, False)
    found = encode_section(section, extractor, encoder_sha256(network), WINDOWS_UM, cache, engine)[:, 0]
    n_colour = N_COLOUR * len(WINDOWS_UM)
    return found[:, :-n_colour], found[:, -n_colour:], slide.centres * slide.mpp, bench_training.expression(sdata)


def around(x, places):
    """Features standardised within the slide, beside the mean of the neighbours within 353 µm."""
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    near = radius_neighbors_graph(places, 353, include_self=False)
    return np.hstack([x, near @ x / np.maximum(near.sum(1), 1)])


def expression(name, names, table, cache):
    """Print what the model, a plain ridge and colour reach on a section."""
    parts = {other: read(other, cache) for other in (*names, name)}
    genes = bench_training.panels([parts[other][3] for other in names])
    together = genes[0].union(genes[1])
    y = np.concatenate([parts[other][3].reindex(columns=together, fill_value=0) for other in names])
    truth, frames = parts[name][3], {"model": table.to_df("he2gene")}
    for title, make in {
        "plain ridge": lambda part: around(part[0], part[2]),
        "colour": lambda part: part[1],
        "colour with slide and neighbours": lambda part: around(part[1], part[2]),
    }.items():
        x = [make(parts[other]) for other in (*names, name)]
        guess = bench_training.ridge(np.concatenate(x[:-1]), y, x[-1], 100 if title == "plain ridge" else 1)
        frames[title] = pd.DataFrame(guess, index=truth.index, columns=together)
    found = {k: bench_training.both([bench_training.score(x, truth, g) for g in genes]) for k, x in frames.items()}
    gaps = " / ".join(gap(frames["model"], frames["plain ridge"], truth, g, parts[name][2]) for g in genes)
    cells = [*(f"{k} {v}" for k, v in found.items()), f"model minus plain ridge {gaps}"]
    print(f"| {name} by {', '.join(names)} | " + " | ".join(cells) + " |", flush=True)


def gap(first, second, truth, genes, places, side=800):
    """Difference of the mean correlations of two predictions; interval (95 %) by drawing squares of tissue (µm) anew."""
    a, b, t = (frame.reindex(columns=genes, fill_value=0).to_numpy(float) for frame in (first, second, truth))
    square = np.unique((places // side).astype(int), axis=0, return_inverse=True)[1].ravel()
    members = [np.flatnonzero(square == i) for i in range(square.max() + 1)]

    def difference(rows):
        return np.subtract(*(np.nan_to_num(pearson(x[rows], t[rows])).mean() for x in (a, b)))

    rng = np.random.default_rng(0)
    drawn = [
        difference(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]))
        for _ in range(1000)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{difference(np.arange(len(t))):.3f} ({low:.3f} to {high:.3f})"


def coarse(arguments):
    (at,) = resolve(hg.datasets.her2st("A1"))
    for name in ("B4", "C2", "C3", "C5"):
        sdata = hg.datasets.her2st(name)
        (own,) = resolve(sdata)
        image, centres, mpp, _ = bench_training.rescaled(sdata, own.mpp / at.mpp)
        said(f"{name} at {mpp:.2g} µm/px", slide(image, centres, mpp), mpp)


def photos(arguments):
    for name in ("retina", "coffee", "astronaut", "rocket", "immunohistochemistry"):
        image = np.moveaxis(getattr(skimage.data, name)(), -1, 0)
        x, y = np.meshgrid(*(np.arange(100, side - 99, 100) for side in image.shape[:0:-1]))
        said(name, slide(image, np.column_stack([x.ravel(), y.ravel()]), 0.5), 0.5)


def slides(arguments):
    if arguments.slides is None:
        return
    module = runpy.run_path(str(arguments.slides))
    for name in module["ITEMS"]:
        sdata = module["load"](name)
        mpp = sdata.attrs["stranger"]["mpp"] or 0.5
        if "spots" not in sdata.shapes:
            hg.pp.tissue(sdata)
            hg.pp.grid(sdata, mpp=mpp)
        if not said(name, sdata, mpp):
            # What is refused for its genes, spots or resolution is tried again without genes, enlarged, with spots of 200 µm.
            image = np.asarray(sdata["he"].data)
            centres = np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y])
            while mpp > COARSEST:
                image, centres, mpp = enlarged(image), 2 * centres, mpp / 2
            said(f"{name}, at {mpp:.2g} µm/px with spots of 200 µm", slide(image, centres, mpp, 200), mpp)


def placed(arguments):
    for name in SECTIONS:
        (at,) = resolve(hg.datasets.her2st(name))
        wrong = {title: list(mirror_matrices(at).values()) for title in ["mirrored, turned, swapped"]}
        for share in (0.1, 0.2):
            steps = ((share, 0), (-share, 0), (0, share), (0, -share))
            wrong[f"shifted by {share:.0%}"] = [shift_matrix(at, *step) for step in steps]
        row = [f"as it is {tissue_shares(at, {'': np.eye(3)})['']:.0%}"]
        for title, matrices in wrong.items():
            found = tissue_shares(at, dict(enumerate(matrices))).values()
            row.append(f"{title} {min(found):.0%} to {max(found):.0%}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)


def hued(turn):
    def altered(image):
        hsv = rgb2hsv(np.moveaxis(image, 0, -1))
        hsv[..., 0] = (hsv[..., 0] + turn) % 1
        return np.moveaxis((hsv2rgb(hsv) * 255).astype(np.uint8), -1, 0)

    return altered


def enlarged(image):
    wide = Image.fromarray(np.moveaxis(image, 0, -1))
    return np.moveaxis(np.asarray(wide.resize((2 * wide.width, 2 * wide.height), Image.Resampling.BICUBIC)), -1, 0)


#: Alterations that pass, and what they make of the µm/px.
PASSING = {
    "as it is": (ALTERED["as it is"], 1),
    "gamma 0.4": (ALTERED["gamma 0.4"], 1),
    "half the density": (stained(lambda hed: 0.5 * hed), 1),
    "hue turned by -0.1": (hued(-0.1), 1),
    "hue turned by 0.1": (hued(0.1), 1),
    "sharpened, radius 2 px": (ALTERED["sharpened, radius 2 px"], 1),
    "enlarged to double the size": (enlarged, 0.5),
}


def passing(arguments):
    truth = hg.datasets.her2st("C5")
    table = truth["table"]
    measured, labels = (
        pd.DataFrame(log_normalise(table.X), columns=table.var_names),
        table.obs["label_warp"].astype(str),
    )
    image, centres, mpp = pixels_of(truth)
    top = None
    low, high = (centres.min(0) - 600).clip(0).astype(int), (centres.max(0) + 600).astype(int)
    image, centres = image[:, low[1] : high[1], low[0] : high[0]], centres - low
    for title, (change, factor) in PASSING.items():
        if arguments.only not in title:
            continue
        sdata = slide(change(image), centres / factor, mpp * factor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hg.tl.predict(sdata, mpp=mpp * factor, device="cpu", dtype="float32", show_progress_bar=False)
        made = next(iter(sdata.tables.values()))
        known = measured.columns.intersection(made.var_names)
        if top is None:
            top = measured[known].mean().nlargest(250).index
        r = pearson(made[:, top].layers["he2gene"], measured[top].to_numpy())
        proba = made.obsm["he2gene_annotation_proba"]
        called, judged = proba.columns[proba.to_numpy().argmax(1)], labels.isin(proba.columns).to_numpy()
        print(
            f"| {title} | {(made.obs['he2gene_ood'] > 1).mean():.0%} | {made.uns['he2gene']['verdict']} | {np.nanmean(r):.3f} | "
            f"{(called == labels)[judged].mean():.0%} |",
            flush=True,
        )


PARTS = {
    "altered": altered,
    "unseen": unseen,
    "held-out": held_out,
    "coarse": coarse,
    "photos": photos,
    "placed": placed,
    "passing": passing,
    "slides": slides,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {list(PARTS)}")
    parser.add_argument("--slides", type=Path, help="Python file with `ITEMS` and `load(name)`")
    parser.add_argument("--cache", type=Path, help="folder for the encoder's features; default: a temporary one")
    parser.add_argument("--spots", type=int, default=MOST, help="of each altered crop, at most")
    parser.add_argument("--only", default="", help="alterations whose name has these words")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.cache = arguments.cache or Path(temporary)
        for part in arguments.parts:
            PARTS[part](arguments)


if __name__ == "__main__":
    main()
