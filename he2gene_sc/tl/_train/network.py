"""``hg.tl.train`` for the paper's presets: patches on disk and gradient training of the whole network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .default import describe, patch_reader
from .labels import check_two_classes
from .measured import MeasuredSection, join
from .options import Plan

if TYPE_CHECKING:
    from ...models import HE2Gene

_BATCH = 64


def train_by_gradient(sections: Iterator[MeasuredSection], plan: Plan) -> HE2Gene:
    """Cut the patches of the training window, and train with the recipe of the preset."""
    from ...training import patch_set, spill, train_network

    recipe, spec = plan.recipe, plan.spec
    preset = recipe.preset()
    # The normalisation of the paper belongs to its initial weights, not to a network from the user.
    if not plan.own_encoder and spec.name == preset.encoder:
        spec = replace(spec, mean=preset.mean, std=preset.std)
    read: list[MeasuredSection] = []
    parts: list[np.memmap] = []
    counted: Counter[str] = Counter()
    for section in sections:
        if preset.exact:
            check_two_classes(section.labels, plan.classes, counted)
        path = plan.work / f"{len(parts)}.npy"
        parts.append(_cut_patches(section, preset.train_window_um, spec.input_px, spec.interpolation, path))
        read.append(section.release())
        del section
    empty = [np.empty((len(part), 0, 0)) for part in parts]
    joined, genes, classes = join(read, empty, plan.genes, plan.classes, all_listed=preset.exact)
    # Rows, for access by batch. Each memory map keeps a file open.
    rows = spill(section.targets.tocsr() for section in joined)
    joined = [replace(section, targets=targets) for section, targets in zip(joined, rows, strict=True)]
    del read
    return train_network(
        patch_set(
            joined,
            _concatenate(parts, plan.work / "patches.npy"),
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


def _cut_patches(
    section: MeasuredSection, window_um: float, input_px: int, interpolation: str, path: Path
) -> np.memmap:
    """Patches of one section at the encoder's input size, ``(n, 3, input_px, input_px)`` uint8 on disk."""
    import torch
    import torch.nn.functional as F

    reader = patch_reader(section, (window_um,), input_px, _BATCH)
    shape = (reader.n_spots, 3, input_px, input_px)
    patches = _allocate(path, shape)
    for batch in reader:
        cut = torch.from_numpy(batch.patches[0])
        if cut.shape[-1] != input_px:
            cut = F.interpolate(cut, size=(input_px, input_px), mode=interpolation, antialias=True)
        patches[batch.index] = cut.numpy()
    patches.flush()
    return np.load(path, mmap_mode="r")


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Memory-map a new uint8 file whose disk space is reserved first."""
    from ...training import check_room

    check_room(path.parent, int(np.prod(shape)))
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def _concatenate(parts: Sequence[np.memmap], path: Path) -> np.ndarray:
    """Join the patches of all sections in one file, section by section."""
    n = sum(len(part) for part in parts)
    out = _allocate(path, (n, *parts[0].shape[1:]))
    start = 0
    for part in parts:
        out[start : start + len(part)] = part
        start += len(part)
        Path(str(part.filename)).unlink()
    out.flush()
    return np.load(path, mmap_mode="r")
