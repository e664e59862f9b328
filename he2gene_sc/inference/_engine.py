"""Run batches of patches through the network on any device, in bounded memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._core.logs import logger
from ..image import PatchBatch, PatchReader
from ..models._embedding import Rows, row_blocks
from ..models._network import SYMMETRIES, FeatureExtractor, Network, keep_heap
from ..models._ood import OODResult
from ._lattice import Interpolated, SpotFeatures
from ._pixels import Pixels

#: Bytes of features that are collected on the device before they are copied to the host.
_DEVICE_BYTES = 2**28
#: Number of spots whose views are classified at once.
_VIEWS_AT_ONCE = 256
#: Most batches that wait for a GPU.
_MAX_IN_FLIGHT = 2
#: Most spots that a CPU encodes at once: feature maps of more spots take longer to allocate than to compute.
_CPU_BATCH = 8


@dataclass(frozen=True)
class Predictions:
    """Predictions for the spots of one slide, in the order of the spots."""

    proba: np.ndarray  # (n, c) float32; c is 0 without an annotation head
    embedding: np.ndarray  # (n, k) float32, input of the heads; `Network.expression_blocks` gives expression
    tissue: np.ndarray  # (n,) float32 share of tissue in the smallest window
    ood: OODResult | None = None  # None if the model has no OOD detector


def predict(
    network: Network,
    source: PatchReader | SpotFeatures,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tta: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Predict all spots of a reader, or from features of spots.

    The encoder runs in ``dtype``, the heads in float32. ``progress`` is called with the number of spots of each batch.
    """
    network = network.to(device)
    centres_um = source.centres_um if isinstance(source, SpotFeatures) else source.centres * source.mpp
    if not len(centres_um):
        n_classes = network.annotation_bias.shape[0] if network.has_annotation else 0
        proba, embedding = (np.empty((0, size), np.float32) for size in (n_classes, network.n_latent))
        return Predictions(proba, embedding, np.empty(0, np.float32))
    by_view = network.extractor.fusion == "mean" and network.has_annotation
    features: Rows
    with torch.inference_mode():
        if isinstance(source, SpotFeatures):
            features, facts = _mean_over_views(source.values), source.facts
            probas = _probabilities(network, source.values, device) if by_view else None
        else:
            pixels = Pixels(source)
            features_of, probas_of = _HostRows(source.n_spots), _HostRows(source.n_spots)
            symmetries = SYMMETRIES if tta else SYMMETRIES[:1]
            for batch, views in encode(network.extractor, source, device=device, dtype=dtype, symmetries=symmetries):
                features_of.add(batch.index, views.mean(1))
                if by_view:
                    probas_of.add(batch.index, network.annotation(views).mean(1))
                pixels.add(batch, digest=False)
                if progress is not None:
                    progress(len(batch.index))
            features, facts = features_of.array(), pixels.facts
            probas = probas_of.array() if by_view else None
        embedding = network.embed(features, centres_um, facts.mpp)
        if not network.has_annotation:
            probas = np.empty((len(centres_um), 0), np.float32)
        elif probas is None:
            probas = network.classify(features, centres_um, torch.from_numpy(embedding).to(device))
    ood = None if network.detector is None else network.detector.assess(features, facts)
    return Predictions(probas, embedding, facts.tissue, ood)


class _HostRows:
    """Array of ``n`` rows that are computed batch by batch on a device and copied to the host in larger parts."""

    def __init__(self, n: int):
        self._n = n
        self._waiting: list[tuple[np.ndarray, torch.Tensor]] = []
        self._array: np.ndarray | None = None

    def add(self, index: np.ndarray, rows: torch.Tensor) -> None:
        self._waiting.append((index, rows))
        # Each copy synchronises with the device.
        if len(self._waiting) * rows.nbytes >= _DEVICE_BYTES:
            self.array()

    def array(self) -> np.ndarray:
        """Return all rows."""
        if self._waiting:
            rows = torch.cat([part for _, part in self._waiting]).cpu().numpy()
            if self._array is None:
                self._array = np.empty((self._n, rows.shape[1]), rows.dtype)
            self._array[np.concatenate([index for index, _ in self._waiting])] = rows
            self._waiting = []
        assert self._array is not None
        return self._array


def _mean_over_views(values: np.ndarray | Interpolated) -> np.ndarray | Interpolated:
    """Average features over views; interpolated features are averaged when they are read."""
    if isinstance(values, Interpolated):
        return values
    parts = (np.array(values[rows], np.float32) for rows in row_blocks(len(values)))
    return np.concatenate([torch.from_numpy(part).mean(1).numpy() for part in parts])


def _probabilities(network: Network, values: np.ndarray | Interpolated, device: torch.device) -> np.ndarray:
    """Return class probabilities, averaged over those of each view."""
    found = []
    for rows in row_blocks(len(values), _VIEWS_AT_ONCE):
        views = values.views(rows) if isinstance(values, Interpolated) else np.array(values[rows])
        found.append(network.annotation(torch.from_numpy(views).to(device)).mean(1).cpu().numpy())
    return np.concatenate(found)


def encode(
    extractor: FeatureExtractor,
    batches: Iterable[PatchBatch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    symmetries: tuple[tuple[int, bool], ...] = SYMMETRIES[:1],
) -> Iterator[tuple[PatchBatch, torch.Tensor]]:
    """Yield each batch with its features ``(b, r, f)`` float32 on the device; batches are halved if memory runs out."""
    size = _CPU_BATCH if device.type == "cpu" else sys.maxsize
    in_flight: deque[tuple[Any, PatchBatch]] = deque()
    with keep_heap(device.type):
        for batch in batches:
            parts: list[torch.Tensor] = []
            start = 0
            while start < len(batch.index):
                part = tuple(torch.from_numpy(window[start : start + size]) for window in batch.patches)
                try:
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                        parts.append(extractor(tuple(w.to(device, non_blocking=True) for w in part), symmetries))
                except torch.OutOfMemoryError as error:
                    if len(part[0]) == 1:
                        raise RuntimeError(
                            f"one spot does not fit into the memory of `device` {device}; choose another device"
                        ) from error
                    size = len(part[0]) // 2
                    logger.warning("%s is out of memory: continuing with %d spots at a time", device, size)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    continue
                start += size
            if device.type == "cuda":
                # Copies are asynchronous: the page-locked memory of a batch must not be reused before its copy ends.
                in_flight.append((torch.cuda.current_stream(device).record_event(), batch))
                if len(in_flight) > _MAX_IN_FLIGHT:
                    in_flight.popleft()[0].synchronize()
            yield batch, torch.cat(parts)
