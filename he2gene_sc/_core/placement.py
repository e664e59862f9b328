"""Check that windows fit into the image, that spots lie inside it, on pixels that are not blank, and are not mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..image import MIN_TISSUE
from ..image._geometry import MIN_PX
from ..stats import pitch_of
from .images import darkness_at
from .logs import warn
from .matrix import subsample
from .mpp import array_lattice, known_assay, transform_points, transformation_call

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .elements import Slide

#: A likely cause has to bring this fraction of the spots into the image, where they span this fraction of it.
_INSIDE, _SPAN = 0.9, 0.2
#: Fraction of the image that spots of a larger image span after scaling, if all of them lie outside.
_WIDE = 0.5
#: Least ratio of the µm/px of lattice and image at which they count as equal.
_SAME_SIZE = 0.8
#: Number of spots that are compared with the pixels; ratio of darkness and gain in correlation of a better placement.
_N_SPOTS, _DARKER, _BETTER = 400, 1.15, 0.15
#: Ratio of darkness of a better placement without array positions as a second criterion.
_MUCH_DARKER = 1.5
#: Spots of a larger diameter-to-pitch ratio are adjacent bins (array positions of Visium HD are mirrored by design), or overlap
#: more than cells do.
_TOUCHING, _OVERLAP = 0.9, 1.5

#: Other placements are tried if a smaller fraction of spots lies on tissue; they have to bring the second fraction onto it.
_OFF_TISSUE, _ON_TISSUE = 0.92, 0.98
#: Shifts to try, as fractions of the extent of the spots; pixels of the overview; largest level that it is read from.
_SHIFTS, _OVERVIEW_PX, _MAX_LEVEL_PX = np.linspace(-0.3, 0.3, 25), 400_000, 10**8

_AS_IS = "nothing were changed"
_SWAP = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])


def check_windows(slide: Slide, windows_um: Sequence[float]) -> None:
    """Raise if a window has too few pixels, or does not fit into the image."""
    smallest = min(windows_um)
    pixels = smallest / slide.mpp
    shortest = min(slide.pyramid.height, slide.pyramid.width)
    if not MIN_PX <= pixels <= shortest / 2:
        least, most = 2 * smallest / shortest, smallest / MIN_PX
        cause = f"image {slide.image_key!r} is too coarse; " if pixels < MIN_PX else ""
        raise ValueError(
            f"`mpp` is {slide.mpp:.4g} ({slide.mpp_source}): {cause}the smallest window ({smallest:g} µm) would be "
            f"{pixels:.3g} px on an image of {slide.pyramid.width} × {slide.pyramid.height}; valid are {MIN_PX} to {shortest // 2} px, "
            f"that is an `mpp` of {least:.3g} to {most:.3g}. Use an image of higher resolution, or check `mpp`"
        )


def check_placement(sdata: SpatialData, slide: Slide) -> None:
    """Check spots against the image and the array positions of the table.

    Warn if more than half of the spots lie outside, or if array positions are mirrored against the pixels.
    """
    outside = int((~slide.inside).sum())
    if outside > len(slide.inside) / 2:
        message = _outside_message(sdata, slide, outside)
        if not slide.inside.any():
            raise ValueError(message)
        warn(f"{message} Spots outside are not predicted, the others may be misplaced")
    pitch = pitch_of(slide.centres) if len(slide.centres) > 1 else np.inf
    if pitch == 0:
        raise ValueError(
            f"`shapes_key` {slide.shapes_key!r}: most spots lie on top of each other; each needs its own centre. Check how the "
            "shapes were made, and keep joined sections as separate regions"
        )
    diameter = slide.diameter_px
    if slide.table_key is not None and diameter > _OVERLAP * pitch:
        warn(
            f"`shapes_key` {slide.shapes_key!r}: the spots overlap, with a diameter of {diameter:.3g} px {pitch:.3g} px apart on image "
            f"{slide.image_key!r}. Their coordinates look like those of a smaller image, or the diameter is that of another slide: "
            "spots may be predicted from other tissue. Check both, or transform the spots by the width of this image over the width of "
            f"that one. The call that makes them adjacent: {transformation_call(sdata, slide, np.diag([diameter / pitch, diameter / pitch, 1]))}"
        )
    chosen = subsample(np.flatnonzero(slide.inside))
    darkness = darkness_at(slide.pyramid, slide.image_key, slide.centres[chosen], diameter)
    # Without spots inside, an image is not blank.
    if darkness.blank:
        raise ValueError(
            f"`image_key` {slide.image_key!r} is blank at all spots: black, white or transparent. Name the image that "
            "shows the tissue, or check the transformations"
        )
    _check_orientation(sdata, slide, chosen, darkness.mean)


def _outside_message(sdata: SpatialData, slide: Slide, outside: int) -> str:
    (left, top), (right, bottom) = slide.centres.min(0), slide.centres.max(0)
    width, height = slide.pyramid.width, slide.pyramid.height
    found = (
        f"`shapes_key` {slide.shapes_key!r}: {outside} of {len(slide.inside)} spots lie outside image {slide.image_key!r} "
        f"({width} × {height} px; the spots lie at x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f})."
    )
    for cause, matrix in _possible_causes(sdata, slide):
        places = transform_points(slide.centres, matrix)
        inside = ((places >= 0) & (places <= [width, height])).all(1)
        if inside.mean() >= _INSIDE and (np.ptp(places, axis=0) / [width, height]).max() >= _SPAN:
            return f"{found} {cause}; if so: {transformation_call(sdata, slide, matrix)}."
    factor = 0.95 * min(width / max(right, 1), height / max(bottom, 1))
    span = factor * np.ptp(slide.centres, axis=0) / [width, height]
    # Spots that were shifted, not scaled, would span little of the image.
    near = left < width and top < height
    if factor < 1 and (near or span.max() >= _WIDE) and min(left, top) >= 0:
        return (
            f"{found} Their coordinates look like those of a larger image, such as the full-resolution one: use that image, "
            "or scale the spots by the ratio of the image widths, about: "
            f"{transformation_call(sdata, slide, np.diag([factor, factor, 1]))}."
        )
    return f"{found} Check the transformations, `coordinate_system` and `image_key`, of {sorted(sdata.images)}."


def _possible_causes(sdata: SpatialData, slide: Slide) -> Iterator[tuple[str, np.ndarray]]:
    """Yield possible causes, each with the matrix in pixels that corrects it."""
    yield "x and y of the spots look swapped", _SWAP
    if (slide.centres[:, 1] < 0).mean() > 0.5:
        yield "y of the spots looks mirrored", np.diag([1.0, -1, 1])
    if "pitch" not in slide.mpp_source and abs(slide.mpp - 1) > 0.05:
        yield "the coordinates look like micrometres, not pixels", np.diag([1 / slide.mpp, 1 / slide.mpp, 1])
    for name, factor in _scale_factors(sdata, slide).items():
        what = f"`{name}` {factor:.4g} in uns['spatial']"
        yield f"full-resolution coordinates on a reduced image, by {what}", np.diag([factor, factor, 1])
        yield f"coordinates of a reduced image, by {what}", np.diag([1 / factor, 1 / factor, 1])
    assay = known_assay(slide.centres, slide.diameter_px)
    if assay is not None and not _SAME_SIZE < assay[0] / slide.mpp < 1 / _SAME_SIZE:
        factor = assay[0] / slide.mpp
        what = f"the pitch of {assay[1]} at {slide.mpp:.4g} µm/px"
        yield f"coordinates of a {'larger' if factor < 1 else 'smaller'} image, by {what}", np.diag([factor, factor, 1])


def _scale_factors(sdata: SpatialData, slide: Slide) -> dict[str, float]:
    """Return the scale factors of Space Ranger, if the table has them."""
    libraries = {} if slide.table_key is None else sdata[slide.table_key].uns.get("spatial", {})
    found = {}
    for library in libraries.values() if isinstance(libraries, Mapping) else ():
        factors = library.get("scalefactors", {}) if isinstance(library, Mapping) else {}
        for name in ("tissue_hires_scalef", "tissue_lowres_scalef"):
            if isinstance(factors, Mapping) and 0 < float(factors.get(name, 0)) < 1:
                found[name] = float(factors[name])
    return found


def _check_orientation(sdata: SpatialData, slide: Slide, chosen: np.ndarray, darkness: np.ndarray) -> None:
    """Warn if array positions are mirrored against the pixels, unless the pixels confirm the placement.

    Without them, warn if there is much more tissue under the spots with x and y swapped. ``darkness`` ``(n,)`` is that of the
    image at the ``chosen`` spots.
    """
    if not slide.inside.any() or slide.table_key is None:
        return
    obs = sdata[slide.table_key].obs.iloc[slide.rows]
    lattice, scattered = array_lattice(obs, slide.centres)
    if scattered:
        warn(
            f"`array_row` and `array_col` of table {slide.table_key!r} do not match the positions of the spots of "
            f"{slide.shapes_key!r}: the ids of table and spots look mixed up, as after sorting one of them. If so, all "
            "spots are predicted from other tissue; compare sdata[table].obs with sdata[shapes]. If these columns belong "
            "to another array, delete them"
        )
    if lattice is None or slide.diameter_px >= _TOUCHING * pitch_of(slide.centres):
        then = _darkness(slide, transform_points(slide.centres[chosen], _SWAP))
        both = np.isfinite(then)
        if both.mean() >= _INSIDE and then[both].mean() > _MUCH_DARKER * darkness[both].mean():
            warn(
                f"`shapes_key` {slide.shapes_key!r}: x and y of the spots look swapped: there is more tissue under them if they "
                f"are exchanged. If so, all spots are predicted from other tissue; correct it with {transformation_call(sdata, slide, _SWAP)}"
            )
        return
    if np.linalg.det(lattice) >= 0:
        return
    if abs(lattice[0, 1] * lattice[1, 0]) > abs(lattice[0, 0] * lattice[1, 1]):
        causes = {"x and y of the spots look swapped": _SWAP}
    else:
        mirrors = mirror_matrices(slide)
        causes = {f"{axis} of the spots looks mirrored": mirrors[f"{axis} of the spots were mirrored"] for axis in "xy"}
    better = {cause: _compare_placements(sdata, slide, matrix) for cause, matrix in causes.items()}
    if max(better.values()) < 0:
        return
    likeliest = [cause for cause in causes if better[cause] == max(better.values())]
    cause, shown = likeliest[0], "; the pixels agree" if max(better.values()) > 0 else ""
    call = transformation_call(sdata, slide, causes[cause])
    if len(likeliest) > 1:
        cause = "x or y of the spots looks mirrored"
        call = f"{call} for x, or {transformation_call(sdata, slide, causes[likeliest[1]])} for y"
    warn(
        f"`array_row` and `array_col` of table {slide.table_key!r} are mirrored against the pixels: {cause}{shown}. If so, "
        f"all spots are predicted from other tissue; correct it with {call}. Ignore this "
        "if the section was imaged mirrored, as in some CytAssist runs, or array_row counts columns"
    )


def check_on_tissue(sdata: SpatialData, slide: Slide, share: np.ndarray) -> None:
    """Warn if many spots lie on glass, but nearly all would lie on tissue if they were mirrored, swapped or shifted.

    ``share`` ``(n,)`` is the fraction of tissue at each spot. An overview of the image is only read if too few are on tissue.
    """
    now = float((share >= MIN_TISSUE).mean()) if len(share) else 1.0
    if now >= _OFF_TISSUE or slide.pyramid.levels[-1].height * slide.pyramid.levels[-1].width > _MAX_LEVEL_PX:
        return
    placements = {_AS_IS: np.eye(3), **mirror_matrices(slide)}
    # Try small shifts first, which win among equally good ones.
    for x, y in sorted(((x, y) for x in _SHIFTS for y in _SHIFTS), key=lambda shift: np.hypot(*shift)):
        matrix = shift_matrix(slide, x, y)
        placements[f"they were shifted by ({matrix[0, 2]:.0f}, {matrix[1, 2]:.0f}) px"] = matrix
    shares = tissue_shares(slide, placements)
    cause = max(shares, key=shares.__getitem__)
    # The overview may find tissue at the present placement where the full resolution does not.
    if shares[_AS_IS] >= _OFF_TISSUE or shares[cause] < _ON_TISSUE:
        return
    warn(
        f"`shapes_key` {slide.shapes_key!r}: {now:.0%} of the spots lie on tissue, and {shares[cause]:.0%} would if {cause}. If so, all spots are "
        f"predicted from other tissue; correct it with {transformation_call(sdata, slide, placements[cause])}. Ignore this warning if the spots cover glass too"
    )


def mirror_matrices(slide: Slide) -> dict[str, np.ndarray]:
    """Return matrices that mirror, rotate and swap the spots in the image, by their effect."""
    width, height = slide.pyramid.width, slide.pyramid.height
    return {
        "x of the spots were mirrored": np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]),
        "y of the spots were mirrored": np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]]),
        "the spots were turned by half a turn": np.array([[-1.0, 0, width], [0, -1, height], [0, 0, 1]]),
        "x and y of the spots were exchanged": _SWAP,
    }


def shift_matrix(slide: Slide, x: float, y: float) -> np.ndarray:
    """Return the matrix that shifts the spots by fractions of their extent."""
    across, down = np.array([x, y]) * np.ptp(slide.centres, axis=0)
    return np.array([[1, 0, across], [0, 1, down], [0, 0, 1]])


def tissue_shares(slide: Slide, placements: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the fraction of spots on tissue after each transformation, from an overview of the image; outside is glass."""
    from scipy.ndimage import uniform_filter

    from ..image import read_reduced, tissue_pixels

    overview = tissue_pixels(read_reduced(slide.pyramid, _OVERVIEW_PX, slide.pixel_factor))[0]
    size = np.array(overview.shape[::-1])
    scale = size / [slide.pyramid.width, slide.pyramid.height]
    side = max(1, round(slide.diameter_px * float(scale.mean())))
    on_tissue = uniform_filter(overview.astype(np.float32), side) >= MIN_TISSUE
    centres, shares = subsample(slide.centres, 2000), {}
    for cause, matrix in placements.items():
        at = np.floor(transform_points(centres, matrix) * scale).astype(int)
        inside = ((at >= 0) & (at < size)).all(1)
        shares[cause] = float(on_tissue[at[inside, 1], at[inside, 0]].sum()) / len(centres)
    return shares


