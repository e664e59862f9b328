"""Find µm per pixel of an image: an argument, a value in the object, or the pitch of a known assay; never a guess."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import validate
from .elements import he2gene_attrs, spot_element
from .hints import mpp_hint
from .keys import ATTRS
from .logs import logger, warn
from .rasters import levels, shared_systems, systems_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .elements import Slide

#: Valid µm per pixel: from an electron microscope to a thumbnail of a slide.
_PLAUSIBLE = (1e-3, 1e4)
_MICROMETRE_SYSTEMS = ("micrometer", "micrometers", "micrometre", "micrometres", "micron", "microns", "um", "µm", "μm")

#: Coordinates are in µm if the lattice gives 1 µm/px within this tolerance; the second one if another µm/px is known, since
#: the pitch of printed arrays is off by up to a percent, and that of a few spots by more.
_EXACT, _NEARLY = 2e-3, 0.03
#: Warn if the scale differs between directions by more than this fraction.
_MAX_ANISOTROPY = 0.05
#: ``sdata.attrs[ATTRS][_MPP_IMAGE][image_key]``: µm/px, and size, scale and position of the image that it was set for.
_MPP_IMAGE = "mpp_of"


#: Known assays: name, pitch in µm, number of neighbours, and limits of the ratio of diameter to pitch. Some readers write
#: Visium circles too wide.
_ASSAYS = (
    ("Visium (100 µm pitch)", 100.0, 6, (0.45, 0.75)),
    ("legacy ST (200 µm pitch)", 200.0, 4, (0.4, 0.6)),
)
_VISIUM_SPOT_UM = 55.0
#: Size of the bins in the names that Space Ranger gives to them.
_BIN = r"^s_(\d+)um_"


def check_mpp(mpp: float | None) -> None:
    """Raise unless µm per pixel is a plausible positive number, or ``None`` (unknown)."""
    if mpp is None:
        return
    if not (validate.is_number(mpp) and mpp > 0):
        raise ValueError(f"`mpp` is {mpp!r}; a positive number of µm per pixel is needed, for example 0.5")
    if not _PLAUSIBLE[0] <= mpp <= _PLAUSIBLE[1]:
        raise ValueError(
            f"`mpp` is {mpp!r}; µm per pixel is needed, {_PLAUSIBLE[0]:g} to {_PLAUSIBLE[1]:g}: 0.5 for a 20× scan, 0.25 for 40×"
        )


def affine(element: Any, coordinate_system: str) -> np.ndarray:
    """Return the 3 × 3 matrix from x and y of an element to a coordinate system."""
    from spatialdata.transformations import get_transformation

    transformation = get_transformation(element, to_coordinate_system=coordinate_system)
    matrix = np.asarray(transformation.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y")), dtype=float)
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"`coordinate_system` {coordinate_system!r}: a transformation of image or spots has NaN or infinite numbers; set it "
            "again with spatialdata.transformations.set_transformation"
        )
    return matrix


def transform_points(xy: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Transform points ``(n, 2)`` by a 3 × 3 matrix."""
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def stored_mpp(sdata: SpatialData, image_key: str) -> tuple[float, str] | None:
    """Return µm per pixel of an image that is stored in the object, by our readers or by a coordinate system in µm."""
    stored = he2gene_attrs(sdata).get("mpp", {}).get(image_key)
    if stored is not None:
        if not (validate.is_number(stored) and stored > 0):
            raise ValueError(
                f"`sdata`: attrs[{ATTRS!r}]['mpp'][{image_key!r}] is {stored!r}; a positive number is needed: "
                f"sdata.attrs[{ATTRS!r}]['mpp'][{image_key!r}] = 0.5"
            )
        _check_same_image(sdata, image_key, float(stored))
        return float(stored), "metadata"
    for system in systems_of(sdata.images[image_key]):
        if system.lower() in _MICROMETRE_SYSTEMS:
            return length_scale(affine(sdata.images[image_key], system)), f"coordinate system {system!r}"
    return None


def attrs_with_mpp(sdata: SpatialData, image_key: str, mpp: float) -> dict[str, Any]:
    """Return ``sdata.attrs[ATTRS]`` with µm per pixel of an image, and the frame of that image."""
    facts = he2gene_attrs(sdata)
    stated: dict[str, Any] = {"mpp": float(mpp)}
    if image_key in sdata.images:
        stated[_MPP_IMAGE] = [float(mpp), *_frame(sdata.images[image_key])]
    return {**facts, **{name: {**facts.get(name, {}), image_key: value} for name, value in stated.items()}}


