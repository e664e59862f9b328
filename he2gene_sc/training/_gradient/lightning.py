"""Set up Lightning without files and advice of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..._core import logs


def hardware(device: str | torch.device, devices: Any) -> tuple[str, Any]:
    """Return Lightning's accelerator and devices for a device and a number of devices (default: one)."""
    if str(device) == "auto":
        return "auto", 1 if devices is None else devices
    device = torch.device(device)
    if devices is None:
        devices = 1 if device.index is None else [device.index]
    return device.type, devices


def default_precision(accelerator: str) -> str:
    """Return the default precision: bfloat16 on CUDA, single precision elsewhere."""
    cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if cuda else "32-true"


def is_first_process() -> bool:
    """Return whether this is the only process of a run, or the process of global rank zero."""
    from lightning.pytorch.utilities import rank_zero_only

    # Lightning sets the rank if it starts processes, or reads it from the environment of another launcher.
    return not getattr(rank_zero_only, "rank", None)


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's tips and its advice on loaders."""
    with logs.silence("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        yield
