"""``hg.pl.spatial``: genes, classes and other columns on the tissue, with measured beside predicted genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import as_logs, summarize_values
from .._core.genes import columns_of
from .._core.keys import OWN_TABLE, Keys
from .._core.matrix import dense, layer_label, matrix_of
from .._core.ownership import is_prediction, is_record_of
from .._core.predictions import gene_flags, predicted_layer, predicted_table, record_of, symbols_of
from .._core.results import scores_of
from ..stats import pearson
from ._canvas import Canvas, canvases, on_glass
from ._panels import Panel, Style, class_panel, classes_of, complete, draw_panels

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

    Predictions of spots on glass are not based on tissue: they are grey and not part of the colour scale. Measured values are drawn
    at all spots. The title of a measured panel states the Pearson correlation with the prediction. Held-out correlations of the
    gene are below the predicted panel.

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to; a list of them, or a dict by name. A table (AnnData), or an
        object without images, is drawn with its ``obsm["spatial"]``, without tissue. All regions of a table are drawn.
    genes, color
        One or several names to draw; both parameters mean the same. A gene: its name in ``var_names``, or in the column given to
        predict as ``gene_symbols``; previous and current HGNC symbols are both found. A column of ``obs``. ``"annotation"``,
        ``"confidence"``, ``"ood"`` or ``"tissue"`` (share of tissue) of the prediction, if ``obs`` has no column with that name. A
        class of the model: its probability; ``"probabilities"``: those of all classes. A gene set of
        :func:`he2gene_sc.tl.programmes`: its score. Default: only the tissue.
    measured
        Measured values beside a predicted gene. ``None``: ``X``, if the table was measured. ``True``: the same, with an error if it
        was not. ``False``: no measured values. A text: that layer. Raw counts are shown as natural log of (1 + counts per 10,000),
        the unit of the prediction; other values are not changed.
    shared_scale
        Use the same colour scale for predicted and measured values of a gene. Predictions vary less than measurements, which
        contain noise. A shared scale shows this; separate scales are better to compare patterns.
    image
        Draw the tissue under the spots, from the level of the image that fits the panel.
    bbox
        Region to draw, (xmin, ymin, xmax, ymax) in pixels of the full-resolution image; for a table, in the unit of
        ``obsm["spatial"]``.
    inset
        Smaller region, in the same unit, to enlarge in a corner of each panel.
    vmin, vmax
        Ends of the colour scale: a number, a percentile such as ``"p99"``, or a list with one for each name and for each class of
        ``"probabilities"``. Default: the 1st and 99th percentile of the panel, so that predicted and measured values are
        comparable; with fewer than 100 spots nothing is clipped. Probabilities are drawn from 0 to 1. Slides in one figure have
        the same scale.
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
        Position of the legend of classes: ``"right margin"``, ``"below"``, a corner such as ``"upper right"``, or ``None``. Classes
        without spots are listed as absent.
    frameon
        Draw a frame around each panel.
    layer
        Layer of the genes: the prediction, or another layer, for example ``"he2gene_adapted"``, which the titles then name.
        ``None``: ``X``.
    prediction_key
        ``key_added`` of predict.
    table_key, shapes_key, image_key, coordinate_system
        As given to predict; ``shapes_key`` may name several regions.
    figsize
        Width and height of the figure in inches.
    ncols
        Number of panels in a row. Default: predicted beside measured for one or two genes or several slides, else 4.
    ax
        Axes to draw in, one per panel: for each gene first predicted, then measured.
    save
        File to write the figure to.
    show
        Call ``matplotlib.pyplot.show`` and return nothing, unless ``return_fig``.
    return_fig
        Return the figure.

    Returns
    -------
    matplotlib.axes.Axes, list of them, or matplotlib.figure.Figure
        One per panel.

    Raises
    ------
    ValueError
        If a name is neither a predicted gene nor a column, there is no prediction, the number of axes is wrong, or a table has no
        ``obsm["spatial"]``.

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
    names = [*_as_list(genes, "genes"), *_as_list(color, "color")]
    keys = Keys(prediction_key)
    chosen_table = table_key or (lambda item: _table_with(item, names, keys))
    slides = canvases(sdata, prediction_key, chosen_table, shapes_key, image_key, coordinate_system)
    if "probabilities" in names:
        classes = list(dict.fromkeys(label for slide in slides for label in classes_of(slide.table, keys)))
        if without := [slide.name for slide in slides if not classes_of(slide.table, keys)]:
            where = f" of slide {without[0]!r}" if without[0] else ""
            raise ValueError(
                f"`prediction_key` {prediction_key!r}: the model has no annotation head, so obsm{where} has no {keys.proba!r}"
            )
        names = [expanded for name in names for expanded in (classes if name == "probabilities" else [name])]
    if not names and (not image or any(slide.slide is None for slide in slides)):
        raise ValueError("`genes`/`color` are empty, and there is no tissue to draw; name a gene or a column of obs")
    given = {"genes": genes, "color": color}
    parameter = "/".join(f"`{key}`" for key, value in given.items() if value is not None)
    drawn = []
    for slide, found in zip(slides, _check_names(slides, names, keys, parameter), strict=True):
        sources = [(name, found[name]) for name in names]
        drawn.append(_panels(slide, sources, keys, layer, measured, shared_scale))
    panels = complete([panel for own in drawn for panel in own], keys, palette)
    if ncols is None:
        n_panels = max(map(len, drawn))
        pairs = len(panels) == 4 and any(panel.title.split(" (")[0].endswith("measured") for panel in panels)
        ncols = n_panels if len(slides) > 1 and 1 < n_panels < 5 else 2 if pairs else 4
    return draw_panels(panels, style, ax, ncols, figsize, title, save, show, return_fig)


def _as_list(names: Any, parameter: str) -> list[str]:
    listed = [] if names is None else validate.names(names, parameter, one=True)
    if names is not None and not listed:
        raise ValueError(f"`{parameter}` is empty; name at least one gene or column of obs")
    if wrong := [name for name in listed if not isinstance(name, str)]:
        raise ValueError(f"`{parameter}` holds {wrong[:5]}; names of genes or columns of obs are needed")
    return listed


def _sources(table: AnnData, names: list[str], keys: Keys) -> dict[str, tuple[str, Any]]:
    """Return what each name is, and its key.

    ``"gene"``: a predicted gene, by its name in ``var``. ``"numbers"``, ``"labels"``: a column of ``obs``. ``"class"``: a class of
    the model, or ``"probabilities"``. ``"set"``: a gene set, by its key in ``obsm`` and the suffix of its title. Empty: unknown.
    """
    columns = np.full(len(names), -1)
    if is_prediction(table.uns.get(keys.uns)):
        columns = columns_of(table, names, symbols_of(table, record_of(table, keys.key_added), None))
    if (columns >= 0).any():
        columns = np.where(np.append(gene_flags(table, keys.predicted), False)[columns], columns, -1)
    ours = {"annotation": keys.annotation, "confidence": keys.confidence, "ood": keys.ood, "tissue": keys.tissue}
    classes, sets = classes_of(table, keys), scores_of(table, keys)
    found: dict[str, tuple[str, Any]] = {}
    for name, column in zip(names, columns, strict=True):
        in_obs = next((key for key in (name, ours.get(name)) if key in table.obs), None)
        if column >= 0:
            found[name] = "gene", table.var_names[column]
        elif in_obs is not None:
            values = table.obs[in_obs]
            is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
            found[name] = "numbers" if is_number else "labels", in_obs
        elif name in classes or (name == "probabilities" and classes):
            found[name] = "class", name
        else:
            found[name] = ("set", sets[name]) if name in sets else ("", None)
    return found


def _check_names(
    slides: list[Canvas], names: list[str], keys: Keys, parameter: str
) -> list[dict[str, tuple[str, Any]]]:
    """Return the sources of each slide; raise if it lacks a name, or if a column has numbers in one slide and labels in another."""
    sources = [_sources(slide.table, names, keys) for slide in slides]
    for slide, found in zip(slides, sources, strict=True):
        table, where = slide.table, f" for slide {slide.name!r}" if slide.name else ""
        if unknown := [name for name in names if not found[name][0]]:
            raise ValueError(
                f"{parameter} {unknown[:5]} were not predicted{where}; hg.get.genes(sdata) lists the predicted genes. Also valid are "
                "columns of obs, classes of the model, gene sets, 'annotation', 'confidence', 'ood', 'tissue' and 'probabilities'"
                f"{validate.suggest(unknown[0], [*table.obs, *classes_of(table, keys), *scores_of(table, keys)])}"
            )
    for name in names:
        if len({found[name][0] == "labels" for found in sources}) > 1:
            raise ValueError(
                f"{parameter} {name!r} holds numbers in one slide and labels in another; one kind is needed"
            )
    return sources


def _panels(
    slide: Canvas,
    sources: Sequence[tuple[str, tuple[str, Any]]],
    keys: Keys,
    layer: str | None,
    measured: Any,
    shared: bool,
) -> list[Panel]:
    """Return the panels of one slide; ``sources`` are the names with what they are."""
    table = slide.table
    if not sources:
        return [Panel(slide, "tissue")]
    genes = {i: (name, key) for i, (name, (kind, key)) in enumerate(sources) if kind == "gene"}
    gene_panels = _gene_panels(slide, genes, keys, layer, measured, shared) if genes else {}
    glass = on_glass(table, keys.key_added)
    panels: list[Panel] = []
    for i, (name, (kind, key)) in enumerate(sources):
        if kind == "gene":
            panels += gene_panels[i]
        elif kind == "set":
            obsm, suffix = key
            values = np.where(glass, np.nan, table.obsm[obsm][name].to_numpy(float))
            panels.append(Panel(slide, f"{name}{suffix}", values, label="score (t)", glass=glass, item=i, scale=i))
        elif kind == "class":
            values = table.obsm[keys.proba][name].to_numpy(float)
            panels.append(Panel(slide, name, values, label="probability", item=i, scale=i, limits=(0, 1)))
        elif kind == "numbers":
            shares = {keys.confidence: "probability", keys.tissue: "share of tissue"}
            label = {**shares, keys.ood: "above 1: out of distribution"}.get(key, "")
            limits, own = (0.0, 1.0) if key in shares else None, glass if key == keys.confidence else None
            values = table.obs[key].to_numpy(float, na_value=np.nan)
            panels.append(Panel(slide, name, values, label=label, glass=own, item=i, scale=i, limits=limits))
        else:
            ours = key == keys.annotation
            title = "predicted annotation" if ours else name
            panels.append(class_panel(slide, key, title, glass if ours else None, i))
    return panels


def _gene_panels(
    slide: Canvas, genes: dict[int, tuple[str, str]], keys: Keys, layer: str | None, measured: Any, shared: bool
) -> dict[int, list[Panel]]:
    """Return the predicted and measured panels of each gene; ``genes`` are the given name and that in ``var``, by position."""
    table = slide.table
    if not table.var_names.is_unique:
        raise ValueError(
            "`sdata`: the table has duplicated var_names; run sdata[table_key].var_names_make_unique() first"
        )
    model_layer = predicted_layer(table, keys.key_added)
    drawn_layer = None if layer is None else predicted_layer(table, keys.key_added, layer)
    var_names = [gene for _, gene in genes.values()]
    predicted = np.array(dense(matrix_of(table[:, var_names], drawn_layer)), dtype=float)
    glass = on_glass(table, keys.key_added)
    predicted[glass] = np.nan
    truth, were_counts = _measured(table, var_names, measured) or (None, False)
    facts, reliable = table.var, pd.Series(gene_flags(table, keys.reliable), table.var_names)
    held_out: list[tuple[str, str]] = []
    title = "adapted" if is_record_of("adapt", table.uns.get(drawn_layer)) else drawn_layer or layer_label(None)
    if drawn_layer == model_layer:
        title = "predicted"
        held_out = [("held-out", keys.pcc), ("new patients", keys.pcc_new_patient)]
    out: dict[int, list[Panel]] = {}
    for j, (i, (name, gene)) in enumerate(genes.items()):
        mark = "" if reliable[gene] else " (not reliable)"
        r = {text: facts.loc[gene, column] for text, column in held_out if column in facts}
        caption = ", ".join(f"{text} r = {value:.2f}" for text, value in r.items() if np.isfinite(value))
        scales = (i, i) if shared else ((i, "predicted"), (i, "measured"))
        values = predicted[:, j]
        out[i] = [
            Panel(slide, f"{name} {title}{mark}", values, None, _LOG_UNIT, caption, glass, item=i, scale=scales[0])
        ]
        if truth is not None:
            known = truth[:, j]
            both = np.isfinite(values) & np.isfinite(known)
            r_here = pearson(values[both, None], known[both, None])[0] if both.sum() > 2 else np.nan
            measured_title = f"{name} measured{f' (r = {r_here:.2f})' if np.isfinite(r_here) else ''}"
            label = _LOG_UNIT if were_counts else "as stored"
            out[i].append(Panel(slide, measured_title, known, label=label, item=i, scale=scales[1]))
    return out


def _table_with(sdata: SpatialData, names: list[str], keys: Keys) -> str | None:
    """Return the measured table if it has all names, else the table with all genes of the model if it has them."""
    first = predicted_table(sdata, keys.key_added)
    others = [key for key, table in sdata.tables.items() if keys.uns in table.uns and key != first]
    return next(
        (k for k in (first, *others) if all(kind for kind, _ in _sources(sdata[k], names, keys).values())), first
    )


def _measured(table: AnnData, genes: list[str], measured: bool | str | None) -> tuple[np.ndarray, bool] | None:
    """Return measured values of the genes and whether they were raw counts, or ``None`` if none are drawn."""
    layer = measured if isinstance(measured, str) else None
    if layer is None and measured and OWN_TABLE in table.uns:
        raise ValueError(
            "`measured`: the table has only predictions; pass a table with measured values, or measured=False"
        )
    if measured is False or (layer is None and (OWN_TABLE in table.uns or table.X is None)):
        return None
    values = matrix_of(table, layer, "measured")
    contents = summarize_values(values)
    were_counts = contents.kind == "counts" and contents.high > 1
    columns = table.var_names.get_indexer(genes)
    return as_logs(values, "counts" if were_counts else "log", columns).astype(float), were_counts
