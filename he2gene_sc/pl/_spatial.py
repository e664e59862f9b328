"""``hg.pl.spatial``: genes, classes and other columns on the tissue; genes with what was measured beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.genes import columns_of
from .._core.keys import OWN_TABLE, Keys
from .._core.matrix import dense, layer_label, matrix_of
from .._core.ownership import is_prediction, is_record_of
from .._core.predictions import predicted_layer, predicted_table, record_of, symbols_of
from .._core.results import scores_of
from ..stats import pearson
from ._canvas import Canvas, canvases, finish, on_glass
from ._panels import Panel, Style, as_log, check_palette, class_colours, class_panel, draw_panels

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_LOG_UNIT = "ln(1 + counts per 10,000)"


def spatial(
    sdata: SpatialData | AnnData | Sequence[SpatialData | AnnData] | Mapping[str, SpatialData | AnnData],
    genes: str | Sequence[str] | None = None,
    *,
    color: str | Sequence[str] | None = None,
    measured: bool | str | None = None,
    shared_scale: bool = False,
    image: bool = True,
    bbox: Sequence[float] | None = None,
    inset: Sequence[float] | None = None,
    vmin: float | str | Sequence[float | str | None] | None = None,
    vmax: float | str | Sequence[float | str | None] | None = None,
    cmap: str | Colormap = "viridis",
    palette: Mapping[str, str] | Sequence[str] | str | None = None,
    size: float = 1.0,
    alpha: float = 1.0,
    title: str | Sequence[str] | None = None,
    legend_loc: str | None = "right margin",
    frameon: bool = True,
    layer: str | None = "he2gene",
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | Sequence[str] | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    figsize: Sequence[float] | None = None,
    ncols: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw genes, classes or any column of ``obs`` at the spots over the tissue, and measured genes beside predicted ones.

    The prediction of a spot on glass is of no tissue: it is grey and does not count for the colour scale. Measured values are
    drawn everywhere. The title of a measured panel states the Pearson correlation with the predicted one. Below a predicted
    panel stand the held-out correlations of the gene.

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to; a list of them, or a dict by name. A table (AnnData) is drawn
        by its ``obsm["spatial"]``, without tissue. All regions of a table are drawn.
    genes, color
        What to draw, one name or several; both mean the same. A gene: its name in ``var_names``, or in the column that
        predict was given as ``gene_symbols``; a symbol that HGNC has changed since is found by its other name. A column of
        ``obs``. ``"annotation"``, ``"confidence"``, ``"ood"`` or ``"tissue"`` (share of tissue) of the prediction, where
        ``obs`` has no such column. A class of the model: its probability; ``"probabilities"``: those of all classes. A gene set
        of :func:`he2gene_sc.tl.programmes`: its score.
        Default: the tissue alone.
    measured
        What to show beside a predicted gene. ``None``: ``X``, where the table was measured. ``True``: the same, an error
        where there is none. ``False``: nothing. A text: that layer. Raw counts are shown as natural log of (1 +
        counts per 10,000), the unit of the prediction; other values as they are.
    shared_scale
        Give predicted and measured of a gene the same colour scale. Predictions vary less than measurements, which
        carry noise; on one scale that shows, on their own the patterns compare better.
    image
        Draw the tissue underneath, from the level of the image that fits the panel.
    bbox
        Region to draw, (xmin, ymin, xmax, ymax) in pixels of the full-resolution image; of a table, in the unit of
        ``obsm["spatial"]``.
    inset
        Smaller region, in the same unit, to enlarge in a corner of each panel.
    vmin, vmax
        Ends of the colour scale: a number, a percentile such as ``"p99"``, or a list with one for each name, and for
        each class of ``"probabilities"``. Default: the 1st and the 99th percentile of the panel, so that predicted and measured
        compare; of fewer than 100 spots none is clipped. Probabilities go from 0 to 1. Slides of one figure have one scale.
    cmap
        Colour map of numbers.
    palette
        Colours of classes: a mapping, a list, or a colour map. Default: those of the model and of ``uns``.
    size
        Scale of the spots; 1 is their true size.
    alpha
        Opacity of the spots.
    title
        A text: title of the figure, or of its only panel. A list: one for each panel.
    legend_loc
        Of classes: ``"right margin"``, ``"below"``, a corner such as ``"upper right"``, or ``None``. Classes without a
        spot are listed as absent.
    frameon
        Draw a frame around each panel.
    layer
        What to show of genes: the prediction, or another layer, ``"he2gene_adapted"`` for example; the titles say so.
        ``None``: ``X``.
    prediction_key
        ``key_added`` of predict.
    table_key, shapes_key, image_key, coordinate_system
        As given to predict; ``shapes_key`` may name several regions.
    figsize
        Width and height of the figure in inches.
    ncols
        Panels in a row. Default: what is beside each other for one or two genes or several slides, else 4.
    ax
        Axes to draw in, one a panel: for each gene the predicted, then the measured.
    save
        File to write the figure to.
    show
        Call ``matplotlib.pyplot.show`` and return nothing, unless ``return_fig``.
    return_fig
        Return the figure.

    Returns
    -------
    matplotlib.axes.Axes, list of them, or matplotlib.figure.Figure
        One a panel.

    Raises
    ------
    ValueError
        If a name is neither a predicted gene nor a column, nothing was predicted, the number of axes does not fit, or a
        table has no ``obsm["spatial"]``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> len(hg.pl.spatial(sdata, "ERBB2", vmax="p99"))
    2
    >>> ax = hg.pl.spatial(sdata, color="confidence", figsize=(4, 3))
    """
    validate.arguments(spatial, locals())
    style = Style(image, size, alpha, cmap, vmin, vmax, legend_loc, frameon, bbox, inset)
    if ncols is not None:
        validate.whole_number(ncols, "ncols")
    names = [*_listed(genes, "genes"), *_listed(color, "color")]
    keys = Keys(prediction_key)
    slides = canvases(
        sdata,
        prediction_key=prediction_key,
        table_key=table_key or (lambda each: _table_with(each, names, prediction_key)),
        shapes_key=shapes_key,
        image_key=image_key,
        coordinate_system=coordinate_system,
    )
    if "probabilities" in names:
        of_all = list(dict.fromkeys(each for slide in slides for each in _classes(slide.table, keys)))
        if bare := [slide.name for slide in slides if not _classes(slide.table, keys)]:
            where = f" of slide {bare[0]!r}" if bare[0] else ""
            raise ValueError(
                f"`prediction_key` {prediction_key!r}: the model has no annotation head, obsm{where} has no {keys.proba!r}"
            )
        names = [each for name in names for each in (of_all if name == "probabilities" else [name])]
    if not names and (not image or any(slide.slide is None for slide in slides)):
        raise ValueError("`genes`/`color` name nothing, and there is no tissue to draw; name a gene or a column of obs")
    given = {"genes": genes, "color": color}
    _check_names(slides, names, keys, "/".join(f"`{name}`" for name, value in given.items() if value is not None))
    tables = [slide.table for slide in slides]
    panels: list[Panel] = []
    most = 0
    for slide in slides:
        own = _panels(slide, names, keys, layer, measured, shared_scale)
        most = max(most, len(own))
        own = [
            replace(p, colours=class_colours(p.scale, tables, keys, palette)) if p.colours is not None else p
            for p in own
        ]
        panels += [replace(p, title=f"{slide.name}\n{p.title}") for p in own] if len(slides) > 1 else own
    if ncols is None:
        pairs = len(panels) == 4 and any(panel.title.split(" (")[0].endswith("measured") for panel in panels)
        ncols = most if len(slides) > 1 and 1 < most < 5 else 2 if pairs else 4
    check_palette(palette, panels)
    axes = draw_panels(panels, style, ax, ncols, figsize, title, save)
    return finish(axes, save, title, show, return_fig)


