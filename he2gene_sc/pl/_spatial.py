"""``hg.pl.spatial``: predicted genes on the tissue, the measured ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core import validate
from .._core.expression import contents_of
from .._core.genes import columns_of
from .._core.keys import MADE, Keys
from .._core.layers import layer_names
from .._core.matrix import dense, in_memory, matrix_of, where_of
from .._core.ownership import is_of
from .._core.predictions import predicted_layer, record_of, symbols_of
from ._canvas import (
    GREYS,
    NO_TISSUE,
    UNKNOWN,
    Canvas,
    add_colorbar,
    axes_for,
    canvas,
    draw,
    finish,
    name_grey,
    on_glass,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from spatialdata import SpatialData


def spatial(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    measured: bool | str | None = None,
    shared_scale: bool = False,
    image: bool = True,
    cmap: str = "viridis",
    size: float = 1.0,
    layer: str | None = "he2gene",
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    ncols: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw predicted genes at the spots over the tissue, and the measured expression beside them.

    The prediction of a spot on glass is of no tissue: it is grey and does not count for the colour scale. Measured values are
    drawn everywhere.

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to.
    genes
        One gene or several: names in ``var_names``, or in the column that predict was given as ``gene_symbols``. A symbol
        that HGNC has changed since is found by its other name.
    measured
        What to show beside the prediction. ``None``: ``X``, where the table was measured. ``True``: the same, an error
        where there is none. ``False``: nothing. A text: that layer. Raw counts are shown as natural log of (1 +
        counts per 10,000), the unit of the prediction; other values as they are.
    shared_scale
        Give predicted and measured of a gene the same colour scale. Predictions vary less than measurements, which
        carry noise; on one scale that shows, on their own the patterns compare better.
    image
        Draw the tissue underneath.
    cmap
        Colour map.
    size
        Scale of the spots; 1 is their true size.
    layer
        What to show: the prediction, or another layer, ``"he2gene_adapted"`` for example; the titles say so. ``None``: ``X``.
    prediction_key
        ``key_added`` of predict.
    table_key, shapes_key, image_key, coordinate_system
        As given to predict.
    ncols
        Panels in a row; default 2 with measured, else 4.
    ax
        Axes to draw in, one a panel: for each gene the predicted, then the measured.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        One a panel.

    Raises
    ------
    ValueError
        If a gene was not predicted, nothing was predicted, or the number of axes does not fit.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> axes = hg.pl.spatial(sdata, "ERBB2")
    >>> len(axes)
    2
    """
    validate.arguments(spatial, locals())
    from matplotlib import colormaps

    validate.key_in(cmap, colormaps, "cmap", what="a colour map of matplotlib")
    validate.in_range(size, "size", above=0)
    if ncols is not None:
        validate.whole(ncols, "ncols")
    genes = [genes] if isinstance(genes, str) else list(genes)
    where = canvas(
        sdata,
        prediction_key=prediction_key,
        table_key=_table_with(sdata, genes, prediction_key) if table_key is None else table_key,
        shapes_key=shapes_key,
        image_key=image_key,
        coordinate_system=coordinate_system,
    )
    table = where.table
    shown_layer = None if layer is None else predicted_layer(table, prediction_key, layer)
    names = _check_predicted(table, genes, prediction_key)
    predicted = np.array(dense(matrix_of(table[:, names], shown_layer)), dtype=float)
    glass = on_glass(table, prediction_key)
    predicted[glass] = np.nan
    found = _measured(where, table, names, measured)
    beside, were_counts = found if found is not None else (None, False)
    columns = {f"predicted_{i}": predicted[:, i] for i in range(len(genes))}
    columns |= {} if beside is None else {f"measured_{i}": beside[:, i] for i in range(len(genes))}
    panels = where.panels(columns)
    kinds = ["predicted"] if beside is None else ["predicted", "measured"]
    name = "predicted" if shown_layer == predicted_layer(table, prediction_key) else _name(table, shown_layer)
    axes = axes_for(len(genes) * len(kinds), ax, ncols or (4 if beside is None else 2))
    reliable = table.var[Keys(prediction_key).reliable]
    for i, (gene, own) in enumerate(zip(genes, names, strict=True)):
        shown = {"predicted": predicted[:, i]} | ({} if beside is None else {"measured": beside[:, i]})
        for j, kind in enumerate(kinds):
            values = np.concatenate(list(shown.values())) if shared_scale else shown[kind]
            norm = _norm(values)
            doubt = "" if kind == "measured" or bool(reliable[own]) else " (not reliable)"
            panel = axes[i * len(kinds) + j]
            draw(
                where,
                panels,
                f"{kind}_{i}",
                panel,
                title=f"{gene} {name if kind == 'predicted' else kind}{doubt}",
                image=image,
                size=size,
                cmap=cmap,
                norm=norm,
                colorbar=False,
                na_color=GREYS[NO_TISSUE],
            )
            if kind == "predicted":
                unknown = np.isnan(predicted[:, i]) & ~glass
                name_grey(panel, [NO_TISSUE] * bool(glass.any()) + [UNKNOWN] * bool(unknown.any()))
            in_log = kind == "predicted" or were_counts
            add_colorbar(panel, norm, cmap, "ln(1 + counts per 10,000)" if in_log else "as stored")
    return finish(axes, save)


