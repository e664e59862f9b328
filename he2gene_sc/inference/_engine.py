"""Drives batches of patches through the network, on whatever device, in bounded memory."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..image import FAULTS, PatchBatch, PatchReader, faults, tissue_share
from ..models._heap import kept_heap
from ..models._network import SYMMETRIES, FeatureExtractor, Network
from ..models._ood import OODResult, SlideFacts

logger = logging.getLogger("he2gene_sc")

#: Genes that the gene head computes at once, so that a wide head needs no second copy of its result.
_GENES_AT_ONCE = 4096
#: Batches that may wait for a GPU.
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Predictions:
    """What a model says of the spots of one slide, in the order of the spots.

    Attributes
    ----------
    expression
        ``(n, g)`` float32, natural log of (1 + counts per 10,000), floored at 0.
    proba
        ``(n, c)`` float32, class probabilities; ``c`` is 0 without an annotation head.
    embedding
        ``(n, k)`` float32, what the heads read.
    tissue
        ``(n,)`` float32, share of tissue in the smallest window.
    ood
        How the slide looks beside training; ``None`` where the model has no statistics of it.
    """

    expression: np.ndarray
    proba: np.ndarray
    embedding: np.ndarray
    tissue: np.ndarray
    ood: OODResult | None = None


def predict(
    network: Network,
    reader: PatchReader,
    genes: np.ndarray,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tta: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Predict all spots of a reader.

    Parameters
    ----------
    network
        The model.
    reader
        The patches.
    genes
        Positions in the gene head, ``(g,)``.
    device, dtype
        Where and in which precision the encoder runs; the heads run in float32.
    tta
        Average over the eight symmetries of the square.
    progress
        Called with the number of spots done by each batch.

    Returns
    -------
    Predictions
        In the order of the reader's spots.
    """
    network = network.to(device)
    n = reader.n_spots
    proba = np.empty((n, network.annotation_bias.shape[0] if network.has_annotation else 0), np.float32)
    with torch.inference_mode():
        symmetries = SYMMETRIES if tta else SYMMETRIES[:1]
        by_view = network.extractor.fusion == "mean" and network.has_annotation
        facts = _no_facts(n, reader)
        features, probas, order = [], [], []
        for batch, views in encode(network.extractor, reader, device=device, dtype=dtype, symmetries=symmetries):
            features.append(views.mean(1))
            if by_view:
                probas.append(network.annotation(views).mean(1))
            _read_pixels(facts, batch, reader)
            order.append(batch.index)
            if progress is not None:
                progress(len(batch.index))
        if not n:
            return Predictions(
                np.empty((0, len(genes)), np.float32), proba, np.empty((0, network.n_latent), np.float32), facts.tissue
            )
        # Back into the order of the spots on the device, so that one copy brings everything home.
        back = torch.from_numpy(np.argsort(np.concatenate(order))).to(device)
        seen = torch.cat(features)[back].cpu().numpy()
        embedding = network.embed(seen, reader.centres * reader.mpp)
        latent = torch.from_numpy(embedding).to(device)
        expression = np.empty((n, len(genes)), np.float32)
        positions = torch.from_numpy(np.asarray(genes, np.int64)).to(device)
        for start in range(0, len(genes), _GENES_AT_ONCE):
            part = positions[start : start + _GENES_AT_ONCE]
            expression[:, start : start + len(part)] = network.expression(latent, part).cpu().numpy()
        if by_view:
            proba[:] = torch.cat(probas)[back].cpu().numpy()
        elif network.has_annotation:
            proba[:] = network.classify(seen, reader.centres * reader.mpp, latent)
    return Predictions(expression, proba, embedding, facts.tissue, network.judge(seen, facts))


def _no_facts(n: int, reader: PatchReader) -> SlideFacts:
    return SlideFacts(reader.mpp, np.zeros(n, np.float32), np.zeros((n, len(FAULTS)), np.float32))


def _read_pixels(facts: SlideFacts, batch: PatchBatch, reader: PatchReader) -> None:
    """Note what the patches of a batch show without a model: tissue in the smallest window, faults in stored pixels."""
    windows = reader.plan.windows
    smallest = min(range(len(windows)), key=lambda i: windows[i].um)
    facts.tissue[batch.index] = tissue_share(batch.patches[smallest], windows[smallest].um)
    # Averaging hides faults: they are looked for in the widest window that was not averaged.
    whole = [i for i, window in enumerate(windows) if window.factor == 1]
    widest = max(whole or [smallest], key=lambda i: windows[i].um)
    facts.faults[batch.index] = faults(batch.patches[widest])


def encode(
    extractor: FeatureExtractor,
    reader: PatchReader,
    *,
    device: torch.device,
    dtype: torch.dtype,
    symmetries: tuple[tuple[int, bool], ...] = SYMMETRIES[:1],
) -> Iterator[tuple[PatchBatch, torch.Tensor]]:
    """Yield each batch with its features ``(b, r, f)`` float32 on the device.

    When the device runs out of memory, the batch is cut in halves, the smaller size is kept, and the run goes on.

    Raises
    ------
    RuntimeError
        If one spot alone does not fit.
    """
    size = reader.batch_size
    in_flight: deque[tuple[Any, PatchBatch]] = deque()
    keep = kept_heap() if device.type == "cpu" else contextlib.nullcontext()
    with keep:
        for batch in reader:
            parts: list[torch.Tensor] = []
            start = 0
            while start < len(batch.index):
                part = tuple(torch.from_numpy(window[start : start + size]) for window in batch.patches)
                try:
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                        parts.append(extractor(tuple(w.to(device, non_blocking=True) for w in part), symmetries))
                except torch.OutOfMemoryError as error:
                    if len(part[0]) == 1:
                        raise RuntimeError(f"one spot does not fit into the memory of `device` {device}") from error
                    size = len(part[0]) // 2
                    logger.warning("%s is out of memory: going on with %d spots at a time", device, size)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    continue
                start += size
            if device.type == "cuda":
                # The copies run behind us: a batch must outlive its own, or its page-locked memory is filled again.
                in_flight.append((torch.cuda.current_stream(device).record_event(), batch))
                if len(in_flight) > _IN_FLIGHT:
                    in_flight.popleft()[0].synchronize()
            yield batch, torch.cat(parts)
