"""Choose the held-out spots for early stopping."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._core import validate
from .._folds import grouped_folds
from .patches import PatchSet
from .presets import Preset

VALIDATIONS = ("grouped", "random")


class Split(NamedTuple):
    """Unit of the groups that are held out, and positions of training and held-out spots."""

    unit: str
    train: np.ndarray
    held_out: np.ndarray

    def allowed_neighbours(self, n: int) -> np.ndarray:
        """Return which of ``n`` spots may serve as neighbours: training spots, or all in the validation of the paper."""
        allowed = np.full(n, self.unit == "spot")
        allowed[self.train] = True
        return allowed


def split(
    data: PatchSet, preset: Preset, validation: str = "grouped", seed: int = 0, rows: np.ndarray | None = None
) -> Split:
    """Choose the held-out spots for early stopping: the fold of groups whose size is nearest to ``preset.validation_share``.

    ``"grouped"`` holds out patients, else sections, else blocks; ``"random"`` holds out spots as in the paper, which leaks.
    """
    validate.one_of(validation, VALIDATIONS, "validation")
    rows = np.arange(len(data)) if rows is None else rows
    if validation == "random":
        order = np.random.default_rng([seed, 1]).permutation(rows)
        n = len(rows) - int(len(rows) * (1 - preset.validation_share))
        return Split("spot", np.sort(order[n:]), np.sort(order[:n]))
    unit, folds = balanced_folds(data, preset, rows)
    held = np.abs(np.bincount(folds) / len(rows) - preset.validation_share).argmin()
    return Split(unit, rows[folds != held], rows[folds == held])


def balanced_folds(data: PatchSet, preset: Preset, rows: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the unit, and folds of about the size of ``preset.validation_share``, at most one per group."""
    coordinates = None if data.coordinates is None else data.coordinates[rows]
    arrays = (data.sections[rows], data.patients[rows], coordinates)
    unit, folds = grouped_folds(*arrays)
    if unit == "block":
        return unit, folds
    return grouped_folds(*arrays, n_folds=max(2, round(1 / preset.validation_share)), unit=unit)
