"""Variants of the default preset, within a patient and with patients held out, at fixed penalties and ranks.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_variants.py [VARIANT...] --cache DIR [--encode KIND...]

Prints a row for each variant and setting (penalty, rank), which nothing here has chosen: mean Pearson over the 250 genes of
highest mean / the 50 most variable within sections, both chosen on the training sections. Within: one section of C2-C5 held
out, the others in training, a known patient. A, B4, C: trained on the other two patients, mean over the sections of the one
held out (C and B4 have 0.69 µm/px, A has 3.2). Given depth: the same, partial on a cubic in log counts.

Features are encoded where they are not in the cache: about 25 spots a second and core.
"""

import argparse
import gc
import warnings
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from scipy.special import softmax
from skimage.color import hed_from_rgb, hsv2rgb, rgb2hsv, rgb_from_hed

import he2gene_sc as hg
from he2gene_sc.image import PatchBatch, PatchReader
from he2gene_sc.inference import Encoder, Part, cached_features
from he2gene_sc.models._embedding import N_COLOUR, Context, rings_of
from he2gene_sc.models._encoders.load import encoder_sha256, load_encoder
from he2gene_sc.models._encoders.stages import default_stages, stage_sizes
from he2gene_sc.models._network import FeatureExtractor
from he2gene_sc.stats import calibration_error, pearson
from he2gene_sc.tl._train.fit import _COLOUR_SHARE, _SYMMETRIES, recolouring_of
from he2gene_sc.tl._train.measured import join, read_sections
from he2gene_sc.tl._train.options import WINDOWS_UM, TrainingKeys
from he2gene_sc.training import Recipe, feature_weights
from he2gene_sc.training._closed_form import annotation
from he2gene_sc.training._closed_form.heads import FINE_BELOW_MPP, Choice, embed, find_rings, fit_basis, fit_sums
from he2gene_sc.training._closed_form.validate import panels
from he2gene_sc.training._held_out import Depth

NAMES = ("A1", "A2", "B4", "C2", "C3", "C4", "C5")
C = NAMES[3:]
#: Tested sections of each column.
COLUMNS = {"within": C, "A": NAMES[:2], "B4": NAMES[2:3], "C": C}
#: Penalty and rank.
SETTINGS = [(1.0, 3), (1.0, 8), (3.0, 3), (3.0, 8)]
COARSE_UM = 3.2
#: Sections whose colours are altered in tests of the annotation.
TESTED = ("B4", "C5")


def density(patches):
    return -torch.log((patches.float() + 1) / 256)


def pixels(density):
    return (256 * torch.exp(-density) - 1).round().clamp(0, 255).to(torch.uint8)


def degraded(patches, window, name):
    side = round(window.um / COARSE_UM)
    return F.interpolate(patches, size=(side, side), mode="bilinear", antialias=True)


def restained(patches, strengths, shift):
    """Patches with other strengths of the stains, and the light of another lamp."""
    mixed = torch.from_numpy((hed_from_rgb @ np.diag(strengths) @ rgb_from_hed).astype(np.float32))
    changed = torch.einsum("bcyx,cd->bdyx", density(patches), mixed)
    return pixels(changed + torch.from_numpy(shift.astype(np.float32))[:, None, None])


def stained(patches, window, name):
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    return restained(patches, np.exp(rng.normal(0, 0.25, 3)), rng.normal(0, 0.04, 3))


def turned(turn):
    def change(patches, window, name):
        hsv = rgb2hsv(np.moveaxis(patches.numpy(), 1, -1))
        hsv[..., 0] = (hsv[..., 0] + turn) % 1
        return torch.from_numpy(np.moveaxis((hsv2rgb(hsv) * 255).round().astype(np.uint8), -1, 1).copy())

    return change


copy_of = cache(recolouring_of)


def recoloured(number):
    def change(patches, window, name):
        return torch.from_numpy(copy_of(name, number)(patches.numpy()))

    return change


