"""Variants of the default preset, within a patient and across patients, at fixed penalties and ranks.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_variants.py [VARIANT...] --cache DIR [--encode KIND...]

Prints a row a variant: mean Pearson over the 250 genes of highest mean / the 50 most variable within sections, both chosen on
the training sections. Within: leave one section out over C2-C5, a known patient. Across: trained on C2-C5 and tested on
A1 and A2, and the other way round; two folds, confounded with resolution (C 0.69, A 3.2 µm/px). Each row is given for
two settings, (penalty 1, rank 8) and (penalty 3, rank 3), which nothing here has chosen.

Features are encoded where they are not in the cache: about 25 spots a second and core for each symmetry of three windows.
"""

import argparse
import gc
import warnings
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from scipy.stats import rankdata
from skimage.color import hed_from_rgb, rgb_from_hed

import he2gene_sc as hg
from he2gene_sc.image import PatchBatch, PatchReader
from he2gene_sc.inference import Encoder, Part, cached_features
from he2gene_sc.models._embedding import N_COLOUR, Context, rings_of
from he2gene_sc.models._encoders.load import encoder_sha256, load_encoder
from he2gene_sc.models._encoders.stages import default_stages, stage_sizes
from he2gene_sc.models._network import FeatureExtractor
from he2gene_sc.stats import pearson
from he2gene_sc.tl._train.fit import _COLOUR_SHARE, _SYMMETRIES
from he2gene_sc.tl._train.measured import join, read_sections
from he2gene_sc.tl._train.options import WINDOWS_UM, TrainingKeys
from he2gene_sc.training import Recipe, feature_weights
from he2gene_sc.training._closed_form.heads import embed, fit_basis, fit_sums
from he2gene_sc.training._closed_form.validate import panels

C, A = ("C2", "C3", "C4", "C5"), ("A1", "A2")
#: Penalty and rank (None: full).
SETTINGS = [(1.0, 8), (3.0, 3)]
COARSE_UM = 3.2
#: What is encoded: encoder, symmetries, number of the stain (None: as it is), whether patches are degraded.
KINDS = {
    "plain": ("efficientnet-lite0", _SYMMETRIES, None, False),
    "lite2": ("efficientnet-lite2", _SYMMETRIES[:1], None, False),
    "coarse": ("efficientnet-lite0", _SYMMETRIES[:1], None, True),
    "coarse stain": ("efficientnet-lite0", _SYMMETRIES[1:2], 0, True),
    "stain": ("efficientnet-lite0", _SYMMETRIES[2:3], 0, False),
}


class Changed(PatchReader):
    """A reader whose patches are recoloured, the same for a section, or degraded."""

    def __init__(self, *arguments, stain, coarse, name, **options):
        super().__init__(*arguments, **options)
        self.coarse, self.stain = coarse, None
        if stain is not None:
            rng = np.random.default_rng([stain, zlib.crc32(name.encode())])
            # Each stain stronger or weaker, and the light of another lamp.
            mixed = hed_from_rgb @ np.diag(np.exp(rng.normal(0, 0.25, 3))) @ rgb_from_hed
            self.stain = mixed.astype(np.float32), rng.normal(0, 0.04, 3).astype(np.float32)

    def read_batches(self, numbers):
        for batch in super().read_batches(numbers):
            yield PatchBatch(batch.index, tuple(map(self._change, batch.patches, self.plan.windows)))

    def _change(self, patches, window):
        x = torch.from_numpy(patches)
        if self.coarse:
            side = round(window.um / COARSE_UM)
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        if self.stain is not None:
            mixed, shift = (torch.from_numpy(array) for array in self.stain)
            density = -torch.log((x.float() + 1) / 256)
            density = torch.einsum("bcyx,cd->bdyx", density, mixed) + shift[:, None, None]
            x = (256 * torch.exp(-density) - 1).round().clamp(0, 255).to(torch.uint8)
        return x.numpy()


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
    encoder, symmetries, stain, coarse = KINDS[kind]
    extractor, sha256, _ = extractor_of(encoder)
    slide = measured.slide
    reader = Changed(
        slide.pyramid,
        measured.centres,
        slide.mpp,
        windows_um=WINDOWS_UM,
        input_px=extractor.input_px,
        factor=slide.pixel_factor,
        stain=stain,
        coarse=coarse,
        name=measured.name,
    )
    how = Encoder(sha256, symmetries, torch.device("cpu"), torch.float32)
    return cached_features(Part(extractor, reader), how, folder)


