"""Convert the stored samples of a TIFF to RGB uint8: ink, palettes, luminance with chroma, alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..image import check_pixels, to_rgb_uint8

if TYPE_CHECKING:
    import tifffile

#: Compressions whose decoder does not convert luminance and chroma to RGB; JPEG decoders do.
_WITHOUT_CONVERSION = {1, 5, 8, 32773, 32946, 34925, 50000}
_APERIO_YCBCR = 33003
_READ_AS_STORED = {"MINISBLACK", "RGB", "YCBCR"}


@dataclass(frozen=True)
class Colour:
    """Conversion of samples to RGB."""

    kind: Literal["rgb", "premultiplied", "ink", "palette", "ycbcr"] = "rgb"
    factor: float = 1.0  # to 0..255
    palette: Any = None  # (3, n) uint8
    order: tuple[int, ...] = ()  # positions of the channels that are used; empty: as stored

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Convert ``(n, h, w)`` to ``(3, h, w)`` uint8; ink and luminance with chroma are uint8, ink from 0 for none."""
        if self.order == (0, 1, 2):
            samples = samples[:3]
        elif self.order:
            samples = samples[list(self.order)]
        if self.kind == "palette":
            return self.palette[:, np.minimum(samples[0], self.palette.shape[1] - 1)]
        if self.kind == "ink":
            # As Pillow does.
            light = 255 - samples[3].astype(np.uint16)
            out = np.empty((3, *samples.shape[1:]), np.uint8)
            for i in range(3):
                product = samples[i] * light + 128
                out[i] = light - ((product + (product >> 8)) >> 8)
            return out
        if self.kind == "ycbcr":
            # Full range, ITU-R BT.601.
            y, cb, cr = (samples[i].astype(np.float32) for i in range(3))
            cb, cr = cb - 128, cr - 128
            rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
            return np.rint(np.clip(rgb, 0, 255)).astype(np.uint8)
        if self.kind == "premultiplied":
            colours, alpha = samples[:3].astype(np.float32) * self.factor, samples[3:] * np.float32(self.factor)
            return np.rint(np.clip(colours + 255 - alpha, 0, 255)).astype(np.uint8)
        return to_rgb_uint8(samples, self.factor, paint_black=False)


def colour_of(page: tifffile.TiffPage, sample: np.ndarray, name: str, order: list[int] | None = None) -> Colour:
    """Return the conversion to RGB of a TIFF page; ``sample`` are some pixels, ``(n, k)``."""
    sample = sample if order is None else sample[order]
    n, dtype = len(sample), sample.dtype
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if photometric == "PALETTE" and n == 1 and dtype.kind == "u":
        colours = np.asarray(page.colormap)
        # Some writers use all 16 bits of an entry, others only the lower 8.
        return Colour("palette", palette=(colours >> 8 if colours.max(initial=0) > 255 else colours).astype(np.uint8))
    if photometric == "SEPARATED":
        ink_set = page.tags.valueof(332, 1)
        if n != 4 or int(ink_set) != 1 or dtype != np.uint8:
            raise ValueError(f"`path` {name!r} has {n} inks of type {dtype}; save it as RGB")
        return Colour("ink")
    if photometric not in _READ_AS_STORED:
        raise ValueError(f"`path` {name!r} holds {photometric} colours; save it as RGB")
    factor = check_pixels(n, dtype, sample, name)
    if int(page.compression) == _APERIO_YCBCR or (
        photometric == "YCBCR" and int(page.compression) in _WITHOUT_CONVERSION
    ):
        if n != 3 or dtype != np.uint8:
            raise ValueError(f"`path` {name!r} has {n} channels of luminance and chroma ({dtype}); save it as RGB")
        return Colour("ycbcr")
    used = tuple(order or ())
    if n != 4:
        return Colour("rgb", factor, order=used)
    if page.samplesperpixel != 4 or photometric == "MINISBLACK":
        raise ValueError(
            f"`path` {name!r} has 4 channels that are not declared as red, green, blue and alpha; save it as RGB"
        )
    extra, alpha = int(page.extrasamples[0]) if page.extrasamples else 0, sample[3]
    if extra in (1, 2):
        return Colour("premultiplied" if extra == 1 else "rgb", factor, order=used)
    if not alpha.any():
        used = (used or (0, 1, 2, 3))[:3]  # a fourth channel without content
    elif (alpha < alpha.max()).any() and not np.isin(alpha, (0, alpha.max())).all():
        raise ValueError(f"`path` {name!r} has a fourth channel that is not declared as alpha; save it as RGB")
    return Colour("rgb", factor, order=used)
