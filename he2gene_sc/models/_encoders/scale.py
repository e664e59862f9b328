"""Windows that show an encoder tissue at the scale that it was trained at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

from .registry import EncoderSpec

#: How many times too coarse or too fine a window may be before it is said.
_TOLERANCE = 1.5
#: Tiles a side at most.
_MOST_TILES = 8
#: Of an encoder of several scales, the one that windows are made for: 20×, what all of them know.
_USUAL_MPP = 0.5


def own_windows(spec: EncoderSpec) -> tuple[float, ...] | None:
    """Windows made for an encoder, µm: its input at its own scale, and twice that; ``None`` where its scale is not known."""
    if not _trained(spec):
        return None
    own = min(_trained(spec), key=lambda mpp: abs(math.log(mpp / _USUAL_MPP))) * spec.input_px
    return (own, 2 * own)


def tiles_of(spec: EncoderSpec, windows_um: Sequence[float]) -> tuple[int, ...] | None:
    """Tiles a side of each window that bring an encoder nearest to its own scale; ``None`` where all are read whole."""
    if not _trained(spec):
        return None

    def off(um: float, n: int) -> tuple[float, int]:
        return round(min(abs(math.log(um / (n * spec.input_px) / mpp)) for mpp in _trained(spec)), 6), n

    tiles = tuple(min(range(1, _MOST_TILES + 1), key=lambda n: off(um, n)) for um in windows_um)
    return None if set(tiles) == {1} else tiles


def read_as(windows_um: Sequence[float], tiles: Sequence[int], input_px: int) -> str:
    """Say how windows are cut, and at what µm/px an encoder sees them."""
    seen = [um / (n * input_px) for um, n in zip(windows_um, tiles, strict=True)]
    return f"read as {', '.join(f'{n} × {n}' for n in tiles)} tiles at {_listed(seen)} µm/px"


def warn_of_scale(
    spec: EncoderSpec, windows_um: Sequence[float], tiles: Sequence[int] | None = None, *, stacklevel: int = 3
) -> None:
    """Warn if windows, or their tiles, are resized to another µm/px than the encoder was trained at."""
    trained = _trained(spec)
    if not trained:
        return
    shown = {um: um / (n * spec.input_px) for um, n in zip(windows_um, tiles or [1] * len(windows_um), strict=True)}
    off = [um for um, mpp in shown.items() if min(max(mpp / at, at / mpp) for at in trained) > _TOLERANCE]
    if off:
        fitting = ", ".join(f"{at * spec.input_px:g}" for at in trained)
        warnings.warn(
            f"encoder {spec.name!r} was trained at {_listed(trained)} µm/px. `windows_um` of {_listed(off)} show it "
            f"{_listed(shown[um] for um in off)} µm/px at its input of {spec.input_px} px, so its features may be poor. Windows "
            f"of {fitting} µm would fit, for example preset=hg.DefaultRecipe(windows_um=...)",
            stacklevel=stacklevel,
        )


def _trained(spec: EncoderSpec) -> tuple[float, ...]:
    return spec.mpp if isinstance(spec.mpp, tuple) else () if spec.mpp is None else (spec.mpp,)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
