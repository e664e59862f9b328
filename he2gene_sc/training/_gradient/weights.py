"""Convert a trained module to the tensors of a model folder, and predict held-out spots with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...models._embedding import NO_CONTEXT, row_blocks
from ...models._network import SYMMETRIES, FeatureExtractor, Network
from ...models._tensors import ENCODER
from .._calibrate import temperature

if TYPE_CHECKING:
    from .module import TrainingModule

_BATCH = 64
#: Largest magnitude of the logarithm of a class probability.
_LARGEST_LOGIT = 80.0


def name_tensors(module: TrainingModule) -> dict[str, np.ndarray]:
    """Return the weights under their names in a model folder."""

    def array(value: torch.Tensor) -> np.ndarray:
        return np.array(value.detach().cpu().numpy(), order="C")

    tensors = {ENCODER + key: array(value) for key, value in module.encoder.state_dict().items()}
    for name in ("genes", "annotation"):
        head = getattr(module, name)
        if head is not None:
            tensors |= {f"{name}.weight": array(head.weight.T), f"{name}.bias": array(head.bias)}
    if module.annotation is not None and module.annotation.out_features == 1:
        # A sigmoid of z is a softmax of (0, z).
        for key in ("annotation.weight", "annotation.bias"):
            tensors[key] = np.concatenate([np.zeros_like(tensors[key]), tensors[key]], axis=-1)
    return tensors


@torch.no_grad()
def predict_rows(
    module: TrainingModule, tensors: dict[str, np.ndarray], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict spots from the training window with the network of inference."""
    expression = np.empty((len(rows), module.data.targets.shape[1]), np.float32)
    proba = np.empty((len(rows), len(tensors.get("annotation.bias", ()))), np.float32)
    genes = torch.arange(expression.shape[1], device=module.device)
    for part, network, views in _views(module, tensors, rows):
        expression[part] = network.expression(views.mean(1), genes).cpu().numpy()
        if network.has_annotation:
            proba[part] = network.annotation(views).mean(1).cpu().numpy()
    return expression, proba


@torch.no_grad()
def calibrate(module: TrainingModule, tensors: dict[str, np.ndarray], rows: np.ndarray) -> float | None:
    """Divide the annotation head by the temperature that maximises the likelihood of held-out labels, and return it.

    Probabilities are averaged over symmetries, as in inference. With fewer than two classes, nothing changes and ``None`` is returned.
    """
    codes = module.data.codes[rows]
    rows, codes = rows[codes >= 0], codes[codes >= 0]
    if "annotation.weight" not in tensors or len(np.unique(codes)) < 2:
        return None
    # Log probabilities are logits up to a constant, which has no effect.
    logits = [network.annotation(views).log().cpu().numpy() for _, network, views in _views(module, tensors, rows)]
    found = temperature(np.maximum(np.concatenate(logits), -_LARGEST_LOGIT), codes)
    for name in ("annotation.weight", "annotation.bias"):
        tensors[name] = (tensors[name] / found).astype(np.float32)
    return found


def _views(
    module: TrainingModule, tensors: dict[str, np.ndarray], rows: np.ndarray
) -> Iterator[tuple[slice, Network, torch.Tensor]]:
    """Yield features ``(b, r, f)`` of spots in the training window, batch by batch, with the network of inference."""
    heads = {key: torch.from_numpy(value) for key, value in tensors.items() if not key.startswith(ENCODER)}
    extractor = FeatureExtractor(copy.deepcopy(module.encoder).cpu(), module.spec, fusion="mean")
    network = Network(extractor, heads, NO_CONTEXT).to(module.device)
    for part in row_blocks(len(rows), _BATCH):
        patches = torch.from_numpy(np.asarray(module.data.patches[rows[part]])).to(module.device)
        yield part, network, network.extractor((patches,), SYMMETRIES if module.preset.tta else SYMMETRIES[:1])
