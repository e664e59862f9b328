"""Features of the spots of a slide: encoded, read from a folder, or interpolated between the nodes of a lattice."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..models._ood import SlideFacts
from ._cache import Encoder, Part, Progress, cached_features, encode_part, feature_facts
from ._lattice import Interpolated, SpotFeatures
from ._pixels import Pixels, windows_for_quality
from ._workers import Workers

#: Everything that determines features, as named in errors, in that order.
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
    """Encode the parts of a slide with spots at ``centres_um``, or read their features from a folder.

    ``workers`` may compute the files of the folder. Returns features in the order of the spots, and what determines them as
    JSON texts, for :func:`differences`.
    """
    values, pixels = [], []
    for part in parts:
        if folder is None:
            part_pixels = Pixels(part.reader)
            values.append(_encode_in_memory(part, how, part_pixels, progress))
        else:
            place = folder if workers is None else folder.absolute()
            with contextlib.nullcontext() if workers is None else workers.share(part, how, place) as shared:
                part_pixels = Pixels.read(part.reader) if shared is None else shared.pixels()
                fill = None if shared is None else partial(shared.fill, progress=progress)
                found = cached_features(part, how, place, progress, pixels=part_pixels.sha256, fill=fill)
            values.append(found)
        pixels.append(part_pixels)
    weights = tuple(part.weights for part in parts if part.weights is not None)
    joined = Interpolated(tuple(values), weights, parts[0].extractor.fusion) if weights else values[0]
    quality, facts = _facts(parts, how, pixels)
    return SpotFeatures(joined, quality, centres_um), facts


def read_pixels(parts: Sequence[Part], how: Encoder) -> tuple[SlideFacts, dict[str, str]]:
    """Read only the pixels of a slide: return their quality, and what would determine their features (JSON texts)."""
    return _facts(parts, how, [Pixels.read(part.reader) for part in parts])


def differences(kept: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List, in words, what differs between kept and wanted features; empty if they agree."""
    return [words for name, words in _WORDS.items() if kept.get(name) != wanted.get(name)]


def _facts(parts: Sequence[Part], how: Encoder, pixels: Sequence[Pixels]) -> tuple[SlideFacts, dict[str, str]]:
    """Return the quality of the pixels at the spots, and what determines the features (JSON texts)."""
    quality = pixels[0].facts
    found: dict[str, list[object]] = {}
    for part, part_pixels in zip(parts, pixels, strict=True):
        facts = feature_facts(part, how, part_pixels.sha256)
        if part.weights is not None:
            digest = hashlib.sha256()
            arrays = (part.weights.indptr, np.int64), (part.weights.indices, np.int64), (part.weights.data, np.float32)
            for values, kind in arrays:
                digest.update(np.ascontiguousarray(values, kind).tobytes())
            facts["places"] = digest.hexdigest()
        for name, value in facts.items():
            found.setdefault(name, []).append(value)
    if parts[0].weights is not None:
        smallest, widest = windows_for_quality([part.reader.plan.windows[0] for part in parts])
        tissue = np.asarray(parts[smallest].weights @ pixels[smallest].facts.tissue, np.float32)
        faults = np.asarray(parts[widest].weights @ pixels[widest].facts.faults, np.float32)
        quality = SlideFacts(quality.mpp, tissue, faults)
    return quality, {name: json.dumps(values) for name, values in found.items()}


def _encode_in_memory(part: Part, how: Encoder, part_pixels: Pixels, progress: Progress) -> np.ndarray:
    out = np.empty((0, 1, 0), np.float32)
    part.extractor.to(how.device)
    with torch.inference_mode():
        for batch, views in encode_part(part, how, part.reader, progress):
            if not len(out):
                out = np.empty((part.reader.n_spots, *views.shape[1:]), np.float32)
            out[batch.index] = views
            part_pixels.add(batch)
    return out
