"""Lightning, set up so that it leaves nothing behind and keeps its advice to itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..._core import logs


def hardware(device: str | torch.device, devices: Any) -> tuple[str, Any]:
    """Turn a device and a number of devices into Lightning's accelerator and devices; one by default."""
    if str(device) == "auto":
        return "auto", 1 if devices is None else devices
    device = torch.device(device)
    if devices is None:
        devices = 1 if device.index is None else [device.index]
    return device.type, devices


def default_precision(accelerator: str) -> str:
    """Return bfloat16 on CUDA, single precision elsewhere."""
    cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if cuda else "32-true"


def is_first_process() -> bool:
    """Tell whether this is the only process of a run, or that of global rank zero."""
    from lightning.pytorch.utilities import rank_zero_only

    # Lightning sets it where it starts processes, and reads it from the environment where another launcher did.
    return not getattr(rank_zero_only, "rank", None)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's tips and its advice on loaders to itself."""
    with logs.silence("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        yield
