"""Images of a SpatialData object: find the image, read its pyramid, and map spots to its pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..image import Darkness, Level, Pyramid, check_channel_names, check_pixels, read_darkness
from . import validate
from .elements import Spots, check_files, check_spatialdata, spot_element
from .logs import logger, warn
from .matrix import subsample
from .mpp import affine, length_scale, transform_points
from .rasters import levels, shared_systems, systems_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Least number of points at which images are compared, and the least correlation of darkness of the same tissue.
_MIN_POINTS, _SAME_TISSUE = 8, 0.5
#: Images with a lower SD of darkness cannot be compared.
_MIN_DARKNESS_SD = 1.0
#: Fraction of a side by which extents may differ, and fraction of the points that the finest image has to cover.
_SAME_EXTENT, _MIN_COVERAGE = 0.02, 0.95


def find_image(
    sdata: SpatialData,
    shapes_key: str | None = None,
    image_key: str | Mapping[str, str] | None = None,
    coordinate_system: str | None = None,
    spots: Spots | None = None,
) -> str:
    """Return the name of the image; the finest, if several show the same tissue."""
    check_spatialdata(sdata)
    if not sdata.images:
        raise ValueError("`sdata` has no image; read one with hg.io.read_he or add it to sdata.images")
    if isinstance(image_key, Mapping):
        if shapes_key is None or shapes_key not in image_key:
            raise ValueError(f"`image_key` names no image for shapes {shapes_key!r}, it has {sorted(image_key)}")
        image_key = image_key[shapes_key]
    if image_key is not None:
        return validate.existing_key(image_key, sdata.images, "image_key")
    candidates = list(sdata.images)
    if shapes_key is not None and len(candidates) > 1:
        systems = set(systems_of(spot_element(sdata, shapes_key)))
        if coordinate_system is not None:
            systems &= {coordinate_system}
        candidates = [key for key in candidates if systems & systems_of(sdata.images[key]).keys()]
    if not candidates:
        raise ValueError(
            f"`image_key`: no image shares a coordinate system with shapes {shapes_key!r}; images: {sorted(sdata.images)}"
        )
    if len(candidates) == 1:
        return candidates[0]
    return _finest_image(sdata, candidates, shapes_key, coordinate_system, spots)


def spots_to_pixels(
    sdata: SpatialData, image_key: str, shapes_key: str, coordinate_system: str | None, spots: Spots
) -> tuple[str, np.ndarray]:
    """Return the coordinate system, and the matrix from shapes through it to pixels of level 0."""
    image, shapes = sdata.images[image_key], spot_element(sdata, shapes_key)
    shared = shared_systems(image, shapes)
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ValueError(
                f"`coordinate_system` {coordinate_system!r} is not shared by image {image_key!r} and shapes {shapes_key!r}, "
                f"valid: {shared}"
            )
        shared = [coordinate_system]
    if not shared:
        raise ValueError(
            f"`coordinate_system`: image {image_key!r} and shapes {shapes_key!r} share no coordinate system; set one with "
            "spatialdata.transformations.set_transformation"
        )
    what = f"the transformation of image {image_key!r}"
    matrices = {
        system: _inverse(affine(image, system), f"`coordinate_system` {system!r}: {what}") @ affine(shapes, system)
        for system in shared
    }
    first = matrices[shared[0]]
    # The choice of a shared system matters unless all put the corners of the spots on the same pixels.
    (left, top), (right, bottom) = spots.centres.min(0), spots.centres.max(0)
    corners = np.array([[left, top, 1], [right, bottom, 1], [left, bottom, 1]]).T
    if any(np.abs((matrix - first) @ corners)[:2].max() > 0.5 for matrix in matrices.values()):
        raise ValueError(
            f"`coordinate_system` is ambiguous: image {image_key!r} and shapes {shapes_key!r} share {shared}, which map the "
            "spots to different pixels; name one of them"
        )
    return shared[0], first


def _inverse(matrix: np.ndarray, what: str) -> np.ndarray:
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise ValueError(f"{what} is singular")
    return np.linalg.inv(matrix)


@dataclass(frozen=True)
class TissueMask:
    """Tissue mask of an image, with its alignment."""

    values: np.ndarray  # (h, w) bool
    to_mask: np.ndarray  # 3 × 3, from x and y in pixels of the image to pixels of the mask

    @classmethod
    def read(cls, sdata: SpatialData, image_key: str, tissue_key: str | None) -> TissueMask:
        """Read the finest level of the labels, and their alignment to the image."""
        tissue_key = tissue_key_of(sdata, image_key, tissue_key)
        image, labels = sdata.images[image_key], sdata.labels[tissue_key]
        shared = shared_systems(image, labels)
        if not shared:
            raise ValueError(
                f"`tissue_key`: labels {tissue_key!r} and image {image_key!r} share no coordinate system; set one with "
                "spatialdata.transformations.set_transformation"
            )
        what = f"`tissue_key`: the transformation of labels {tissue_key!r} to {shared[0]!r}"
        to_mask = _inverse(affine(labels, shared[0]), what) @ affine(image, shared[0])
        values, pyramid = np.asarray(levels(labels)[0]) > 0, pyramid_of(sdata, image_key)
        stretch = np.array([values.shape[1] / pyramid.width, values.shape[0] / pyramid.height])
        if np.allclose(to_mask, np.eye(3)) and stretch.max() < 0.9 and abs(stretch[0] / stretch[1] - 1) < 0.05:
            warn(
                f"`tissue_key`: labels {tissue_key!r} are {stretch[0]:.3g} times as large as image {image_key!r}, with the same "
                "aspect ratio and no scale: they are taken to cover it. Set the scale: spatialdata.transformations.set_transformation("
                f"sdata.labels[{tissue_key!r}], spatialdata.transformations.Scale([{1 / stretch[0]:.6g}, {1 / stretch[1]:.6g}], "
                "axes=('x', 'y')))"
            )
            to_mask = np.diag([*stretch, 1.0])
        return cls(values, to_mask)

    def sample(self, x: np.ndarray, y: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Sample the mask, or ``values`` of its shape, at positions of the image in pixels; 0 outside."""
        values = self.values if values is None else values
        columns, rows = (np.floor(a * x + b * y + c + 1e-9).astype(int) for a, b, c in self.to_mask[:2])
        inside = (rows >= 0) & (rows < values.shape[0]) & (columns >= 0) & (columns < values.shape[1])
        found = np.zeros(np.shape(inside), values.dtype)
        found[inside] = values[rows[inside], columns[inside]]
        return found

    def resample(self, pyramid: Pyramid, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Sample the mask over the whole image, ``(h, w)`` bool of this shape (default: that of the mask)."""
        height, width = self.values.shape if shape is None else shape
        y, x = (np.arange(height) + 0.5) * pyramid.height / height, (np.arange(width) + 0.5) * pyramid.width / width
        found = self.sample(*np.meshgrid(x, y))
        if not found.any():
            raise ValueError("`tissue_key`: the mask marks no tissue on the image; look at it: hg.pl.tissue(sdata)")
        return found


def tissue_key_of(sdata: SpatialData, image_key: str, tissue_key: str | None) -> str:
    """Return the name of the tissue mask, by default that of :func:`he2gene_sc.pp.tissue`; check that its files exist."""
    tissue_key = f"{image_key}_tissue" if tissue_key is None else tissue_key
    validate.existing_key(tissue_key, sdata.labels, "tissue_key", "; run hg.pp.tissue first")
    check_files(f"labels[{tissue_key!r}]", sdata.labels[tissue_key])
    return tissue_key


@dataclass(frozen=True)
class _Candidate:
    """One of several images, with its transformation from a shared frame, and its darkness at common points."""

    key: str
    pyramid: Pyramid
    to_pixels: np.ndarray
    darkness: Darkness

    @property
    def scale(self) -> float:
        """Pixels per unit of the frame."""
        return length_scale(self.to_pixels, quiet=True)

    def shows_same_tissue(self, other: _Candidate) -> bool:
        """Whether both images show the same tissue: by darkness at common points, else by their extent."""
        means = np.array([self.darkness.mean, other.darkness.mean])
        means = means[:, np.isfinite(means).all(axis=0)]
        if means.shape[1] >= _MIN_POINTS and means.std(axis=1).min() > _MIN_DARKNESS_SD:
            return np.corrcoef(means)[0, 1] > _SAME_TISSUE
        own, others = (_corners(each.pyramid, each.to_pixels) for each in (self, other))
        return np.abs(own - others).max() <= _SAME_EXTENT * np.ptp(own, axis=0).max()


def _finest_image(
    sdata: SpatialData,
    candidates: list[str],
    shapes_key: str | None,
    coordinate_system: str | None,
    spots: Spots | None,
) -> str:
    """Return the finest of several images that is not blank; raise if they do not show the same tissue."""
    pyramids: dict[str, Pyramid] = {}
    for key in candidates:
        with contextlib.suppress(ValueError):
            pyramid = pyramid_of(sdata, key)
            array = pyramid.levels[0].array
            check_pixels(int(array.shape[0]), array.dtype, None, key)
            pyramids[key] = pyramid
    rgb = list(pyramids)
    if not rgb:
        raise ValueError(
            f"`image_key`: none of the images {sorted(candidates)} is an RGB H&E image of uint8 or float pixels"
        )
    if len(rgb) == 1:
        logger.info("image %r is used: the only RGB image of %s", rgb[0], sorted(candidates))
        return rgb[0]
    ambiguous = f"`image_key` is ambiguous, candidates: {sorted(rgb)}"
    frames = _frames(sdata, rgb, shapes_key, coordinate_system, spots)
    if not frames:
        raise ValueError(ambiguous)
    points, side = _points(pyramids, frames, spots)
    found = []
    for key, matrix in frames.items():
        places, width = transform_points(points, matrix), side * length_scale(matrix, quiet=True)
        try:
            found.append(_Candidate(key, pyramids[key], matrix, darkness_at(pyramids[key], key, places, width)))
        except ValueError as error:
            logger.info("image %r is not used: %s", key, error)
    if not found:
        raise ValueError(ambiguous)
    seen = [c for c in found if not c.darkness.blank] or found
    covered = [np.isfinite(c.darkness.mean).mean() for c in seen]
    seen = [c for c, share in zip(seen, covered, strict=True) if share >= _MIN_COVERAGE * max(covered)]
    best, *others = sorted(seen, key=lambda c: -c.scale)
    if not all(best.shows_same_tissue(other) for other in others):
        raise ValueError(f"{ambiguous}: they show different tissue")
    if any(other.scale > best.scale * 0.99 for other in others):
        raise ValueError(ambiguous)
    if blank := sorted(c.key for c in found if c.darkness.blank and c not in seen):
        warn(f"images {blank} are blank and not used; image {best.key!r} is used")
    if small := [c for c in found if c not in seen and not c.darkness.blank and _is_reduced(c, best)]:
        warn(
            f"image {small[0].key!r} is finer than {best.key!r} by their transformations, but smaller, and spots lie outside of it: "
            f"image {best.key!r} is used. If {small[0].key!r} shows the whole slide, it is a reduced image, not the full-resolution one "
            "of the coordinates of the spots; use the full-resolution image"
        )
    logger.info("image %r is used, the finest of %s; name another one by `image_key`", best.key, [c.key for c in found])
    return best.key


def _is_reduced(image: _Candidate, best: _Candidate) -> bool:
    """Whether an image begins at the corner of a coarser one and ends before it, as a reduced one does without its scale."""
    own, others = (_corners(each.pyramid, each.to_pixels) for each in (image, best))
    extent = np.ptp(others, axis=0)
    at_corner = np.abs(own[0] - others[0]).max() <= _SAME_EXTENT * extent.max()
    return bool(image.scale > 1.01 * best.scale and at_corner and (np.ptp(own, axis=0) < extent).all())


def _frames(
    sdata: SpatialData, keys: list[str], shapes_key: str | None, coordinate_system: str | None, spots: Spots | None
) -> dict[str, np.ndarray]:
    """Return the matrix from a shared frame (units of the spots, or a coordinate system) to the pixels of each image."""
    if shapes_key is not None and spots is not None:
        return {key: spots_to_pixels(sdata, key, shapes_key, coordinate_system, spots)[1] for key in keys}
    shared = shared_systems(*(sdata.images[key] for key in keys))
    matrices = {key: affine(sdata.images[key], shared[0]) for key in keys if shared}
    if any(abs(np.linalg.det(matrix)) < 1e-12 for matrix in matrices.values()):
        return {}
    return {key: np.linalg.inv(matrix) for key, matrix in matrices.items()}


def _corners(pyramid: Pyramid, to_pixels: np.ndarray) -> np.ndarray:
    """Return the corners of an image in the frame, ``(4, 2)``."""
    width, height = pyramid.width, pyramid.height
    return transform_points(
        np.array([[0, 0], [width, 0], [width, height], [0, height]], float), np.linalg.inv(to_pixels)
    )


def _points(
    pyramids: Mapping[str, Pyramid], frames: Mapping[str, np.ndarray], spots: Spots | None
) -> tuple[np.ndarray, float]:
    """Return points of the shared frame where images are compared (some spots, else a grid), and the side of a square there."""
    if spots is not None:
        return subsample(spots.centres), float(np.median(spots.diameters))
    corners = np.array([_corners(pyramids[key], matrix) for key, matrix in frames.items()])
    low, high = corners.min(axis=1).max(axis=0), corners.max(axis=1).min(axis=0)
    steps = (np.arange(8) + 0.5) / 8
    x, y = np.meshgrid(*(low + steps[:, None] * (high - low)).T)
    return np.column_stack([x.ravel(), y.ravel()]), float(max(np.min(high - low), 0) / 24)


def pyramid_of(sdata: SpatialData, image_key: str) -> Pyramid:
    """Wrap an image of the object, single or multiscale, finest level first."""
    element = sdata.images[image_key]
    check_files(f"images[{image_key!r}]", element)
    arrays = []
    for array in (level.transpose("c", "y", "x") for level in levels(element)):
        # Channels may be named red, green and blue, in any order.
        named = "c" in array.coords
        order = check_channel_names(array.coords["c"].to_numpy().tolist(), image_key) if named else None
        arrays.append(array if order is None or order == list(range(len(order))) else array.isel(c=order))
    arrays.sort(key=lambda array: -array.sizes["x"])
    full = arrays[0]
    found = []
    for array in arrays:
        scale = float(np.sqrt(full.sizes["y"] / array.sizes["y"] * full.sizes["x"] / array.sizes["x"]))
        # Downscaling by a whole number cuts off odd borders, so the ratio of the sizes is slightly off.
        found.append(Level(array.data, round(scale) if abs(scale - round(scale)) < 0.02 * scale else scale))
    return Pyramid((Level(found[0].array), *found[1:]))


def check_image(pyramid: Pyramid, image_key: str, centres: np.ndarray | None = None) -> float:
    """Check that an image is RGB H&E, and return the factor that scales its pixels to 0..255.

    Float images and images with alpha are sampled around some ``centres``, or on their whole coarsest level.
    """
    array = pyramid.levels[0].array
    sample = None
    if np.dtype(array.dtype).kind == "f" or array.shape[0] == 4:
        if centres is not None and len(centres):
            chosen = subsample(centres, 16).astype(int)
            blocks = [array[:, max(0, y - 64) : y + 64, max(0, x - 64) : x + 64] for x, y in chosen]
            sample = np.concatenate([np.asarray(block).reshape(array.shape[0], -1) for block in blocks], axis=1)
        else:
            sample = np.asarray(pyramid.levels[-1].array)
    return check_pixels(int(array.shape[0]), array.dtype, sample, image_key)


def darkness_at(pyramid: Pyramid, image_key: str, centres: np.ndarray, side: float) -> Darkness:
    """Return how dark an image is in squares around some positions."""
    inside = centres[((centres >= 0) & (centres < [pyramid.width, pyramid.height])).all(1)]
    if not len(inside):
        return Darkness(np.full(len(centres), np.nan), blank=False)
    return read_darkness(pyramid, centres, side, check_image(pyramid, image_key, inside))
