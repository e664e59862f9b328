"""``hg.pl.domains``: tissue, annotated domains, and clusters of measured and predicted expression, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import PATIENT, SECTION
from .._core.names import labels_of
from .._core.predictions import prediction_of
from .._core.results import find_results
from .._core.slide import slides_of
from .._core.spots import apart, pitch_of, samples_of, sections_of, spots_of
from ..tl._domains.inputs import MIN_SPOTS
from ._canvas import Canvas, axes_for, draw, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

_EXTRA_COLOURS = ("#e377c2", "#8c564b", "#aec7e8", "#ffbb78", "#98df8a")


def domains(
    data: SpatialData | AnnData,
    *,
    section: str | None = None,
    image: bool = True,
    size: float = 1.0,
    key: str = "he2gene_domains",
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the tissue, the annotated domains and the clusters beside each other, with their scores.

    A cluster has the colour of the domain that it matches one to one, and a grey where it matches none.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.domain_preservation` wrote to. Without an image spots alone are drawn.
    section
        Which, where there are several.
    image
        Draw the tissue, alone and underneath the spots.
    size
        Scale of the spots; 1 is their true size over an image, and just touching ones without.
    key
        ``key_added`` of the run.
    table_key
        Table, where an object holds several.
    ax
        Axes to draw in, one a panel.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        One a panel: tissue (with an image), annotation, measured and predicted, as far as they are there.

    Raises
    ------
    ValueError
        If domain_preservation was not run, ``section`` is ambiguous or not there, or ``ax`` has another number.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((8, 8), mpp=2.0)
    >>> hg.tl.domain_preservation(sdata, "pathologist", layer=None, n_seeds=2)
    >>> len(hg.pl.domains(sdata))
    3
    """
    validate.arguments(domains, locals())
    validate.in_range(size, "size", above=0)
    (table,) = find_results(data, "domain_preservation", key, table_key)
    record = table.uns[key]
    section, spots = _spots(table, record, section)
    columns = {record["params"]["domain_key"]: "annotation"}
    columns |= {f"{key}_{name}": name for name in ("measured", "predicted") if f"{key}_{name}" in table.obs}
    labels = {column: _labels(table, spots, column) for column in columns}
    colours = _colours(table, labels)
    titles = [_title(record, section, name) for name in columns.values()]
    where = _canvas(data, table, spots, prediction_of(table, record["params"].get("layer"))) if image else None
    axes = axes_for(len(columns) + (where is not None), ax, ncols=4, panel=4.0)
    if where is not None:
        rows = where.table.obs_names
        shown = where.panels({column: pd.Categorical(values[rows]) for column, values in labels.items()})
        draw(where, shown, None, axes[0], title="tissue", image=True, size=size)
    for axis, column, title in zip(axes[-len(columns) :], columns, titles, strict=True):
        present = labels[column].iloc[spots].dropna().unique()
        present = [name for name in colours if name in set(present)]
        if where is None:
            _scatter(spots_of(table)[spots], labels[column].iloc[spots], colours, axis, size)
            axis.set_title(title)
        else:
            palette = [colours[name] for name in present]
            draw(where, shown, column, axis, title=title, image=True, size=size, groups=present, palette=palette)
        _legend(axis, {name: colours[name] for name in present})
    return finish(axes, save)


def _spots(table: AnnData, record: Mapping, section: str | None) -> tuple[str, np.ndarray]:
    """Section and its rows: those of the sample, where sections were told apart by it."""
    scored = [name for name in record["table"]["section"].unique() if name != "all"]
    if section is None and len(scored) > 1:
        raise ValueError(f"`section` is ambiguous, candidates: {scored}")
    section = scored[0] if section is None else section
    if section not in scored:
        raise ValueError(f"`section` {section!r} was not scored, valid: {scored}")
    params = record["params"]
    samples = samples_of(table, params.get("sample_key", PATIENT))
    names = apart(sections_of(table, params.get("section_key", SECTION)), samples)
    return section, np.flatnonzero(names == section)


