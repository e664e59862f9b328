"""Panels of tissue: numbers with a colour bar, or classes with a legend, over the image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import Keys
from .._core.names import stored_colours
from ._canvas import Canvas, axes_for, finish, panel_pixels

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

#: Legend entries of spots without a value and of spots on glass, and their greys.
UNKNOWN, NO_TISSUE = "unknown", "no tissue"
GREYS = {NO_TISSUE: "#c4c4c4", UNKNOWN: "#8c8c8c"}
#: Colours of classes without a colour from the model or ``uns``.
_EXTRA_COLOURS = ("#17becf", "#bcbd22", "#7f7f7f", "#e377c2", "#8c564b", "#1f77b4", "#aec7e8", "#ffbb78", "#98df8a")
#: Maximum number of labels with separate colours.
_MAX_LABELS = 40
#: Positions of legends beside and below a panel, and inside it (by matplotlib).
_BESIDE, _BELOW = "right margin", "below"
_OUTSIDE: dict[str | None, dict[str, Any]] = {
    _BESIDE: {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False},
    _BELOW: {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "columnspacing": 1},
}
_INSIDE = ("best", "upper left", "upper right", "lower left", "lower right")
#: Share of the width or height of a panel for an enlarged region.
_INSET = 0.4


@dataclass(frozen=True, eq=False)
class Panel:
    """Content of a panel: numbers, labels as text with colours (``None``: unknown), or only tissue.

    Spots in ``glass`` have no tissue and are grey. Panels with the same ``scale`` share a range of colours, ``limits`` if given.
    """

    canvas: Canvas
    title: str
    values: np.ndarray | None = None
    colours: Mapping[str, str] | None = None
    label: str = ""
    caption: str = ""
    glass: np.ndarray | None = None
    item: int = 0
    scale: Any = None
    limits: tuple[float, float] | None = None
    name_unknown: bool = True


@dataclass(frozen=True)
class Style:
    """Style of the panels, checked on creation."""

    image: bool = True
    size: float = 1.0
    alpha: float = 1.0
    cmap: str | Colormap = "viridis"
    vmin: Any = None
    vmax: Any = None
    legend_loc: str | None = _BESIDE
    frameon: bool = True
    bbox: Sequence[float] | None = None
    inset: Sequence[float] | None = None

    def __post_init__(self) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import Colormap

        validate.in_range(self.size, "size", above=0)
        validate.in_range(self.alpha, "alpha", least=0, most=1)
        if not isinstance(self.cmap, Colormap):
            validate.key_in(self.cmap, colormaps, "cmap", what="a colour map of matplotlib")
        validate.one_of(self.legend_loc, [_BESIDE, _BELOW, *_INSIDE, "none", None], "legend_loc")
        for name, box in (("bbox", self.bbox), ("inset", self.inset)):
            ends = list(box) if isinstance(box, Sequence | np.ndarray) else []
            valid = len(ends) == 4 and all(map(validate.is_number, ends))
            if box is not None and (not valid or ends[0] >= ends[2] or ends[1] >= ends[3]):
                raise ValueError(f"`{name}` is {box!r}; (xmin, ymin, xmax, ymax) is needed, such as (0, 0, 2000, 1500)")


def draw_panels(
    panels: list[Panel],
    style: Style,
    ax: Axes | Sequence[Axes] | None,
    ncols: int,
    figsize: Any,
    title: Any,
    save: Any,
    show: bool,
    return_fig: bool,
) -> Any:
    """Draw panels side by side, in the given axes or in a new figure; return what ``finish`` returns."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable

    norms = _norms(panels, style.vmin, style.vmax)
    boxes = [panel.canvas.box(style.bbox) for panel in panels]
    aspect = max((box[3] - box[1]) / (box[2] - box[0]) for box in boxes)
    has_side_legend = any(panel.colours is not None for panel in panels) and style.legend_loc == _BESIDE
    width, side_width = {1: 5.0, 2: 4.5}.get(min(ncols, len(panels)), 3.4), 2.0 if has_side_legend else 1.0
    axes = axes_for(len(panels), ax, ncols, figsize, title, save, panel=width, aspect=aspect, side_width=side_width)
    try:
        for panel, axis, box, norm in zip(panels, axes, boxes, norms, strict=True):
            _draw_region(panel, style, axis, box, norm)
            corners = panel.canvas.frame(axis, box)
            if style.inset is not None:
                _draw_inset(panel, style, axis, box, norm, corners.pop(0))
            axis.set_title(panel.title, fontsize="medium")
            if panel.caption:
                axis.set_xlabel(panel.caption, fontsize="small", color="0.35")
            for spine in axis.spines.values():
                spine.set_visible(style.frameon)
            if norm is not None:
                bar = axis.figure.colorbar(ScalarMappable(norm, style.cmap), cax=axis.inset_axes((1.03, 0, 0.04, 1)))
                bar.set_label(panel.label, fontsize="small")
                bar.ax.tick_params(labelsize="small")
            if panel.values is not None:
                _add_legend(axis, panel, style.legend_loc, corners[0])
    except BaseException:
        if ax is None:
            plt.close(axes[0].figure.canvas.figure)
        raise
    return finish(axes, save, title, show, return_fig)


