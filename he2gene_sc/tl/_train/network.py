"""``hg.tl.train`` for the paper's presets: patches on disk, then a whole network by gradient."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .default import describe, patch_reader
from .gene_lists import Genes
from .labels import Labels, check_two_classes
from .measured import Measured, check_room, join, on_disk

if TYPE_CHECKING:
    import torch

    from ...models import EncoderSpec, HE2Gene
    from ...training import Preset

_BATCH = 64


def train_by_gradient(
    sections: Iterator[Measured],
    recipe: Preset,
    encoder: tuple[torch.nn.Module, EncoderSpec],
    chosen: Genes,
    labels: Labels,
    ids: Mapping[str, str],
    card: Mapping[str, Any],
    work: Path,
    *,
    own_encoder: bool,
    windows_um: Sequence[float] | None,
    validation: str,
    show_progress: bool,
    **options: Any,
) -> HE2Gene:
    """Cut the patches of the training window, and train by the preset's recipe.

    Parameters
    ----------
    sections
        Read one by one.
    recipe
        The recipe.
    encoder
        Where training begins, and what is known of it.
    chosen, labels, ids, card
        Genes, labels, Ensembl ids and words for the card, as given to ``hg.tl.train``.
    work
        Folder for what has to be on disk meanwhile.
    own_encoder
        Whether the encoder is a network of somebody's own, which keeps its normalisation.
    windows_um
        Windows at inference; default: the preset's.
    validation, show_progress, **options
        Of :func:`he2gene_sc.training.train_network`.
    """
    from ...training import ModelMetadata, patch_set, train_network

    network, spec = encoder
    # The normalisation of the paper goes with the weights that the paper began from, not with a network of one's own.
    if not own_encoder and spec.name == recipe.encoder:
        spec = replace(spec, mean=recipe.mean, std=recipe.std)
    read: list[Measured] = []
    parts: list[np.memmap] = []
    counted: Counter[str] = Counter()
    for section in sections:
        if recipe.exact:
            check_two_classes(section.labels, labels, counted)
        parts.append(
            _cut(section, recipe.train_window_um, spec.input_px, spec.interpolation, work / f"{len(parts)}.npy")
        )
        read.append(section.set_down(work))
        del section
    joined, genes, classes = join(read, [np.empty((len(part), 0, 0)) for part in parts], chosen, labels, work)
    # Batches are rows. Each map holds a file open.
    joined = [replace(section, targets=on_disk(section.targets.tocsr(), work)) for section in joined]
    del read
    metadata = ModelMetadata(
        **describe(len(joined), genes, classes, labels, ids, card, spec),
        windows_um=tuple(windows_um or recipe.windows_um),
    )
    return train_network(
        patch_set(
            joined,
            _concatenated(parts, work / "patches.npy"),
            n_target=min(chosen.n_target, len(genes)),
            neighbours=recipe.neighbour_weight > 0,
        ),
        metadata,
        recipe,
        network,
        section_names=[section.name for section in joined],
        patient_names=[section.patient for section in joined],
        mpps=[section.mpp for section in joined],
        validation=validation,
        show_progress=show_progress,
        **options,
    )


def _cut(section: Measured, window_um: float, input_px: int, interpolation: str, path: Path) -> np.memmap:
    """Patches of one section at the encoder's input size, ``(n, 3, input_px, input_px)`` uint8 on disk."""
    import torch
    import torch.nn.functional as F

    reader = patch_reader(section, (window_um,), input_px, _BATCH)
    shape = (reader.n_spots, 3, input_px, input_px)
    patches = _room(path, shape)
    for batch in reader:
        cut = torch.from_numpy(batch.patches[0])
        if cut.shape[-1] != input_px:
            cut = F.interpolate(cut, size=(input_px, input_px), mode=interpolation, antialias=True)
        patches[batch.index] = cut.numpy()
    patches.flush()
    return np.load(path, mmap_mode="r")


def _room(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a file of uint8 that is there in full before it is mapped."""
    check_room(path.parent, int(np.prod(shape)))
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def _concatenated(parts: Sequence[np.memmap], path: Path) -> np.ndarray:
    """Put the patches of all sections into one file, a section at a time."""
    n = sum(len(part) for part in parts)
    out = _room(path, (n, *parts[0].shape[1:]))
    start = 0
    for part in parts:
        out[start : start + len(part)] = part
        start += len(part)
        Path(str(part.filename)).unlink()
    out.flush()
    return np.load(path, mmap_mode="r")
