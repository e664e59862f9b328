"""One vector a patch from the tokens of a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
        self._by_timm = hasattr(network, "forward_features")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class token, or that and the mean of the patch tokens side by side."""
        tokens = self.network.forward_features(x) if self._by_timm else self.network(pixel_values=x).last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.n_prefix :].mean(1)], dim=1)

    def extra_repr(self) -> str:
        """Name what the weights do not tell."""
        return f"pooling={self.pooling!r}, n_prefix={self.n_prefix}"