def read(folder, kinds):
    """Sections by name, without features, and the features of each kind."""
    keys = TrainingKeys("annotation", "patient", "section")
    kept, features = [], {}
    for name in (*C, *A):
        (measured,) = read_sections(hg.datasets.her2st(name), keys, {})
        for kind in kinds:
            # A is coarse as it is.
            if not (KINDS[kind][3] and name in A):
                features[name, kind] = encode(measured, kind, folder)
                print(f"{name}: {kind} {features[name, kind].shape}", flush=True)
        kept.append(measured.release())
        del measured
        gc.collect()
    sections, _, _ = join(
        kept,
        [np.empty((len(s.centres), 0, 0)) for s in kept],
        hg.GeneSelection(missing_genes_are_zero=True),
        hg.Classes(ignore=()),
    )
    return {section.name: section for section in sections}, features


# What a variant is made of: the views it is trained on, the one it is tested on, and the weights of its features.


def weights(encoders=("efficientnet-lite0",), colour=_COLOUR_SHARE):
    parts = [feature_weights(extractor_of(name)[2], len(WINDOWS_UM), 0, 0) for name in encoders]
    return np.concatenate([*(part / np.sqrt(len(parts)) for part in parts), colour_weights(colour)])


def colour_weights(share=1.0):
    n = N_COLOUR * len(WINDOWS_UM)
    return np.full(n, np.sqrt(share / n), np.float32)


def side_by_side(features, name):
    """Lite0 and Lite2 of the same view; the colours stand behind both."""
    n = N_COLOUR * len(WINDOWS_UM)
    lite0, lite2 = (features[name, kind][:, :1] for kind in ("plain", "lite2"))
    return np.concatenate([lite0[..., :-n], lite2[..., :-n], lite0[..., -n:]], axis=2)


def views(*kinds):
    """Train on these kinds side by side; A has no degraded copies."""
    return lambda features, name: np.concatenate(
        [features[name, kind] for kind in kinds if not (KINDS[kind][3] and name in A)], axis=1
    )


def first(kind):
    return lambda features, name: features[name, kind if (name, kind) in features else "plain"][:, :1]


def colour_alone(features, name):
    return np.array(features[name, "plain"][:, :1, -N_COLOUR * len(WINDOWS_UM) :])


def normal_scores(features):
    """Ranks of each feature within the slide, as quantiles of the normal distribution."""
    return ndtri((rankdata(features, axis=0) - 0.5) / len(features)).astype(np.float32)


def smoothed(section):
    """A section whose targets are the mean of a spot's and its neighbours'."""
    (ring,) = rings_of(section.centres_um, ((50.0, 350.0),))
    return replace(section, targets=(0.5 * section.targets + 0.5 * (ring @ section.targets)).tocsc().astype(np.float32))


class Variant:
    def __init__(self, train, test, weights, *, context=None, matched=False, targets=None, **sizes):
        self.train, self.test, self.weights, self.matched, self.targets = train, test, weights, matched, targets
        self.recipe = {"context": context or Context(), **sizes}

    def predict(self, sections, features, train, tests):
        """Held-out predictions of the target and the variable genes, by setting and test."""
        recipe = Recipe(self.weights(), **self.recipe)
        chosen = [replace(sections[name], features=self.train(features, name)) for name in train]
        rows = [np.ones(len(section), bool) for section in chosen]
        basis = fit_basis(chosen, rows, recipe)
        learned = chosen if self.targets is None else [self.targets(section) for section in chosen]
        sums = fit_sums(learned, rows, basis, recipe.power)
        genes = np.concatenate(panels(chosen, rows, 250))
        spread = np.sqrt(np.mean([embed(section, basis).var(0) for section in chosen], axis=0))
        found = {}
        for setting in SETTINGS:
            weight = sums.ridge(*setting)[:, genes]
            for name in tests:
                section = replace(sections[name], features=self.test(features, name))
                embedding = embed(section, basis)
                if self.matched:
                    n, own = len(embedding), embedding.var(0)
                    embedding = embedding * spread / np.sqrt((n * own + 20 * spread**2) / (n + 20))
                found[setting, name] = np.maximum(embedding @ weight + sums.mean[genes], 0)
        return genes, found


class Mean:
    """The mean of what several variants predict."""

    def __init__(self, *variants):
        self.variants = variants

    def predict(self, *arguments):
        genes, found = zip(*(variant.predict(*arguments) for variant in self.variants), strict=True)
        return genes[0], {key: np.mean([part[key] for part in found], axis=0) for key in found[0]}


class Blend:
    """The mean of what a variant predicts with the two settings."""

    def __init__(self, variant):
        self.variant = variant

    def predict(self, *arguments):
        genes, found = self.variant.predict(*arguments)
        names = {name for _, name in found}
        return genes, {(SETTINGS[0], name): np.mean([found[s, name] for s in SETTINGS], axis=0) for name in names}


