"""Tables as a store can hold them: missing values stay missing, and what would become another value is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.differences import MAPPINGS

if TYPE_CHECKING:
    from anndata import AnnData

#: Kinds of values in a column of objects, and the type that keeps them and what is missing; anndata writes all as texts,
#: "nan", "None" and "True" among them.
_TYPES = {
    "string": "string",
    "empty": "string",
    "boolean": "boolean",
    "integer": "Int64",
    "floating": "float64",
    "mixed-integer-float": "float64",
}
_NUMBERS = ("boolean", "integer", "floating", "mixed-integer-float", "complex")
#: Names that a folder of a store has already, or cannot have.
_RESERVED = ("", ".", "..", "zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


def parts_of(table: AnnData, without: Collection[str] = (), **changed: Any) -> AnnData:
    """Return a table that shares the parts of another, without some by their path; ``obs``, ``var``, ``uns`` may be others."""
    from anndata import AnnData

    slots = {
        slot: {
            key: value
            for key, value in dict(getattr(table, slot)).items()
            if key is not None and f"{slot}/{key}" not in without
        }
        for slot in MAPPINGS
    }
    # Which spots a table is of is looked at when it is written.
    attrs = table.uns.get("spatialdata_attrs", {})
    needed = (attrs.get("region_key"), attrs.get("instance_key"))
    frames = {
        axis: frame[[key for key in frame if f"{axis}/{key}" not in without or key in needed]]
        for axis, frame in (("obs", table.obs), ("var", table.var))
        if axis not in changed
    }
    parts = {**frames, "uns": dict(table.uns), **slots, **changed}
    light = AnnData(X=None if "X" in without else table.X, **parts)
    if table.raw is not None and "raw" not in without:
        light.raw = table.raw.to_adata()
    return light


def check_table(where: str, table: AnnData) -> None:
    """Refuse a table whose parts have other rows than its ``obs``, as anndata notices when they are read, or masks."""
    try:
        parts = {f"{slot}[{key!r}]": part for slot in MAPPINGS for key, part in dict(getattr(table, slot)).items()}
        # Newer versions of anndata do not look.
        for part, names in (("obsm", table.obs_names), ("varm", table.var_names)):
            for key, values in getattr(table, part).items():
                if isinstance(values, pd.DataFrame) and not values.index.astype(str).equals(names.astype(str)):
                    raise ValueError(f"{part}[{key!r}] has other row names")
    except Exception as error:
        raise ValueError(
            f"`sdata`: the parts of {where} do not fit together: {' '.join(str(error).split())[:200]}. Rename spots by "
            f"{where}.obs_names = names, not by its obs.index"
        ) from error
    for part, values in {"X": table.X, **parts}.items():
        if np.ma.is_masked(values):
            raise ValueError(
                f"`sdata`: {where}.{part} is a masked array, and a store holds no mask; fill it: "
                f"{where}.{part} = {where}.{part}.filled(np.nan)"
            )
        if (
            part.startswith(("X", "layers", "obsp", "varp"))
            and getattr(getattr(values, "dtype", None), "kind", "") == "O"
        ):
            raise ValueError(
                f"`sdata`: {where}.{part} holds objects, which would become texts; make them numbers: "
                f"{where}.{part} = {where}.{part}.astype(float)"
            )


def storable(where: str, table: AnnData) -> AnnData:
    """Return a table whose missing texts, numbers and flags among objects are missing in a store too."""
    given: dict[str, Any] = {"obs": table.obs, "var": table.var, "uns": dict(table.uns)}
    given |= {slot: dict(getattr(table, slot).items()) for slot in ("obsm", "varm")}
    made = {slot: _value(f"{where}.{slot}", value) for slot, value in given.items()}
    changed = {slot: value for slot, value in made.items() if value is not given[slot]}
    raw_var = table.var if table.raw is None else _frame(f"{where}.raw.var", table.raw.var)
    if not changed and (table.raw is None or raw_var is table.raw.var):
        return table
    light = parts_of(table, **changed)
    if light.raw is not None:
        raw = light.raw.to_adata()
        raw.var = raw_var
        light.raw = raw
    return light


def _value(where: str, value: Any) -> Any:
    """Return the value itself, or one that keeps what is missing."""
    if isinstance(value, Mapping):
        _check_names(value, f"{where} has the key")
        made = {key: _value(f"{where}[{key!r}]", part) for key, part in value.items()}
        return made if any(made[key] is not value[key] for key in made) else value
    if isinstance(value, pd.DataFrame):
        return _frame(where, value)
    if isinstance(value, pd.Categorical):
        return _categories(where, value)
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return _objects(where, value)
    return value


def _check_names(names: Iterable[Any], start: str) -> None:
    """Refuse names that are not texts, or that mean something else as the name of a folder."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"`sdata`: {start} {name!r}, which is not a text; rename it")
        if name in _RESERVED or "/" in name or "\0" in name:
            raise ValueError(f"`sdata`: {start} {name!r}, which cannot be the name of a folder; rename it")


