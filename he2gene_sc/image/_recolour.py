"""Recolour patches as if another laboratory had stained and scanned them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._reader import PatchBatch, PatchReader

#: Range of the common strength of the stains, SD of the logarithm of each strength.
_STRENGTHS, _STAIN_SD = (0.4, 1.5), 0.2
#: SD of the light (optical density), and the largest turn of the hue.
_LIGHT_SD, _HUE = 0.05, 0.06
#: Bits per channel of a colour in the table: patches have many more pixels than there are such colours.
_BITS = 6


@dataclass(frozen=True, eq=False)
class Recolouring:
    """Other strengths of haematoxylin, eosin and DAB, another lamp, and a turn of the hue."""

    mixing: np.ndarray  # (3, 3), of optical densities of red, green and blue
    light: np.ndarray  # (3,), added to the optical densities
    hue: float  # share of a full turn
    table: np.ndarray = field(init=False, default_factory=lambda: np.zeros((8**_BITS, 3), np.uint8))  # of seen colours
    seen: np.ndarray = field(init=False, default_factory=lambda: np.zeros(8**_BITS, bool))

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Recolouring:
        """Draw one recolouring; the stains are those of Ruifrok & Johnston 2001, as in scikit-image."""
        from skimage.color import hed_from_rgb, rgb_from_hed

        strengths = np.exp(rng.uniform(*np.log(_STRENGTHS))) * np.exp(rng.normal(0, _STAIN_SD, 3))
        light = rng.normal(0, _LIGHT_SD, 3)
        return cls(hed_from_rgb @ np.diag(strengths) @ rgb_from_hed, light, float(rng.uniform(-_HUE, _HUE)))

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Recolour patches ``(n, 3, side, side)`` uint8."""
        red, green, blue = np.moveaxis(patches >> (8 - _BITS), 1, 0).astype(np.int32)
        codes = (red << _BITS | green) << _BITS | blue
        here = np.zeros_like(self.seen)
        here[codes] = True
        new = np.flatnonzero(here & ~self.seen)
        self.table[new], self.seen[new] = self._recolour(new), True
        return np.ascontiguousarray(np.moveaxis(self.table[codes], -1, 1))

    def _recolour(self, codes: np.ndarray) -> np.ndarray:
        """Return the new colours ``(n, 3)`` uint8 of codes of colours."""
        from skimage.color import hsv2rgb, rgb2hsv

        step = 1 << (8 - _BITS)
        levels = np.stack([codes >> 2 * _BITS, codes >> _BITS, codes], axis=1) & (1 << _BITS) - 1
        rgb = levels * step + (step - 1) / 2
        density = -np.log((rgb + 1) / 256) @ self.mixing + self.light
        hsv = rgb2hsv(np.clip(256 * np.exp(-density) - 1, 0, 255) / 255)
        hsv[:, 0] = (hsv[:, 0] + self.hue) % 1
        return np.rint(255 * hsv2rgb(hsv)).astype(np.uint8)


class RecolouredReader(PatchReader):
    """A reader whose patches are recoloured."""

    def __init__(self, *arguments: Any, recolouring: Recolouring, **options: Any):
        super().__init__(*arguments, **options)
        self._recolouring = recolouring

    def read_batches(self, numbers: Collection[int] | None) -> Iterator[PatchBatch]:
        """Yield recoloured batches, as :meth:`PatchReader.read_batches` yields them."""
        for batch in super().read_batches(numbers):
            yield PatchBatch(batch.index, tuple(map(self._recolouring, batch.patches)))
