"""Which spots lie beside which on the grid of an assay."""

from __future__ import annotations

import numpy as np

N_NEIGHBOURS = 8
#: In units of the pitch: beyond the diagonal of a square grid (1.41), short of the next ring (1.73 on a hexagonal one).
_REACH = 1.57


def neighbour_table(
    coordinates: np.ndarray, pitch_um: float | None = None, sections: np.ndarray | None = None
) -> np.ndarray:
    """Neighbours of each spot on its grid, ``(n, 8)`` int64, nearest first, -1 where there is none.

    Up to 8 on a square grid, 6 on a hexagonal one. It may be turned; spots may stray by a tenth of the pitch, which
    is read off each section by default. Coordinates ``(n, 2)`` are in µm.

    Examples
    --------
    >>> import numpy as np
    >>> neighbour_table(np.array([[0.0, 0.0], [200.0, 0.0], [600.0, 0.0]]), 200.0)[:, 0]
    array([ 1,  0, -1])
    """
    from scipy.spatial import KDTree

    coordinates = np.asarray(coordinates, float)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not np.isfinite(coordinates).all():
        raise ValueError(
            f"`coordinates` has shape {coordinates.shape}; finite x and y of each spot, (n, 2), are needed"
        )
    if pitch_um is not None and not (np.isfinite(pitch_um) and pitch_um > 0):
        raise ValueError(f"`pitch_um` is {pitch_um}; a positive number of µm is needed")
    sections = np.zeros(len(coordinates), int) if sections is None else np.asarray(sections)
    if sections.shape != (len(coordinates),):
        raise ValueError(f"`sections` has shape {sections.shape}; one code a spot, ({len(coordinates)},), is needed")
    table = np.full((len(coordinates), N_NEIGHBOURS), -1, np.int64)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        if len(rows) < 2:
            continue
        tree = KDTree(coordinates[rows])
        # One more than asked for: the nearest spot to a spot is itself.
        distance, found = tree.query(coordinates[rows], k=min(N_NEIGHBOURS + 1, len(rows)))
        pitch = _pitch(distance) if pitch_um is None else pitch_um
        near = (found != np.arange(len(rows))[:, None]) & (distance <= _REACH * pitch)
        for row, (candidates, kept) in enumerate(zip(found, near, strict=True)):
            chosen = candidates[kept][:N_NEIGHBOURS]
            table[rows[row], : len(chosen)] = rows[chosen]
    return table


def _pitch(distance: np.ndarray) -> float:
    """Read the pitch off the distances ``(n, k)`` of each spot to itself and those around it."""
    nearest = np.median(distance[:, 1])
    around = distance[:, 1:]
    return float(around[around <= 1.3 * nearest].mean())
