"""Whether spots lie on the image where they should: inside it, on pixels that show something, not mirrored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from .images import darkness_at, subsample
from .mpp import array_lattice, is_scattered, known_assay, transform_points, transformation_call
from .spots import pitch_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .slide import Slide

#: Share of spots that a likely cause has to bring into the image, and of the image that they then span.
_INSIDE, _SPAN = 0.9, 0.2
#: µm/px by the lattice over that of the image, from which on they are taken for the same.
_SAME_SIZE = 0.8
#: Spots that are compared with the pixels, and by how much one placement has to be better to be called right.
_N_SPOTS, _DARKER, _BETTER = 400, 1.15, 0.15
#: The same without array positions, which have to agree else.
_MUCH_DARKER = 1.5
#: Diameter to pitch from which spots are bins side by side: those of Visium HD run mirrored as they should.
_TOUCHING = 0.9

_SWAP = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])


def check_placement(sdata: SpatialData, slide: Slide) -> None:
    """Check spots against the image and the array positions of the table.

    Warns where more than half of the spots lie outside, or array positions run mirrored against the pixels.
    """
    outside = int((~slide.inside).sum())
    if outside > len(slide.inside) / 2:
        message = _outside(sdata, slide, outside)
        if not slide.inside.any():
            raise ValueError(message)
        warnings.warn(
            f"{message} Spots outside are not predicted, the others may be misplaced", UserWarning, stacklevel=4
        )
    if len(slide.centres) > 1 and pitch_of(slide.centres) == 0:
        raise ValueError(
            f"`shapes_key` {slide.shapes_key!r}: most spots lie on top of each other; each needs a centre of its own. Check how the "
            "shapes were made, and whether sections that were joined are regions of their own"
        )
    if slide.inside.any():
        side = slide.diameter_um / slide.mpp
        if darkness_at(slide.pyramid, slide.image_key, subsample(slide.centres[slide.inside]), side).blank:
            raise ValueError(
                f"`image_key` {slide.image_key!r} is blank at all spots: black, white or transparent. Name the image that "
                "shows the tissue, or check the transformations"
            )
    _check_orientation(sdata, slide)


def _outside(sdata: SpatialData, slide: Slide, outside: int) -> str:
    (left, top), (right, bottom) = slide.centres.min(0), slide.centres.max(0)
    width, height = slide.pyramid.width, slide.pyramid.height
    found = (
        f"`shapes_key` {slide.shapes_key!r}: {outside} of {len(slide.inside)} spots lie outside image {slide.image_key!r} "
        f"({width} × {height} px; the spots lie at x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f})."
    )
    for cause, matrix in _causes(sdata, slide):
        places = transform_points(slide.centres, matrix)
        inside = ((places >= 0) & (places <= [width, height])).all(1)
        if inside.mean() >= _INSIDE and (np.ptp(places, axis=0) / [width, height]).max() >= _SPAN:
            return f"{found} {cause}; if so: {_mend(sdata, slide, matrix)}."
    factor = 0.95 * min(width / max(right, 1), height / max(bottom, 1))
    if factor < 1 and left < width and top < height and min(left, top) >= 0:
        return (
            f"{found} Their coordinates look like those of a larger image, such as the full-resolution one: use that image, "
            "or scale the spots by the width of this image over the width of that one, about: "
            f"{_mend(sdata, slide, np.diag([factor, factor, 1]))}."
        )
    return f"{found} Check the transformations, `coordinate_system` and `image_key`, of {sorted(sdata.images)}."


def _causes(sdata: SpatialData, slide: Slide) -> Iterator[tuple[str, np.ndarray]]:
    """List what may have gone wrong, and the matrix that mends it, in pixels."""
    yield "x and y of the spots look swapped", _SWAP
    if (slide.centres[:, 1] < 0).mean() > 0.5:
        yield "y of the spots looks mirrored", np.diag([1.0, -1, 1])
    if "pitch" not in slide.mpp_source and abs(slide.mpp - 1) > 0.05:
        yield "the coordinates look like micrometres, not pixels", np.diag([1 / slide.mpp, 1 / slide.mpp, 1])
    for name, factor in _scale_factors(sdata, slide).items():
        what = f"`{name}` {factor:.4g} in uns['spatial']"
        yield f"full-resolution coordinates on a reduced image, by {what}", np.diag([factor, factor, 1])
        yield f"coordinates of a reduced image, by {what}", np.diag([1 / factor, 1 / factor, 1])
    assay = known_assay(slide.centres, slide.diameter_um / slide.mpp)
    if assay is not None and not _SAME_SIZE < assay[0] / slide.mpp < 1 / _SAME_SIZE:
        factor = assay[0] / slide.mpp
        what = f"the pitch of {assay[1]} at {slide.mpp:.4g} µm/px"
        yield f"coordinates of a {'larger' if factor < 1 else 'smaller'} image, by {what}", np.diag([factor, factor, 1])


def _scale_factors(sdata: SpatialData, slide: Slide) -> dict[str, float]:
    """Scale factors that Space Ranger wrote, where the table kept them."""
    libraries = {} if slide.table_key is None else sdata[slide.table_key].uns.get("spatial", {})
    found = {}
    for library in libraries.values() if isinstance(libraries, Mapping) else ():
        factors = library.get("scalefactors", {}) if isinstance(library, Mapping) else {}
        for name in ("tissue_hires_scalef", "tissue_lowres_scalef"):
            if isinstance(factors, Mapping) and 0 < float(factors.get(name, 0)) < 1:
                found[name] = float(factors[name])
    return found


def _mend(sdata: SpatialData, slide: Slide, matrix: np.ndarray) -> str:
    return transformation_call(sdata, slide.image_key, slide.shapes_key, slide.coordinate_system, matrix)


def _check_orientation(sdata: SpatialData, slide: Slide) -> None:
    """Warn of array positions that run mirrored against the pixels, unless the pixels say that this is right."""
    if not slide.inside.any() or slide.table_key is None:
        return
    obs = sdata[slide.table_key].obs.iloc[slide.rows]
    lattice = array_lattice(obs, slide.centres)
    if lattice is None:
        if is_scattered(obs, slide.centres):
            warnings.warn(
                f"`array_row` and `array_col` of table {slide.table_key!r} say nothing of where the spots of "
                f"{slide.shapes_key!r} lie: the ids of table and spots look mixed up, as after sorting one of them. If so, all "
                "spots are predicted from other tissue; compare sdata[table].obs with sdata[shapes]. If these columns are of "
                "another array, delete them",
                UserWarning,
                stacklevel=5,
            )
        _check_swap(sdata, slide)
        return
    if np.linalg.det(lattice) >= 0 or slide.diameter_um / slide.mpp >= _TOUCHING * pitch_of(slide.centres):
        return
    width, height = slide.pyramid.width, slide.pyramid.height
    if abs(lattice[0, 1] * lattice[1, 0]) > abs(lattice[0, 0] * lattice[1, 1]):
        causes = {"x and y of the spots look swapped": _SWAP}
    else:
        causes = {
            "x of the spots looks mirrored": np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]),
            "y of the spots looks mirrored": np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]]),
        }
    better = {cause: _compare(sdata, slide, matrix) for cause, matrix in causes.items()}
    if max(better.values()) < 0:
        return
    cause = max(better, key=better.__getitem__)
    shown = "; the pixels agree" if better[cause] > 0 else ""
    warnings.warn(
        f"`array_row` and `array_col` of table {slide.table_key!r} run mirrored against the pixels: {cause}{shown}. If so, "
        f"all spots are predicted from other tissue; mend it by {_mend(sdata, slide, causes[cause])}. If the "
        "section was imaged mirrored, as in some CytAssist runs, or array_row counts columns, all is well",
        UserWarning,
        stacklevel=5,
    )


def _check_swap(sdata: SpatialData, slide: Slide) -> None:
    """Warn where the tissue lies under the spots with x and y swapped, and not as they are."""
    now, then = _darkness(slide, _SWAP, subsample(np.flatnonzero(slide.inside)))
    both = np.isfinite(then)
    if both.mean() >= _INSIDE and then[both].mean() > _MUCH_DARKER * now[both].mean():
        warnings.warn(
            f"`shapes_key` {slide.shapes_key!r}: x and y of the spots look swapped: there is more tissue under them if they "
            f"are exchanged. If so, all spots are predicted from other tissue; mend it by {_mend(sdata, slide, _SWAP)}",
            UserWarning,
            stacklevel=5,
        )


def _darkness(slide: Slide, matrix: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """Darkness under some spots as they are, and where a matrix moves them."""
    side, centres = slide.diameter_um / slide.mpp, slide.centres[chosen]
    places = (centres, transform_points(centres, matrix))
    return [darkness_at(slide.pyramid, slide.image_key, place, side).mean for place in places]


def _compare(sdata: SpatialData, slide: Slide, matrix: np.ndarray) -> int:
    """Say whether the pixels fit better after a move (1), before (-1), or equally (0).

    Spots lie on tissue, which is darker than glass, and more was counted where more cells are.
    """
    from scipy.stats import spearmanr

    chosen = subsample(np.flatnonzero(slide.inside), _N_SPOTS)
    now, then = _darkness(slide, matrix, chosen)
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
