"""Shared by all plots: slides, the tissue under the spots, and figures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.elements import Slide, check_spatialdata
from .._core.keys import Keys
from .._core.logs import warn
from .._core.mpp import affine, length_scale, transform_points
from .._core.names import check_text_names
from .._core.predictions import predicted_table
from .._core.rasters import levels
from .._core.slide import recorded_slide
from .._core.spots import SECTION, sections_of, spots_of
from ..image import MIN_TISSUE, Level, Pyramid, read_reduced
from ..stats import pitch_of

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

#: Dots per inch of saved figures, which also sets the resolution of the tissue.
_DPI = 150
#: Font size of names of points.
NAME_SIZE = 7
#: Corners of a panel as (x, y) of the outer end, in order of preference.
_CORNERS = {"lower left": (0, 0), "lower right": (1, 0), "upper right": (1, 1), "upper left": (0, 1)}


@dataclass(frozen=True, eq=False)
class Canvas:
    """Spots to draw: rows of a table, and their slide if there is an image."""

    table: AnnData
    slide: Slide | None = None
    sdata: SpatialData | None = None
    name: str = ""
    _tissue: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def matrix(self) -> np.ndarray:
        """Transformation from pixels of level 0, or from ``obsm["spatial"]``, to the drawing, 3 × 3."""
        if self.slide is None or self.sdata is None:
            return np.eye(3)
        return affine(self.sdata.images[self.slide.image_key], self.slide.coordinate_system)

    @cached_property
    def xy(self) -> np.ndarray:
        """Spot centres in the drawing, ``(n, 2)``."""
        return transform_points(spots_of(self.table) if self.slide is None else self.slide.centres, self.matrix)

    @cached_property
    def diameter(self) -> float:
        """Diameter of a spot in the drawing; without a slide, spots nearly touch."""
        if self.slide is None:
            centres = np.unique(self.xy, axis=0)
            return 0.95 * pitch_of(centres) if len(centres) > 1 else 1.0
        return self.slide.diameter_um / self.um_per_unit

    @cached_property
    def um_per_unit(self) -> float:
        """µm per unit of the drawing; NaN if unknown."""
        return np.nan if self.slide is None else self.slide.mpp / length_scale(self.matrix, quiet=True)

    def box(self, bbox: Sequence[float] | None, parameter: str = "bbox") -> tuple[float, float, float, float]:
        """Return the drawn part (xmin, ymin, xmax, ymax): the region ``bbox``, or all spots and a margin."""
        if bbox is not None:
            corners = transform_points(np.array([[x, y] for x in bbox[::2] for y in bbox[1::2]], float), self.matrix)
            low, high = corners.min(0), corners.max(0)
            if not ((self.xy >= low) & (self.xy <= high)).all(1).any():
                first, last = (np.nanmin(self.xy, 0), np.nanmax(self.xy, 0)) if len(self.xy) else (low, high)
                ends = transform_points(np.array([first, last]), np.linalg.inv(self.matrix))
                raise ValueError(
                    f"`{parameter}` {tuple(bbox)} contains no spot; the spots are at x {ends[:, 0].min():.0f} to "
                    f"{ends[:, 0].max():.0f} and y {ends[:, 1].min():.0f} to {ends[:, 1].max():.0f}"
                )
            return (*low, *high)
        low, high = self.xy.min(0), self.xy.max(0)
        margin = 0.06 * (high - low).max() + self.diameter
        return (*(low - margin), *(high + margin))

    def draw_tissue(self, ax: Axes, box: tuple[float, ...], pixels: float) -> None:
        """Draw the image; it is read once for all panels."""
        if self.slide is not None:
            if box not in self._tissue:
                self._tissue[box] = read_region(self.slide.pyramid, self.slide.pixel_factor, self.matrix, box, pixels)
            draw_image(ax, *self._tissue[box])

    def draw_spots(self, ax: Axes, colours: np.ndarray, size: float) -> None:
        """Draw the spots with true size and shape; ``colours`` is ``(n, 4)``."""
        if self.slide is None or self.sdata is None:
            diameters = np.full(len(self.xy), size * self.diameter)
            ax.add_collection(_circles(ax, self.xy, diameters, facecolors=colours))
        elif self.slide.shapes_key in self.sdata.labels:
            element = self.sdata.labels[self.slide.shapes_key]
            nodes = sorted((node.transpose("y", "x") for node in levels(element)), key=lambda node: node.sizes["x"])
            level = next((node for node in nodes if node.sizes["x"] >= 2000), nodes[-1])
            values = np.asarray(level.data)
            names, codes = np.unique(values, return_inverse=True)
            positions = pd.Index(self.slide.spot_ids).get_indexer(pd.Index(names))
            rgba = np.vstack([colours, np.zeros(4)])[positions][codes.reshape(values.shape)]
            scale = nodes[-1].sizes["x"] / level.sizes["x"]
            draw_image(ax, rgba, affine(element, self.slide.coordinate_system) @ np.diag([scale, scale, 1]), "nearest")
        else:
            shapes = self.sdata.shapes[self.slide.shapes_key].loc[self.slide.spot_ids]
            ax.add_collection(outlines(ax, shapes, self.slide.coordinate_system, size, facecolors=colours))

    def frame(self, ax: Axes, box: tuple[float, ...]) -> list[str]:
        """Set the limits of the axes, and draw a scale bar if µm are known; return the free corners, emptiest first."""
        x0, y0, x1, y1 = box
        ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xlabel="", ylabel="", xticks=[], yticks=[])
        relative = (self.xy - [x0, y1]) / [x1 - x0, y0 - y1]
        n_spots = {c: (np.abs(relative - end) < (0.45, 0.15)).all(1).sum() for c, end in _CORNERS.items()}
        corners = sorted(_CORNERS, key=n_spots.__getitem__)
        if not np.isfinite(self.um_per_unit):
            return corners
        length = max(np.ptp(np.clip(self.xy[:, 0], x0, x1)), self.diameter) / 3
        add_scale_bar(ax, self.um_per_unit, length, corners[0])
        return corners[1:]


def add_scale_bar(ax: Axes, um_per_unit: float, length: float, location: str) -> None:
    """Add a scale bar of about ``length``, rounded to a readable number."""
    from matplotlib_scalebar.scalebar import ScaleBar

    candidates = np.outer([1, 1.5, 2, 2.5, 3, 4, 5, 7.5], 10.0 ** np.arange(-2, 7)).ravel()
    um = candidates[np.abs(np.log(candidates / (length * um_per_unit))).argmin()]
    value, unit = (um / 1000, "mm") if um >= 1000 else (um, "um")
    # Write whole numbers without ".0".
    fixed = {"fixed_value": int(value) if value == int(value) else float(value), "fixed_units": unit}
    ax.add_artist(ScaleBar(um_per_unit, "um", location=location, box_alpha=0.6, font_properties={"size": 8}, **fixed))


def read_region(
    pyramid: Pyramid, factor: float, matrix: np.ndarray, box: tuple[float, ...], pixels: float
) -> tuple[np.ndarray, np.ndarray]:
    """Read a region ``(h, w, 3)`` from the coarsest sufficient level; also return the matrix from its pixels to the drawing."""
    corners = transform_points(np.array([[x, y] for x in box[::2] for y in box[1::2]]), np.linalg.inv(matrix))
    low = np.clip(corners.min(0), 0, [pyramid.width - 1, pyramid.height - 1])
    high = np.clip(corners.max(0), low + 1, [pyramid.width, pyramid.height])
    sufficient = [level for level in pyramid.levels if (high - low).max() / level.scale >= pixels]
    level = sufficient[-1] if sufficient else pyramid.levels[0]
    (x0, y0), (x1, y1) = np.floor(low / level.scale).astype(int), np.ceil(high / level.scale).astype(int)
    part = Level(level.array[:, y0:y1, x0:x1])
    rgb = read_reduced(Pyramid((part,)), int((2 * pixels) ** 2), factor).transpose(1, 2, 0)
    step = level.scale * 2 ** round(np.log2(part.width / rgb.shape[1]))
    return rgb, matrix @ np.array([[step, 0, x0 * level.scale], [0, step, y0 * level.scale], [0, 0, 1]])


def draw_image(ax: Axes, pixels: np.ndarray, matrix: np.ndarray, interpolation: str | None = None) -> None:
    """Draw pixels ``(h, w, 3 or 4)``; ``matrix`` transforms them to the drawing."""
    from matplotlib.transforms import Affine2D

    height, width = pixels.shape[:2]
    image = ax.imshow(pixels, extent=(0, width, height, 0), interpolation=interpolation)
    image.set_transform(Affine2D(matrix) + ax.transData)


def outlines(ax: Axes, shapes: GeoDataFrame, system: str, size: float = 1.0, **kwargs: Any) -> Collection:
    """Return a collection of the circles or polygons of a shapes element."""
    from matplotlib.collections import PolyCollection

    matrix = affine(shapes, system)
    if "radius" in shapes.columns:
        diameters = 2 * size * shapes["radius"].to_numpy(float) * length_scale(matrix, quiet=True)
        return _circles(ax, transform_points(shapes.get_coordinates().to_numpy(), matrix), diameters, **kwargs)
    rings = shapes.geometry.convex_hull if (shapes.geom_type != "Polygon").any() else shapes.geometry
    rings = rings if size == 1 else rings.scale(size, size)
    return PolyCollection(
        [transform_points(np.asarray(ring.exterior.coords)[:, :2], matrix) for ring in rings],
        **{"edgecolors": "none", **kwargs},
    )


def _circles(ax: Axes, xy: np.ndarray, diameters: np.ndarray, **kwargs: Any) -> Collection:
    from matplotlib.collections import EllipseCollection

    options: dict[str, Any] = {"offsets": xy, "offset_transform": ax.transData, "edgecolors": "none", **kwargs}
    return EllipseCollection(diameters, diameters, np.zeros(len(diameters)), units="xy", **options)


def name_points(ax: Axes, names: Sequence[str], xy: np.ndarray, place: float, step: float) -> None:
    """Write the names of points, highest first, in a column at a fraction of the width, with a line to each point."""
    from sklearn.isotonic import isotonic_regression

    if not len(names):
        return
    # As near as possible to the heights of the points, one step apart and inside the axes.
    low, high = ax.get_ylim()
    order = step * np.arange(len(names))
    heights = isotonic_regression(xy[:, 1] + order, increasing=False)
    heights = np.clip(heights, low + order[-1] + step / 2, high - step / 2) - order
    line: dict[str, Any] = {"arrowstyle": "-", "color": "#b8b8b8", "lw": 0.4, "shrinkA": 1, "shrinkB": 3, "zorder": 1.5}
    style: dict[str, Any] = {"ha": "right" if place > 0.5 else "left", "va": "center", "zorder": 5, "arrowprops": line}
    for name, point, height in zip(names, xy, heights, strict=True):
        at = (place, height)
        ax.annotate(name, point, at, textcoords=("axes fraction", "data"), fontsize=NAME_SIZE, **style)


def canvases(
    data: Any,
    prediction_key: str,
    table_key: str | None | Callable[[SpatialData], str | None],
    shapes_key: str | Sequence[str] | None,
    image_key: str | None,
    coordinate_system: str | None,
) -> list[Canvas]:
    """Return the slides with predictions in an object, a table, or a list or dict of them."""
    if isinstance(data, list | tuple | Mapping):
        if not len(data):
            raise ValueError("`sdata` is empty; at least one object is needed")
        slides = []
        for name, item in data.items() if isinstance(data, Mapping) else [("", item) for item in data]:
            for canvas in canvases(item, prediction_key, table_key, shapes_key, image_key, coordinate_system):
                label = " ".join(part for part in (str(name), canvas.name) if part)
                slides.append(replace(canvas, name=label or str(sections_of(canvas.table)[0])))
        n_named = Counter(canvas.name for canvas in slides)
        numbered = [f"{canvas.name} ({i})" for i, canvas in enumerate(slides, 1)]
        return [replace(c, name=name) if n_named[c.name] > 1 else c for c, name in zip(slides, numbered, strict=True)]
    key = None
    if not hasattr(data, "obs_names"):
        check_spatialdata(data)
        key = predicted_table(data, prediction_key, table_key(data) if callable(table_key) else table_key)
    table = check_text_names(data if key is None else data[key])
    if not table.n_obs:
        raise ValueError("`sdata`: the table has no spots; at least one is needed")
    if key is None:
        xy, sections = spots_of(table), sections_of(table)
        names = list(dict.fromkeys(sections))
        if len(names) > 1:
            return [Canvas(table[sections == name], name=str(name)) for name in names]
        if n := len(xy) - len(np.unique(xy, axis=0)):
            warn(
                f"`sdata`: {n} of {len(xy)} spots have the position of another spot, as if several slides overlap; write the "
                f"name of the slide of each spot to obs[{SECTION!r}]"
            )
        return [Canvas(table)]
    record = table.uns[Keys(prediction_key).uns]
    regions = validate.names(record["shapes"] if shapes_key is None else shapes_key, "shapes_key", least=1, one=True)
    found = []
    for region in regions:
        rows = (table.obs[table.uns["spatialdata_attrs"]["region_key"]] == region).to_numpy()
        canvas = Canvas(table[rows], name=region if len(regions) > 1 else "")
        # Without pixels, if it was saved without them, only the spots are drawn, as of a table.
        if data.images or image_key is not None:
            slide = recorded_slide(data, record, region, key, image_key, coordinate_system)
            canvas = replace(canvas, slide=slide, sdata=data)
        found.append(canvas)
    return found


def on_glass(table: AnnData, prediction_key: str) -> np.ndarray:
    """Return the mask of spots with too little tissue; all ``False`` if the prediction does not record tissue."""
    share = table.obs.get(Keys(prediction_key).tissue)
    return np.zeros(table.n_obs, bool) if share is None else share.to_numpy(dtype=float) < MIN_TISSUE


def panel_pixels(ax: Axes) -> float:
    """Return the length in pixels of the longer side of a panel in the saved figure."""
    extent = ax.get_window_extent()
    return max(extent.width, extent.height) * _DPI / ax.figure.dpi


def axes_for(
    n: int,
    ax: Axes | Sequence[Axes] | None,
    ncols: int,
    figsize: Sequence[float] | None,
    title: str | Sequence[str] | None,
    save: str | Path | None,
    *,
    panel: float = 4.5,
    aspect: float | None = None,
    side_width: float = 0.0,
) -> list[Axes]:
    """Return ``n`` axes, those in ``ax`` or of a new figure; always check ``ncols``, ``figsize``, ``title`` and ``save``.

    Panels of tissue have an ``aspect`` (height to width) and are packed, with ``side_width`` inches for colour bars or legends.
    """
    import matplotlib.pyplot as plt

    validate.whole_number(ncols, "ncols")
    if save is not None:
        _file_of(save)
    if title is not None and not isinstance(title, str) and len(validate.names(title, "title")) != n:
        raise ValueError(
            f"`title` holds {len(title)} titles, {n} are needed; pass a text for a title of the whole figure"
        )
    sides = list(figsize) if isinstance(figsize, Iterable) else []
    if figsize is not None and (len(sides) != 2 or not all(validate.is_number(s) and s > 0 for s in sides)):
        raise ValueError(f"`figsize` is {figsize!r}; (width, height) in inches is needed, such as (8, 6)")
    if ax is not None:
        given = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(given) != n:
            raise ValueError(f"`ax` holds {len(given)} axes, {n} are needed")
        return given
    ncols = min(n, ncols)
    nrows = -(-n // ncols)
    size = (panel * 1.15 * ncols, panel * nrows)
    if aspect is not None:
        # Limit the height of a tall slide to the width of a panel.
        width = panel / max(1.0, aspect)
        size = ((width + side_width) * ncols, (width * aspect + 0.6) * nrows)
    layout = "constrained" if aspect is None else "compressed"
    _, grid = plt.subplots(nrows, ncols, figsize=sides or size, squeeze=False, layout=layout)
    flat = list(grid.ravel())
    for empty in flat[n:]:
        empty.remove()
    return flat[:n]


def _file_of(save: str | Path) -> Path:
    """Return the file for a figure; without a suffix, add the default of matplotlib."""
    from matplotlib import rcParams
    from matplotlib.backend_bases import FigureCanvasBase

    path = validate.folder_or_file(save, "save")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"`save` {str(save)!r} is a folder, or its folder does not exist; pass the name of a file, such as 'a.png'"
        )
    path = path if path.suffix else path.with_name(f"{path.name}.{rcParams['savefig.format']}")
    validate.one_of(path.suffix[1:].lower(), sorted(FigureCanvasBase.get_supported_filetypes()), "save")
    return path.resolve()


def finish(
    axes: list[Axes], save: str | Path | None, title: str | Sequence[str] | None, show: bool, return_fig: bool
) -> Any:
    """Set titles, save and show the figure; return its axes, or the figure."""
    import matplotlib.pyplot as plt

    figure: Figure = axes[0].figure.canvas.figure
    if isinstance(title, str) and len(axes) > 1:
        figure.suptitle(title)
    elif title is not None:
        for axis, text in zip(axes, [title] if isinstance(title, str) else title, strict=True):
            axis.set_title(str(text))
    if save is not None:
        path = _file_of(save)
        new = path.with_name(f".{os.getpid()}-{id(figure)}{path.suffix}")
        try:
            figure.savefig(new, dpi=_DPI, bbox_inches="tight")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    if show:
        plt.show()
    if return_fig or show:
        return figure if return_fig else None
    return axes[0] if len(axes) == 1 else axes
