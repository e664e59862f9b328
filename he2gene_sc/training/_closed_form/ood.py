"""What is kept of training to notice a slide unlike it, with limits from patients and sections that were left out in turn."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models._embedding import N_COLOUR
from ...models._ood import BANK, MEAN, PROJECTION, SCALE, SIZE, WEIGHTS, components, nearest, seeming_size
from ...models._stain import stain_of
from .._sections import Section
from .heads import principal

N_COMPONENTS = 32
#: Training spots that are kept, over all sections.
_BANK = 1500
#: Quantile of the spots of a left-out patient at which a spot counts as far.
_FAR = 0.9
#: How much more is allowed where sections of one patient were left out, not patients.
_ONE_PATIENT = 1.5
#: Least limit of the seeming size, octaves, and how many times the worst left-out section is exceeded.
_LEAST_OCTAVES, _MARGIN = 0.6, 2.0
#: How much coarser than the coarsest training image a slide may be.
_COARSER = 1.3
#: Quantile of a patient's spots that the range of a stain leaves out at each end, and what is added to half that range for the
#: patients that there are: 1.5 over their number.
_STAIN_TAIL, _STAIN_MARGIN = 0.02, 1.5
#: Half of the least range of a number of the stain, a logarithm: patients of one laboratory may have chanced on less.
_LEAST_STAIN = 0.12
_PENALTY = 0.1
#: Share of its square below which the variance of a feature, a difference of sums, is rounding.
_ROUNDING = 1e-12


def fit_detector(
    sections: Sequence[Section],
    weights: np.ndarray,
    windows_um: tuple[float, ...],
    input_px: int,
    n_colour: int,
    *,
    tiled: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, object] | None]:
    """Fit tensors of the detector and limits for the card; nothing with one section, which cannot tell how others look.

    With ``tiled`` windows of one µm/px, features do not tell how large a window is.
    """
    if len(sections) < 2:
        return {}, None
    features = [np.asarray(section.features[:, 0], np.float32) for section in sections]
    patients = [section.patient for section in sections]
    names = list(dict.fromkeys(patients))
    encoded = np.where(np.arange(len(weights)) < len(weights) - n_colour, weights, 0).astype(np.float32)
    space = _Space.fit(features, patients, encoded)
    tensors = space.tensors() | {BANK: space.bank(features).astype(np.float16)}
    far, rest = _left_out(features, patients if len(names) > 1 else [str(i) for i in range(len(sections))], encoded)
    slack = 1.0 if len(names) > 1 else _ONE_PATIENT
    tensors[SIZE], octaves = _sizes(features, windows_um[:1] if tiled else windows_um, n_colour)
    coarsest = max(max(section.mpp for section in sections), min(windows_um) / input_px)
    limits: dict[str, object] = {
        "distance": _limit(far, slack),
        "rest": _limit(rest, slack),
        "octaves": round(max(_LEAST_OCTAVES, _MARGIN * float(np.nanmax(np.abs([*octaves, 0.0])))), 6),
        "mpp": round(_COARSER * coarsest, 6),
    }
    known = _known(features, patients, encoded)
    if known is not None:
        limits["known"] = known
    if n_colour == N_COLOUR * len(windows_um):
        limits["stain"] = _stains([stain_of(x, len(windows_um)) for x in features], patients)
    return tensors, limits


@dataclass(frozen=True)
class _Space:
    """Standardised features and their components; every patient of the same weight."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    projection: np.ndarray

    @classmethod
    def fit(cls, features: Sequence[np.ndarray], patients: Sequence[str], weights: np.ndarray) -> _Space:
        """Read the sections, ``(n, f)`` each."""
        share = [1 / (list(patients).count(name) * len(set(patients))) for name in patients]
        means = (part * x.mean(0, dtype=np.float64) for part, x in zip(share, features, strict=True))
        mean = sum(means, start=np.zeros(features[0].shape[1]))
        scale = np.sqrt(sum(part * x.var(0, dtype=np.float64) for part, x in zip(share, features, strict=True)))
        scale = np.where(scale > 1e-6 * (np.abs(mean) + 1), scale, 0)
        mean, scale = mean.astype(np.float32), scale.astype(np.float32)
        inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0) * weights
        gram = np.zeros((len(mean), len(mean)))
        for part, x in zip(share, features, strict=True):
            z = ((x - mean) * inverse).astype(np.float64)
            gram += part / len(x) * (z.T @ z)
        projection = principal(gram, min(N_COMPONENTS, len(mean))).astype(np.float16)
        return cls(mean, scale, weights, projection)

    def see(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Components of the spots of a section, and the length of the rest."""
        return components(features, self.mean, self.scale, self.weights, self.projection.astype(np.float32))

    def bank(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Components of some spots of each section."""
        share = max(1, _BANK // len(features))
        return np.concatenate([self.see(x[:: -(-len(x) // share)])[0] for x in features])

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays of a model."""
        return {MEAN: self.mean, SCALE: self.scale, WEIGHTS: self.weights, PROJECTION: self.projection}


def _left_out(
    features: Sequence[np.ndarray], groups: Sequence[str], weights: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Distances and rests of the spots of each group, seen by the others."""
    far, rest = [], []
    for name in dict.fromkeys(groups):
        others = [i for i, group in enumerate(groups) if group != name]
        space = _Space.fit([features[i] for i in others], [groups[i] for i in others], weights)
        bank = space.bank([features[i] for i in others])
        seen = [space.see(x) for x, group in zip(features, groups, strict=True) if group == name]
        far.append(np.concatenate([nearest(own, bank) for own, _ in seen]))
        rest.append(np.concatenate([left for _, left in seen]))
    return far, rest


def _limit(of_groups: Sequence[np.ndarray], slack: float) -> float:
    """Largest quantile of a left-out group. No limit is 0: a feature that never varies must not make every slide odd."""
    return round(max(1e-6, slack * max(float(np.quantile(x, _FAR)) for x in of_groups)), 6)


def _known(features: Sequence[np.ndarray], patients: Sequence[str], weights: np.ndarray) -> float | None:
    """Median distance that a section of a known patient stays below; ``None`` where no patient has two."""
    found = []
    for i, name in enumerate(patients):
        if patients.count(name) < 2:
            continue
        others = [j for j in range(len(patients)) if j != i]
        space = _Space.fit([features[j] for j in others], [patients[j] for j in others], weights)
        found.append(float(np.median(nearest(space.see(features[i])[0], space.bank([features[j] for j in others])))))
    return round(max(found), 6) if found else None


def _stains(stains: Sequence[np.ndarray], patients: Sequence[str]) -> dict[str, list[float]]:
    """Range of each number of :func:`stain_of`, wider the fewer patients there are."""
    names = list(dict.fromkeys(patients))
    ends = []
    for name in names:
        own = np.concatenate([x for x, patient in zip(stains, patients, strict=True) if patient == name])
        ends.append(np.quantile(own, (_STAIN_TAIL, 1 - _STAIN_TAIL), axis=0))
    low, high = np.min([end[0] for end in ends], axis=0), np.max([end[1] for end in ends], axis=0)
    half = np.maximum((high - low) / 2 * (1 + _STAIN_MARGIN / len(names)), _LEAST_STAIN)
    return {"middle": [round(float(x), 6) for x in (low + high) / 2], "half": [round(float(x), 6) for x in half]}


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
        """Ridge of the log2 of a window's side on the encoder's features of it, sections equal; slope made 1.

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
