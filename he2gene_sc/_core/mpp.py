"""µm per pixel of an image: given, stated by the object, or told by the pitch of a known assay; never guessed."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._keys import ATTRS

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

_MICROMETRE_SYSTEMS = ("micrometer", "micrometers", "micrometre", "micrometres", "micron", "microns", "um", "µm", "μm")


@dataclass(frozen=True)
class _Assay:
    name: str
    pitch_um: float
    neighbours: int
    ratio: tuple[float, float]


#: Lattice and diameter-to-pitch ratio by which an assay is known. Some readers write Visium circles too wide.
_ASSAYS = (
    _Assay("Visium (100 µm pitch)", 100.0, 6, (0.45, 0.75)),
    _Assay("legacy ST (200 µm pitch)", 200.0, 4, (0.4, 0.6)),
)


def check_mpp(mpp: float | None) -> None:
    """Refuse a µm per pixel that is not a positive finite number; ``None`` means unknown."""
    valid = isinstance(mpp, int | float | np.number) and not isinstance(mpp, bool) and np.isfinite(mpp) and mpp > 0
    if mpp is not None and not valid:
        raise ValueError(f"`mpp` is {mpp!r}; a positive number of µm per pixel is needed, for example 0.5")


def affine(element: Any, coordinate_system: str) -> np.ndarray:
    """3 × 3 matrix from the x and y of an element to a coordinate system."""
    from spatialdata.transformations import get_transformation

    transformation = get_transformation(element, to_coordinate_system=coordinate_system)
    return np.asarray(transformation.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y")), dtype=float)


def stored_mpp(sdata: SpatialData, image_key: str) -> tuple[float, str] | None:
    """µm per pixel that the object itself states for an image: written by our readers, or a system in µm."""
    from spatialdata.transformations import get_transformation

    stored = sdata.attrs.get(ATTRS, {}).get("mpp", {}).get(image_key)
    if stored is not None:
        if not (isinstance(stored, int | float) and np.isfinite(stored) and stored > 0):
            raise ValueError(f"sdata.attrs[{ATTRS!r}]['mpp'][{image_key!r}] is {stored!r}; a positive number is needed")
        return float(stored), "metadata"
    for system in get_transformation(sdata.images[image_key], get_all=True):
        if system.lower() in _MICROMETRE_SYSTEMS:
            matrix = affine(sdata.images[image_key], system)
            return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))), f"coordinate system {system!r}"
    return None


def resolve_mpp(
    sdata: SpatialData, image_key: str, mpp: float | None, centres: np.ndarray, diameter_px: float, *, measured: bool
) -> tuple[float, str]:
    """Find µm per pixel and say where it was found: argument, then what the object states, then a known assay.

    Parameters
    ----------
    sdata, image_key
        The image.
    mpp
        The caller's own value.
    centres
        Spots, ``(n, 2)``, pixels of level 0.
    diameter_px
        Their diameter.
    measured
        Whether the spots carry measurements: then a value that contradicts the lattice of a known assay is warned of.

    Raises
    ------
    ValueError
        If it is stated nowhere and the spots are no known lattice.
    """
    assay = _known_assay(centres, diameter_px)
    found = (float(mpp), "argument") if mpp is not None else stored_mpp(sdata, image_key) or assay
    if found is None:
        raise ValueError(
            f"`mpp` of image {image_key!r} is unknown: give it in µm per pixel (0.5 for a 20× scan, 0.25 for 40×); the "
            "object states none and the spots are no Visium or legacy ST lattice"
        )
    if measured and assay is not None and not 0.8 < found[0] / assay[0] < 1.25:
        warnings.warn(
            f"µm/px of image {image_key!r} is {found[0]:.4g} ({found[1]}), but its spots look like {assay[1]}, which makes "
            f"{assay[0]:.4g}; if that is right, pass mpp={assay[0]:.4g}",
            UserWarning,
            stacklevel=4,
        )
    if not measured and found[1] == (assay and assay[1]):
        warnings.warn(
            f"µm/px of image {image_key!r} was taken from the lattice of its spots, as {found[1]}: {found[0]:.4g}. Nothing "
            "was measured on them, so they may be no such assay; pass mpp= to be sure",
            UserWarning,
            stacklevel=4,
        )
    logger.info("image %r: %.4g µm/px (%s)", image_key, *found)
    return found


def _known_assay(centres: np.ndarray, diameter_px: float) -> tuple[float, str] | None:
    """µm/px from lattice, pitch and diameter of the spots, where they are those of a known assay."""
    from scipy.spatial import KDTree

    if len(centres) < 12:
        return None
    distances = KDTree(centres).query(centres, k=9)[0][:, 1:]
    near = distances < 1.2 * np.median(distances[:, 0])
    pitch = float(np.median(distances[near])) if near.any() else 0.0
    if pitch <= 0:
        return None
    neighbours = int(np.quantile(near.sum(1), 0.75))
    for assay in _ASSAYS:
        if neighbours == assay.neighbours and assay.ratio[0] <= diameter_px / pitch <= assay.ratio[1]:
            return assay.pitch_um / pitch, assay.name
    return None
