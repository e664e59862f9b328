"""Group spots into folds by patient, section or block of tissue; never by single spots."""

from __future__ import annotations

import numpy as np

from .._core.logs import logger

#: Limitations of held-out metrics, by the unit that was held out.
UNIT_LIMITATIONS = {
    "section": "all sections are of one patient. Metrics hold for other sections of this patient, not for other patients",
    "block": (
        "there is one section only: held-out figures are those of another part of the SAME section. They are far better than "
        "what the model reaches on other sections, let alone patients; do not report them as accuracy"
    ),
}
#: Number of blocks of a section if no larger unit can be held out.
N_BLOCKS = 5


def grouped_folds(
    sections: np.ndarray,
    patients: np.ndarray,
    coordinates: np.ndarray | None = None,
    *,
    n_folds: int | None = None,
    unit: str | None = None,
) -> tuple[str, np.ndarray]:
    """Distribute spots over folds by groups; return the unit of the groups, and codes of folds ``(n,)``.

    Units are ``"patient"``, ``"section"`` and ``"block"``. Blocks are strips of equal numbers of spots along the longer side
    of each section, and need coordinates ``(n, 2)``. The default is the first unit with at least two groups. The default,
    and largest, number of folds is one per patient or section, or five for blocks. Fewer folds have about equal numbers of
    spots.

    Examples
    --------
    >>> import numpy as np
    >>> grouped_folds(np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1]))
    ('patient', array([0, 0, 0, 1]))
    """
    codes = {"patient": patients, "section": sections}
    if unit is None:
        unit = next((name for name, groups in codes.items() if len(np.unique(groups)) > 1), "block")
    if unit == "block":
        return unit, _blocks(sections, coordinates, n_folds or N_BLOCKS)
    groups, inverse, sizes = np.unique(codes[unit], return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise ValueError(f"`unit`: there is only one {unit}; at least two are needed to hold one out")
    return unit, _balance(sizes, min(n_folds or len(groups), len(groups)))[inverse]


def warn_of_unit(unit: str) -> None:
    """Warn about the limitations of held-out metrics if patients cannot be held out."""
    if unit in UNIT_LIMITATIONS:
        logger.warning(UNIT_LIMITATIONS[unit])


def _balance(sizes: np.ndarray, n_folds: int) -> np.ndarray:
    """Assign groups to folds, the largest first, each to the fold with fewest spots so far."""
    if n_folds == len(sizes):
        return np.arange(n_folds)
    folds, filled = np.empty(len(sizes), np.intp), np.zeros(n_folds)
    for group in np.argsort(-sizes, kind="stable"):
        folds[group] = filled.argmin()
        filled[folds[group]] += sizes[group]
    return folds


def _blocks(sections: np.ndarray, coordinates: np.ndarray | None, n_folds: int) -> np.ndarray:
    assert coordinates is not None
    folds = np.empty(len(sections), np.intp)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        if len(rows) < n_folds:
            raise ValueError(f"a section of {len(rows)} spots cannot be cut into {n_folds} blocks")
        positions = coordinates[rows, np.ptp(coordinates[rows], axis=0).argmax()]
        rank = np.argsort(np.argsort(positions, kind="stable"))
        folds[rows] = rank * n_folds // len(rows)
    return folds