#: What is encoded: encoder and change of the patches.
KINDS = {
    "plain": ("efficientnet-lite0", None),
    "lite2": ("efficientnet-lite2", None),
    "coarse": ("efficientnet-lite0", degraded),
    "stain": ("efficientnet-lite0", stained),
}
#: The copies that training reads.
COPIES = tuple(f"copy {number}" for number in range(hg.DefaultRecipe().n_recoloured))
KINDS |= {copy: ("efficientnet-lite0", recoloured(number)) for number, copy in enumerate(COPIES)}
#: Alterations of the tested slides B4 and C5.
ALTERED = {
    "gamma 0.4": lambda patches, *_: (255 * (patches.float() / 255) ** 0.4).to(torch.uint8),
    "gamma 1.6": lambda patches, *_: (255 * (patches.float() / 255) ** 1.6).to(torch.uint8),
    "half the density": lambda patches, *_: pixels(0.5 * density(patches)),
    "1.5 times the density": lambda patches, *_: pixels(1.5 * density(patches)),
    "hue +0.1": turned(0.1),
    "hue -0.1": turned(-0.1),
}
KINDS |= {name: ("efficientnet-lite0", change) for name, change in ALTERED.items()}


class Changed(PatchReader):
    """A reader whose patches are changed."""

    def __init__(self, *arguments, change, name, **options):
        super().__init__(*arguments, **options)
        self.change = change or (lambda patches, window, name: patches), name

    def read_batches(self, numbers):
        change, name = self.change
        for batch in super().read_batches(numbers):
            changed = (
                change(torch.from_numpy(patches), window, name).numpy()
                for patches, window in zip(batch.patches, self.plan.windows, strict=True)
            )
            yield PatchBatch(batch.index, tuple(changed))


@cache
def extractor_of(name):
    network, spec = load_encoder(name)
    stages = default_stages(network)
    return (
        FeatureExtractor(network, spec, stages=stages),
        encoder_sha256(network),
        stage_sizes(network, stages, spec.input_px),
    )


def encode(measured, kind, folder):
    encoder, change = KINDS[kind]
    extractor, sha256, _ = extractor_of(encoder)
    slide = measured.slide
    reader = Changed(
        slide.pyramid,
        measured.centres,
        slide.mpp,
        windows_um=WINDOWS_UM,
        input_px=extractor.input_px,
        factor=slide.pixel_factor,
        change=change,
        name=measured.name,
    )
    how = Encoder(sha256, _SYMMETRIES, torch.device("cpu"), torch.float32)
    return cached_features(Part(extractor, reader), how, folder)


def read(folder, kinds):
    """Sections by name, without features, and the features of each kind."""
    keys = TrainingKeys("annotation", "patient", "section")
    kept, features = [], {}
    for name in NAMES:
        (measured,) = read_sections(hg.datasets.her2st(name), keys, {})
        for kind in kinds:
            # A is coarse as it is.
            if not (kind == "coarse" and name in COLUMNS["A"]) and not (kind in ALTERED and name not in TESTED):
                features[name, kind] = encode(measured, kind, folder)
                print(f"{name}: {kind} {features[name, kind].shape}", flush=True)
        kept.append(measured.release())
        del measured
        gc.collect()
    sections, _, _ = join(
        kept,
        [np.empty((len(s.centres), 0, 0)) for s in kept],
        hg.GeneSelection(missing_genes_are_zero=True),
        hg.Classes(ignore=("undetermined", "breast glands")),
    )
    find_rings(sections, (Context(), annotation.ANNOTATION_CONTEXT))
    return dict(zip(NAMES, sections, strict=True)), features


# What a variant is made of: the views it is trained on, the one it is tested on, and the weights of its features.


def weights(encoders=("efficientnet-lite0",), colour=_COLOUR_SHARE):
    parts = [feature_weights(extractor_of(name)[2], len(WINDOWS_UM), 0, 0) for name in encoders]
    return np.concatenate([*(part / np.sqrt(len(parts)) for part in parts), colour_weights(colour)])


def colour_weights(share=1.0):
    n = N_COLOUR * len(WINDOWS_UM)
    return np.full(n, np.sqrt(share / n), np.float32)


