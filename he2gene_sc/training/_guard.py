"""What is kept of training to notice a slide unlike it, with limits from sections that were left out in turn."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models._guard import BANK, PROJECTION, SIZE, components, distances, seeming_size, variation_of
from ._closed_form import _principal
from ._sections import Section

N_COMPONENTS = 32
#: Training spots that are kept, over all sections.
_BANK = 1500
#: Quantile of the distances of left-out spots at which a spot counts as far.
_DISTANCE_QUANTILE = 0.95
#: Least limits: sections that happen to agree must not make the guard nervous.
_LEAST_FAR, _LEAST_OCTAVES, _LEAST_VARIATION = 0.5, 0.5, 1.0
#: How many times the worst left-out section is exceeded before a slide is out.
_MARGIN = 2.0
_PENALTY = 0.1
#: Share of its square below which the variance of a feature, a difference of sums, is rounding.
_ROUNDING = 1e-12


def fit_guard(
    sections: Sequence[Section], mean: np.ndarray, scale: np.ndarray, windows_um: tuple[float, ...], n_colour: int
) -> tuple[dict[str, np.ndarray], dict[str, object] | None]:
    """Fit the components, the bank, the seeming size of a window and the limits.

    Parameters
    ----------
    sections
        Training sections; the first symmetry of each spot is read.
    mean, scale
        Of the features, as the model keeps them.
    windows_um
        Sides of the windows whose features stand side by side.
    n_colour
        Number of colour features, the last ones.

    Returns
    -------
    dict
        Tensors; empty where there is one section, which says nothing of how another may look.
    dict or None
        Limits for the card.
    """
    if len(sections) < 2:
        return {}, None
    features = [np.asarray(section.features[:, 0], np.float32) for section in sections]
    usable = scale > 0
    inverse = np.where(usable, 1 / np.where(usable, scale, 1), 0).astype(np.float32)
    f = len(mean)
    gram = np.zeros((f, f))
    for x in features:
        z = (x - mean) * inverse
        gram += z.T.astype(np.float64) @ z / len(x)
    projection = (_principal(gram, min(N_COMPONENTS, f)) / np.sqrt(f)).astype(np.float16)
    d = projection.shape[1]
    own = [components(x, mean, scale, projection.astype(np.float32), n_colour) for x in features]
    share = max(1, _BANK // len(sections))
    banks = [part[:: -(-len(part) // share)].astype(np.float16) for part in own]
    size, octaves = _sizes(features, windows_um, n_colour)
    far_off = []
    for i in range(len(features)):
        rest = np.concatenate([bank for j, bank in enumerate(banks) if j != i]).astype(np.float32)
        far_off.append(distances(own[i], rest, d))
    # No limit is 0: a feature that never varies must not make every slide odd.
    limit = [
        max(1e-6, float(np.mean([np.quantile(x, _DISTANCE_QUANTILE) for x in kind])))
        for kind in zip(*far_off, strict=True)
    ]
    far = max(float((np.maximum(*(x / k for x, k in zip(both, limit, strict=True))) > 1).mean()) for both in far_off)
    variation = np.array([variation_of(part[:, :d]) for part in own])
    spread = float(variation.mean())
    tensors = {PROJECTION: projection, BANK: np.concatenate(banks), SIZE: size}
    limits: dict[str, object] = {
        "distance": [round(x, 6) for x in limit],
        "far": round(max(_LEAST_FAR, _MARGIN * far), 6),
        "octaves": round(max(_LEAST_OCTAVES, _MARGIN * float(np.nanmax(np.abs([*octaves, 0.0])))), 6),
        "spread": round(spread, 6),
        "variation": [
            round(float(variation.min()) - spread - _LEAST_VARIATION, 6),
            round(float(variation.max()) - spread + _LEAST_VARIATION, 6),
        ],
    }
    return tensors, limits


def _sizes(
    features: Sequence[np.ndarray], windows_um: tuple[float, ...], n_colour: int
) -> tuple[np.ndarray, list[float]]:
    """From features to the size of a window, and how many octaves each section seems off by what the others say."""
    if len(windows_um) < 2:
        return np.zeros(0, np.float32), [float("nan")] * len(features)
    total = functools.reduce(operator.add, (_SizeSums.of(x, windows_um, n_colour) for x in features))
    octaves = [
        seeming_size(x, (total - _SizeSums.of(x, windows_um, n_colour)).fit(windows_um), windows_um) for x in features
    ]
    return total.fit(windows_um), octaves


@dataclass(frozen=True)
class _SizeSums:
    """Sums over sections, each of weight 1, of the moments of a window's features ``x`` and the log2 of its side."""

    n: float
    x: np.ndarray
    xx: np.ndarray
    xy: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, windows_um: tuple[float, ...], n_colour: int) -> _SizeSums:
        """Read one section, ``(n, f)``."""
        w, sides = len(windows_um), np.log2(windows_um)
        k = (features.shape[1] - n_colour) // w
        x, xx, xy = np.zeros(k), np.zeros((k, k)), np.zeros(k)
        for i, side in enumerate(sides):
            window = features[:, i * k : (i + 1) * k].astype(np.float64)
            mean = window.mean(0) / w
            x, xx, xy = x + mean, xx + window.T @ window / (len(window) * w), xy + side * mean
        return cls(1, x, xx, xy)

    def __add__(self, other: _SizeSums) -> _SizeSums:
        return _SizeSums(self.n + other.n, self.x + other.x, self.xx + other.xx, self.xy + other.xy)

    def __sub__(self, other: _SizeSums) -> _SizeSums:
        return _SizeSums(self.n - other.n, self.x - other.x, self.xx - other.xx, self.xy - other.xy)

    def fit(self, windows_um: tuple[float, ...]) -> np.ndarray:
        """Ridge of the log2 of a window's side on the encoder's features of it, sections weighted equally; slope made 1.

        A window of 200 µm shows what one of 100 µm would if the µm/px were wrong by two: labels for free.
        """
        y = np.log2(windows_um)
        centre, mean = y.mean(), self.x / self.n
        covariance = self.xx / self.n - np.outer(mean, mean)
        variance = covariance.diagonal()
        usable = variance > _ROUNDING * np.square(mean)
        inverse = np.where(usable, 1 / np.sqrt(np.where(usable, variance, 1)), 0)
        gram = covariance * np.outer(inverse, inverse)
        with_size = (self.xy / self.n - mean * centre) * inverse
        slope = np.linalg.solve(gram + _PENALTY * np.eye(len(gram)), with_size)
        # Ridge draws its predictions towards the middle; a window twice as large shall seem twice as large.
        slope *= y.var() / max(slope @ with_size, 1e-9) * inverse
        return np.append(slope, centre - mean @ slope).astype(np.float32)