def _darkness(slide: Slide, places: np.ndarray) -> np.ndarray:
    """Return the darkness of the image in squares as large as a spot."""
    return darkness_at(slide.pyramid, slide.image_key, places, slide.diameter_px).mean


def _compare_placements(sdata: SpatialData, slide: Slide, matrix: np.ndarray) -> int:
    """Return 1 if the pixels fit better after a transformation, -1 if before, 0 if equally.

    Spots lie on tissue, which is darker than glass, and counts are higher where cells are denser.
    """
    from scipy.stats import spearmanr

    chosen = subsample(np.flatnonzero(slide.inside), _N_SPOTS)
    places = slide.centres[chosen]
    now, then = _darkness(slide, places), _darkness(slide, transform_points(places, matrix))
    both = np.isfinite(now) & np.isfinite(then)
    if np.isfinite(then).mean() < _INSIDE or not both.any():
        return -1
    ratio = then[both].mean() / max(now[both].mean(), 1e-9)
    if not 1 / _DARKER < ratio < _DARKER:
        return 1 if ratio > 1 else -1
    values = sdata[slide.table_key].X
    if values is None:
        return 0
    depth = np.asarray(values[slide.rows[chosen[both]]].sum(axis=1), float).ravel()
    if not np.isfinite(depth).all() or min(np.ptp(depth), np.ptp(now[both]), np.ptp(then[both])) == 0:
        return 0
    gain = spearmanr(then[both], depth)[0] - spearmanr(now[both], depth)[0]
    return 0 if abs(gain) < max(_BETTER, 3 / np.sqrt(len(depth))) else int(np.sign(gain))
