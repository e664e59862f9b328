"""``hg.pl.annotation``: predicted classes on the tissue, with known labels beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.keys import Keys
from ._canvas import canvases, on_glass
from ._panels import Style, class_panel, complete, draw_panels

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData


def annotation(
    sdata: SpatialData | AnnData | Sequence[SpatialData | AnnData] | Mapping[str, SpatialData | AnnData],
    *,
    reference: str | None = None,
    image: bool = True,
    bbox: Sequence[float] | None = None,
    palette: Mapping[str, str] | Sequence[str] | str | None = None,
    size: float = 1.0,
    alpha: float = 1.0,
    title: str | Sequence[str] | None = None,
    legend_loc: str | None = "right margin",
    frameon: bool = True,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    figsize: Sequence[float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw the predicted annotation at the spots over the tissue, and known labels beside it.

    A class has the same colour in all panels. Classes of the model without spots are listed as absent. Spots without a class are
    grey: "no tissue" if less than 0.25 of the spot is tissue, else "unknown".

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to, a table, or several, as in :func:`he2gene_sc.pl.spatial`.
    reference
        Column of ``obs`` with known labels, for example ``"pathologist"``, drawn in a second panel in the same colours.
    image, bbox, palette, size, alpha, legend_loc, frameon, figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.
    prediction_key, table_key, shapes_key, image_key, coordinate_system
        As in :func:`he2gene_sc.pl.spatial`.
    ax
        Axes to draw in: one, or two with ``reference``.

    Returns
    -------
    matplotlib.axes.Axes, list of them, or matplotlib.figure.Figure
        One per panel.

    Raises
    ------
    ValueError
        If no annotation was predicted, or ``reference`` is not a column with labels.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> ax = hg.pl.annotation(sdata)
    """
    validate.arguments(annotation, locals())
    style = Style(image, size, alpha, legend_loc=legend_loc, frameon=frameon, bbox=bbox)
    keys = Keys(prediction_key)
    slides = canvases(sdata, prediction_key, table_key, shapes_key, image_key, coordinate_system)
    for slide in slides:
        table, where = slide.table, f" of slide {slide.name!r}" if slide.name else ""
        if keys.annotation not in table.obs:
            raise ValueError(
                f"`prediction_key` {prediction_key!r}: the model has no annotation head, so obs{where} has no {keys.annotation!r}"
            )
        if reference is not None and not _has_labels(table, reference):
            labelled = [c for c in table.obs if isinstance(table.obs[c].dtype, pd.CategoricalDtype)]
            raise ValueError(
                f"`reference` {reference!r} is not a column of obs{where} with labels, candidates: {labelled}"
            )
    shown = {keys.annotation: "predicted annotation"} | ({} if reference is None else {reference: reference})
    panels = []
    for slide in slides:
        for i, (column, name) in enumerate(shown.items()):
            glass = on_glass(slide.table, prediction_key) if column == keys.annotation else None
            panels.append(class_panel(slide, column, name, glass, i))
    ncols = 2 if reference is not None else 3
    return draw_panels(complete(panels, keys, palette), style, ax, ncols, figsize, title, save, show, return_fig)


def _has_labels(table: AnnData, column: str) -> bool:
    if column not in table.obs or table.obs[column].isna().all():
        return False
    values = table.obs[column]
    return isinstance(values.dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(values)
