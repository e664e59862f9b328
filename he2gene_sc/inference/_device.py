"""Choose the device and the precision of inference."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

#: Threads that read the image for a GPU, where nothing else is said.
_MOST_READERS = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return an available device for a name or ``"auto"``."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, is_usable in usable.items() if is_usable]
    if device == "auto":
        return torch.device(present[0])
    valid = f"valid here: 'auto', {', '.join(map(repr, present))}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` {device!r} is unknown; {valid}") from error
    if found.type not in present or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"`device` {device!r} is not present; {valid}")
    return found


def allocator(device: torch.device) -> Callable[[tuple[int, ...]], np.ndarray] | None:
    """Return a function that allocates page-locked arrays of patches for CUDA; ``None`` for other devices."""
    return _page_locked if device.type == "cuda" else None


def _page_locked(shape: tuple[int, ...]) -> np.ndarray:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def n_readers(device: torch.device, wanted: int | None) -> int:
    """Return how many threads read the image for a device: those of ``settings.n_readers``, or by its kind."""
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_READERS, cores)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision of the encoder for a name; ``"auto"`` is bfloat16 on GPUs that support it, else float32."""
    if isinstance(dtype, str) and dtype == "auto":
        # Older GPUs emulate bfloat16, which is slower than float32.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"`dtype` {dtype!r} is unknown; valid: 'auto', {', '.join(map(repr, _DTYPES))}")
    if found == torch.float16 and device.type == "cpu":
        raise ValueError("`dtype` 'float16' is for GPUs; on the CPU use 'float32' or 'bfloat16'")
    return found
