"""Estimate the memory of a training step, and check that it is available."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .._core.memory import memory_of_machine

#: Share of the memory that a run may use.
_USABLE = 0.8


def activation_bytes(encoder: nn.Module, input_px: int) -> int:
    """Measure the bytes that an encoder keeps per patch for its gradient, on two patches."""
    network = copy.deepcopy(encoder).cpu().float().requires_grad_(True).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=()), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result keeps the saved arrays alive, so that each address stands for one array.
        found = network(torch.zeros(2, 3, input_px, input_px))
    del found
    return sum(kept.values()) // 2


def check_sums(n_features: int) -> None:
    """Raise if the sums of squares of features do not fit into memory, with two copies in double precision for the solver."""
    available = memory_of_machine()
    needed = 3 * 8 * n_features**2
    if needed > _USABLE * available:
        raise MemoryError(
            f"{n_features:,} features a spot need {needed / 2**30:.1f} GiB for their sums of squares, "
            f"{available / 2**30:.1f} are free here; use fewer `windows_um` or `stages`, which hg.tl.train takes as "
            "preset=hg.DefaultRecipe(windows_um=..., stages=...), or a smaller `encoder`"
        )


def check_memory(encoder: nn.Module, input_px: int, *, patches: int, spots: int, n_genes: int, n_held_out: int) -> None:
    """Raise if a run on the CPU would not fit into memory; the error says what to change."""
    available = memory_of_machine()
    bytes_per_patch = activation_bytes(encoder, input_px) + 16 * input_px**2
    # Weights, gradient, two moments of Adam and the best weights; losses; predicted and measured values.
    fixed = 20 * sum(p.numel() for p in encoder.parameters()) + n_genes * (24 * spots + 8 * n_held_out)
    needed = patches * bytes_per_patch + fixed
    if needed > _USABLE * available:
        fits = int((_USABLE * available - fixed) // bytes_per_patch)
        hint = (
            f"pass `patches_at_once` (at most {fits} fit)" if fits > 1 else "take a smaller `encoder` or fewer `genes`"
        )
        raise MemoryError(
            f"{patches:,} patches at once need {needed / 2**30:.1f} GiB ({bytes_per_patch / 2**20:.0f} MiB a patch of {input_px} px), "
            f"{available / 2**30:.1f} are free here; {hint}, or a smaller `batch_size`; "
            "hg.tl.train takes both as preset=hg.PaperRecipe(..., patches_at_once=..., batch_size=...)"
        )
