"""``hg.tl.train(preset="default")``: features of a frozen encoder, then closed-form heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .arguments import check_features, check_memory
from .gene_lists import Genes
from .labels import Labels, colours_of
from .measured import Measured, join

if TYPE_CHECKING:
    import torch

    from ...image import PatchReader
    from ...models import EncoderSpec, HE2Gene
    from ...models._network import FeatureExtractor

#: Symmetries a training spot is seen under.
_SYMMETRIES = ((0, False),)
#: Sum of squares of the colour features, that of the encoder's being 1.
_COLOUR_SHARE = 0.25
#: The same for the annotation.
_ANNOTATION_COLOUR_SHARE = 2.0


def train_default(
    read: Iterator[Measured],
    encoder: tuple[torch.nn.Module, EncoderSpec],
    chosen: Genes,
    labels: Labels,
    ids: Mapping[str, str],
    card: dict[str, Any],
    work: Path,
    *,
    cache: Path,
    stages: Sequence[int] | Literal["auto"] | None,
    windows_um: tuple[float, ...],
    tiles: tuple[int, ...] | None,
    n_latent: int,
    validation: str,
    seed: int,
    engine: tuple[int, torch.device, torch.dtype, bool],
    own_encoder: bool,
) -> HE2Gene:
    """Encode the sections one by one, and fit the heads to the features of all."""
    from ...models._embedding import N_COLOUR
    from ...models._encoders.load import encoder_sha256
    from ...models._encoders.stages import default_stages, stage_sizes
    from ...models._network import FeatureExtractor
    from ...training import ModelMetadata, Recipe, build_model, feature_weights

    network, spec = encoder
    stages = default_stages(network) if stages == "auto" else None if stages is None else tuple(stages)
    extractor = FeatureExtractor(network, spec, stages=stages, tiles=tiles)
    sizes = stage_sizes(network, stages, spec.input_px)
    n_colour = N_COLOUR * len(windows_um)
    weights = feature_weights(sizes, len(windows_um), n_colour, _COLOUR_SHARE)
    annotation = feature_weights(sizes, len(windows_um), n_colour, _ANNOTATION_COLOUR_SHARE)
    recipe = Recipe(weights, n_latent=n_latent, annotation_weights=annotation)
    check_memory(len(weights))
    sha256 = encoder_sha256(network)
    kept, features = [], []
    for section in read:
        features.append(encode_section(section, extractor, sha256, windows_um, cache, engine))
        check_features(section.name, features[-1])
        kept.append(section.set_down(work))
        del section
    sections, genes, classes = join(kept, features, chosen, labels, work)
    # Each map holds a file open.
    del kept, features
    metadata = ModelMetadata(
        **describe(len(sections), genes, classes, labels, ids, card, spec),
        encoder_sha256=sha256,
        stages=stages,
        tiles=tiles,
        windows_um=windows_um,
        encoder_output=tuple(extractor.fingerprint()) if own_encoder else None,
    )
    return build_model(
        sections,
        metadata,
        recipe,
        n_colour=n_colour,
        n_target=min(chosen.n_target, len(genes)),
        validation=validation,
        seed=seed,
    )


def describe(
    n_sections: int,
    genes: pd.Index,
    classes: tuple[str, ...],
    labels: Labels,
    ids: Mapping[str, str],
    card: Mapping[str, Any],
    spec: EncoderSpec,
) -> dict[str, Any]:
    """Arguments of :class:`he2gene_sc.training.ModelMetadata` that all presets share."""
    return {
        "genes": genes,
        "ensembl_ids": tuple(gene if gene.startswith("ENSG") else ids.get(gene, "") for gene in genes),
        "classes": classes,
        "class_colors": colours_of(classes, labels.colours),
        "encoder": spec,
        **card,
        "description": card["description"] or f"Trained on {n_sections} section(s) with {spec.name}.",
    }


def encode_section(
    section: Measured,
    extractor: FeatureExtractor,
    sha256: str,
    windows_um: tuple[float, ...],
    folder: Path,
    engine: tuple[int, torch.device, torch.dtype, bool],
    symmetries: tuple[tuple[int, bool], ...] = _SYMMETRIES,
) -> np.ndarray:
    """Features of the spots of one section, on disk, ``(n, r, f)``."""
    from tqdm.auto import tqdm

    from ...inference import cached_features

    batch_size, device, dtype, bar = engine
    reader = patch_reader(section, windows_um, extractor.window_px, batch_size)
    with tqdm(total=reader.n_spots, unit="spot", desc=f"encode {section.name}", disable=not bar) as progress:
        return cached_features(
            extractor,
            reader,
            encoder_sha256=sha256,
            symmetries=symmetries,
            device=device,
            dtype=dtype,
            folder=folder,
            progress=progress.update,
        )


def patch_reader(
    section: Measured, windows_um: tuple[float, ...], input_px: int | tuple[int, ...], batch_size: int
) -> PatchReader:
    """Reader of the windows around the spots of a section that has its image still."""
    from ...image import PatchReader

    slide = section.slide
    assert slide is not None
    return PatchReader(
        slide.pyramid,
        section.centres,
        slide.mpp,
        windows_um=windows_um,
        input_px=input_px,
        batch_size=batch_size,
        factor=slide.pixel_factor,
    )
