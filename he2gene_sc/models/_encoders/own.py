"""Check networks that a user gives."""

from __future__ import annotations

import copy

import torch

from .registry import EncoderSpec


def check_user_encoder(encoder: object) -> tuple[torch.nn.Module, EncoderSpec]:
    """Check a network of the user and return a copy in evaluation mode on the CPU, float32."""
    if not (
        isinstance(encoder, tuple | list)
        and len(encoder) == 2
        and isinstance(encoder[0], torch.nn.Module)
        and isinstance(encoder[1], EncoderSpec)
    ):
        found = f"({', '.join(type(e).__name__ for e in encoder)})" if isinstance(encoder, tuple | list) else encoder
        raise ValueError(
            f"`encoder` is {found!r}; a name, or a network and its specification, "
            "`(module, hg.models.EncoderSpec('my-encoder', input_px=224))`, is needed"
        )
    module = copy.deepcopy(encoder[0]).cpu().float().eval()
    check_output(module, encoder[1])
    return module, encoder[1]


def check_output(network: torch.nn.Module, spec: EncoderSpec) -> None:
    """Check that a network maps an image to one vector of finite numbers."""
    size = (1, 3, spec.input_px, spec.input_px)
    x = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        with torch.inference_mode():
            found = network(x)
    except Exception as error:  # whatever the network raises
        raise ValueError(f"`encoder` {spec.name!r} failed on an image of shape {size}: {error}") from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or found.shape[0] != 1 or found.shape[1] == 0:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"`encoder` {spec.name!r} maps {size} to {shape}; one vector per image, (1, n_features), is needed: pool or "
            "wrap it"
        )
    if not found.is_floating_point() or not torch.isfinite(found).all():
        raise ValueError(f"`encoder` {spec.name!r} gives values that are not finite numbers for a random image")
    if spec.n_features not in (None, found.shape[1]):
        raise ValueError(
            f"`encoder` {spec.name!r} gives {found.shape[1]} features, its specification says {spec.n_features}"
        )