def _frame(image: Any) -> tuple[float, ...]:
    """Return width, height, length of a pixel, and position of the corner of an image in a coordinate system."""
    size, matrix = levels(image)[0].sizes, affine(image, shared_systems(image)[0])
    return size["x"], size["y"], length_scale(matrix, quiet=True), *map(float, matrix[:2, 2])


def _check_same_image(sdata: SpatialData, image_key: str, mpp: float) -> None:
    """Raise if the image of a stored µm per pixel was replaced by an image of another size that is not a crop of it."""
    stated = he2gene_attrs(sdata).get(_MPP_IMAGE, {}).get(image_key, [])
    if not isinstance(stated, list) or len(stated) != 6 or stated[0] != mpp:
        return
    was, now = np.array(stated[1:], float), np.array(_frame(sdata.images[image_key]))
    size, scale = now[:2] / was[:2], now[2] / was[2]
    if (size == 1).all():
        return
    same_form, same_scale = abs(size[0] / size[1] - 1) < 0.02, abs(scale - 1) < 0.01
    shifted = np.abs(now[3:] - was[3:]).max() > 0.5 * now[2]
    if (size <= 1).all() and same_scale and (shifted or not same_form):
        return
    likely = mpp / size[0] if same_form and not shifted else mpp * scale
    found = (
        f"`mpp` of image {image_key!r} was stated as {mpp:.4g} for {was[0]:.0f} × {was[1]:.0f} pixels, but the image now has "
        f"{now[0]:.0f} × {now[1]:.0f}"
    )
    own, hint = f"state it: sdata.attrs[{ATTRS!r}]['mpp'][{image_key!r}] = {likely:.4g}", mpp_hint(image_key, likely)
    own += "" if hint.startswith("state it") else f", or {hint}"
    if (size > 1).any() or (not same_scale and (abs(size * scale - 1) < 0.02).all()):
        raise ValueError(f"{found}: it was replaced or resampled. If it shows the same tissue, {own}")
    warn(
        f"{found}. {mpp:.4g} is right if it was cropped. If it was resampled, {likely:.4g} is right, and lengths are wrong now; {own}"
    )


def known_mpp(sdata: SpatialData, image_key: str, mpp: float | None) -> float:
    """Return µm per pixel of an image without spots: the argument, or the value in the object."""
    check_mpp(mpp)
    found = mpp if mpp is not None else (stored_mpp(sdata, image_key) or [None])[0]
    if found is None:
        raise ValueError(f"`mpp` of image {image_key!r} is unknown: give it in µm per pixel (0.5 for a 20× scan)")
    return float(found)


def spots_mpp(sdata: SpatialData, shapes_key: str, to_pixels: np.ndarray) -> tuple[float, str] | None:
    """Return µm per pixel from the alignment of spots in µm: a coordinate system in µm, or shapes of Xenium's reader."""
    scale = length_scale(to_pixels)
    element = spot_element(sdata, shapes_key)
    for system in systems_of(element):
        if system.lower() in _MICROMETRE_SYSTEMS:
            return length_scale(affine(element, system)) / scale, f"coordinate system {system!r} of the spots"
    if sdata.attrs.get("spatialdata_io_reader") != "xenium":
        return None
    # Xenium's shapes are in µm; its labels are in pixels, which shapes or transcripts relate to µm.
    if shapes_key in sdata.shapes:
        return 1 / scale, "Xenium, shapes in µm"
    for other in [*sdata.shapes.values(), *sdata.points.values()]:
        if shared := sorted(shared_systems(element, other)):
            um = length_scale(affine(element, shared[0])) / length_scale(affine(other, shared[0]))
            return um / scale, "Xenium, shapes in µm"
    return None


def length_scale(matrix: np.ndarray, *, quiet: bool = False) -> float:
    """Return the scale of a 3 × 3 matrix; warn if it depends on the direction."""
    most, least = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not quiet and least < (1 - _MAX_ANISOTROPY) * most:
        warn(
            f"the transformations of image and spots are anisotropic or sheared: they scale lengths by {least:.4g} in one "
            f"direction and by {most:.4g} in the other; the mean is used. Resample the image to square pixels"
        )
    return float(np.sqrt(most * least))


