"""Whether windows show an encoder tissue at the scale that it was trained at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from ._registry import EncoderSpec

#: How many times too coarse or too fine a window may be before it is said.
_TOLERANCE = 1.5


def warn_of_scale(spec: EncoderSpec, windows_um: Sequence[float], *, stacklevel: int = 3) -> None:
    """Warn if windows are resized to another µm/px than the encoder was trained at."""
    if spec.mpp is None:
        return
    trained = spec.mpp if isinstance(spec.mpp, tuple) else (spec.mpp,)
    shown = {um: um / spec.input_px for um in windows_um}
    off = [um for um, mpp in shown.items() if min(max(mpp / at, at / mpp) for at in trained) > _TOLERANCE]
    if off:
        fitting = ", ".join(f"{at * spec.input_px:g}" for at in trained)
        warnings.warn(
            f"encoder {spec.name!r} was trained at {_listed(trained)} µm/px. `windows_um` of {_listed(off)} show it "
            f"{_listed(shown[um] for um in off)} µm/px at its input of {spec.input_px} px, so its features may be poor. Windows "
            f"of {fitting} µm would fit",
            UserWarning,
            stacklevel=stacklevel,
        )


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