def _frame(where: str, frame: pd.DataFrame) -> pd.DataFrame:
    _check_names(frame.columns, f"{where} has a column named")
    if frame.columns.has_duplicates:
        return frame  # which anndata refuses, by its name
    made = {name: _column(f"{where}[{name!r}]", frame[name]) for name in frame.columns if frame[name].dtype == object}
    changed: dict[str, Any] = {name: column for name, column in made.items() if column is not None}
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            values = _categories(f"{where}[{name!r}]", frame[name].array)
            if values is not frame[name].array:
                changed[name] = values
    return frame.assign(**changed) if changed else frame


def _categories(where: str, values: Any) -> Any:
    """Give categories of objects the type of what they hold, if that is not text."""
    made = _column(where, pd.Series(values.categories)) if values.categories.dtype == object else None
    return values if made is None else values.rename_categories(pd.Index(made))


def _column(where: str, column: pd.Series) -> pd.Series | None:
    """Give a column of objects the type of what it holds; ``None`` where it is texts, none of them missing."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind not in _TYPES:
        raise ValueError(
            f"`sdata`: {where} holds values that a store cannot hold side by side ({kind}: "
            f"{', '.join(sorted({type(value).__name__ for value in column}))}); make it one type: {where} = {where}.astype('string')"
        )
    missing = column.isna().any()
    if kind == "string" and not missing:
        return None
    try:
        if missing and _TYPES[kind] == "float64":
            # pandas has no float of pd.NA.
            return pd.Series(column.to_numpy(float, na_value=np.nan), column.index)
        made = column.astype(_TYPES[kind]) if missing else column.infer_objects()
    except OverflowError:
        made = column
    if kind == "integer" and made.dtype == object:
        raise ValueError(
            f"`sdata`: {where} holds whole numbers that 64 bits do not hold, up to {max(column.dropna())}; make them another "
            f"type: {where} = {where}.astype('string')"
        )
    return made


def _objects(where: str, value: Any) -> Any:
    flat = np.asarray(value, object).ravel()
    kind = pd.api.types.infer_dtype(flat, skipna=False)
    # numpy, by which anndata writes lists, makes numbers of whole numbers and NaN.
    if isinstance(value, np.ndarray) and kind in _NUMBERS:
        # anndata writes arrays of objects as texts.
        value = np.array(value.tolist())
        if value.dtype != object:
            return value
    elif kind in (*_TYPES, "complex") or (kind == "integer-na" and np.asarray(value).dtype.kind == "f"):
        return value
    if flat.shape == np.shape(value) and pd.api.types.infer_dtype(flat, skipna=True) in ("string", "empty"):
        return pd.array(flat, dtype="string")
    raise ValueError(
        f"`sdata`: {where} holds values that a store cannot hold side by side ({kind}: "
        f"{', '.join(sorted({type(part).__name__ for part in flat}))}); make them one type, or delete it"
    )
