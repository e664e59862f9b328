"""``hg.pl.tissue``: tissue mask and grid of spots over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core import validate
from .._core.elements import find_shapes
from .._core.images import check_image, find_image, pyramid_of, tissue_key_of
from .._core.mpp import affine, length_scale, stored_mpp
from .._core.rasters import levels, shared_systems
from ._canvas import add_scale_bar, axes_for, draw_image, finish, outlines, panel_pixels, read_region

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_MASK, _SPOTS = "#00a9e0", "black"


def tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    tissue_key: str | None = None,
    shapes_key: str | None = None,
    coordinate_system: str | None = None,
    figsize: Sequence[float] | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw the tissue mask and the outlines of the spots over the image.

    Check it before a prediction: :func:`he2gene_sc.pp.grid` makes no spots outside the mask.

    Parameters
    ----------
    sdata
        Object with an image and its mask (:func:`he2gene_sc.pp.tissue`).
    image_key
        Image; needed if there are several.
    tissue_key
        Mask in ``sdata.labels``; default ``"<image_key>_tissue"``.
    shapes_key
        Spots, for example of :func:`he2gene_sc.pp.grid`. Default: the only circles, or none if there are no circles.
    coordinate_system
        Coordinate system of the plot; default: the only one that all elements share.
    ax
        Axes to draw in.
    figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes
        The title states the share of the image that is tissue, and the number of spots.

    Raises
    ------
    ValueError
        If the image, the mask or the spots are missing or ambiguous, or share no coordinate system.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4), mpp=2.0)
    >>> hg.pp.tissue(sdata)
    >>> ax = hg.pl.tissue(sdata)
    """
    validate.arguments(tissue, locals())
    image_key = find_image(sdata, None, image_key)
    tissue_key = tissue_key_of(sdata, image_key, tissue_key)
    elements = {image_key: sdata.images[image_key], tissue_key: sdata.labels[tissue_key]}
    if shapes_key is not None or any("radius" in element.columns for element in sdata.shapes.values()):
        (shapes_key,) = find_shapes(sdata, shapes_key, None)
        if shapes_key not in sdata.shapes:
            raise ValueError(
                f"`shapes_key` {shapes_key!r} is a labels element; shapes are needed, valid: {sorted(sdata.shapes)}"
            )
        elements[shapes_key] = sdata.shapes[shapes_key]
    shared = shared_systems(*elements.values())
    default = shared[0] if len(shared) == 1 else "global"
    system = default if coordinate_system is None else coordinate_system
    if system not in shared:
        raise ValueError(
            f"`coordinate_system` is {coordinate_system!r}; valid (shared by {sorted(elements)}): {sorted(shared)}"
        )
    pyramid, matrix = pyramid_of(sdata, image_key), affine(elements[image_key], system)
    ends = np.array([[x, y, 1] for x in (0, pyramid.width) for y in (0, pyramid.height)]) @ matrix.T
    (x0, y0), (x1, y1) = ends[:, :2].min(0), ends[:, :2].max(0)
    mpp = stored_mpp(sdata, image_key)
    (axes,) = axes_for(1, ax, 1, figsize, title, save, panel=6.0, aspect=(y1 - y0) / (x1 - x0))
    factor = check_image(pyramid, image_key)
    draw_image(axes, *read_region(pyramid, factor, matrix, (x0, y0, x1, y1), panel_pixels(axes)))
    share = _draw_mask(axes, elements[tissue_key], system)
    spots = ""
    if shapes_key is not None:
        shapes = elements[shapes_key]
        axes.add_collection(outlines(axes, shapes, system, facecolors="none", edgecolors=_SPOTS, linewidths=0.6))
        spots = f", {len(shapes):,} spots"
    axes.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"tissue: {100 * share:.0f} % of the image{spots}")
    if mpp is not None:
        um_per_unit = mpp[0] / length_scale(matrix, quiet=True)
        add_scale_bar(axes, um_per_unit, (x1 - x0) / 4, "lower left")
    return finish([axes], save, title, show, return_fig)


def _draw_mask(ax: Axes, labels: Any, system: str) -> float:
    """Draw a mask and its outline; return the share of the image that is tissue."""
    from matplotlib.colors import to_rgba
    from scipy.ndimage import binary_erosion

    mask = np.asarray(levels(labels)[0].transpose("y", "x")) > 0
    step = -(-max(mask.shape) // 1500)
    reduced = mask[::step, ::step]
    rgba = np.zeros((*reduced.shape, 4))
    rgba[reduced] = to_rgba(_MASK, 0.25)
    rgba[reduced & ~binary_erosion(reduced, iterations=max(1, max(reduced.shape) // 500))] = to_rgba(_MASK)
    draw_image(ax, rgba, affine(labels, system) @ np.diag([step, step, 1]))
    return float(mask.mean())
