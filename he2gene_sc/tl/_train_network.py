"""``hg.tl.train`` for the paper's presets: patches on disk, then a whole network by gradient."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._measured import Genes, Labels, Measured, join
from ._train import describe

if TYPE_CHECKING:
    import torch

    from ..models import EncoderSpec, HE2Gene

_BATCH = 64


def train_by_gradient(
    read: Iterator[Measured],
    preset: str,
    encoder: tuple[torch.nn.Module, EncoderSpec],
    chosen: Genes,
    labels: Labels,
    ids: Mapping[str, str],
    card: Mapping[str, Any],
    *,
    windows_um: Sequence[float] | None,
    validation: str,
    show_progress: bool,
    **options: Any,
) -> HE2Gene:
    """Cut the patches of the training window, and train by the preset's recipe.

    Parameters
    ----------
    read
        The sections, read one by one.
    preset
        Name of the recipe.
    encoder
        Where training begins, and what is known of it.
    chosen, labels, ids, card
        Genes, labels, Ensembl ids and words for the card, as given to ``hg.tl.train``.
    windows_um
        Windows at inference; default: the preset's.
    validation, show_progress, **options
        Of :func:`he2gene_sc.training.train_network`.
    """
    from ..training import PRESETS, Facts, PatchSet, neighbour_table, train_network

    network, spec = encoder
    recipe = PRESETS[preset]
    with tempfile.TemporaryDirectory(prefix="he2gene-") as folder:
        sections, parts = [], []
        for section in read:
            parts.append(_cut(section, recipe.train_window_um, spec.input_px, Path(folder) / f"{len(parts)}.npy"))
            sections.append(section.without_image())
            del section
        joined = join(sections, chosen, labels)
        sizes = [len(part) for part in parts]
        coordinates = np.concatenate([section.centres * section.mpp for section in sections])
        codes = np.repeat(np.arange(len(sections)), sizes)
        patients = list(dict.fromkeys(section.patient for section in sections))
        targets = _targets(joined.targets, joined.measured, Path(folder) / "targets.npy")
        data = PatchSet(
            patches=_joined(parts, Path(folder) / "patches.npy"),
            targets=targets,
            codes=np.concatenate(joined.codes),
            sections=codes,
            patients=np.repeat([patients.index(section.patient) for section in sections], sizes),
            target_mask=_target_mask(targets, chosen.n_target),
            coordinates=coordinates,
            neighbours=neighbour_table(coordinates, sections=codes) if recipe.neighbour_weight else None,
        )
        facts = Facts(
            **describe(sections, joined.genes, joined.classes, labels, ids, card, spec),
            windows_um=tuple(float(um) for um in windows_um or recipe.windows_um),
        )
        return train_network(
            data, facts, recipe, network, validation=validation, show_progress=show_progress, **options
        )


def _cut(section: Measured, window_um: float, input_px: int, path: Path) -> np.ndarray:
    """Patches of one section at the encoder's input size, ``(n, 3, input_px, input_px)`` uint8 on disk."""
    import torch
    import torch.nn.functional as F

    from ..image import PatchReader

    slide = section.slide
    reader = PatchReader(
        slide.pyramid,
        section.centres,
        slide.mpp,
        windows_um=(window_um,),
        input_px=input_px,
        batch_size=_BATCH,
        factor=slide.pixel_factor,
    )
    shape = (reader.n_spots, 3, input_px, input_px)
    patches = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for batch in reader:
        cut = torch.from_numpy(batch.patches[0])
        if cut.shape[-1] != input_px:
            cut = F.interpolate(cut, size=(input_px, input_px), mode="bilinear", antialias=True)
        patches[batch.index] = cut.numpy()
    patches.flush()
    return np.load(path, mmap_mode="r")


def _joined(parts: Sequence[np.ndarray], path: Path) -> np.ndarray:
    """Put the patches of all sections into one file, a section at a time."""
    n = sum(len(part) for part in parts)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *parts[0].shape[1:]))
    start = 0
    for part in parts:
        out[start : start + len(part)] = part
        start += len(part)
        Path(part.filename).unlink()
    out.flush()
    return np.load(path, mmap_mode="r")


def _targets(parts: Sequence[Any], measured: Sequence[np.ndarray], path: Path) -> np.ndarray:
    """Dense targets on disk, ``(n, g)`` float32; NaN where a section does not list a gene."""
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for part, there in zip(parts, measured, strict=True):
        rows = part.toarray()
        rows[:, ~there] = np.nan
        out[start : start + len(rows)] = rows
        start += len(rows)
    out.flush()
    return np.load(path, mmap_mode="r")


def _target_mask(targets: np.ndarray, n_target: int) -> np.ndarray:
    """Mark the genes of highest mean, of those that every section lists."""
    mean = np.nan_to_num(targets.mean(0, dtype=np.float64), nan=-1)
    mask = np.zeros(targets.shape[1], bool)
    mask[np.argsort(-mean, kind="stable")[: min(n_target, int((mean >= 0).sum()))]] = True
    return mask