def resolve_mpp(sdata: SpatialData, slide: Slide, mpp: float | None, to_pixels: np.ndarray) -> tuple[float, str]:
    """Return µm per pixel and its source: the argument, else the value in the object, else a known assay.

    ``slide`` is still in pixels, with 1 µm/px; ``to_pixels`` maps the units of its spots to pixels. Warn if the value contradicts
    the lattice of a known assay.
    """
    image_key, shapes_key, diameter_px = slide.image_key, slide.shapes_key, slide.diameter_px
    obs = None if slide.table_key is None else sdata[slide.table_key].obs.iloc[slide.rows]
    lattice = None if obs is None else array_lattice(obs, slide.centres)[0]
    assay = _bins(lattice, obs) or known_assay(slide.centres, diameter_px) or _visium_array(lattice, diameter_px)
    by_array = _visium_array(lattice)

    def scaled(factor: float) -> str:
        return transformation_call(sdata, slide, np.diag([factor, factor, 1]))

    found: tuple[float, str] | None
    if mpp is not None:
        found = float(mpp), "argument"
    else:
        found = stored_mpp(sdata, image_key) or spots_mpp(sdata, shapes_key, to_pixels) or assay
    if found is None and by_array is not None:
        pitch, width = _ASSAYS[0][1] / by_array[0], _VISIUM_SPOT_UM / by_array[0]
        raise ValueError(
            f"`mpp` of image {image_key!r} is unknown: by their array positions the spots of {shapes_key!r} are those of Visium, "
            f"{pitch:.4g} px apart, but they are {diameter_px:.4g} px wide, not {width:.3g}. Either the diameter is that of another "
            f"slide, then {mpp_hint(image_key, by_array[0])}; or their coordinates are {_coordinate_frame(diameter_px / width, by_array[0])}, "
            f"then transform them: {scaled(diameter_px / width)}"
        )
    if found is None:
        image, hint = sdata.images[image_key], ""
        for system in systems_of(image):
            value = length_scale(affine(image, system), quiet=True)
            if abs(value - 1) > 1e-6:
                hint += f"; if coordinate system {system!r} is in µm, {mpp_hint(image_key, value)}"
        raise ValueError(
            f"`mpp` of image {image_key!r} is unknown: give it in µm per pixel (0.5 for a 20× scan, 0.25 for 40×); the "
            f"object does not state it and the spots are not a lattice of Visium, Visium HD or legacy ST"
            f"{hint or '; ' + mpp_hint(image_key)}"
        )

    assay = assay or by_array
    by_assay = assay is not None and found[1] == assay[1]
    ratio = 1.0 if obs is None or assay is None else found[0] / assay[0]
    if assay is not None and not 0.8 < ratio < 1.25:
        in_um = abs(assay[0] - 1) < _NEARLY
        cause = (
            f"its coordinates look like micrometres, not pixels; if they are, transform them: {scaled(1 / found[0])}"
            if in_um
            else f"if that is right, {mpp_hint(image_key, assay[0])}; if the coordinates are {_coordinate_frame(1 / ratio)}, "
            f"transform them: {scaled(1 / ratio)}"
        )
        tenfold = ", ten times off" if not in_um and any(0.8 < r < 1.25 for r in (ratio / 10, ratio * 10)) else ""
        warn(
            f"µm/px of image {image_key!r} is {found[0]:.4g} ({found[1]}), but its spots look like {assay[1]}, which gives "
            f"{assay[0]:.4g}{tenfold}; {cause}"
        )
    elif assay is not None and by_assay and abs(assay[0] - 1) < _EXACT:
        warn(
            f"the spots of {shapes_key!r} look like {assay[1]} at exactly 1 µm/px: their coordinates look like micrometres, "
            f"not pixels of image {image_key!r}. If so, the wrong pixels are read; transform them by the true µm/px, for "
            f"0.5: {scaled(2.0)}. If the image has 1 µm/px, {mpp_hint(image_key, 1.0)}"
        )
    if obs is None and by_assay:
        warn(
            f"µm/px of image {image_key!r} was taken from the lattice of its spots, as {found[1]}: {found[0]:.4g}. These "
            f"spots have no counts, so they may not be of this assay; to be sure, {mpp_hint(image_key)}"
        )
    logger.info("image %r: %.4g µm/px (%s)", image_key, *found)
    return found


def _coordinate_frame(factor: float, mpp: float = 0.0) -> str:
    """Describe coordinates that have to be scaled by ``factor``; ``mpp`` is that of the lattice."""
    if abs(mpp - 1) < _NEARLY:
        return "micrometres, not pixels"
    return f"those of a {'larger' if factor < 1 else 'smaller'} image of the slide"