def _draw_region(panel: Panel, style: Style, ax: Axes, box: tuple[float, ...], norm: Normalize | None) -> None:
    """Draw the tissue and the spots; spots without a value are grey."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba, to_rgba_array

    if style.image:
        panel.canvas.draw_tissue(ax, box, panel_pixels(ax))
    if panel.values is None:
        return
    missing = pd.isna(panel.values)
    if norm is not None:
        numbers = np.where(missing, 0.0, panel.values.astype(float))
        colours = np.array(colormaps.get_cmap(style.cmap)(norm(numbers)))
        colours[missing] = to_rgba(GREYS[NO_TISSUE])
    else:
        of_class, pairs = panel.colours or {}, zip(panel.values, missing, strict=True)
        colours = to_rgba_array([GREYS[UNKNOWN] if is_missing else of_class[label] for label, is_missing in pairs])
    if panel.glass is not None:
        colours[panel.glass & missing] = to_rgba(GREYS[NO_TISSUE])
    colours[:, 3] *= style.alpha
    panel.canvas.draw_spots(ax, colours, style.size)


def _draw_inset(
    panel: Panel, style: Style, ax: Axes, box: tuple[float, ...], norm: Normalize | None, corner: str
) -> None:
    """Draw an enlarged region in a corner of the axes, with lines to its position."""
    region = panel.canvas.box(style.inset, "inset")
    sides = np.subtract(region[2:], region[:2]) / np.subtract(box[2:], box[:2])
    width, height = _INSET * sides / sides.max()
    if sides.max() >= _INSET or min(np.subtract(region, box)[:2]) < 0 or min(np.subtract(box, region)[2:]) < 0:
        raise ValueError(
            f"`inset` {tuple(style.inset or ())} must be inside the drawn region, with less than {_INSET:.0%} of its width and "
            "height; pass a smaller region, or draw only this region with bbox="
        )
    low = {"left": 0.0, "right": 1 - width}[corner.split()[1]], {"lower": 0.0, "upper": 1 - height}[corner.split()[0]]
    inset = ax.inset_axes((*low, width, height))
    _draw_region(panel, style, inset, region, norm)
    inset.set(xlim=region[::2], ylim=region[3::-2], xticks=[], yticks=[])
    ax.indicate_inset_zoom(inset, edgecolor="k", alpha=1)


def _add_legend(ax: Axes, panel: Panel, loc: str | None, free_corner: str) -> None:
    """Add a legend of the classes, including classes without spots, and of the greys; of numbers, of the greys only."""
    from matplotlib.lines import Line2D

    missing = pd.isna(panel.values)
    glass = missing & (False if panel.glass is None else panel.glass)
    drawn = {NO_TISSUE: glass.any(), UNKNOWN: panel.name_unknown and (missing & ~glass).any()}
    greys = [(name, GREYS[name]) for name, is_drawn in drawn.items() if is_drawn]
    if panel.colours is None and greys:
        greys, loc = [(" or ".join(name for name, _ in greys), GREYS[NO_TISSUE])], free_corner
    elif panel.colours is None or loc in (None, "none"):
        return
    present = set(pd.unique(np.asarray(panel.values, object)))
    handles = []
    for name, colour in dict.fromkeys([*(panel.colours or {}).items(), *greys]):
        is_drawn = name in present or (name, colour) in greys
        label = name if is_drawn else f"{name} (absent)"
        fill: Literal["full", "none"] = "full" if is_drawn else "none"
        handles.append(Line2D([], [], marker="o", ls="", color=colour, label=label, fillstyle=fill))
    ncols = 2 if loc == _BELOW and len(handles) > 2 else 1
    options = _OUTSIDE.get(loc, {"loc": loc})
    ax.legend(handles=handles, fontsize="small", handletextpad=0.2, ncols=ncols, **options)


def class_panel(slide: Canvas, column: str, title: str, glass: np.ndarray | None, item: int) -> Panel:
    """Return the panel of a column with labels, without colours, which are added later."""
    values = slide.table.obs[column]
    pairs = zip(values, values.isna(), strict=True)
    labels = np.array([None if is_missing else str(label) for label, is_missing in pairs], object)
    if (n := len(pd.unique(labels))) > _MAX_LABELS:
        raise ValueError(
            f"`genes`/`color`: obs[{column!r}] has {n} different labels, at most {_MAX_LABELS} can be drawn; group them first"
        )
    return Panel(slide, title, labels, colours={}, glass=glass, item=item, scale=column)


def complete(panels: list[Panel], keys: Keys, palette: Any) -> list[Panel]:
    """Return panels with the colours of their classes and, of several slides, with the name of the slide in the title.

    Raise if no entry of the palette is a class in the panels; it may have classes that a slide lacks.
    """
    slides = list(dict.fromkeys(panel.canvas for panel in panels))
    columns = dict.fromkeys(panel.scale for panel in panels if panel.colours is not None)
    colours = {column: _class_colours(column, [slide.table for slide in slides], keys, palette) for column in columns}
    known = sorted(set().union(*colours.values()))
    entries = [str(key) for key in palette] if isinstance(palette, Mapping) else []
    if known and entries and not set(entries) & set(known):
        raise ValueError(
            f"`palette` has {entries[:5]}, which are not classes, valid: {known}{validate.suggest(entries[0], known)}"
        )
    titles = [f"{panel.canvas.name}\n{panel.title}" if len(slides) > 1 else panel.title for panel in panels]
    return [replace(p, title=title, colours=colours.get(p.scale)) for p, title in zip(panels, titles, strict=True)]


def classes_of(table: AnnData, keys: Keys) -> list[str]:
    """Return the classes of which a prediction has probabilities."""
    return [str(label) for label in getattr(table.obsm.get(keys.proba), "columns", ())]


def _class_colours(column: str, tables: Sequence[AnnData], keys: Keys, palette: Any) -> dict[str, str]:
    """Return the colour of each class of a column, in the order of the legend.

    Colours are from ``palette``, else the model, else ``uns``, else a default list.
    """
    of_model: dict[str, str] = {}
    stored: dict[str, str] = {}
    labels: dict[str, Any] = {}
    for table in tables:
        of_model |= _model_colours(table, keys)
        stored |= stored_colours(table, column)
        if column in table.obs:  # another slide may have its labels in another column
            labels |= dict.fromkeys(sorted(map(str, table.obs[column].astype("category").cat.categories)))
    labels = of_model | labels if column == keys.annotation else labels
    others = [label for label in labels if label not in of_model and label not in stored]
    colours = dict(zip(others, cycle(_EXTRA_COLOURS))) | GREYS | stored | of_model
    return {label: colours[label] for label in labels} | _palette_colours(palette, list(labels))


def _model_colours(table: AnnData, keys: Keys) -> dict[str, str]:
    """Return the colours of the model's classes, from the card of a bundled model, else from ``uns``."""
    from ..models import BUNDLED, load

    record, values = table.uns.get(keys.uns), table.obs.get(keys.annotation)
    name = record.get("model") if isinstance(record, Mapping) else None
    classes = classes_of(table, keys)
    if values is not None and isinstance(values.dtype, pd.CategoricalDtype):
        classes += map(str, values.cat.categories)
    card = load(name).card if name in BUNDLED else None
    colours = dict(zip(card.classes, card.class_colors, strict=True)) if card is not None else {}
    colours |= stored_colours(table, keys.annotation)
    extra = cycle(_EXTRA_COLOURS)
    return {label: colours.get(label) or next(extra) for label in dict.fromkeys(classes)}


