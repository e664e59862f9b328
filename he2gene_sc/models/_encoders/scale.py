"""Windows and tiles that match the scale at which an encoder was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..._core.logs import warn
from .registry import EncoderSpec

#: Ratio of scales above which a window is reported as too coarse or too fine.
_TOLERANCE = 1.5
#: Most tiles per side of a window.
_MAX_TILES = 8
#: Scale of default windows for encoders of several scales: 20×, which all of them were trained at.
_DEFAULT_MPP = 0.5


def default_windows(spec: EncoderSpec) -> tuple[float, ...] | None:
    """Return windows for an encoder in µm: its input at its scale, and twice that; ``None`` if its scale is unknown."""
    if not spec.scales:
        return None
    side = min(spec.scales, key=lambda mpp: abs(math.log(mpp / _DEFAULT_MPP))) * spec.input_px
    return (side, 2 * side)


def tiles_of(spec: EncoderSpec, windows_um: Sequence[float]) -> tuple[int, ...] | None:
    """Return the tiles per side of each window that are nearest to the encoder's scale; ``None`` if no window is tiled."""
    if not spec.scales:
        return None

    def misfit(um: float, n: int) -> tuple[float, int]:
        return round(min(abs(math.log(um / (n * spec.input_px) / mpp)) for mpp in spec.scales), 6), n

    tiles = tuple(min(range(1, _MAX_TILES + 1), key=lambda n: misfit(um, n)) for um in windows_um)
    return None if set(tiles) == {1} else tiles


def describe_tiles(windows_um: Sequence[float], tiles: Sequence[int], input_px: int) -> str:
    """Describe the tiles of windows, and their µm/px at the input of an encoder."""
    input_mpp = [um / (n * input_px) for um, n in zip(windows_um, tiles, strict=True)]
    return f"read as {', '.join(f'{n} × {n}' for n in tiles)} tiles at {_format_list(input_mpp)} µm/px"


def warn_of_scale(spec: EncoderSpec, windows_um: Sequence[float], tiles: Sequence[int] | None = None) -> None:
    """Warn if windows, or their tiles, are resized to another µm/px than the encoder was trained at."""
    if not spec.scales:
        return
    input_mpp = {um: um / (n * spec.input_px) for um, n in zip(windows_um, tiles or [1] * len(windows_um), strict=True)}
    mismatched = [
        um for um, mpp in input_mpp.items() if min(max(mpp / scale, scale / mpp) for scale in spec.scales) > _TOLERANCE
    ]
    if mismatched:
        fitting = ", ".join(f"{scale * spec.input_px:g}" for scale in spec.scales)
        warn(
            f"encoder {spec.name!r} was trained at {_format_list(spec.scales)} µm/px. `windows_um` of {_format_list(mismatched)} "
            f"show it {_format_list(input_mpp[um] for um in mismatched)} µm/px at its input of {spec.input_px} px, so its features "
            f"may be poor. Windows of {fitting} µm would fit, for example preset=hg.DefaultRecipe(windows_um=...)"
        )


def _format_list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
