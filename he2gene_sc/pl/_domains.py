"""``hg.pl.domains``: tissue, annotated domains, and clusters of measured and predicted expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import PATIENT, SECTION
from .._core.labelled import MIN_DOMAIN_SPOTS
from .._core.names import annotation_target, names_of, stored_colours
from .._core.predictions import prediction_of
from .._core.results import find_results
from .._core.slide import slides_of
from .._core.spots import samples_of, sections_of, unique_section_names
from ._canvas import Canvas
from ._panels import Panel, Style, draw_panels

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_EXTRA_COLOURS = ("#e377c2", "#8c564b", "#aec7e8", "#ffbb78", "#98df8a")


def domains(
    data: SpatialData | AnnData,
    *,
    section: str | None = None,
    image: bool = True,
    size: float = 1.0,
    alpha: float = 1.0,
    title: str | Sequence[str] | None = None,
    key: str = "he2gene_domains",
    table_key: str | None = None,
    figsize: Sequence[float] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw the tissue, the annotated domains and the clusters side by side, with their scores.

    A cluster has the colour of the domain that it matches one to one, or grey if it matches none.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.domain_preservation` wrote to. Without an image, only spots are drawn.
    section
        Section to draw; needed if there are several.
    image
        Draw the tissue in its own panel and under the spots.
    size
        Scale of the spots; 1 is their true size with an image; without an image, spots nearly touch.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.
    ax
        Axes to draw in, one per panel.
    alpha, title, figsize, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        One per panel: tissue (with an image), annotation, and measured and predicted if available.

    Raises
    ------
    ValueError
        If domain_preservation was not run, ``section`` is ambiguous or unknown, or ``ax`` has the wrong number of axes.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((8, 8), mpp=2.0)
    >>> hg.tl.domain_preservation(sdata, "pathologist", layer=None, n_seeds=2)
    >>> len(hg.pl.domains(sdata))
    3
    """
    validate.arguments(domains, locals())
    style = Style(image, size, alpha, legend_loc="below")
    (table,) = find_results(data, "domain_preservation", key, table_key)
    record = table.uns[key]
    section, spots = _spots(table, record, section)
    columns = {record["params"]["domain_key"]: "annotation"}
    columns |= {f"{key}_{name}": name for name in ("measured", "predicted") if f"{key}_{name}" in table.obs}
    labels = {column: _labels(table, spots, column) for column in columns}
    colours = _colours(table, labels)
    canvas = _canvas(data, table, spots, record, image)
    panels = [Panel(canvas, "tissue")] if canvas.slide is not None else []
    for column, name in columns.items():
        present = set(labels[column].iloc[spots].dropna())
        values = labels[column][canvas.table.obs_names]
        legend = {label: colour for label, colour in colours.items() if label in present}
        values = values.where(values.isin(present), None).to_numpy(object)
        panels.append(Panel(canvas, _title(record, section, name), values, legend, name_unknown=False))
    return draw_panels(panels, style, ax, 4, figsize, title, save, show, return_fig)


def _spots(table: AnnData, record: Mapping, section: str | None) -> tuple[str, np.ndarray]:
    """Return the section and its rows; sections of several samples may share a name."""
    scored = [name for name in record["table"]["section"].unique() if name != "all"]
    if section is None:
        validate.not_ambiguous(scored, "section")
    chosen: str = scored[0] if section is None else section
    if chosen not in scored:
        raise ValueError(f"`section` {chosen!r} was not scored, valid: {scored}")
    params = record["params"]
    samples = samples_of(table, params.get("sample_key", PATIENT))
    names = unique_section_names(sections_of(table, params.get("section_key", SECTION)), samples)
    return chosen, np.flatnonzero(names == chosen)


def _canvas(data: Any, table: AnnData, spots: np.ndarray, record: Mapping, image: bool) -> Canvas:
    """Return the slide of the section; without an image, or if the table annotates nothing, only the spots."""
    attrs = annotation_target(table) if image else None
    if attrs is not None and getattr(data, "images", None):
        regions = table.obs[attrs["region_key"]]
        shapes = regions.iloc[spots[0]]
        with suppress(ValueError):
            for slide in slides_of(data, table, prediction_of(table, record["params"].get("layer"))):
                if slide.shapes_key == shapes:
                    return Canvas(table[(regions == shapes).to_numpy()], slide, data)
    return Canvas(table[spots])


def _labels(table: AnnData, spots: np.ndarray, column: str) -> pd.Series:
    """Return the labels as text, without labels that have too few spots in the section for a score."""
    labels = pd.Series(names_of(table, column, "domain_key"), index=table.obs_names)
    size = labels.iloc[spots].value_counts()
    return labels.where(~labels.isin(size.index[size < MIN_DOMAIN_SPOTS]), None)


def _colours(table: AnnData, labels: Mapping[str, pd.Series]) -> dict[str, str]:
    """Return the colour of each label, from ``uns`` if stored; a domain and its clusters have the same colour."""
    colours: dict[str, str] = {}
    for column in reversed(list(labels)):
        colours |= stored_colours(table, column)
    extra = cycle(_EXTRA_COLOURS)
    for label in sorted(next(iter(labels.values())).dropna().unique()):
        if label not in colours:
            colours[label] = colours.get(f"~{label}") or next(extra)
    return colours


def _title(record: Mapping, section: str, name: str) -> str:
    """Return the title of a panel: its name, agreement with the domains, and p-value."""
    if name == "annotation":
        return f"annotation\n{record['params']['domain_key']}"
    scores = record["table"]
    chosen = (scores["section"] == section) & (scores["labels"] == name)
    row = scores[chosen & (scores["against"] == "domains") & (scores["score"] == "ari")].iloc[0]
    sd = f" ± {row['sd']:.2f}" if np.isfinite(row["sd"]) else ""
    p_value = f", p = {row['pval']:.3f} ({int(row['n_shifts'])} shifts)" if np.isfinite(row["pval"]) else ""
    return f"{name}\nARI {row['mean']:.2f}{sd}{p_value}"