def _listed(names: Any, parameter: str) -> list[str]:
    found = [] if names is None else [names] if isinstance(names, str) else validate.names(names, parameter)
    if names is not None and not found:
        raise ValueError(f"`{parameter}` is empty; name at least one")
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"`{parameter}` holds {wrong[:5]}; names of genes or columns of obs are needed")
    return found


def _classes(table: AnnData, keys: Keys) -> list[str]:
    """Classes of the model."""
    return [str(label) for label in getattr(table.obsm.get(keys.proba), "columns", ())]


def _column(table: AnnData, name: str, keys: Keys) -> str | None:
    """Column of ``obs`` that a name means."""
    ours = {"annotation": keys.annotation, "confidence": keys.confidence, "ood": keys.ood, "tissue": keys.tissue}
    return next((column for column in (name, ours.get(name)) if column in table.obs), None)


def _unknown(table: AnnData, names: list[str], keys: Keys) -> list[str]:
    """Names that are neither a predicted gene nor a column nor a class."""
    found = _columns(table, names, keys)
    classes = _classes(table, keys)
    classes += ["probabilities"] * bool(classes) + list(scores_of(table, keys))
    return [
        name
        for name, place in zip(names, found, strict=True)
        if place < 0 and _column(table, name, keys) is None and name not in classes
    ]


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _check_names(slides: list[Canvas], names: list[str], keys: Keys, parameter: str) -> None:
    """Refuse names that a slide lacks, and columns that are numbers in one slide and labels in another."""
    for slide in slides:
        table, where = slide.table, f" for slide {slide.name!r}" if slide.name else ""
        if unknown := _unknown(table, names, keys):
            raise ValueError(
                f"{parameter} {unknown[:5]} were not predicted{where}; hg.get.genes(sdata) lists those that were. Drawn are columns of "
                "obs too, classes of the model, gene sets, 'annotation', 'confidence', 'ood', 'tissue' and 'probabilities'"
                f"{validate.suggest(unknown[0], [*table.obs, *_classes(table, keys), *scores_of(table, keys)])}"
            )
    for name in names:
        columns = [(slide.table.obs, _column(slide.table, name, keys)) for slide in slides]
        if len({column is None or _is_number(obs[column]) for obs, column in columns}) > 1:
            raise ValueError(
                f"{parameter} {name!r} holds numbers in one slide and labels in another; one kind is needed"
            )


