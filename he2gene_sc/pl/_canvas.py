"""What the pictures share: the slide to draw on, its axes, its scale bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import logs
from .._core.elements import check_spatialdata, spot_element
from .._core.keys import Keys
from .._core.mpp import affine
from .._core.predictions import predicted_table
from .._core.slide import Slide, resolve
from ..image import MIN_TISSUE

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from spatialdata import SpatialData

#: What legends call a spot without a value, and a spot on glass, and their greys.
UNKNOWN, NO_TISSUE = "unknown", "no tissue"
GREYS = {NO_TISSUE: "#c4c4c4", UNKNOWN: "#8c8c8c"}


@dataclass(frozen=True)
class Canvas:
    """A slide and the table that was predicted on it."""

    sdata: SpatialData
    slide: Slide
    table_key: str

    @property
    def table(self) -> AnnData:
        """Rows of the slide's spots, in the order of the slide."""
        table = self.sdata[self.table_key]
        attrs = table.uns["spatialdata_attrs"]
        return table[(table.obs[attrs["region_key"]] == self.slide.shapes_key).to_numpy()]

    def panels(self, columns: Mapping[str, Any]) -> AnnData:
        """Make a small table of the slide's spots with a column of ``obs`` for each panel, as spatialdata-plot wants it."""
        from anndata import AnnData
        from spatialdata.models import TableModel

        table, region = self.table, self.slide.shapes_key
        obs = pd.DataFrame(dict(columns), index=table.obs_names)
        obs["region"] = pd.Categorical([region] * len(obs))
        obs["instance"] = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()
        return TableModel.parse(AnnData(obs=obs), region=region, region_key="region", instance_key="instance")

    def um_per_unit(self) -> float:
        """µm per unit of the coordinate system that is drawn."""
        matrix = affine(self.sdata.images[self.slide.image_key], self.slide.coordinate_system)
        return float(self.slide.mpp / np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def canvas(
    sdata: SpatialData,
    *,
    prediction_key: str,
    table_key: str | None,
    shapes_key: str | None,
    image_key: str | None,
    coordinate_system: str | None,
) -> Canvas:
    """Find the slide that a prediction was made on."""
    check_spatialdata(sdata)
    table_key = predicted_table(sdata, prediction_key, table_key)
    record = sdata[table_key].uns[Keys(prediction_key).uns]
    regions = [record["shapes"]] if isinstance(record["shapes"], str) else list(record["shapes"])
    if shapes_key is None and len(regions) > 1:
        raise ValueError(f"`shapes_key` is ambiguous, candidates: {regions}")
    shapes_key = shapes_key or regions[0]

    def recorded(name: str) -> Any:
        return record[name][shapes_key] if isinstance(record[name], dict) else record[name]

    (slide,) = resolve(
        sdata,
        image_key=image_key or recorded("image"),
        shapes_key=shapes_key,
        table_key=table_key,
        coordinate_system=coordinate_system or recorded("coordinate_system"),
        mpp=float(recorded("mpp")),
    )
    return Canvas(sdata, slide, table_key)


def draw(
    where: Canvas, table: AnnData, color: str | None, ax: Axes, *, title: str, image: bool, size: float, **kwargs: Any
) -> None:
    """Draw one column of a table on the spots over the tissue, by spatialdata-plot.

    Parameters
    ----------
    where
        The slide.
    table
        Annotates its spots; replaces the object's tables for the drawing.
    color
        Gene or ``obs`` column of ``table``; ``None``: the tissue alone.
    ax
        Where to draw.
    title
        Of the axes.
    image
        Whether the tissue is drawn underneath.
    size
        Scale of the spots.
    **kwargs
        Passed to ``render_shapes``, or ``render_labels`` where the spots are labels.
    """
    import spatialdata as sd
    import spatialdata_plot  # noqa: F401 - registers sdata.pl

    slide = where.slide
    elements = {slide.shapes_key: spot_element(where.sdata, slide.shapes_key)}
    if image:
        elements[slide.image_key] = where.sdata.images[slide.image_key]
    shown = sd.SpatialData.init_from_elements({**elements, "table": table})
    with quiet():
        plot = shown.pl.render_images(slide.image_key) if image else shown
        if color is not None and slide.shapes_key in where.sdata.labels:
            plot = plot.pl.render_labels(slide.shapes_key, color=color, table_name="table", **kwargs)
        elif color is not None:
            plot = plot.pl.render_shapes(slide.shapes_key, color=color, table_name="table", scale=size, **kwargs)
        plot.pl.show(
            coordinate_systems=slide.coordinate_system,
            ax=ax,
            title=title,
            scalebar_dx=where.um_per_unit(),
            scalebar_units="um",
            scalebar_params={"location": "lower left", "box_alpha": 0.6},
            show=False,
        )
    bare_axes(ax, title)
    _zoom(where, ax)


def bare_axes(ax: Axes, title: str) -> None:
    """Leave a picture without labels and ticks, and set its title."""
    ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    ax.set_title(title)


def _zoom(where: Canvas, ax: Axes) -> None:
    """Show the spots and a margin, not the empty glass around them."""
    slide = where.slide
    matrix = affine(where.sdata.images[slide.image_key], slide.coordinate_system)
    xy = slide.centres @ matrix[:2, :2].T + matrix[:2, 2]
    low, high = xy.min(0), xy.max(0)
    margin = 0.06 * (high - low).max() + slide.diameter_um / where.um_per_unit()
    ax.set_xlim(low[0] - margin, high[0] + margin)
    bottom, top = ax.get_ylim()
    limits = (low[1] - margin, high[1] + margin)
    ax.set_ylim(limits[::-1] if bottom > top else limits)


def on_glass(table: AnnData, prediction_key: str) -> np.ndarray:
    """Mask of the spots with less tissue than is needed; ``False`` everywhere for predictions that do not say."""
    share = table.obs.get(Keys(prediction_key).tissue)
    return np.zeros(table.n_obs, bool) if share is None else share.to_numpy(dtype=float) < MIN_TISSUE


def name_grey(ax: Axes, names: Sequence[str]) -> None:
    """Say in a legend inside the axes what the grey spots are."""
    from matplotlib.lines import Line2D

    if names:
        handle = Line2D([], [], marker="o", ls="", color=GREYS[NO_TISSUE], label=" or ".join(names))
        ax.legend(handles=[handle], loc="upper right", fontsize="small", handletextpad=0.2)


def add_colorbar(ax: Axes, norm: Normalize, cmap: str, label: str) -> None:
    """Put a colour bar beside the axes, inside what the layout gives them."""
    from matplotlib.cm import ScalarMappable

    ax.figure.colorbar(ScalarMappable(norm, cmap), ax=ax, shrink=0.8, pad=0.02).set_label(label)


def quiet() -> AbstractContextManager[None]:
    """Keep spatialdata-plot's log lines about a temporary object out of the notebook."""
    return logs.quiet("spatialdata", "spatialdata_plot", "spatialdata_plot._logging")


def axes_for(n: int, ax: Axes | Sequence[Axes] | None, ncols: int, panel: float = 4.5) -> list[Axes]:
    """Return ``n`` axes: those given, or a new figure of them.

    Raises
    ------
    ValueError
        If another number of axes is given.
    """
    import matplotlib.pyplot as plt

    if ax is not None:
        given = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(given) != n:
            raise ValueError(f"`ax` holds {len(given)} axes, {n} are needed")
        return given
    ncols = min(n, ncols)
    nrows = -(-n // ncols)
    figure, grid = plt.subplots(
        nrows, ncols, figsize=(panel * 1.15 * ncols, panel * nrows), squeeze=False, layout="constrained"
    )
    flat = list(grid.ravel())
    for empty in flat[n:]:
        empty.remove()
    return flat[:n]


def finish(axes: list[Axes], save: str | Path | None) -> Axes | list[Axes]:
    """Save the figure if asked, and return one axes or the list of them."""
    if save is not None:
        axes[0].figure.canvas.figure.savefig(Path(save).expanduser(), dpi=150, bbox_inches="tight")
    return axes[0] if len(axes) == 1 else axes