def _palette_colours(palette: Any, labels: list[str]) -> dict[str, str]:
    from matplotlib import colormaps
    from matplotlib.colors import is_color_like, to_hex

    if palette is None:
        return {}
    if isinstance(palette, str):
        validate.key_in(palette, colormaps, "palette", what="a colour map of matplotlib")
        cmap = colormaps[palette]
        steps = range(len(labels)) if cmap.N <= 20 else np.linspace(0, 1, max(2, len(labels)))
        pairs = zip(labels, steps, strict=False)
        return {label: to_hex(cmap(x % cmap.N if cmap.N <= 20 else x)) for label, x in pairs}
    if isinstance(palette, Mapping):
        colours = {str(label): colour for label, colour in palette.items()}
    elif isinstance(palette, Sequence | np.ndarray) and len(palette) >= len(labels):
        colours = dict(zip(labels, palette, strict=False))
    else:
        raise ValueError(
            f"`palette` is {palette!r}; a mapping from classes to colours, a colour map, or {len(labels)} colours are needed"
        )
    if wrong := [colour for colour in colours.values() if not is_color_like(colour)]:
        raise ValueError(f"`palette` holds {wrong[:5]}, which are not colours; use colours such as '#d62728' or 'red'")
    return {label: to_hex(colours[label]) for label in labels if label in colours}