def side_by_side(features, name):
    """Lite0 and Lite2; the colours stand behind both."""
    n = N_COLOUR * len(WINDOWS_UM)
    lite0, lite2 = (features[name, kind] for kind in ("plain", "lite2"))
    return np.concatenate([lite0[..., :-n], lite2[..., :-n], lite0[..., -n:]], axis=2)


def views(*kinds):
    """Train on these kinds side by side; A has no degraded copies."""
    return lambda features, name: np.concatenate(
        [features[name, kind] for kind in kinds if (name, kind) in features], axis=1
    )


def colour_alone(features, name):
    return np.array(features[name, "plain"][:, :1, -N_COLOUR * len(WINDOWS_UM) :])


def with_features(section, features):
    changed = replace(section, features=features)
    changed.rings.update(section.rings)
    return changed


def with_copies(section, features, name, copies):
    found = with_features(section, features[name, "plain"])
    changed = replace(found, recoloured=tuple(features[name, copy][:, 0] for copy in copies))
    changed.rings.update(section.rings)
    return changed


def smoothed(section):
    """A section whose targets are the mean of a spot's and its neighbours'."""
    (ring,) = rings_of(section.centres_um, ((50.0, 350.0),))
    return replace(section, targets=(0.5 * section.targets + 0.5 * (ring @ section.targets)).tocsc().astype(np.float32))


def without_depth(section):
    """A section whose targets are residuals of a regression on depth."""
    targets = Depth.fit(section.totals, np.zeros(len(section))).residual(section.targets.toarray())
    return replace(section, targets=scipy.sparse.csc_array(targets.astype(np.float32)))


class Variant:
    def __init__(self, train, weights, *, test=None, context=None, targets=None, **sizes):
        self.train, self.test, self.weights, self.targets = train, test or train, weights, targets
        self.recipe = {"context": context or Context(), "n_latent": 128, **sizes}

    def predict(self, sections, features, train, tests):
        """Held-out predictions of the target and the variable genes, by setting and test."""
        recipe = Recipe(self.weights(), **self.recipe)
        chosen = [with_features(sections[name], self.train(features, name)) for name in train]
        rows = [np.ones(len(section), bool) for section in chosen]
        basis = fit_basis(chosen, rows, recipe)
        learned = chosen if self.targets is None else [self.targets(section) for section in chosen]
        sums = fit_sums(learned, rows, basis, recipe.power)
        genes = np.concatenate(panels(chosen, rows, 250))
        found = {}
        for name in tests:
            embedding = embed(with_features(sections[name], self.test(features, name)[:, :1]), basis)
            embedding *= basis.column_weights(sections[name].mpp)
            for setting in SETTINGS:
                found[setting, name] = (
                    embedding @ sums.weights(Choice(*setting, without_rings=Choice(*setting)))[:, genes]
                )
                if self.targets is not without_depth:
                    found[setting, name] = np.maximum(found[setting, name] + sums.mean[genes], 0)
        return genes, found


class Smoothed:
    """What a variant predicts, with its first ring of neighbours added at a weight."""

    def __init__(self, variant, weight):
        self.variant, self.weight = variant, weight

    def predict(self, sections, *arguments):
        genes, found = self.variant.predict(sections, *arguments)
        rings = {name: rings_of(sections[name].centres_um, RINGS[:1])[0] for _, name in found}
        return genes, {
            (setting, name): (values + self.weight * (rings[name] @ values)) / (1 + self.weight)
            for (setting, name), values in found.items()
        }


class Mean:
    """The mean of what several variants predict."""

    def __init__(self, *variants):
        self.variants = variants

    def predict(self, *arguments):
        genes, found = zip(*(variant.predict(*arguments) for variant in self.variants), strict=True)
        return genes[0], {key: np.mean([part[key] for part in found], axis=0) for key in found[0]}


class Ensemble:
    """The mean of what a variant predicts with all settings."""

    def __init__(self, variant):
        self.variant = variant

    def predict(self, *arguments):
        genes, found = self.variant.predict(*arguments)
        names = {name for _, name in found}
        return genes, {("all", name): np.mean([found[s, name] for s in SETTINGS], axis=0) for name in names}


