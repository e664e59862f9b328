"""Features of the spots of a slide: encoded at once, kept in a folder and found again, or interpolated between windows."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse
import torch

from ..models._ood import SlideFacts
from ._cache import Encoder, Part, Progress, cached_features, feature_facts
from ._engine import encode
from ._lattice import Interpolated, SpotFeatures
from ._pixels import Pixels, judged_windows
from ._workers import Workers

#: What makes features what they are, in words of a user, in the order in which it is said.
_WORDS = {
    "pixels": "the image, its µm/px or the spots",
    "places": "the places of the spots on the lattice (`lattice`, `exact`)",
    "windows": "the windows",
    "encoder": "the weights of the encoder",
    "architecture": "the encoder",
    "output": "what the encoder gives",
    "input_px": "the side of the encoder's input",
    "normalisation": "the normalisation of the encoder's input",
    "interpolation": "the interpolation of the encoder's input",
    "tiles": "the tiles of the windows",
    "fusion": "how windows are joined",
    "symmetries": "the symmetries (`tta`)",
    "dtype": "the precision (`dtype`)",
    "version": "the version of the features",
}


def read_features(
    parts: Sequence[Part],
    how: Encoder,
    centres_um: np.ndarray,
    *,
    folder: Path | None = None,
    progress: Progress = None,
    workers: Workers | None = None,
) -> tuple[SpotFeatures, dict[str, str]]:
    """Encode the parts of a slide, whose spots lie at ``centres_um``, or find them in a folder, which ``workers`` may fill.

    Returns features in the order of the spots, and what makes them what they are, as JSON texts, for :func:`differences`.
    """
    values, pixels = [], []
    for part in parts:
        if folder is None:
            seen = Pixels(part.reader)
            values.append(_encoded(part, how, seen, progress))
        else:
            seen, found = _kept(part, how, folder, progress, workers)
            values.append(found)
        pixels.append(seen)
    features = SpotFeatures(_assembled(parts, values), facts_of(parts, pixels), centres_um)
    return features, _facts(parts, how, pixels)


def read_pixels(parts: Sequence[Part], how: Encoder) -> tuple[SlideFacts, dict[str, str]]:
    """Read the pixels of a slide alone: what they show, and what makes the features that they would have."""
    pixels = [Pixels.of(part.reader) for part in parts]
    return facts_of(parts, pixels), _facts(parts, how, pixels)


def facts_of(parts: Sequence[Part], pixels: Sequence[Pixels]) -> SlideFacts:
    """Put together what the pixels of the parts show, at the spots."""
    if parts[0].weights is None:
        return pixels[0].facts
    smallest, widest = judged_windows([part.reader.plan.windows[0] for part in parts])
    return SlideFacts(
        parts[0].reader.mpp,
        np.asarray(parts[smallest].weights @ pixels[smallest].facts.tissue, np.float32),
        np.asarray(parts[widest].weights @ pixels[widest].facts.faults, np.float32),
    )


def differences(kept: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Say in words what differs between features that are kept and those that are wanted; empty if nothing does."""
    return [words for name, words in _WORDS.items() if kept.get(name) != wanted.get(name)]


def _facts(parts: Sequence[Part], how: Encoder, pixels: Sequence[Pixels]) -> dict[str, str]:
    found: dict[str, list[object]] = {}
    for part, seen in zip(parts, pixels, strict=True):
        facts = feature_facts(part, how, seen.sha256)
        if part.weights is not None:
            facts["places"] = _digest(part.weights)
        for name, value in facts.items():
            found.setdefault(name, []).append(value)
    return {name: json.dumps(values) for name, values in found.items()}


def _digest(weights: scipy.sparse.csr_array) -> str:
    found = hashlib.sha256()
    for values, kind in ((weights.indptr, np.int64), (weights.indices, np.int64), (weights.data, np.float32)):
        found.update(np.ascontiguousarray(values, kind).tobytes())
    return found.hexdigest()


def _encoded(part: Part, how: Encoder, seen: Pixels, progress: Progress) -> np.ndarray:
    out: np.ndarray | None = None
    extractor = part.extractor.to(how.device)
    with torch.inference_mode():
        for batch, views in encode(
            extractor, part.reader, device=how.device, dtype=how.dtype, symmetries=how.symmetries
        ):
            if out is None:
                out = np.empty((part.reader.n_spots, *views.shape[1:]), np.float32)
            out[batch.index] = views.float().cpu().numpy()
            seen.add(batch)
            if progress is not None:
                progress(len(batch.index))
    return np.empty((0, 1, 0), np.float32) if out is None else out


def _kept(
    part: Part, how: Encoder, folder: Path, progress: Progress, workers: Workers | None
) -> tuple[Pixels, np.ndarray]:
    """Read what the pixels show, and find features in a folder or keep them there."""
    with contextlib.ExitStack() as stack:
        others = None
        if workers is not None:
            folder = folder.absolute()
            others = stack.enter_context(workers.share(part, how, folder))
        seen = Pixels.of(part.reader) if others is None else others.pixels()
        fill = None if others is None else partial(others.fill, progress=progress)
        found = cached_features(part, how, folder, progress, pixels=seen.sha256, fill=fill)
    return seen, found


def _assembled(parts: Sequence[Part], values: Sequence[np.ndarray]) -> np.ndarray | Interpolated:
    weights = tuple(part.weights for part in parts if part.weights is not None)
    if not weights:
        return values[0]
    return Interpolated(tuple(values), weights, parts[0].extractor.fusion)
