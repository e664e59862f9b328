"""Check channels and scale of an image, and convert its pixels to RGB uint8."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_EXPECTED_IMAGE = "an RGB H&E image (3 channels, or 4 with alpha; uint8, or float in 0..1 or 0..255) is needed"

#: Share by which float pixels may exceed their scale, and least maximum of an image that is taken to be in 0..255.
_OVERSHOOT = 0.05
_DARKEST = 32.0


def check_pixels(n_channels: int, dtype: np.dtype, sample: np.ndarray | None, name: str) -> float:
    """Return the factor, 1 or 255, that scales an image to 0..255; raise unless it is RGB(A), uint8 or float in range.

    ``sample`` holds pixels ``(n_channels, …)`` at the spots. It is needed for float images and for alpha.
    """
    dtype = np.dtype(dtype)
    if n_channels not in (3, 4):
        kind = "a one-channel (grey or fluorescence) image" if n_channels == 1 else f"an image of {n_channels} channels"
        raise ValueError(f"`image_key` {name!r} is {kind}; {_EXPECTED_IMAGE}")
    if n_channels == 4 and sample is not None and sample.ndim >= 2 and sample.size:
        # On different scales, the image would become white or black.
        alpha, colours = float(np.nanmax(sample[3])), float(np.nanmax(sample[:3]))
        alpha_up_to_1, colours_up_to_255 = alpha <= 1 + _OVERSHOOT, colours > 1 + _OVERSHOOT
        differ = alpha_up_to_1 == colours_up_to_255 and (colours_up_to_255 or dtype.kind == "f")
        if differ and alpha > 0 and colours > 0:
            raise ValueError(
                f"`image_key` {name!r} has alpha up to {alpha:.3g} and colours up to {colours:.3g}, which are on different scales; "
                "rescale alpha to the colours, or drop it: image[:3]"
            )
    if dtype == np.uint8:
        return 1.0
    if dtype.kind != "f":
        hint = " (a full-range uint16 image becomes uint8 by `image // 257`)" if dtype == np.uint16 else ""
        raise ValueError(
            f"`image_key` {name!r}: the value of white is unknown for pixels of type {dtype}; {_EXPECTED_IMAGE}{hint}"
        )
    if sample is None or sample.size == 0:
        return 255.0
    low, high = float(np.min(sample)), float(np.max(sample))
    # Interpolation overshoots a little; a maximum between the two scales is ambiguous.
    for factor, top in ((255.0, 1.0), (1.0, 255.0)):
        if -_OVERSHOOT * top <= low and high <= top * (1 + _OVERSHOOT) and (factor == 255.0 or high >= _DARKEST):
            return factor
    raise ValueError(f"`image_key` {name!r} has float pixels from {low:.3g} to {high:.3g}; {_EXPECTED_IMAGE}")


#: Names that do not tell which channel is meant.
_NUMBERED = re.compile(r"(c|ch|channel|image|band|sample)?[\s:_-]*\d+([\s:_-]+\d+)*")
_COLOURS = {"r": "r", "red": "r", "g": "g", "green": "g", "b": "b", "blue": "b", "a": "a", "alpha": "a"}
_BRIGHT_FIELD = ("rgb", "h&e", "bright", "transmitted")


def check_channel_names(names: Sequence[object], name: str) -> list[int] | None:
    """Return the positions of red, green, blue and, if present, alpha; ``None`` if names do not tell. Raise for other stains."""
    texts = [str(text).strip().lower() for text in names]
    colours = [_COLOURS.get(text, "") for text in texts]
    if sorted(colours) in (sorted("rgb"), sorted("rgba")):
        return [colours.index(colour) for colour in "rgba"[: len(colours)]]
    unknown = [
        str(original)
        for original, text in zip(names, texts, strict=True)
        if text not in ("", "none", "nan")
        and not _NUMBERED.fullmatch(text)
        and not any(word in text for word in _BRIGHT_FIELD)
    ]
    if unknown and len(texts) in (3, 4):
        raise ValueError(
            f"`image_key` {name!r} has channels that are not red, green and blue: {', '.join(map(repr, unknown))}; {_EXPECTED_IMAGE}. "
            f'If the names are wrong: sdata.set_channel_names({name!r}, ["r", "g", "b"])'
        )
    return None


def to_rgb_uint8(
    block: np.ndarray, factor: float = 1.0, *, paint_black: bool = True, corner: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Convert pixels ``(3 or 4, h, w)`` to RGB uint8, with white behind transparent pixels.

    Exact black becomes white: stained tissue is never black, and an encoder would see an edge at a black background. The block
    itself is returned if nothing changes. ``corner`` is the row and column of the block in the image, for errors.
    """
    if block.dtype != np.uint8:
        _check_float(block, 255 / factor, corner)
        block = np.rint(np.clip(block * np.float32(factor), 0, 255)).astype(np.uint8)
    if block.shape[0] == 4:
        alpha = block[3].astype(np.uint16)
        rgb = block[:3].astype(np.uint16) * alpha + 255 * (255 - alpha)
        block = ((rgb + 127) // 255).astype(np.uint8)
    if not paint_black or any(channel.min(initial=255) for channel in block):
        return block
    black = (block[0] | block[1] | block[2]) == 0
    if black.any():
        block = np.where(black, np.uint8(255), block)
    return block


def _check_float(block: np.ndarray, top: float, corner: tuple[int, int]) -> None:
    """Raise if float pixels are not finite or not in 0 to ``top``; the error gives the place of the first one."""
    low, high = block.min(initial=0), block.max(initial=0)
    if np.isfinite([low, high]).all() and low >= -top * _OVERSHOOT and high <= top * (1 + _OVERSHOOT):
        return
    wrong = ~(np.isfinite(block) & (block >= -top * _OVERSHOOT) & (block <= top * (1 + _OVERSHOOT))).all(0)
    row, column = np.argwhere(wrong)[0] + corner
    nan = "" if np.isfinite(block).all() else " (NaN or infinite)"
    raise ValueError(
        f"`image_key`: a block has {wrong.sum():,} pixel(s) outside 0..{top:g}{nan}, the first in row {row:,}, column "
        f"{column:,}; {_EXPECTED_IMAGE}. If they show no tissue, make them white, {top:g}: image.where(numpy.isfinite(image), {top:g})"
    )


def reflect_index(start: int, size: int, n: int) -> np.ndarray:
    """Fold the indices ``start … start + size`` back into ``0 … n - 1`` by reflection at the borders.

    As in numpy's ``"reflect"``, the border pixel is not repeated. Windows wider than the image are reflected several times.
    """
    index = np.arange(start, start + size)
    if n == 1:
        return np.zeros(size, dtype=np.intp)
    period = 2 * (n - 1)
    index = np.mod(index, period)
    return np.where(index >= n, period - index, index)