def as_coarse(features, name):
    """The tested slide is read at 3.2 µm/px."""
    return features[name, "plain" if name in COLUMNS["A"] else "coarse"]


PLAIN = views("plain")
THREE_RINGS = Variant(PLAIN, weights)
NO_RING = Variant(PLAIN, weights, context=Context((), ()))
COLOUR = Variant(colour_alone, colour_weights, n_latent=64)
LITE2 = Variant(views("lite2"), lambda: weights(("efficientnet-lite2",)))
RINGS, RING_WEIGHTS = Context().rings_um, Context().weights
VARIANTS = {
    "default": Variant(PLAIN, weights, context=Context(fine_below_mpp=FINE_BELOW_MPP), n_latent=192),
    "three rings": THREE_RINGS,
    "no ring": NO_RING,
    "no ring, smoothed": Smoothed(NO_RING, 0.35),
    "three rings, smoothed": Smoothed(THREE_RINGS, 0.35),
    "three rings, tested at 3.2 µm/px": Variant(PLAIN, weights, test=as_coarse),
    "no ring, tested at 3.2 µm/px": Variant(PLAIN, weights, test=as_coarse, context=Context((), ())),
    "mean of all settings": Ensemble(THREE_RINGS),
    "one ring": Variant(PLAIN, weights, context=Context(RINGS[:1], RING_WEIGHTS[:1])),
    "two rings": Variant(PLAIN, weights, context=Context(RINGS[:2], RING_WEIGHTS[:2])),
    "two rings, the outer with weight .3": Variant(PLAIN, weights, context=Context(RINGS[:2], (0.7, 0.3))),
    "one ring, weight 1": Variant(PLAIN, weights, context=Context(RINGS[:1], (1.0,))),
    "rings of twice the weight": Variant(PLAIN, weights, context=Context(RINGS, tuple(2 * w for w in RING_WEIGHTS))),
    "colour with rings": COLOUR,
    "mean of three rings and colour": Mean(THREE_RINGS, COLOUR),
    "colour share 1": Variant(PLAIN, lambda: weights(colour=1.0)),
    "stained copies": Variant(views("plain", "stain"), weights, test=PLAIN),
    "degraded copies": Variant(views("plain", "coarse"), weights, test=PLAIN),
    "degraded and stained copies": Variant(views("plain", "coarse", "stain"), weights, test=PLAIN),
    "Lite2": LITE2,
    "Lite0 and Lite2 side by side": Variant(
        side_by_side, lambda: weights(("efficientnet-lite0", "efficientnet-lite2"))
    ),
    "mean of Lite0 and Lite2": Mean(THREE_RINGS, LITE2),
    "targets smoothed over neighbours": Variant(PLAIN, weights, targets=smoothed),
    "targets without depth": Variant(PLAIN, weights, targets=without_depth),
    "32 components": Variant(PLAIN, weights, n_components=32, n_latent=32),
}


def score(predicted, section, genes):
    """Mean correlation of both panels, then the same given depth."""
    measured = section.dense(genes)
    depth = Depth.fit(section.totals, np.zeros(len(section)))
    found = pearson(predicted, measured), depth.partial(predicted, measured)
    return np.array([np.nan_to_num(r)[genes].mean() for r in found for genes in (slice(250), slice(250, None))])


