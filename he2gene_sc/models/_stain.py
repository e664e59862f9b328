"""What the colour features of a window say of its stain. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np

from ._embedding import N_COLOUR

#: Numbers that describe a stain.
N_STAIN = 8
#: Optical density below which a ratio of two says nothing.
_FAINT = 0.02
_TINY = 1e-7


def stain_of(features: np.ndarray, n_windows: int) -> np.ndarray:
    """Describe the stain of each spot by its second smallest window, ``(n, f)`` to ``(n, 8)`` float64.

    Logs of mean density, its red and blue over green, principal densities 2, 3 over 1, red and blue of 1, size.
    """
    which = min(1, n_windows - 1)
    start = features.shape[1] - N_COLOUR * (n_windows - which)
    colour = features[:, start : start + N_COLOUR].astype(np.float64)
    mean, sd, between = colour[:, :3], colour[:, 3:6], colour[:, 6:]
    covariance = np.zeros((len(colour), 3, 3))
    covariance[:, (0, 1, 2), (0, 1, 2)] = np.square(sd) + _TINY
    covariance[:, (0, 0, 1), (1, 2, 2)] = covariance[:, (1, 2, 2), (0, 0, 1)] = between
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
    """How much more green than red is absorbed, or than what varies absorbs, from :func:`stain_of`: ``(n, 8)`` to ``(n,)``.

    In H&E it is positive: eosin absorbs green, and where there is little of it, nuclei vary most, which absorb more red than
    the rest. With red and green exchanged both change their sign. Neither alone is enough: with strong eosin
    nuclei do not vary most, and haematoxylin absorbs about as much red as green.
    """
    return np.maximum(stains[:, 5], 0) - stains[:, 1]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(a, _FAINT) / np.maximum(b, _FAINT))
