"""Whether a slide looks like what a model was trained on: of each spot, and of the slide. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Arrays of a :class:`Guard` among the tensors of a model.
PROJECTION, BANK, SIZE = "guard.projection", "guard.bank", "guard.size"
#: Neighbours in the bank over whose distance a spot is judged.
N_NEAREST = 5
#: Spots below which a slide is not judged as a whole.
MIN_SPOTS = 10


@dataclass(frozen=True)
class Look:
    """How a slide looks beside training.

    Attributes
    ----------
    score
        ``(n,)`` float32; above 1 a spot is out of distribution.
    far
        Share of the spots that lie too far from all training spots.
    octaves
        How many times too large the windows seem to be, as log2; NaN where the model has one window.
    variation
        log2 of the spread between the spots of the slide over that between those of a training section.
    reasons
        What is wrong with the slide as a whole, in words; empty where nothing is.
    """

    score: np.ndarray
    far: float
    octaves: float
    variation: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Guard:
    """What is kept of the training spots to compare with.

    Features are compared as they are, standardised by training alone: what :class:`Context` takes off a slide, its stain
    and its resolution, is what has to be noticed here.

    Attributes
    ----------
    mean, scale
        Of the training features, ``(f,)``.
    projection
        Standardised features to components, ``(f, d)``.
    bank
        Of training spots, ``(b, d + colours)``: components, and beside them the standardised colour features.
    size
        ``(k + 1,)``: from the encoder's features of one window to the log2 of its side, the last the intercept; empty
        where the model has one window.
    limits
        Of the card: ``distance`` (of components, and of colour), ``far``, ``octaves``, ``spread``, ``variation``.
    windows_um
        Sides of the windows.
    """

    mean: np.ndarray
    scale: np.ndarray
    projection: np.ndarray
    bank: np.ndarray
    size: np.ndarray
    limits: Mapping[str, Any]
    windows_um: tuple[float, ...]

    def look(self, features: np.ndarray) -> Look:
        """Compare the spots of one slide, ``(n, f)``, with training."""
        d = self.projection.shape[1]
        own = components(features, self.mean, self.scale, self.projection, self.bank.shape[1] - d)
        both = distances(own, self.bank, d)
        distance = np.maximum(*(x / limit for x, limit in zip(both, self.limits["distance"], strict=True)))
        far = float((distance > 1).mean()) if len(distance) else 0.0
        octaves = seeming_size(features, self.size, self.windows_um)
        variation = variation_of(own[:, :d]) - self.limits["spread"]
        reasons, worst = [], 0.0
        if len(features) >= MIN_SPOTS:
            if far > self.limits["far"]:
                reasons.append(f"{far:.0%} of its spots look like no training spot")
            low, high = self.limits["variation"]
            if not low <= variation <= high:
                reasons.append(
                    f"its spots differ {'less' if variation < low else 'more'} from each other than tissue does"
                )
            # Of what is no tissue, the size means nothing.
            if not reasons and abs(octaves) > self.limits["octaves"]:
                reasons.append(
                    f"what its windows show seems {2 ** abs(octaves):.1f} times {'larger' if octaves > 0 else 'smaller'} than it "
                    "should be: the µm/px may be wrong, or the image far less sharp or sharper"
                )
            worst = max(
                abs(octaves) / self.limits["octaves"] if np.isfinite(octaves) else 0.0,
                (variation / low if variation < 0 else variation / high),
            )
        return Look(np.maximum(distance, worst).astype(np.float32), far, octaves, variation, tuple(reasons))


def components(
    features: np.ndarray, mean: np.ndarray, scale: np.ndarray, projection: np.ndarray, n_colour: int
) -> np.ndarray:
    """Features standardised by training, as components, and the colours among them, ``(n, d + n_colour)``."""
    usable = scale > 0
    z = (features - mean) * np.where(usable, 1 / np.where(usable, scale, 1), 0)
    return np.concatenate([z @ projection, z[:, z.shape[1] - n_colour :] / np.sqrt(max(n_colour, 1))], axis=1)


def distances(own: np.ndarray, bank: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the bank by the first ``d`` columns and by those of colour; 0 where there are none."""
    colour = nearest(own[:, d:], bank[:, d:]) if own.shape[1] > d else np.zeros(len(own))
    return nearest(own[:, :d], bank[:, :d]), colour


def nearest(own: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Distance of each spot ``(n, d)`` to the fifth nearest of the bank ``(b, d)``."""
    from scipy.spatial.distance import cdist

    if not len(own):
        return np.zeros(0)
    distance = cdist(own, bank)
    k = min(N_NEAREST, len(bank)) - 1
    return np.partition(distance, k, axis=1)[:, k]


def seeming_size(features: np.ndarray, size: np.ndarray, windows_um: tuple[float, ...]) -> float:
    """Mean over spots and windows of the log2 of the side that a window seems to have over the side that it has."""
    if not len(size) or not len(features):
        return float("nan")
    k, w = len(size) - 1, len(windows_um)
    windows = features[:, : k * w].reshape(-1, w, k).mean(0, dtype=np.float64)
    return float((windows @ size[:-1] + size[-1] - np.log2(windows_um)).mean())


def variation_of(own: np.ndarray) -> float:
    """log2 of the root mean square deviation of the spots from the mean of their slide, components together."""
    spread = float(np.sqrt(np.square(own - own.mean(0)).sum(1).mean())) if len(own) else 0.0
    return float(np.log2(max(spread, 1e-6)))
