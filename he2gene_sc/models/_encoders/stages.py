"""Features of an encoder: its output, the mean of the maps of some stages, or tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Stages(nn.Module):
    """Concatenated means over the image of the maps of some stages.

    Early stages respond to texture and colour, late ones to objects, which tissue does not have. Stages after the last chosen
    one are not run.
    """

    encoder: Any  # of timm; nn.Module does not declare its methods

    def __init__(self, encoder: nn.Module, stages: tuple[int, ...]):
        super().__init__()
        self.encoder = encoder
        self.stages = tuple(stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(b, 3, s, s)`` to ``(b, f)``."""
        maps = self.encoder.forward_intermediates(
            x, indices=list(self.stages), stop_early=True, intermediates_only=True
        )
        return torch.cat([found.mean((2, 3)) for found in maps], dim=1)

    def extra_repr(self) -> str:
        """Name the stages, which are part of the architecture."""
        return f"stages={self.stages}"


def default_stages(encoder: nn.Module) -> tuple[int, ...] | None:
    """Return the default stages of an encoder: the last three of a convolutional network, ``None`` for any other."""
    info = getattr(encoder, "feature_info", None)
    if info is None or not hasattr(encoder, "forward_intermediates"):
        return None
    reductions = [entry["reduction"] for entry in info]
    if len(reductions) < 4 or any(b <= a for a, b in zip(reductions, reductions[1:], strict=False)):
        return None
    return tuple(range(len(reductions) - 3, len(reductions)))


def wrap_stages(encoder: nn.Module, stages: tuple[int, ...] | None) -> nn.Module:
    """Wrap an encoder so that it returns the means of the stages; ``None`` returns the encoder."""
    if stages is None:
        return encoder
    n = len(getattr(encoder, "feature_info", ()))
    if not hasattr(encoder, "forward_intermediates") or any(not 0 <= stage < n for stage in stages) or not stages:
        valid = f"0 to {n - 1}" if n and hasattr(encoder, "forward_intermediates") else "None"
        raise ValueError(f"`stages` is {tuple(stages)}; valid for this encoder: {valid}")
    return Stages(encoder, stages)


def stage_sizes(encoder: nn.Module, stages: tuple[int, ...] | None, input_px: int) -> tuple[int, ...]:
    """Return the number of features of each stage, or one number for the output of the encoder."""
    if stages is not None:
        info: Any = encoder.feature_info
        return tuple(int(info[stage]["num_chs"]) for stage in stages)
    with torch.inference_mode():
        return (int(encoder(torch.zeros(1, 3, input_px, input_px)).shape[1]),)


class Tokens(nn.Module):
    """A vision transformer of timm or transformers, ``(b, 3, input_px, input_px)`` to ``(b, f)``.

    ``pooling`` is "cls" or "cls+mean"; ``n_prefix`` counts the tokens before the patches: class token and registers.
    """

    network: Any  # of timm or transformers

    def __init__(self, network: nn.Module, pooling: str, n_prefix: int):
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.n_prefix = n_prefix
        self._is_timm = hasattr(network, "forward_features")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class token, or the class token concatenated with the mean of the patch tokens."""
        tokens = self.network.forward_features(x) if self._is_timm else self.network(pixel_values=x).last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.n_prefix :].mean(1)], dim=1)

    def extra_repr(self) -> str:
        """Name the settings that the weights do not determine."""
        return f"pooling={self.pooling!r}, n_prefix={self.n_prefix}"
