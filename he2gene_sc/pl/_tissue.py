"""``hg.pl.tissue``: the tissue mask and the grid of spots over the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core import validate
from .._core.elements import check_spatialdata, find_shapes
from .._core.images import find_image
from .._core.mpp import affine, stored_mpp
from ._canvas import axes_for, bare_axes, finish, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

_MASK, _SPOTS = "#00a9e0", "black"


def tissue(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    tissue_key: str | None = None,
    shapes_key: str | None = None,
    coordinate_system: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the tissue mask and the outlines of the spots over the image.

    Look at it before a prediction: what lies outside the mask gets no spot from :func:`he2gene_sc.pp.grid`.

    Parameters
    ----------
    sdata
        Object with an image and its mask (:func:`he2gene_sc.pp.tissue`).
    image_key
        Image; needed where there are several.
    tissue_key
        Mask in ``sdata.labels``; default ``"<image_key>_tissue"``.
    shapes_key
        Spots, such as :func:`he2gene_sc.pp.grid` makes. Default: the only circles, or none where there are none.
    coordinate_system
        What to draw in; default: the only one that all of them share.
    ax
        Axes to draw in.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes
        Its title states the share of the image that is tissue, and the number of spots.

    Raises
    ------
    ValueError
        If the image, the mask or the spots are not there or ambiguous, or share no coordinate system.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4), mpp=2.0)
    >>> hg.pp.tissue(sdata)
    >>> ax = hg.pl.tissue(sdata)
    """
    validate.arguments(tissue, locals())
    import spatialdata as sd
    import spatialdata_plot  # noqa: F401 - registers sdata.pl

    check_spatialdata(sdata)
    image_key = find_image(sdata, None, image_key)
    tissue_key = f"{image_key}_tissue" if tissue_key is None else tissue_key
    if tissue_key not in sdata.labels:
        raise ValueError(
            f"`tissue_key` {tissue_key!r} not found, valid keys: {sorted(sdata.labels)}; run hg.pp.tissue first"
        )
    shapes_key = _circles(sdata) if shapes_key is None else find_shapes(sdata, shapes_key, None)[0]
    if shapes_key is not None and shapes_key not in sdata.shapes:
        raise ValueError(f"`shapes_key` {shapes_key!r} names labels; shapes are needed, valid: {sorted(sdata.shapes)}")
    elements = {image_key: sdata.images[image_key], tissue_key: _one_piece(sdata.labels[tissue_key])}
    if shapes_key is not None:
        elements[shapes_key] = sdata.shapes[shapes_key]
    system = _shared_system(elements, coordinate_system)
    (axes,) = axes_for(1, ax, ncols=1, panel=6.0)
    with quiet():
        plot = sd.SpatialData.init_from_elements(elements).pl.render_images(image_key)
        plot = plot.pl.render_labels(
            tissue_key, color=_MASK, fill_alpha=0.25, outline_alpha=1.0, outline_color=_MASK, contour_px=3
        )
        if shapes_key is not None:
            plot = plot.pl.render_shapes(
                shapes_key, fill_alpha=0.0, outline_alpha=1.0, outline_width=0.6, outline_color=_SPOTS
            )
        plot.pl.show(coordinate_systems=system, ax=axes, show=False, **_scalebar(sdata, image_key, system))
    share = float((np.asarray(elements[tissue_key]) > 0).mean())
    spots = "" if shapes_key is None else f", {len(sdata.shapes[shapes_key]):,} spots"
    bare_axes(axes, f"tissue: {100 * share:.0f} % of the image{spots}")
    finish([axes], save)
    return axes


def _circles(sdata: SpatialData) -> str | None:
    """Name of the circles; ``None`` where there are none."""
    if not any("radius" in element.columns for element in sdata.shapes.values()):
        return None
    return find_shapes(sdata, None, None)[0]


def _one_piece(labels: Any) -> Any:
    """Mask without the numbers of its pieces, which would be drawn in a colour each; of a pyramid the finest level."""
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import get_transformation

    finest = next(iter(labels["scale0"].values())) if hasattr(labels, "children") else labels
    mask = (np.asarray(finest.transpose("y", "x")) > 0).astype(np.uint8)
    return Labels2DModel.parse(mask, dims=("y", "x"), transformations=get_transformation(labels, get_all=True))


def _shared_system(elements: dict[str, Any], coordinate_system: str | None) -> str:
    from spatialdata.transformations import get_transformation

    shared = set.intersection(*(set(get_transformation(element, get_all=True)) for element in elements.values()))
    if coordinate_system is None and len(shared) == 1:
        return shared.pop()
    if coordinate_system is None and "global" in shared:
        return "global"
    if coordinate_system is None or coordinate_system not in shared:
        raise ValueError(
            f"`coordinate_system` is {coordinate_system!r}; valid, as shared by {sorted(elements)}: {sorted(shared)}"
        )
    return coordinate_system


def _scalebar(sdata: SpatialData, image_key: str, system: str) -> dict[str, Any]:
    """Arguments of a scale bar, where µm/px is known."""
    found = stored_mpp(sdata, image_key)
    if found is None:
        return {}
    area = abs(np.linalg.det(affine(sdata.images[image_key], system)[:2, :2]))
    return {
        "scalebar_dx": float(found[0] / np.sqrt(area)),
        "scalebar_units": "um",
        "scalebar_params": {"location": "lower left", "box_alpha": 0.6},
    }