def _name(table: AnnData, layer: str | None) -> str:
    """Say what the titles call a layer that is not the prediction."""
    if layer is None:
        return where_of(layer)
    return "adapted" if is_of("adapt", table.uns.get(layer)) else layer


def _norm(values: np.ndarray) -> Normalize:
    from matplotlib.colors import Normalize

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1.0)


def _table_with(sdata: SpatialData, genes: list[str], prediction_key: str) -> str | None:
    """Prefer the measured table; if it lacks a gene, the table of all model genes, where there is one."""
    from .._core.predictions import predicted_table

    first = predicted_table(sdata, prediction_key)
    others = [key for key, table in sdata.tables.items() if Keys(prediction_key).uns in table.uns and key != first]
    for key in (first, *others):
        if (_columns(sdata[key], genes, prediction_key) >= 0).all():
            return key
    return first


def _columns(table: AnnData, genes: list[str], prediction_key: str) -> np.ndarray:
    """Columns of the genes, -1 where one was not predicted."""
    found = columns_of(table, genes, symbols_of(table, record_of(table, prediction_key), None))
    known = np.append(table.var[Keys(prediction_key).predicted].to_numpy(bool), False)
    return np.where(known[found], found, -1)


def _check_predicted(table: AnnData, genes: list[str], prediction_key: str) -> list[str]:
    """Names of the genes in the table."""
    if not genes:
        raise ValueError("`genes` is empty; name at least one")
    if not table.var_names.is_unique:
        raise ValueError(
            "`sdata`: the table has duplicated var_names; run sdata[table_key].var_names_make_unique() first"
        )
    found = _columns(table, genes, prediction_key)
    missing = [gene for gene, place in zip(genes, found, strict=True) if place < 0]
    if missing:
        raise ValueError(f"`genes` {missing[:5]} were not predicted; hg.get.genes(sdata) lists those that were")
    return table.var_names[found].tolist()


def _measured(
    where: Canvas, table: AnnData, genes: list[str], measured: bool | str | None
) -> tuple[np.ndarray, bool] | None:
    """Measured values of the genes and whether they were raw counts; ``None`` where nothing is shown."""
    if measured is False:
        return None
    if not isinstance(measured, str) and MADE in where.sdata[where.table_key].uns:
        if measured:
            raise ValueError(f"`measured`: table {where.table_key!r} holds predictions only")
        return None
    if isinstance(measured, str) and measured not in layer_names(table):
        raise ValueError(f"`measured` {measured!r} is no layer, valid: {sorted(layer_names(table))}")
    values = table.layers[measured] if isinstance(measured, str) else table.X
    if values is None:
        return None
    return _as_log(values, table.var_names.get_indexer(genes))


def _as_log(values: Any, columns: np.ndarray) -> tuple[np.ndarray, bool]:
    """Chosen columns; raw counts brought to the unit of the prediction by the depth of the whole spot.

    Returns
    -------
    numpy.ndarray
        ``(n, len(columns))``.
    bool
        Whether they were raw counts.
    """
    import scipy.sparse

    values = in_memory(values)
    chosen = values[:, columns]
    chosen = np.asarray(chosen.toarray() if scipy.sparse.issparse(chosen) else chosen, dtype=float)
    found = contents_of(values)
    if found.kind == "counts" and found.high > 1:
        # A spot of which a count is NaN has no total and is not drawn.
        total = np.asarray(values.sum(axis=1), dtype=float).reshape(-1, 1)
        return np.log1p(1e4 * chosen / np.where(total == 0, 1, total)), True
    return chosen, False
