"""Fold batch normalisation into the convolutions before it: the same function, about half as fast again on a CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_TOLERANCE = 1e-3


def fuse_batch_norm(encoder: nn.Module, input_px: int) -> nn.Module:
    """Return an encoder in evaluation mode without the batch normalisations that follow a convolution.

    Pairs are found by the order in which a block declares its layers, which is the order of use in timm's networks; the
    result is compared with the original on one random image, and the original is returned where they differ.

    Parameters
    ----------
    encoder
        ``(b, 3, input_px, input_px)`` to ``(b, f)``.
    input_px
        Side of its input.
    """
    fused = copy.deepcopy(encoder).eval()
    if not _fuse(fused):
        return encoder
    x = torch.rand(1, 3, input_px, input_px, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = encoder(x), fused(x)
    return fused if torch.allclose(expected, found, rtol=_TOLERANCE, atol=_TOLERANCE) else encoder


def _fuse(module: nn.Module) -> int:
    """Fuse the pairs below a module in place and return how many there were."""
    children = list(module.named_children())
    n = 0
    for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.out_channels == norm.num_features:
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            # timm's normalisation layers carry the activation.
            setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
            n += 1
    return n + sum(_fuse(child) for _, child in children if not isinstance(child, nn.Conv2d | nn.BatchNorm2d))
