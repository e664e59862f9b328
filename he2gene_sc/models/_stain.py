"""Describe the stain of a window by its colour features. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np

from ._embedding import N_COLOUR

#: Number of values that describe a stain.
N_STAIN = 8
#: Least optical density in a ratio; smaller ones are noise.
_MIN_DENSITY = 0.02
_TINY = 1e-7


def stain_of(features: np.ndarray, n_windows: int) -> np.ndarray:
    """Describe the stain of each spot by its second smallest window, ``(n, f)`` to ``(n, 8)`` float64.

    The values are logs: mean density; its red and its blue over green; the second and the third principal density over the
    first; red and blue over green of the first; the first.
    """
    window = min(1, n_windows - 1)
    start = features.shape[1] - N_COLOUR * (n_windows - window)
    colour = features[:, start : start + N_COLOUR].astype(np.float64)
    mean, sd, covariances = colour[:, :3], colour[:, 3:6], colour[:, 6:]
    covariance = np.zeros((len(colour), 3, 3))
    covariance[:, (0, 1, 2), (0, 1, 2)] = np.square(sd) + _TINY
    covariance[:, (0, 0, 1), (1, 2, 2)] = covariance[:, (1, 2, 2), (0, 0, 1)] = covariances
    power, axes = np.linalg.eigh(covariance)
    power, first = np.log(np.maximum(power, _TINY)) / 2, axes[:, :, 2]
    first = first * np.sign(first.sum(1, keepdims=True))
    return np.column_stack(
        [
            np.log(mean.mean(1) + 0.05),
            _ratio(mean[:, 0], mean[:, 1]),
            _ratio(mean[:, 2], mean[:, 1]),
            power[:, 1] - power[:, 2],
            power[:, 0] - power[:, 2],
            _ratio(first[:, 0], first[:, 1]),
            _ratio(first[:, 2], first[:, 1]),
            power[:, 2],
        ]
    )


def green_excess(stains: np.ndarray) -> np.ndarray:
    """Return the excess of absorbed green over red from the result of :func:`stain_of`, ``(n, 8)`` to ``(n,)``.

    It is the excess of the mean density, plus the red over green of the first principal density if that is positive. In H&E it is
    positive: eosin absorbs green; if there is little eosin, nuclei vary most, and they absorb more red than the rest. If red and
    green are exchanged, both terms change their sign. One term is not enough: with strong eosin, nuclei do not vary most, and
    haematoxylin absorbs about as much red as green.
    """
    return np.maximum(stains[:, 5], 0) - stains[:, 1]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(a, _MIN_DENSITY) / np.maximum(b, _MIN_DENSITY))
