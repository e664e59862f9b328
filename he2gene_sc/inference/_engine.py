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
from ..models._ood import OODResult, SlideFacts
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
    reader: PatchReader | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tta: bool = False,
    progress: Callable[[int], object] | None = None,
    features: SpotFeatures | None = None,
) -> Predictions:
    """Predict all spots of a reader, or of ``features`` without reading pixels.

    The encoder runs in ``dtype``, the heads in float32. ``progress`` is called with the number of spots of each batch.
    """
    network = network.to(device)
    with torch.inference_mode():
        by_view = network.extractor.fusion == "mean" and network.has_annotation
        spot_features: Rows
        if features is None:
            assert reader is not None
            spot_features, proba, facts = _encode_spots(network, reader, device, dtype, tta, progress)
            centres_um = reader.centres * reader.mpp
        else:
            centres_um = features.centres_um
            spot_features = _mean_over_views(features)
            facts = features.facts
            proba = _probabilities(network, features, device) if by_view else None
        n = len(centres_um)
        if not n:
            classes = network.annotation_bias.shape[0] if network.has_annotation else 0
            proba, embedding = (np.empty((0, size), np.float32) for size in (classes, network.n_latent))
            return Predictions(proba, embedding, facts.tissue)
        embedding = network.embed(spot_features, centres_um, facts.mpp)
        if proba is None and network.has_annotation:
            proba = network.classify(spot_features, centres_um, torch.from_numpy(embedding).to(device))
        elif proba is None:
            proba = np.empty((n, 0), np.float32)
    ood = None if network.detector is None else network.detector.assess(spot_features, facts)
    return Predictions(proba, embedding, facts.tissue, ood)


def _encode_spots(
    network: Network,
    reader: PatchReader,
    device: torch.device,
    dtype: torch.dtype,
    tta: bool,
    progress: Callable[[int], object] | None,
) -> tuple[np.ndarray, np.ndarray | None, SlideFacts]:
    """Return features averaged over views, class probabilities if each view is classified, and the quality of the pixels."""
    symmetries = SYMMETRIES if tta else SYMMETRIES[:1]
    by_view = network.extractor.fusion == "mean" and network.has_annotation
    pixels = Pixels(reader)
    features, probas = _HostRows(reader.n_spots), _HostRows(reader.n_spots)
    for batch, views in encode(network.extractor, reader, device=device, dtype=dtype, symmetries=symmetries):
        features.add(batch.index, views.mean(1))
        if by_view:
            probas.add(batch.index, network.annotation(views).mean(1))
        pixels.add(batch, digest=False)
        if progress is not None:
            progress(len(batch.index))
    return features.array(), probas.array() if by_view and reader.n_spots else None, pixels.facts


class _HostRows:
    """Array of ``n`` rows that are computed batch by batch on a device and copied to the host in larger parts."""

    def __init__(self, n: int):
        self._n, self._n_bytes = n, 0
        self._waiting: list[tuple[np.ndarray, torch.Tensor]] = []
        self._array: np.ndarray | None = None

    def add(self, index: np.ndarray, rows: torch.Tensor) -> None:
        self._waiting.append((index, rows))
        self._n_bytes += rows.nbytes
        # Each copy synchronises with the device.
        if self._n_bytes >= _DEVICE_BYTES:
            self._fetch()

    def array(self) -> np.ndarray:
        """Return all rows; an array ``(0, 0)`` if there are none."""
        if self._waiting:
            self._fetch()
        return np.empty((0, 0), np.float32) if self._array is None else self._array

    def _fetch(self) -> None:
        rows = torch.cat([part for _, part in self._waiting]).cpu().numpy()
        if self._array is None:
            self._array = np.empty((self._n, rows.shape[1]), rows.dtype)
        self._array[np.concatenate([index for index, _ in self._waiting])] = rows
        self._waiting, self._n_bytes = [], 0


def _mean_over_views(features: SpotFeatures) -> np.ndarray | Interpolated:
    """Average features over views; interpolated features are averaged when they are read."""
    values = features.values
    if isinstance(values, Interpolated):
        return values
    if not len(values):
        return np.empty((0, 0), np.float32)
    parts = (np.array(values[rows], np.float32) for rows in row_blocks(len(values)))
    return np.concatenate([torch.from_numpy(part).mean(1).numpy() for part in parts])


def _probabilities(network: Network, features: SpotFeatures, device: torch.device) -> np.ndarray:
    """Return class probabilities, averaged over those of each view."""
    values, found = features.values, []
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
