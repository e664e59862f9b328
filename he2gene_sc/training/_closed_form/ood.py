"""Fit the detector of slides out of distribution, with limits from patients and sections that are left out in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ...models._embedding import N_COLOUR, reciprocal
from ...models._ood import (
    BANK,
    MEAN,
    PROJECTION,
    SCALE,
    SIZE,
    WEIGHTS,
    apparent_sides,
    components,
    distance_to_bank,
    size_error,
)
from ...models._stain import stain_of
from .._sections import Section, groups_of
from .heads import principal_directions

N_COMPONENTS = 32
#: Number of training spots in the bank, over all sections.
_BANK = 1500
#: Quantile of the spots of a left-out patient that is the limit of a distance.
_LIMIT_QUANTILE = 0.9
#: Factor of the limits if sections of one patient were left out instead of patients.
_ONE_PATIENT_FACTOR = 1.5
#: Limit of the apparent size in octaves: worst left-out error × 2, clipped to 0.6 to 0.75, so that a size wrong by two is
#: detected; never below worst training error × 3, for features that hardly show the size.
_OCTAVES, _LEFT_OUT_FACTOR, _OWN_FACTOR = (0.6, 0.75), 2.0, 3.0
#: Largest µm/px of a slide, relative to the coarsest training image.
_MAX_COARSENING = 1.3
#: Quantile of a patient's spots outside the range of stains, at each end.
_STAIN_TAIL = 0.02
#: Least half range of a value of the stain (a logarithm), since patients of one laboratory may vary less by chance.
_MIN_STAIN = 0.12
_PENALTY = 0.1
#: Variance of a feature relative to its squared mean, below which it is rounding error.
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
    """Return tensors of the detector, and limits for the card; empty and ``None`` for one section, since none can be left out.

    With ``tiled`` windows, all have the same µm/px, so features do not depend on the size of the window.
    """
    if len(sections) < 2:
        return {}, None
    features = [np.asarray(section.features[:, 0], np.float32) for section in sections]
    patients = groups_of(sections, "patient")
    several = len(set(patients)) > 1
    encoded = np.where(np.arange(len(weights)) < len(weights) - n_colour, weights, 0).astype(np.float32)
    (mean, scale, _, projection), bank = _fit_space(features, patients, encoded)
    tensors = {MEAN: mean, SCALE: scale, WEIGHTS: encoded}
    tensors |= {PROJECTION: projection.astype(np.float16), BANK: bank.astype(np.float16)}
    # If there is one patient, its sections are left out.
    groups = patients if several else [str(i) for i in range(len(sections))]
    parts = [[i for i, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)]
    distances, residuals = zip(*_leave_out(features, groups, encoded, parts), strict=True)
    slack = 1.0 if several else _ONE_PATIENT_FACTOR
    tensors[SIZE], own, left_out = _fit_sizes(features, windows_um[:1] if tiled else windows_um, n_colour)
    coarsest = max(max(section.mpp for section in sections), min(windows_um) / input_px)
    limits: dict[str, object] = {
        "distance": _limit(distances, slack),
        "rest": _limit(residuals, slack),
        "octaves": round(max(_OWN_FACTOR * own, float(np.clip(_LEFT_OUT_FACTOR * left_out, *_OCTAVES))), 6),
        "mpp": round(_MAX_COARSENING * coarsest, 6),
    }
    # The largest median distance of a section of a known patient.
    of_known = [[i] for i, name in enumerate(patients) if patients.count(name) > 1]
    known = [float(np.median(found)) for found, _ in _leave_out(features, patients, encoded, of_known)]
    if known:
        limits["known"] = round(max(known), 6)
    if n_colour == N_COLOUR * len(windows_um):
        limits["stain"] = _stain_limits([stain_of(x, len(windows_um)) for x in features], patients)
    return tensors, limits


def _fit_space(
    features: Sequence[np.ndarray], patients: Sequence[str], weights: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Return mean, scale, weights and projection of features ``(n, f)``, and the components of a sample of spots of each section.

    Patients have equal weight. The projection is rounded to half precision, as stored.
    """
    share = [1 / (patients.count(name) * len(set(patients))) for name in patients]
    means = (part * x.mean(0, dtype=np.float64) for part, x in zip(share, features, strict=True))
    mean = sum(means, start=np.zeros(len(weights)))
    scale = np.sqrt(sum(part * x.var(0, dtype=np.float64) for part, x in zip(share, features, strict=True)))
    scale = np.where(scale > 1e-6 * (np.abs(mean) + 1), scale, 0)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    inverse = reciprocal(scale, scale > 0) * weights
    gram = np.zeros((len(mean), len(mean)))
    for part, x in zip(share, features, strict=True):
        z = ((x - mean) * inverse).astype(np.float64)
        gram += part / len(x) * (z.T @ z)
    projection = principal_directions(gram, min(N_COMPONENTS, len(mean))).astype(np.float16).astype(np.float32)
    space = mean, scale, weights, projection
    n = max(1, _BANK // len(features))
    return space, np.concatenate([components(x[:: -(-len(x) // n)], *space)[0] for x in features])


def _leave_out(
    features: Sequence[np.ndarray], patients: Sequence[str], weights: np.ndarray, parts: Iterable[Sequence[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield distances and residuals of the spots of the sections of each part, with statistics of all other sections."""
    for part in parts:
        others = [i for i in range(len(features)) if i not in part]
        space, bank = _fit_space([features[i] for i in others], [patients[i] for i in others], weights)
        projected, residuals = zip(*(components(features[i], *space) for i in part), strict=True)
        yield np.concatenate([distance_to_bank(own, bank) for own in projected]), np.concatenate(residuals)


def _limit(of_groups: Sequence[np.ndarray], slack: float) -> float:
    """Return the largest quantile over left-out groups; above 0, so that constant features do not flag every slide."""
    return round(max(1e-6, slack * max(float(np.quantile(x, _LIMIT_QUANTILE)) for x in of_groups)), 6)


def _stain_limits(stains: Sequence[np.ndarray], patients: Sequence[str]) -> dict[str, list[float]]:
    """Return the range of each value of :func:`stain_of`, wider for fewer patients.

    The range of n values of a uniform distribution is on average too small by 2 / (n − 1) of itself. Half of that is added, since
    this range is over spots, which vary within a patient too; for one patient, twice the range is added.
    """
    ends = []
    for name in set(patients):
        own = np.concatenate([x for x, patient in zip(stains, patients, strict=True) if patient == name])
        ends.append(np.quantile(own, (_STAIN_TAIL, 1 - _STAIN_TAIL), axis=0))
    low, high = np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]
    half = np.maximum((high - low) / 2 * (1 + 1 / max(len(ends) - 1, 0.5)), _MIN_STAIN)
    return {"middle": [round(float(x), 6) for x in (low + high) / 2], "half": [round(float(x), 6) for x in half]}


def _fit_sizes(
    features: Sequence[np.ndarray], windows_um: tuple[float, ...], n_colour: int
) -> tuple[np.ndarray, float, float]:
    """Fit window size to features; return the fit, its worst error over sections in octaves, and that of fits to the others."""
    if len(windows_um) < 2:
        return np.zeros(0, np.float32), 0.0, 0.0
    n = len(features)
    total = sum((_size_sums(x, windows_um, n_colour) for x in features), start=np.zeros(()))
    size = _fit_size(total / n, windows_um)

    def worst_error(fits: Iterable[np.ndarray]) -> float:
        return max(abs(size_error(apparent_sides(x, fit, windows_um))) for x, fit in zip(features, fits, strict=True))

    others = (_fit_size((total - _size_sums(x, windows_um, n_colour)) / (n - 1), windows_um) for x in features)
    return size, worst_error([size] * n), worst_error(others)


def _size_sums(features: np.ndarray, windows_um: tuple[float, ...], n_colour: int) -> np.ndarray:
    """Return moments of the features ``x`` of windows ``(n, f)`` and log2 of their sides: x, x · side and x · x, ``(2 + k, k)``."""
    w = len(windows_um)
    k = (features.shape[1] - n_colour) // w
    sums = np.zeros((2 + k, k))
    for i, side in enumerate(np.log2(windows_um)):
        window = features[:, i * k : (i + 1) * k].astype(np.float64)
        mean = window.mean(0) / w
        sums += np.vstack([mean, side * mean, window.T @ window / (len(window) * w)])
    return sums


def _fit_size(moments: np.ndarray, windows_um: tuple[float, ...]) -> np.ndarray:
    """Fit a ridge of log2 of the side of a window on its features to mean moments of sections, with slope 1.

    Windows of several sizes are labelled examples: one of 200 µm looks like one of 100 µm with a µm/px wrong by a factor of two.
    """
    y = np.log2(windows_um)
    centre, mean = y.mean(), moments[0]
    covariance = moments[2:] - np.outer(mean, mean)
    variance = covariance.diagonal()
    usable = variance > _ROUNDING * np.square(mean)
    inverse = np.where(usable, 1 / np.sqrt(np.where(usable, variance, 1)), 0)
    gram = covariance * np.outer(inverse, inverse)
    with_size = (moments[1] - mean * centre) * inverse
    slope = np.linalg.solve(gram + _PENALTY * np.eye(len(gram)), with_size)
    # A ridge shrinks predictions towards the mean; the slope is rescaled so that octaves are unbiased.
    slope *= y.var() / max(slope @ with_size, 1e-9) * inverse
    return np.append(slope, centre - mean @ slope).astype(np.float32)
