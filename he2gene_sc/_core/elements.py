"""Tables and shapes of a SpatialData object: which are meant, which rows are which spots, where the spots lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._keys import MADE

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData


def find_table(sdata: SpatialData, table_key: str | None = None, shapes_key: str | None = None) -> str | None:
    """Name of the measured table; ``None`` where there is none.

    Raises
    ------
    ValueError
        If ``table_key`` is not there or annotates no shapes, or several tables could be meant.
    """
    if table_key is not None:
        if table_key not in sdata.tables:
            raise ValueError(f"`table_key` {table_key!r} not found, valid keys: {sorted(sdata.tables)}")
        if not regions_of(sdata[table_key], sdata):
            raise ValueError(f"`table_key` {table_key!r} annotates no shapes of this object: {sorted(sdata.shapes)}")
        return table_key
    found = [
        key
        for key, table in sdata.tables.items()
        if MADE not in table.uns
        and (regions := regions_of(table, sdata))
        and (shapes_key is None or shapes_key in regions)
    ]
    if len(found) > 1:
        raise ValueError(f"`table_key` is ambiguous, candidates: {sorted(found)}")
    return found[0] if found else None


def regions_of(table: AnnData, sdata: SpatialData) -> list[str]:
    """Shapes elements of ``sdata`` that a table annotates."""
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        return []
    region = attrs["region"]
    return [key for key in ([region] if isinstance(region, str) else list(region)) if key in sdata.shapes]


def find_shapes(sdata: SpatialData, shapes_key: str | None, table_key: str | None) -> list[str]:
    if shapes_key is not None:
        if shapes_key not in sdata.shapes:
            raise ValueError(f"`shapes_key` {shapes_key!r} not found, valid keys: {sorted(sdata.shapes)}")
        if table_key is not None and shapes_key not in regions_of(sdata[table_key], sdata):
            raise ValueError(
                f"`table_key` {table_key!r} annotates {regions_of(sdata[table_key], sdata)}, not `shapes_key` {shapes_key!r}"
            )
        return [shapes_key]
    if table_key is not None:
        return regions_of(sdata[table_key], sdata)
    circles = [key for key, element in sdata.shapes.items() if "radius" in element.columns]
    if not circles:
        raise ValueError(
            "`sdata` holds no spots (circles in sdata.shapes); make pseudo-spots with hg.pp.tissue(sdata), hg.pp.grid(sdata)"
        )
    if len(circles) > 1:
        raise ValueError(f"`shapes_key` is ambiguous, candidates: {sorted(circles)}")
    return circles


def match_rows(
    sdata: SpatialData, shapes: GeoDataFrame, shapes_key: str, table_key: str | None
) -> tuple[pd.Index, np.ndarray | None]:
    """Ids of the spots in the order of the table's rows, and those rows."""
    if len(shapes) == 0:
        raise ValueError(f"`shapes_key` {shapes_key!r} holds no spots")
    if shapes.index.has_duplicates:
        raise ValueError(
            f"`shapes_key` {shapes_key!r} has duplicated ids: {_some(shapes.index[shapes.index.duplicated()])}"
        )
    if table_key is None:
        return shapes.index, None
    table = sdata[table_key]
    attrs = table.uns["spatialdata_attrs"]
    rows = np.flatnonzero((table.obs[attrs["region_key"]] == shapes_key).to_numpy())
    ids = pd.Index(table.obs[attrs["instance_key"]].iloc[rows])
    where = f"`table_key` {table_key!r} and `shapes_key` {shapes_key!r} do not match"
    if ids.hasnans:
        raise ValueError(f"{where}: {int(ids.isna().sum())} rows have no id in obs[{attrs['instance_key']!r}]")
    if isinstance(shapes.index, pd.MultiIndex):
        raise ValueError(
            f"{where}: the ids of the shapes have several levels; one text or whole number a spot is needed"
        )
    if ids.has_duplicates:
        raise ValueError(f"{where}: duplicated ids in the table: {_some(ids[ids.duplicated()])}")
    # Not sorted: ids of mixed types have no order.
    extra, missing = ids.difference(shapes.index, sort=False), shapes.index.difference(ids, sort=False)
    if len(extra):
        hint = "" if ids.dtype == shapes.index.dtype else f" (ids are {ids.dtype} there, {shapes.index.dtype} here)"
        raise ValueError(f"{where}: {len(extra)} extra ids in the table that are no spots: {_some(extra)}{hint}")
    if len(missing):
        raise ValueError(
            f"{where}: {len(missing)} spots are missing from the table: {_some(missing)}. "
            "If the table was filtered, filter the shapes too: "
            f"sdata[{shapes_key!r}] = spatialdata.match_element_to_table(sdata, {shapes_key!r}, {table_key!r})[0][{shapes_key!r}]"
        )
    return ids, rows


def _some(values: pd.Index) -> str:
    shown = ", ".join(repr(v) for v in values[:5].tolist())
    return shown + (f", … ({len(values)} in all)" if len(values) > 5 else "")


def spot_geometry(shapes: GeoDataFrame, shapes_key: str) -> tuple[np.ndarray, float]:
    """Centres ``(n, 2)`` and median diameter in the units of the element."""
    points = shapes.geometry.centroid
    xy = np.column_stack([points.x, points.y]).astype(float)
    bad = ~np.isfinite(xy).all(1)
    if bad.any():
        raise ValueError(
            f"`shapes_key` {shapes_key!r} has NaN or infinite coordinates in {int(bad.sum())} spots: {_some(shapes.index[bad])}"
        )
    if "radius" in shapes.columns:
        diameters = 2 * shapes["radius"].to_numpy(dtype=float)
    else:
        diameters = np.sqrt(shapes.geometry.area.to_numpy(dtype=float))
    diameter = float(np.median(diameters))
    if not (np.isfinite(diameter) and diameter > 0):
        raise ValueError(f"`shapes_key` {shapes_key!r}: the spots have a diameter of {diameter}; circles are needed")
    return xy, diameter