def annotate(sections, features):
    a, b4, c, c5 = COLUMNS["A"], COLUMNS["B4"], COLUMNS["C"], ("C5",)
    cells = {  # held out, tested, kinds of features that are tested
        "A1": (a, ("A1",), ("plain",)),
        "A2": (a, ("A2",), ("plain",)),
        "B4": (b4, b4, ("plain",)),
        "C2-C5": (c, c, ("plain",)),
        "C5, known": (c5, c5, ("plain",)),
        "B4, altered": (b4, b4, ALTERED),
        "C5, altered": (c, c5, ALTERED),
        "C5, known, altered": (c5, c5, ALTERED),
    }
    n_classes = 1 + max(int(section.codes.max()) for section in sections.values())
    print(f"| copies | colour | C | {' | '.join(cells)} |\n|{'---|' * (len(cells) + 3)}")
    # No copy, each alone, the first ones, all.
    for copies in ((), *((copy,) for copy in COPIES), COPIES[:2], COPIES[:3], COPIES):
        for colour in (2.0, 5.0, 10.0):
            for annotation.STRENGTH in (0.01, 0.03, 0.05):
                heads = {}
                for held_out in {held_out for held_out, _, _ in cells.values()}:
                    train = [name for name in NAMES if name not in held_out]
                    chosen = [with_copies(sections[name], features, name, copies) for name in train]
                    rows = [np.ones(len(section), bool) for section in chosen]
                    heads[held_out] = annotation.fit_annotation(chosen, rows, weights(colour=colour), n_classes)
                row = []
                for held_out, tests, tested in cells.values():
                    pairs = [with_features(sections[name], features[name, kind]) for name in tests for kind in tested]
                    row.append(np.mean([agreement(heads[held_out].logits(x), x.codes) for x in pairs], axis=0))
                texts = [f"{balanced:.2f} ({accuracy:.2f}, {error:.2f})" for balanced, accuracy, error in row]
                title = ", ".join(copies) or "none"
                print(f"| {title} | {colour:g} | {annotation.STRENGTH} | {' | '.join(texts)} |", flush=True)


def agreement(logits, codes):
    """Balanced accuracy, accuracy and calibration error of the spots with labels."""
    logits, codes = logits[codes >= 0], codes[codes >= 0]
    hits = logits.argmax(1) == codes
    balanced = np.mean([hits[codes == code].mean() for code in np.unique(codes)])
    return balanced, hits.mean(), calibration_error(softmax(logits, axis=1), codes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of {list(VARIANTS)}; default: all that --encode allows")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the encoder's features")
    parser.add_argument("--encode", nargs="+", choices=KINDS, help="features to use; default: all that are needed")
    parser.add_argument("--annotation", action="store_true", help="the variants of the annotation instead")
    parser.add_argument("--all-patients", action="store_true", help="also each of C2-C5 by all other sections")
    parser.add_argument("--settings", nargs="+", help="penalty,rank pairs to use instead, e.g. 0.3,8 1,none")
    arguments = parser.parse_args()
    if arguments.settings:
        pairs = (pair.split(",") for pair in arguments.settings)
        SETTINGS[:] = [(float(penalty), None if rank == "none" else int(rank)) for penalty, rank in pairs]
    if arguments.all_patients:
        COLUMNS["all patients"] = C
    warnings.simplefilter("ignore")
    if arguments.annotation:
        annotate(*read(arguments.cache, ["plain", *COPIES, *ALTERED]))
    else:
        compare(*read(arguments.cache, arguments.encode or list(KINDS)[:4]), arguments.variants or VARIANTS)


def compare(sections, features, variants):
    known = {"within": C, "all patients": NAMES}
    folds = [
        (column, [n for n in known[column] if n != test], [test]) for column in known if column in COLUMNS for test in C
    ]
    folds += [(column, [n for n in NAMES if n not in COLUMNS[column]], COLUMNS[column]) for column in ("A", "B4", "C")]
    titles = [f"{column}{given}" for given in ("", ", given depth") for column in COLUMNS]
    print(f"| variant | penalty, rank | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 2)}")
    for title in variants:
        found = {}
        try:
            for column, train, tests in folds:
                genes, predicted = VARIANTS[title].predict(sections, features, train, tests)
                for (setting, name), values in predicted.items():
                    found.setdefault((setting, column), []).append(score(values, sections[name], genes))
        except KeyError as error:
            print(f"{title}: {error} was not encoded")
            continue
        for setting in dict.fromkeys(setting for setting, _ in found):
            means = np.stack([np.mean(found[setting, column], axis=0) for column in COLUMNS])
            cells = [
                f"{target:.3f} / {variable:.3f}" for part in (means[:, :2], means[:, 2:]) for target, variable in part
            ]
            name = setting if setting == "all" else f"{setting[0]:g}, {setting[1]}"
            print(f"| {title} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