def _panels(
    slide: Canvas, names: list[str], keys: Keys, layer: str | None, measured: bool | str | None, shared_scale: bool
) -> list[Panel]:
    """Panels of one slide; those of classes name their column as ``scale``."""
    table = slide.table
    if not names:
        return [Panel(slide, "tissue")]
    places = _columns(table, names, keys)
    genes = [i for i, place in enumerate(places) if place >= 0]
    of_genes = _gene_panels(slide, names, genes, places, keys, layer, measured, shared_scale) if genes else {}
    glass = on_glass(table, keys.key_added)
    panels: list[Panel] = []
    for i, name in enumerate(names):
        column = _column(table, name, keys)
        if i in of_genes:
            panels += of_genes[i]
        elif column is None and name not in _classes(table, keys):
            key, said = scores_of(table, keys)[name]
            values = np.where(glass, np.nan, table.obsm[key][name].to_numpy(float))
            panels.append(Panel(slide, f"{name}{said}", values, label="score (t)", glass=glass, item=i, scale=i))
        elif column is None:
            values = table.obsm[keys.proba][name].to_numpy(float)
            panels.append(Panel(slide, name, values, label="probability", item=i, scale=i, limits=(0, 1)))
        elif _is_number(table.obs[column]):
            values = table.obs[column].to_numpy(float, na_value=np.nan)
            label = {
                keys.confidence: "probability",
                keys.tissue: "share of tissue",
                keys.ood: "above 1: out of distribution",
            }
            limits = (0.0, 1.0) if column in (keys.confidence, keys.tissue) else None
            own = glass if column == keys.confidence else None
            panels.append(
                Panel(slide, name, values, label=label.get(column, ""), glass=own, item=i, scale=i, limits=limits)
            )
        else:
            title = "predicted annotation" if column == keys.annotation else name
            panels.append(class_panel(slide, column, title, glass if column == keys.annotation else None, i))
    return panels