PLAIN = views("plain")
DEFAULT = Variant(PLAIN, first("plain"), weights)
COLOUR = Variant(colour_alone, colour_alone, colour_weights, n_latent=64)
ONE = Variant(first("plain"), first("plain"), weights)
LITE2 = Variant(views("lite2"), first("lite2"), lambda: weights(("efficientnet-lite2",)))
BOTH = Variant(side_by_side, side_by_side, lambda: weights(("efficientnet-lite0", "efficientnet-lite2")))
VARIANTS = {
    "default": DEFAULT,
    "default, mean of both settings": Blend(DEFAULT),
    "colour with rings": COLOUR,
    "mean of default and colour": Mean(DEFAULT, COLOUR),
    "colour share 1": Variant(PLAIN, first("plain"), lambda: weights(colour=1.0)),
    "colour share 4": Variant(PLAIN, first("plain"), lambda: weights(colour=4.0)),
    "features as ranks within the slide": Variant(
        lambda features, name: normal_scores(features[name, "plain"]),
        lambda features, name: normal_scores(features[name, "plain"][:, :1]),
        weights,
    ),
    "embedding's SD matched to training": Variant(PLAIN, first("plain"), weights, matched=True),
    "targets smoothed over neighbours": Variant(PLAIN, first("plain"), weights, targets=smoothed),
    "32 components": Variant(PLAIN, first("plain"), weights, n_components=32, n_latent=32),
    "rings off the grid, 650 and 950": Variant(
        PLAIN,
        first("plain"),
        weights,
        context=Context(((50.0, 350.0), (350.0, 650.0), (650.0, 950.0)), (0.7, 0.5, 0.3)),
    ),
    "wider rings, to 1500": Variant(
        PLAIN,
        first("plain"),
        weights,
        context=Context(((50.0, 350.0), (350.0, 650.0), (650.0, 950.0), (950.0, 1550.0)), (0.7, 0.5, 0.3, 0.3)),
    ),
    "default, one view": ONE,
    "Lite2, one view": LITE2,
    "Lite0 and Lite2 side by side, one view": BOTH,
    "mean of Lite0 and Lite2, one view": Mean(ONE, LITE2),
    "mean of default, Lite2 and colour": Mean(DEFAULT, LITE2, COLOUR),
    "degraded copies": Variant(views("plain", "coarse"), first("plain"), weights),
    "degraded copies, tested degraded": Variant(views("plain", "coarse"), first("coarse"), weights),
    "tested degraded": Variant(PLAIN, first("coarse"), weights),
    "stained copies": Variant(views("plain", "stain"), first("plain"), weights),
    "degraded and stained copies": Variant(views("plain", "coarse", "coarse stain", "stain"), first("plain"), weights),
    "degraded and stained copies, mean with colour": Mean(
        Variant(views("plain", "coarse", "coarse stain", "stain"), first("plain"), weights), COLOUR
    ),
}


def score(predicted, section, genes):
    r = np.nan_to_num(pearson(predicted, section.dense(genes)))
    return r[:250].mean(), r[250:].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"of {list(VARIANTS)}; default: all that --encode allows")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the encoder's features")
    parser.add_argument("--encode", nargs="+", default=list(KINDS), choices=KINDS, help="features to use")
    parser.add_argument("--settings", nargs="+", help="penalty,rank pairs to use instead, e.g. 0.3,8 1,none")
    arguments = parser.parse_args()
    if arguments.settings:
        pairs = (pair.split(",") for pair in arguments.settings)
        SETTINGS[:] = [(float(penalty), None if rank == "none" else int(rank)) for penalty, rank in pairs]
    warnings.simplefilter("ignore")
    compare(*read(arguments.cache, arguments.encode), arguments.variants or VARIANTS)


def compare(sections, features, variants):
    folds = [("within", [n for n in C if n != test], [test]) for test in C] + [("across", C, A), ("across", A, C)]
    names = (*C, *A, *C)
    print(f"| variant | penalty, rank | within, mean | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}")
    for title in variants:
        try:
            found = [
                (part, *VARIANTS[title].predict(sections, features, train, tests), tests)
                for part, train, tests in folds
            ]
        except KeyError as error:
            print(f"{title}: {error} was not encoded")
            continue
        settings = [setting for setting in SETTINGS if (setting, C[0]) in found[0][2]]
        for setting in settings:
            values = [
                score(predicted[setting, name], sections[name], genes)
                for _, genes, predicted, tests in found
                for name in tests
            ]
            cells = [f"{target:.3f} / {variable:.3f}" for target, variable in [np.mean(values[:4], axis=0), *values]]
            name = f"{setting[0]:g}, {setting[1]}" if len(settings) > 1 else "both"
            print(f"| {title} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