def transformation_call(sdata: SpatialData, slide: Slide, matrix: np.ndarray) -> str:
    """Return the call that moves spots by a 3 × 3 matrix in pixels of the image, after their present transformation."""
    from spatialdata.transformations import Identity

    system, element = slide.coordinate_system, spot_element(sdata, slide.shapes_key)
    transformations = systems_of(element)
    image = affine(sdata.images[slide.image_key], system)
    whole = image @ matrix @ np.linalg.inv(image) @ affine(element, system)
    factor = whole[0, 0]
    if isinstance(transformations[system], Identity) and np.allclose(whole, np.diag([factor, factor, 1])):
        made = f"spatialdata.transformations.Scale([{factor:.6g}, {factor:.6g}], axes=('x', 'y'))"
    else:
        rows = ", ".join("[" + ", ".join(f"{0.0 if abs(v) < 1e-9 else v:.8g}" for v in row) + "]" for row in whole)
        made = f"spatialdata.transformations.Affine([{rows}], ('x', 'y'), ('x', 'y'))"
    target = f"{made}, {system!r}" if len(transformations) == 1 else f"{{{system!r}: {made}}}, set_all=True"
    return f"spatialdata.transformations.set_transformation(sdata[{slide.shapes_key!r}], {target})"


def array_lattice(obs: pd.DataFrame, centres: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """Fit pixels per step of ``array_col`` and ``array_row``, 2 × 2, by least squares; ``None`` if the spots do not lie on the array.

    Return also whether array positions explain less than half of the variance of the spot centres. Spots without array
    positions are left out; at least 12 are needed, and half of all.
    """
    names = ["array_col", "array_row"]
    if not set(names) <= set(obs):
        return None, False
    columns = [pd.to_numeric(obs[name], errors="coerce").to_numpy(float, na_value=np.nan) for name in names]
    design = np.column_stack([*columns, np.ones(len(obs))])
    known = np.isfinite(design).all(axis=1)
    if known.sum() < max(12, len(obs) / 2):
        return None, False
    solution, _, rank, _ = np.linalg.lstsq(design[known], centres[known], rcond=None)
    lattice, residuals = solution[:2].T, design[known] @ solution - centres[known]
    if rank < 3:
        return None, False
    if np.sqrt(np.mean(residuals**2)) < 0.3 * np.linalg.norm(lattice, axis=0).min():
        return lattice, False
    # Repeated positions come from several arrays.
    repeated = obs.dropna(subset=names).duplicated(names).any()
    return None, bool(not repeated and (residuals.var(axis=0) > centres.var(axis=0) / 2).all())


def _bins(lattice: np.ndarray | None, obs: pd.DataFrame | None) -> tuple[float, str] | None:
    """Return µm/px from the array positions of Visium HD and the size in the names of its bins (s_008um_00012_00034-1)."""
    if lattice is None or obs is None:
        return None
    sizes = set(obs.index.astype(str).str.extract(_BIN, expand=False))
    size = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(size, str):
        return None
    return float(size) / float(np.linalg.norm(lattice, axis=0).mean()), f"Visium HD ({float(size):g} µm bins)"


def _visium_array(lattice: np.ndarray | None, diameter_px: float | None = None) -> tuple[float, str] | None:
    """Return µm/px from Visium array positions (50 µm per column, 86.6 µm per row), which needs few spots.

    Without a diameter, it is not checked.
    """
    if lattice is None:
        return None
    column, row = np.linalg.norm(lattice, axis=0)
    name, pitch_um, _, (low, high) = _ASSAYS[0]
    if abs(row / column / np.sqrt(3) - 1) > 0.02:
        return None
    if diameter_px is not None and not low <= diameter_px / (2 * column) <= high:
        return None
    return pitch_um / (2 * column), name


def known_assay(centres: np.ndarray, diameter_px: float) -> tuple[float, str] | None:
    """Return µm/px from lattice, pitch and diameter of the spots, if they match a known assay."""
    from scipy.spatial import KDTree

    if len(centres) < 12:
        return None
    distances = KDTree(centres).query(centres, k=9)[0][:, 1:]
    near = distances < 1.2 * np.median(distances[:, 0])
    pitch = float(np.median(distances[near])) if near.any() else 0.0
    if pitch <= 0:
        return None
    neighbours = int(np.quantile(near.sum(1), 0.75))
    for name, pitch_um, n, (low, high) in _ASSAYS:
        if neighbours == n and low <= diameter_px / pitch <= high:
            return pitch_um / pitch, name
    return None
