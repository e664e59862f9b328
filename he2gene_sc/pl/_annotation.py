"""``hg.pl.annotation``: predicted classes on the tissue, known ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import Keys
from ._canvas import GREYS, NO_TISSUE, UNKNOWN, axes_for, canvas, draw, finish, on_glass

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

_EXTRA_COLOURS = ("#17becf", "#bcbd22", "#7f7f7f", "#e377c2", "#8c564b", "#1f77b4", "#aec7e8", "#ffbb78")


def annotation(
    sdata: SpatialData,
    *,
    reference: str | None = None,
    image: bool = True,
    size: float = 1.0,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the predicted annotation at the spots over the tissue, and known labels beside it.

    Spots without a class are grey: "no tissue" where less than 0.25 of a spot is tissue, else "unknown".

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to.
    reference
        Column of ``obs`` with known labels, for example ``"pathologist"``, drawn beside in the same colours.
    image
        Draw the tissue underneath.
    size
        Scale of the spots; 1 is their true size.
    prediction_key
        ``key_added`` of predict.
    table_key, shapes_key, image_key, coordinate_system
        As given to predict.
    ax
        Axes to draw in: one, or two with ``reference``.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        One a panel.

    Raises
    ------
    ValueError
        If no annotation was predicted, or ``reference`` is no column with labels.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> ax = hg.pl.annotation(sdata)
    """
    validate.arguments(annotation, locals())
    validate.in_range(size, "size", above=0)
    keys = Keys(prediction_key)
    where = canvas(
        sdata,
        prediction_key=prediction_key,
        table_key=table_key,
        shapes_key=shapes_key,
        image_key=image_key,
        coordinate_system=coordinate_system,
    )
    table = where.table
    if keys.annotation not in table.obs:
        raise ValueError(
            f"`prediction_key` {prediction_key!r}: the model has no annotation head, obs has no {keys.annotation!r}"
        )
    if reference is not None and not _has_labels(table, reference):
        labelled = [c for c in table.obs if isinstance(table.obs[c].dtype, pd.CategoricalDtype)]
        raise ValueError(f"`reference` {reference!r} is no column of obs with labels, candidates: {labelled}")
    columns = {"predicted annotation": table.obs[keys.annotation]}
    if reference is not None:
        columns[reference] = table.obs[reference]
    colours = _colours(where.sdata[where.table_key], keys, columns)
    glass = on_glass(table, prediction_key)
    panels = where.panels(
        {f"panel_{i}": _labels(values, glass & (i == 0)) for i, values in enumerate(columns.values())}
    )
    axes = axes_for(len(columns), ax, ncols=2, panel=5.0)
    for i, title in enumerate(columns):
        present = list(panels.obs[f"panel_{i}"].cat.categories)
        draw(
            where,
            panels,
            f"panel_{i}",
            axes[i],
            title=title,
            image=image,
            size=size,
            groups=present,
            palette=[colours[name] for name in present],
        )
    return finish(axes, save)


def _labels(values: pd.Series, glass: np.ndarray) -> pd.Categorical:
    """Labels as text, the missing ones named; classes first."""
    missing = values.isna().to_numpy()
    texts = np.where(missing, np.where(glass, NO_TISSUE, UNKNOWN), values.astype(str))
    found = set(texts)
    return pd.Categorical(texts, categories=[*sorted(found - set(GREYS)), *(name for name in GREYS if name in found)])


def _has_labels(table: AnnData, column: str) -> bool:
    if column not in table.obs or table.obs[column].isna().all():
        return False
    values = table.obs[column]
    return isinstance(values.dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(values)


def _colours(table: AnnData, keys: Keys, columns: dict[str, pd.Series]) -> dict[str, str]:
    """Colour of every class: the model's, and further ones for labels that it does not know."""
    known = dict(zip(table.obs[keys.annotation].cat.categories, table.uns.get(keys.colors, ()), strict=False))
    labels = sorted({str(v) for values in columns.values() for v in values.dropna().unique()} - set(known))
    return {label: _EXTRA_COLOURS[i % len(_EXTRA_COLOURS)] for i, label in enumerate(labels)} | known | GREYS
