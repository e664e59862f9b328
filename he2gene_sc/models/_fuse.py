"""Fold batch normalisation into the convolutions before it: the same function, about half as fast again on a CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_TOLERANCE = 1e-3


def fuse_batch_norm(encoder: nn.Module, input_px: int) -> nn.Module:
    """Return an encoder in evaluation mode without the batch normalisations that follow a convolution.

    Pairs follow the order of declaration. The original is returned if a random image gives another result.
    """
    # A transformer has nothing to fuse and may hold a billion weights: those are not copied.
    if not any(_pairs(module) for module in encoder.modules()):
        return encoder
    # The original too: in training mode the comparison would change its statistics.
    fused = copy.deepcopy(encoder.eval())
    _fuse(fused)
    x = torch.rand(1, 3, input_px, input_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = encoder(x), fused(x)
    return fused if torch.allclose(expected, found, rtol=_TOLERANCE, atol=_TOLERANCE) else encoder


def _fuse(module: nn.Module) -> None:
    """Fuse the pairs below a module in place."""
    for conv, norm in _pairs(module):
        fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
        # timm's normalisation layers carry the activation.
        setattr(module, norm, getattr(getattr(module, norm), "act", nn.Identity()))
        setattr(module, conv, fused)
    for child in module.children():
        if not isinstance(child, nn.Conv2d | nn.BatchNorm2d):
            _fuse(child)


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of the children that are a convolution and the normalisation after it."""
    children = list(module.named_children())
    return [
        (conv_name, norm_name)
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features
    ]