def _norms(panels: list[Panel], vmin: Any, vmax: Any) -> list[Normalize | None]:
    """Return the range of colours of each panel with numbers."""
    from matplotlib.colors import Normalize

    pooled: dict[Any, list[np.ndarray]] = {}
    for panel in panels:
        if panel.values is not None and panel.colours is None:
            pooled.setdefault(panel.scale, []).append(panel.values[np.isfinite(panel.values)])
    norms: list[Normalize | None] = []
    ends = (_end_of_each(value, name, panels) for name, value in (("vmin", vmin), ("vmax", vmax)))
    for panel, *given in zip(panels, *ends, strict=True):
        if panel.values is None or panel.colours is not None:
            norms.append(None)
            continue
        values = np.concatenate(pooled[panel.scale])
        limits = panel.limits or (0.0, 1.0)
        if panel.limits is None and len(values):
            # With few spots, these quantiles are the minimum and maximum, so nothing is clipped.
            limits = np.quantile(values, 0.01, method="lower"), np.quantile(values, 0.99, method="higher")
        ends_of_panel = []
        for end, limit in zip(given, limits, strict=True):
            if isinstance(end, str):
                end = np.percentile(values, float(end[1:])) if len(values) else None
            ends_of_panel.append(float(limit if end is None else end))
        low, high = ends_of_panel
        # For constant data, percentiles are valid, and so is a vmin equal to the constant.
        numbers = [end for end in given if validate.is_number(end)]
        if not len(values):
            is_valid = given.count(None) > 0
        else:
            is_valid = not np.ptp(values) and (not numbers or (given[1] is None and high == low))
        if high <= low and any(end is not None for end in given) and not is_valid:
            raise ValueError(f"`vmin` {low:g} is not below `vmax` {high:g} for {panel.title!r}")
        norms.append(Normalize(low, high if high > low else low + 1.0))
    return norms


def _end_of_each(value: Any, name: str, panels: list[Panel]) -> list[Any]:
    """Return the end of each panel; ``value`` is one for all, one per panel, or one per drawn name."""
    n_items = 1 + max(panel.item for panel in panels)
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    given = list(value) if is_list else [value] * len(panels)
    if len(given) not in (n_items, len(panels)):
        raise ValueError(f"`{name}` holds {len(given)} values; {n_items} are needed, one for each drawn name")
    for end in given:
        percent = re.fullmatch(r"p(\d+(?:\.\d+)?)", end) if isinstance(end, str) else None
        if not (end is None or validate.is_number(end) or (percent is not None and float(percent[1]) <= 100)):
            raise ValueError(f"`{name}` is {end!r}; a number, or a percentile such as 'p99', is needed")
    return given if len(given) == len(panels) else [given[panel.item] for panel in panels]
