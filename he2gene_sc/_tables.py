"""What the verbs after predict share: the table, its values on one scale, its spots and samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse

from ._core.elements import find_table
from ._core.layers import layer_names
from ._core.slide import Slide, resolve
from ._keys import MADE
from ._predicted import predicted_table
from .stats import TARGET_SUM

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

Scale = Literal["auto", "counts", "log"]
SCALES = ("auto", "counts", "log")

#: Values of log-normalised data stay below this: ln(1 + 10,000) is 9.2.
_MAX_LOG = 30.0
#: Values that are looked at to tell counts from logarithms.
_SAMPLE = 1_000_000
#: Texts that stand for a missing label: what ``astype(str)`` makes of one, besides blanks.
_NO_LABEL = ("", "nan", "NaN", "None", "<NA>")
#: Rows that are normalised at once.
_ROWS = 256


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
            return data[predicted_table(data, key_added, table_key)]
        if table_key is None and len(data.tables) == 1:
            return next(iter(data.tables.values()))
        found = table_key if table_key in data.tables else find_table(data, table_key)
        if found is None:
            raise ValueError(f"`data` holds no measured table, tables: {sorted(data.tables)}; name one by `table_key`")
        return data[found]
    if not hasattr(data, "obs_names"):
        raise TypeError(f"`data` is a {type(data).__name__}; a SpatialData or AnnData object is needed")
    return data


def values_of(table: AnnData, layer: str | None, parameter: str = "layer") -> Any:
    """``X`` (``layer=None``) or a layer, in memory, dense or csr.

    Raises
    ------
    ValueError
        If there is no such layer, or ``X`` is empty.
    """
    if layer is not None and layer not in table.layers:
        raise ValueError(f"`{parameter}` {layer!r} is no layer, valid: {sorted(layer_names(table))} (None: X)")
    values = table.X if layer is None else table.layers[layer]
    if values is None:
        raise ValueError(f"`{parameter}`: X is empty; name a layer, of {sorted(layer_names(table))}")
    values = values.compute() if hasattr(values, "compute") else values
    # A sparse matrix of a backed table.
    values = values.to_memory() if hasattr(values, "to_memory") else values
    return scipy.sparse.csr_array(values) if scipy.sparse.issparse(values) else np.asarray(values)


def scale_of(values: Any) -> Literal["counts", "log", "other"]:
    """Tell raw counts (whole numbers from 0) from logarithms (fractions, small); NaN is looked over.

    ``"other"`` are values below 0, as scaled ones have, and large fractions, as counts per 10,000 are before the log.
    """
    data = values.data if scipy.sparse.issparse(values) else np.asarray(values).ravel()
    if data.size > _SAMPLE:
        data = data[:: data.size // _SAMPLE + 1]
    data = data[np.isfinite(data)]
    if not data.size or (data.min() >= 0 and (data % 1 == 0).all()):
        return "counts"
    return "log" if data.min() >= 0 and data.max() <= _MAX_LOG else "other"


def log_expression(
    table: AnnData,
    layer: str | None,
    *,
    genes: np.ndarray | slice = slice(None),
    scale: Scale = "auto",
    expected: Literal["counts", "log"],
    parameter: str = "layer",
    scale_parameter: str = "layer_scale",
) -> np.ndarray:
    """Values as natural log of (1 + counts per 10,000).

    Parameters
    ----------
    table
        The table.
    layer
        Layer; ``None``: ``X``.
    genes
        Columns to return; counts are normalised by the totals of all columns in any case.
    scale
        What the values are. ``"auto"``: they are looked at, and what is not ``expected`` is refused.
    expected
        What values should be where ``scale`` is ``"auto"``.
    parameter, scale_parameter
        Names of the caller's parameters, for errors.

    Returns
    -------
    numpy.ndarray
        ``(n, g)`` float32. Logarithms are returned as they are, NaN included.

    Raises
    ------
    ValueError
        If the values are not what was expected; the message says how to state what they are.
    """
    if scale not in SCALES:
        raise ValueError(f"`{scale_parameter}` is {scale!r}, valid: {list(SCALES)}")
    values = values_of(table, layer, parameter)
    where = "X" if layer is None else f"layer {layer!r}"
    infinite = int(np.isinf(values.data if scipy.sparse.issparse(values) else values).sum())
    if infinite:
        raise ValueError(f"`{parameter}`: {where} holds {infinite} infinite value(s); finite ones are needed")
    found = scale_of(values)
    if scale == "auto" and found != expected:
        looks = {"counts": "raw counts", "log": "already log-transformed", "other": "neither counts nor logarithms"}
        needed = {"counts": "raw counts", "log": "natural logarithms of (1 + counts per 10,000)"}[expected]
        hint = {"counts": "layer of raw counts", "log": "layer of logarithms"}[expected]
        stated = f"{scale_parameter}={found!r}" if found != "other" else f"{scale_parameter}='log'"
        raise ValueError(
            f"`{parameter}`: {where} looks {looks[found]}, {needed} are expected; name a {hint}, or pass {stated} if they "
            "are meant as they are"
        )
    if scale == "counts" and found != "counts":
        raise ValueError(f"`{scale_parameter}` is 'counts', but {where} holds fractions or negative values")
    if (found if scale == "auto" else scale) == "log":
        chosen = values[:, genes]
        return np.asarray(chosen.toarray() if scipy.sparse.issparse(chosen) else chosen, np.float32)
    total = np.asarray(values.sum(axis=1), np.float64).reshape(-1, 1)
    factor = TARGET_SUM / np.where(total > 0, total, 1)
    n_columns = len(np.arange(values.shape[1])[genes])
    result = np.empty((values.shape[0], n_columns), np.float32)
    # Some rows at a time: double precision of all of them would take twice the memory of the result.
    for start in range(0, len(result), _ROWS):
        rows = slice(start, start + _ROWS)
        chosen = values[rows][:, genes]
        chosen = chosen.toarray() if scipy.sparse.issparse(chosen) else chosen
        result[rows] = np.log1p(factor[rows] * np.asarray(chosen, np.float64))
    return result


def spots_of(table: AnnData) -> np.ndarray:
    """Spot centres ``(n, 2)``, in the unit of ``obsm["spatial"]``.

    Raises
    ------
    ValueError
        If there are none, or some are missing.
    """
    if "spatial" not in table.obsm:
        raise ValueError("`data` has no obsm['spatial']; spot centres are needed, as scanpy and squidpy keep them")
    xy = np.asarray(table.obsm["spatial"], float)[:, :2]
    if not np.isfinite(xy).all():
        raise ValueError(f"obsm['spatial'] is NaN or infinite for {int((~np.isfinite(xy).all(1)).sum())} spots")
    return xy


def pitch_of(xy: np.ndarray) -> float:
    """Median distance of a spot to its nearest neighbour, in the unit of ``xy`` ``(n, 2)``."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        raise ValueError(f"{len(xy)} spots have no distance; at least 2 are needed")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def column_of(table: AnnData, key: str, parameter: str) -> pd.Series:
    """Return a column of ``obs``.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if key not in table.obs:
        raise ValueError(f"`{parameter}` {key!r} is no column of obs, valid: {list(table.obs.columns)}")
    return table.obs[key]


def labels_of(table: AnnData, key: str, parameter: str) -> np.ndarray:
    """Labels of all rows as text, ``None`` where there is none, ``(n,)`` objects.

    Blank texts and those that ``astype(str)`` makes of a missing value (``"nan"``, ``"None"``, ``"<NA>"``) are none. Whole
    numbers are labels, ``1.0`` being ``"1"``, since a column of integers with gaps is one of floats.

    Raises
    ------
    ValueError
        If there is no such column, or it holds fractions.
    """
    column = column_of(table, key, parameter)
    if column.dtype.kind == "f" and (column.dropna() % 1 != 0).any():
        raise ValueError(f"`{parameter}` {key!r} holds fractions; a column of labels is needed")
    out = np.full(len(column), None, object)
    for i, (value, missing) in enumerate(zip(column.tolist(), pd.isna(column).tolist(), strict=True)):
        text = "" if missing else label_text(value)
        out[i] = None if text.strip() in _NO_LABEL else text
    return out


def label_text(value: object) -> str:
    """Text of a label, as :func:`labels_of` has it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def sections_of(table: AnnData, section_key: str | None = None) -> np.ndarray:
    """Name of the section of each spot, ``(n,)`` objects: the spots of one slide.

    ``section_key``, else the shapes element that the row annotates together with ``obs["section"]`` where there is one,
    else one section.
    """
    if section_key is not None:
        return column_of(table, section_key, "section_key").astype(str).to_numpy(object)
    attrs = table.uns.get("spatialdata_attrs")
    columns = [attrs["region_key"]] if attrs is not None and attrs.get("region_key") in table.obs else []
    columns += ["section"] * ("section" in table.obs)
    varying = [key for key in columns if table.obs[key].nunique() > 1]
    if not varying:
        name = str(table.obs[columns[-1]].iloc[0]) if columns and len(table) else "section"
        return np.full(table.n_obs, name, object)
    return table.obs[varying[-1]].astype(str).to_numpy(object)


def slides_of(sdata: SpatialData, table: AnnData, prediction: str | None = "he2gene") -> tuple[Slide, ...]:
    """Images and spots that a table annotates, one slide a region; as predict recorded them, where it did.

    Raises
    ------
    ValueError
        If there is no image, or several things could be meant.
    """
    (table_key,) = [key for key, value in sdata.tables.items() if value is table]
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        raise ValueError(f"table {table_key!r} annotates no shapes")
    record = table.uns.get(prediction) if prediction is not None else None
    record = record if isinstance(record, Mapping) else {}

    def recorded(name: str, region: str) -> Any:
        value = record.get(name)
        return value.get(region) if isinstance(value, Mapping) else value

    regions = [attrs["region"]] if isinstance(attrs["region"], str) else list(attrs["region"])
    found = []
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