def _canvas(data: SpatialData | AnnData, table: AnnData, spots: np.ndarray, prediction: str | None) -> Canvas | None:
    """Slide that the section lies on; ``None`` without one."""
    if not getattr(data, "images", None):
        return None
    (table_key,) = [key for key, value in data.tables.items() if value is table]
    shapes = table.obs[table.uns["spatialdata_attrs"]["region_key"]].iloc[spots].iloc[0]
    try:
        slides = slides_of(data, table, prediction)
    except ValueError:
        return None
    found = next((slide for slide in slides if slide.shapes_key == shapes), None)
    return None if found is None else Canvas(data, found, table_key)


def _labels(table: AnnData, spots: np.ndarray, column: str) -> pd.Series:
    """Labels as text, without those that have too few spots in the section to be scored."""
    labels = pd.Series(labels_of(table, column, "domain_key"), index=table.obs_names)
    size = labels.iloc[spots].value_counts()
    return labels.where(~labels.isin(size.index[size < MIN_SPOTS]), None)


def _legend(ax: Axes, colours: Mapping[str, str]) -> None:
    """Name the colours below the panel, where they push no other panel apart."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=colour, label=name) for name, colour in colours.items()]
    columns = 2 if len(handles) > 2 else 1
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize="small",
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        handletextpad=0.2,
        columnspacing=1,
    )


def _scatter(xy: np.ndarray, labels: pd.Series, colours: Mapping[str, str], ax: Axes, size: float) -> None:
    """Draw spots alone, in their own size."""
    from matplotlib.collections import EllipseCollection

    diameter = 0.95 * size * pitch_of(xy)
    for label in [None, *labels.dropna().unique()]:
        chosen = (labels.isna() if label is None else labels == label).to_numpy()
        if chosen.any():
            sides = np.full(chosen.sum(), diameter)
            circles = EllipseCollection(
                sides,
                sides,
                np.zeros(chosen.sum()),
                units="xy",
                offsets=xy[chosen],
                offset_transform=ax.transData,
                facecolors="none" if label is None else colours[label],
                edgecolors="#d0d0d0" if label is None else "none",
            )
            ax.add_collection(circles)
    low, high = xy.min(0) - diameter, xy.max(0) + diameter
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])


def _colours(table: AnnData, labels: Mapping[str, pd.Series]) -> dict[str, str]:
    """Colour of every label: that in ``uns``, where there is one, the same for a domain and for its clusters."""
    colours: dict[str, str] = {}
    for column in reversed(list(labels)):
        values = table.obs[column]
        if isinstance(values.dtype, pd.CategoricalDtype) and f"{column}_colors" in table.uns:
            pairs = zip(values.cat.categories, table.uns[f"{column}_colors"], strict=False)
            colours |= {str(name): str(colour) for name, colour in pairs}
    extra = iter(_EXTRA_COLOURS * 10)
    for label in sorted(next(iter(labels.values())).dropna().unique()):
        if label not in colours:
            colours[label] = colours.get(f"~{label}") or next(extra)
    return colours


def _title(record: Mapping, section: str, name: str) -> str:
    """Name of the panel, its agreement with the domains and the p-value."""
    if name == "annotation":
        return f"annotation\n{record['params']['domain_key']}"
    lines = record["table"]
    chosen = (lines["section"] == section) & (lines["labels"] == name)
    line = lines[chosen & (lines["against"] == "domains") & (lines["score"] == "ari")].iloc[0]
    spread = f" ± {line['sd']:.2f}" if np.isfinite(line["sd"]) else ""
    p_value = f", p = {line['pval']:.3f} ({int(line['n_shifts'])} shifts)" if np.isfinite(line["pval"]) else ""
    return f"{name}\nARI {line['mean']:.2f}{spread}{p_value}"
