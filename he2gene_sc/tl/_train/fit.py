"""``hg.tl.train``: fit closed-form heads on a frozen encoder, or the whole network by gradient."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.logs import logger
from ..._core.validate import format_list
from ...image._geometry import MIN_PX
from ...models._gene_table import is_identifier
from .._gene_sets import membership, read_net, select_sets
from .measured import MeasuredSection, join
from .names import PALETTE, check_two_classes, class_of
from .options import Plan

if TYPE_CHECKING:
    import torch

    from ...image import PatchReader, Recolouring
    from ...models import HE2Gene
    from ...models._network import FeatureExtractor
    from ...training import ModelMetadata, Programmes

#: Symmetries (rotations, mirrored or not) of a training patch.
_SYMMETRIES = ((0, False),)
#: Sum of squares of the colour features; that of the encoder's features is 1.
_COLOUR_SHARE = 0.25
#: The same for the annotation head, without and with recoloured copies.
_ANNOTATION_COLOUR_SHARE, _RECOLOURED_SHARE = 2.0, 10.0
#: SD of a feature, as a share of its largest value, below which all spots are the same.
_MIN_SD = 1e-6
#: Spots per batch when patches are cut.
_BATCH = 64


def train_default(read: Iterator[MeasuredSection], plan: Plan) -> HE2Gene:
    """Encode the sections one by one, and fit the heads to the features of all sections."""
    from ...inference import resolve_dtype
    from ...models._embedding import N_COLOUR
    from ...models._encoders.load import encoder_sha256
    from ...models._encoders.stages import default_stages, stage_sizes
    from ...models._network import FeatureExtractor
    from ...training import Recipe, build_model, feature_weights, spill
    from ...training._memory import check_sums

    recipe, network, spec = plan.recipe, plan.network, plan.spec
    stages = default_stages(network) if recipe.stages == "auto" else recipe.stages
    stages = None if stages is None else tuple(stages)
    extractor = FeatureExtractor(network, spec, stages=stages, tiles=plan.tiles)
    sizes = stage_sizes(network, stages, spec.input_px)
    n_colour = N_COLOUR * len(plan.windows_um)
    weights = feature_weights(sizes, len(plan.windows_um), n_colour, _COLOUR_SHARE)
    share = _RECOLOURED_SHARE if recipe.n_recoloured else _ANNOTATION_COLOUR_SHARE
    annotation = feature_weights(sizes, len(plan.windows_um), n_colour, share)
    check_sums(len(weights))
    sha256 = encoder_sha256(network)
    engine = (recipe.batch_size, plan.device, resolve_dtype(recipe.dtype, plan.device), plan.show_progress)
    how = (extractor, sha256, plan.windows_um, plan.cache, engine)
    kept: list[MeasuredSection] = []
    features: list[np.ndarray] = []

    def encode() -> Iterator[tuple[np.ndarray, ...]]:
        """Keep each section and its features, and yield those of its recoloured copies."""
        for section in read:
            check_window_pixels(section, plan.windows_um)
            features.append(encode_section(section, *how))
            check_features(section.name, features[-1])
            has_class = any(class_of(label, plan.classes) is not None for label in set(section.labels))
            copies = []
            for number in range(recipe.n_recoloured if has_class else 0):
                copy = encode_section(section, *how, recolouring=recolouring_of(section.name, number))
                check_features(f"{section.name}, recoloured", copy)
                copies.append(np.ascontiguousarray(copy[:, 0]))
            yield tuple(copies)
            kept.append(section.release())
            del section

    # Each memory map keeps a file open, so all copies share one.
    copies = spill(encode())
    sections, genes, classes = join(kept, features, plan.genes, plan.classes)
    sections = [replace(section, recoloured=found) for section, found in zip(sections, copies, strict=True)]
    kept.clear()
    metadata = replace(
        describe(len(sections), genes, classes, plan),
        encoder_sha256=sha256,
        stages=stages,
        tiles=plan.tiles,
        encoder_output=tuple(extractor.fingerprint()) if plan.own_encoder else None,
    )
    return build_model(
        sections,
        metadata,
        Recipe(weights, n_latent=recipe.n_latent, annotation_weights=annotation, by_level=recipe.by_level),
        n_colour=n_colour,
        n_target=min(plan.genes.n_target_genes, len(genes)),
        validation=plan.validation,
        seed=plan.seed,
    )


def check_features(name: str, features: np.ndarray) -> None:
    """Raise if all spots of an image have the same features."""
    x = np.asarray(features[:, 0], np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"`encoder` gives NaN or infinite features in section {name!r}")
    if (x.std(axis=0) <= _MIN_SD * np.abs(x).max(initial=1)).all():
        raise ValueError(
            f"`sdatas`: all spots of section {name!r} have the same encoder features; the image may be blank or belong to another "
            "section. Correct the image or leave the section out"
        )


def check_window_pixels(section: MeasuredSection, windows_um: Sequence[float]) -> None:
    """Raise if pixels are too coarse for the smallest window."""
    pixels = min(windows_um) / section.mpp
    if pixels < MIN_PX:
        raise ValueError(
            f"`windows_um`: a window of {min(windows_um):g} µm is {pixels:.3g} px in section {section.name!r} "
            f"({section.mpp:.4g} µm/px), but at least {MIN_PX} px ({MIN_PX * section.mpp:.3g} µm) are needed. "
            "Pass wider windows: preset=hg.DefaultRecipe(windows_um=...)"
        )


def describe(n_sections: int, genes: pd.Index, classes: tuple[str, ...], plan: Plan) -> ModelMetadata:
    """Metadata of a model that are common to all presets."""
    from ...training import ModelMetadata

    card = plan.card
    return ModelMetadata(
        genes=genes,
        ensembl_ids=tuple(
            gene if gene.startswith("ENSG") and is_identifier(gene) else plan.ids.get(gene, "") for gene in genes
        ),
        classes=classes,
        class_colors=tuple(plan.classes.colors.get(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(classes)),
        encoder=plan.spec,
        windows_um=plan.windows_um,
        name=plan.name,
        version=str(card.version),
        description=card.description or f"Trained on {n_sections} section(s) with {plan.spec.name}.",
        intended_use=card.intended_use,
        limitations=tuple(card.limitations),
        programmes=programmes_of(plan.genes.programmes, genes),
    )


def programmes_of(named: Any, genes: pd.Index) -> Programmes | None:
    """Gene sets with enough genes in the model."""
    if named is None:
        return None
    from ...training import Programmes
    from ...training._programmes import MIN_GENES

    sets, sizes = select_sets(read_net(named), genes, MIN_GENES)
    if left_out := [f"{name} ({sizes.get(name, 0)} of {len(named[name])})" for name in named if name not in sets]:
        logger.warning(
            "programmes: sets with fewer than %d genes in the model are left out: %s", MIN_GENES, format_list(left_out)
        )
    return Programmes(sets, membership(sets, genes)) if sets else None


def encode_section(
    section: MeasuredSection,
    extractor: FeatureExtractor,
    sha256: str,
    windows_um: tuple[float, ...],
    folder: Path,
    engine: tuple[int, torch.device, torch.dtype, bool],
    symmetries: tuple[tuple[int, bool], ...] = _SYMMETRIES,
    *,
    recolouring: Recolouring | None = None,
) -> np.ndarray:
    """Features of the spots of one section, or of a recoloured copy, on disk, ``(n, r, f)``."""
    from tqdm.auto import tqdm

    from ...inference import Encoder, Part, cached_features

    batch_size, device, dtype, bar = engine
    reader = patch_reader(section, windows_um, extractor.window_px, batch_size, recolouring)
    title = f"encode {section.name}{'' if recolouring is None else ', recoloured'}"
    with tqdm(total=reader.n_spots, unit="spot", desc=title, disable=not bar) as progress:
        how = Encoder(sha256, symmetries, device, dtype)
        return cached_features(Part(extractor, reader), how, folder, progress.update)


def recolouring_of(section: str, number: int) -> Recolouring:
    """Draw the recolouring of a copy of a section, whose name is the seed."""
    from ...image import Recolouring

    return Recolouring.draw(np.random.default_rng([number, zlib.crc32(section.encode())]))


def patch_reader(
    section: MeasuredSection,
    windows_um: tuple[float, ...],
    input_px: int | tuple[int, ...],
    batch_size: int,
    recolouring: Recolouring | None = None,
) -> PatchReader:
    """Reader of the windows around the spots of a section whose image is not yet released; it recolours them if asked to."""
    from ...image import PatchReader, RecolouredReader

    slide = section.slide
    assert slide is not None
    reader = PatchReader if recolouring is None else partial(RecolouredReader, recolouring=recolouring)
    return reader(
        slide.pyramid,
        section.centres,
        slide.mpp,
        windows_um=windows_um,
        input_px=input_px,
        batch_size=batch_size,
        factor=slide.pixel_factor,
    )


def train_by_gradient(sections: Iterator[MeasuredSection], plan: Plan) -> HE2Gene:
    """Cut the patches of the training window, and train with the recipe of the preset."""
    from ...training import patch_set, spill, train_network

    recipe, spec = plan.recipe, plan.spec
    preset = recipe.preset()
    # The normalisation of the paper belongs to its initial weights, not to a network from the user.
    if not plan.own_encoder and spec.name == preset.encoder:
        spec = replace(spec, mean=preset.mean, std=preset.std)
    read: list[MeasuredSection] = []
    patches = plan.work / "patches"
    patches.touch()
    counted: Counter[str] = Counter()
    for section in sections:
        check_window_pixels(section, plan.windows_um)
        if preset.exact:
            check_two_classes(section.labels, plan.classes, counted)
        _cut_patches(section, preset.train_window_um, spec.input_px, spec.interpolation, patches)
        read.append(section.release())
        del section
    empty = [np.empty((len(section.centres), 0, 0)) for section in read]
    joined, genes, classes = join(read, empty, plan.genes, plan.classes, all_listed=preset.exact)
    # Rows, for access by batch. Each memory map keeps a file open.
    rows = spill(section.targets.tocsr() for section in joined)
    joined = [replace(section, targets=targets) for section, targets in zip(joined, rows, strict=True)]
    del read
    return train_network(
        patch_set(
            joined,
            np.memmap(patches, np.uint8, "r").reshape(-1, 3, spec.input_px, spec.input_px),
            n_target=min(plan.genes.n_target_genes, len(genes)),
            neighbours=preset.neighbour_weight > 0,
        ),
        joined,
        replace(describe(len(joined), genes, classes, plan), encoder=spec),
        preset,
        plan.network,
        validation=plan.validation,
        seed=plan.seed,
        device=plan.device,
        show_progress=plan.show_progress,
        cross_validate=recipe.cross_validate,
        run=recipe,
    )


def _cut_patches(section: MeasuredSection, window_um: float, input_px: int, interpolation: str, path: Path) -> None:
    """Append the patches of one section at the encoder's input size, ``(n, 3, input_px, input_px)`` uint8, to a file."""
    import torch
    import torch.nn.functional as F

    from ...training import check_room

    reader = patch_reader(section, (window_um,), input_px, _BATCH)
    shape = (reader.n_spots, 3, input_px, input_px)
    start, n_bytes = path.stat().st_size, int(np.prod(shape))
    check_room(path.parent, n_bytes)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), start, n_bytes)
    patches = np.memmap(path, np.uint8, "r+", start, shape)
    for batch in reader:
        cut = torch.from_numpy(batch.patches[0])
        if cut.shape[-1] != input_px:
            cut = F.interpolate(cut, size=(input_px, input_px), mode=interpolation, antialias=True)
        patches[batch.index] = cut.numpy()
    patches.flush()
