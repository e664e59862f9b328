"""From a trained module to the tensors of a model folder, and what they predict for held-out spots."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from ..models import EncoderSpec
from ..models._embedding import ALONE
from ..models._model import ENCODER
from ..models._network import SYMMETRIES, FeatureExtractor, Network

_BATCH = 64


def n_features(encoder: nn.Module, spec: EncoderSpec) -> int:
    """Ask the encoder, in evaluation mode so that nothing in it changes."""
    training = encoder.training
    with torch.inference_mode():
        found = encoder.eval()(torch.zeros(1, 3, spec.input_px, spec.input_px))
    encoder.train(training)
    if found.ndim != 2:
        raise ValueError(
            f"`encoder` gives {tuple(found.shape)} for one image; (1, f) is needed: build it without a head"
        )
    return found.shape[1]


def name_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """Name the weights as a model folder does."""

    def array(value: torch.Tensor) -> np.ndarray:
        return np.array(value.detach().cpu().numpy(), order="C")

    tensors = {ENCODER + key: array(value) for key, value in module.encoder.state_dict().items()}
    for name in ("genes", "annotation"):
        head = getattr(module, name)
        if head is not None:
            tensors |= {f"{name}.weight": array(head.weight.T), f"{name}.bias": array(head.bias)}
    return tensors


def predict_rows(
    module: nn.Module, spec: EncoderSpec, tensors: dict[str, np.ndarray], rows: np.ndarray, tta: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Predict spots from the training window with the network that inference uses."""
    heads = {key: torch.from_numpy(value) for key, value in tensors.items() if not key.startswith(ENCODER)}
    extractor = FeatureExtractor(copy.deepcopy(module.encoder).cpu(), spec, fusion="mean")
    network = Network(extractor, heads, ALONE).to(module.device)
    data, genes = module.data, torch.arange(module.data.targets.shape[1], device=module.device)
    expression = np.empty((len(rows), len(genes)), np.float32)
    proba = np.empty((len(rows), len(heads.get("annotation.bias", ()))), np.float32)
    symmetries = SYMMETRIES if tta else SYMMETRIES[:1]
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            patches = torch.from_numpy(np.asarray(data.patches[rows[part]])).to(module.device)
            views = extractor((patches,), symmetries)
            expression[part] = network.expression(views.mean(1), genes).cpu().numpy()
            if network.has_annotation:
                proba[part] = network.annotation(views).mean(1).cpu().numpy()
    return expression, proba
