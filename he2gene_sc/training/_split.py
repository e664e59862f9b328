"""Which spots say when to stop."""

from __future__ import annotations

import numpy as np

from ._folds import N_BLOCKS, grouped_folds
from ._patches import PatchSet
from ._presets import Preset

VALIDATIONS = ("grouped", "random")


def split(
    data: PatchSet, preset: Preset, validation: str = "grouped", seed: int = 0
) -> tuple[str, np.ndarray, np.ndarray]:
    """Choose the spots that say when to stop.

    Parameters
    ----------
    data
        The spots.
    preset
        Its ``validation_share`` is the share that is held out; of groups, the fold that comes nearest to it.
    validation
        ``"grouped"``: whole patients, else sections, else blocks; ``"random"``: spots of the training patients, as in
        the paper, which leaks.
    seed
        Of the random spots.

    Returns
    -------
    str, numpy.ndarray, numpy.ndarray
        Unit, positions trained on, positions held out.
    """
    if validation not in VALIDATIONS:
        raise ValueError(f"`validation` is {validation!r}, valid: {list(VALIDATIONS)}")
    if validation == "random":
        order = np.random.default_rng([seed, 1]).permutation(len(data))
        n = len(data) - int(len(data) * (1 - preset.validation_share))
        return "spot", np.sort(order[n:]), np.sort(order[:n])
    unit, _ = grouped_folds(data.sections, data.patients, data.coordinates)
    n_folds = N_BLOCKS if unit == "block" else max(2, round(1 / preset.validation_share))
    _, folds = grouped_folds(data.sections, data.patients, data.coordinates, n_folds=n_folds, unit=unit)
    held = np.abs(np.bincount(folds) / len(data) - preset.validation_share).argmin()
    return unit, np.flatnonzero(folds != held), np.flatnonzero(folds == held)