def _gene_panels(
    slide: Canvas,
    names: list[str],
    genes: list[int],
    places: np.ndarray,
    keys: Keys,
    layer: str | None,
    measured: bool | str | None,
    shared_scale: bool,
) -> dict[int, list[Panel]]:
    """Panels of each gene, predicted and measured, by its place in what was asked for."""
    table = slide.table
    if not table.var_names.is_unique:
        raise ValueError(
            "`sdata`: the table has duplicated var_names; run sdata[table_key].var_names_make_unique() first"
        )
    of_model = predicted_layer(table, keys.key_added)
    shown = None if layer is None else predicted_layer(table, keys.key_added, layer)
    own = table.var_names[places[genes]].tolist()
    predicted = np.array(dense(matrix_of(table[:, own], shown)), dtype=float)
    glass = on_glass(table, keys.key_added)
    predicted[glass] = np.nan
    beside, were_counts = _measured(table, own, measured) or (None, False)
    facts = table.var.loc[own]
    out: dict[int, list[Panel]] = {}
    for j, i in enumerate(genes):
        doubt = "" if bool(facts[keys.reliable].iloc[j]) else " (not reliable)"
        said = [
            f"{text} r = {facts[name].iloc[j]:.2f}"
            for text, name in (("held-out", keys.pcc), ("new patients", keys.pcc_new_patient))
            if shown == of_model and name in facts and np.isfinite(facts[name].iloc[j])
        ]
        out[i] = [
            Panel(
                slide,
                f"{names[i]} {'predicted' if shown == of_model else _name(table, shown)}{doubt}",
                predicted[:, j],
                label=_LOG_UNIT,
                caption=", ".join(said),
                glass=glass,
                item=i,
                scale=i if shared_scale else (i, "predicted"),
            )
        ]
        if beside is not None:
            r = _correlation(predicted[:, j], beside[:, j])
            out[i].append(
                Panel(
                    slide,
                    f"{names[i]} measured{f' (r = {r:.2f})' if np.isfinite(r) else ''}",
                    beside[:, j],
                    label=_LOG_UNIT if were_counts else "as stored",
                    item=i,
                    scale=i if shared_scale else (i, "measured"),
                )
            )
    return out


def _correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    there = np.isfinite(predicted) & np.isfinite(measured)
    return float(pearson(predicted[there, None], measured[there, None])[0]) if there.sum() > 2 else np.nan


def _name(table: AnnData, layer: str | None) -> str:
    """Say what the titles call a layer that is not the prediction."""
    return "adapted" if is_record_of("adapt", table.uns.get(layer)) else layer or layer_label(None)


def _table_with(sdata: SpatialData, names: list[str], prediction_key: str) -> str | None:
    """Prefer the measured table; if it lacks a name, the table of all model genes, where there is one."""
    keys = Keys(prediction_key)
    first = predicted_table(sdata, prediction_key)
    others = [key for key, table in sdata.tables.items() if keys.uns in table.uns and key != first]
    return next((key for key in (first, *others) if not _unknown(sdata[key], names, keys)), first)


def _columns(table: AnnData, names: list[str], keys: Keys) -> np.ndarray:
    """Columns of predicted genes, -1 for other names."""
    if not is_prediction(table.uns.get(keys.uns)):
        return np.full(len(names), -1)
    found = columns_of(table, names, symbols_of(table, record_of(table, keys.key_added), None))
    known = np.append(table.var[keys.predicted].to_numpy(bool), False)
    return np.where(known[found], found, -1)


def _measured(table: AnnData, genes: list[str], measured: bool | str | None) -> tuple[np.ndarray, bool] | None:
    """Measured values of the genes and whether they were raw counts; ``None`` where nothing is shown."""
    layer = measured if isinstance(measured, str) else None
    if layer is None and measured and OWN_TABLE in table.uns:
        raise ValueError("`measured`: the table holds predictions only")
    if measured is False or (layer is None and (OWN_TABLE in table.uns or table.X is None)):
        return None
    return as_log(matrix_of(table, layer, "measured"), table.var_names.get_indexer(genes))
