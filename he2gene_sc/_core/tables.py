"""What the verbs after predict share: the table, its values on one scale, its spots and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .elements import find_table
from .expression import SCALES, Scale, log_expression, scale_of
from .keys import MADE
from .matrix import values_of
from .predictions import predicted_table
from .slide import Slide, resolve
from .spots import annotated_by, column_of, labels_of, sections_of, with_text_names

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = [
    "SCALES",
    "Scale",
    "column_of",
    "get_table",
    "labels_of",
    "log_expression",
    "pitch_of",
    "scale_of",
    "sections_of",
    "slides_of",
    "spots_of",
    "values_of",
]


def get_table(
    data: SpatialData | AnnData, table_key: str | None = None, *, key_added: str | None = "he2gene"
) -> AnnData:
    """Return the table itself, or the one of a SpatialData object that predict filled, else the measured one.

    Parameters
    ----------
    data
        Object or table.
    table_key
        Which, where there are several.
    key_added
        Prefix of a prediction; ``None``: no prediction is needed, the measured table is meant.

    Raises
    ------
    TypeError
        If ``data`` is neither.
    ValueError
        If there is no such table, or several could be meant.
    """
    if hasattr(data, "tables"):
        if key_added is not None:
            return with_text_names(data[predicted_table(data, key_added, table_key)])
        if table_key is None and len(data.tables) == 1:
            return with_text_names(next(iter(data.tables.values())))
        found = table_key if table_key in data.tables else find_table(data, table_key)
        if found is None:
            raise ValueError(f"`data` holds no measured table, tables: {sorted(data.tables)}; name one by `table_key`")
        return with_text_names(data[found])
    if not hasattr(data, "obs_names"):
        raise TypeError(f"`data` is a {type(data).__name__}; a SpatialData or AnnData object is needed")
    return with_text_names(data)


def spots_of(table: AnnData) -> np.ndarray:
    """Spot centres ``(n, 2)``, in the unit of ``obsm["spatial"]``.

    Raises
    ------
    ValueError
        If there are none, or some are missing.
    """
    if "spatial" not in table.obsm:
        raise ValueError("`data` has no obsm['spatial']; spot centres are needed, as scanpy and squidpy keep them")
    xy = np.asarray(table.obsm["spatial"], float)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(f"obsm['spatial'] has shape {xy.shape}; a row (x, y) for each spot is needed")
    xy = xy[:, :2]
    if not np.isfinite(xy).all():
        raise ValueError(f"obsm['spatial'] is NaN or infinite for {int((~np.isfinite(xy).all(1)).sum())} spots")
    return xy


def pitch_of(xy: np.ndarray) -> float:
    """Median distance of a spot to its nearest neighbour, in the unit of ``xy`` ``(n, 2)``."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        raise ValueError(f"{len(xy)} spots have no distance; at least 2 are needed")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def slides_of(sdata: SpatialData, table: AnnData, prediction: str | None = "he2gene") -> tuple[Slide, ...]:
    """Images and spots that a table annotates, one slide a region; as predict recorded them, where it did.

    Raises
    ------
    ValueError
        If there is no image, or several things could be meant.
    """
    (table_key,) = [key for key, value in sdata.tables.items() if value is table]
    attrs = annotated_by(table)
    if attrs is None:
        raise ValueError(f"table {table_key!r} annotates no shapes")
    record = table.uns.get(prediction) if prediction is not None else None
    record = record if isinstance(record, Mapping) else {}

    def recorded(name: str, region: str) -> Any:
        value = record.get(name)
        return value.get(region) if isinstance(value, Mapping) else value

    regions = [attrs["region"]] if isinstance(attrs["region"], str) else list(attrs["region"])
    found: list[Slide] = []
    for region in regions:
        found += resolve(
            sdata,
            image_key=recorded("image", region),
            shapes_key=region,
            table_key=None if MADE in table.uns else table_key,
            coordinate_system=recorded("coordinate_system", region),
            mpp=recorded("mpp", region),
        )
    return tuple(found)
