"""Convert tables for a store: keep missing values missing, and raise for values that a store would change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.keys import MAPPINGS
from .._core.rasters import entries_of

if TYPE_CHECKING:
    from anndata import AnnData

#: Types that keep values and missing values, by the kind of values in a column of objects. anndata would write all of them
#: as texts, such as "nan", "None" and "True".
_TYPES = {
    "string": "string",
    "empty": "string",
    "boolean": "boolean",
    "integer": "Int64",
    "floating": "float64",
    "mixed-integer-float": "float64",
}
_NUMBERS = ("boolean", "integer", "floating", "mixed-integer-float", "complex")
#: Names that are invalid or already used in a folder of a store.
_RESERVED = ("", ".", "..", "zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
#: Longest name of a folder, in bytes.
_MAX_NAME = 255


def parts_of(table: AnnData, without: Collection[str] = (), **changed: Any) -> AnnData:
    """Return a table that shares the parts of another, except the paths in ``without`` and the ``changed`` slots."""
    from anndata import AnnData

    slots = {
        slot: {key: value for key, value in entries_of(table, slot).items() if f"{slot}/{key}" not in without}
        for slot in MAPPINGS
    }
    # spatialdata checks the annotated spots on writing.
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
    """Raise if parts of a table have other rows than its ``obs``, are masked arrays, or hold objects."""
    try:
        parts = {f"{slot}[{key!r}]": part for slot in MAPPINGS for key, part in entries_of(table, slot).items()}
        # Newer versions of anndata do not check this.
        for part, names in (("obsm", table.obs_names), ("varm", table.var_names)):
            for key, values in getattr(table, part).items():
                if isinstance(values, pd.DataFrame) and not values.index.astype(str).equals(names.astype(str)):
                    raise ValueError(f"{part}[{key!r}] has other row names")
    except Exception as error:
        raise ValueError(
            f"`sdata`: the parts of {where} do not fit together: {' '.join(str(error).split())[:200]}. Rename spots with "
            f"{where}.obs_names = names, not with its obs.index"
        ) from error
    for part, values in {"X": table.X, **parts}.items():
        if np.ma.is_masked(values):
            raise ValueError(
                f"`sdata`: {where}.{part} is a masked array, and a store cannot hold the mask; fill it: "
                f"{where}.{part} = {where}.{part}.filled(np.nan)"
            )
        kind = getattr(getattr(values, "dtype", None), "kind", "")
        if kind == "O" and part.startswith(("X", "layers", "obsp", "varp")):
            raise ValueError(
                f"`sdata`: {where}.{part} holds objects, which would become texts; make them numbers: "
                f"{where}.{part} = {where}.{part}.astype(float)"
            )


def storable(where: str, table: AnnData) -> AnnData:
    """Return a table in which missing texts, numbers and flags among objects stay missing in a store."""
    given: dict[str, Any] = {"obs": table.obs, "var": table.var, "uns": dict(table.uns)}
    given |= {slot: dict(getattr(table, slot).items()) for slot in ("obsm", "varm")}
    made = {slot: _convert(f"{where}.{slot}", value) for slot, value in given.items()}
    for slot in ("layers", "obsp", "varp"):
        check_names(entries_of(table, slot), f"{where}.{slot} has the key")
    changed = {slot: value for slot, value in made.items() if value is not given[slot]}
    raw_var = None if table.raw is None else table.raw.var
    made_var = _convert(f"{where}.raw.var", raw_var)
    if not changed and made_var is raw_var:
        return table
    light = parts_of(table, **changed)
    if light.raw is not None:
        raw = light.raw.to_adata()
        raw.var = made_var
        light.raw = raw
    return light


def _convert(where: str, value: Any) -> Any:
    """Return the value itself, or a conversion that keeps missing values."""
    if isinstance(value, Mapping | pd.DataFrame):
        frame: Any = value if isinstance(value, pd.DataFrame) else None
        check_names(value, f"{where} has {'the key' if frame is None else 'a column named'}")
        if frame is not None and frame.columns.has_duplicates:
            return value  # anndata raises, with the name
        parts = {key: value[key] for key in value}
        convert = _convert if frame is None else _convert_column
        made = {key: convert(f"{where}[{key!r}]", part) for key, part in parts.items()}
        changed = {key: part for key, part in made.items() if part is not parts[key]}
        if not changed:
            return value
        return made if frame is None else frame.assign(**changed)
    if isinstance(value, pd.Categorical):
        return _convert_categories(where, value)
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return _convert_objects(where, value)
    return value


def check_names(names: Iterable[Any], start: str) -> None:
    """Raise for names that are not texts, or that are not valid as the name of a folder."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"`sdata`: {start} {name!r}, which is not a text; rename it")
        if name in _RESERVED or "/" in name or "\0" in name:
            raise ValueError(f"`sdata`: {start} {name!r}, which cannot be the name of a folder; rename it")
        if (n := len(name.encode(errors="surrogatepass"))) > _MAX_NAME:
            raise ValueError(
                f"`sdata`: {start} {name[:40]!r}…, a name of {len(name)} characters ({n} bytes); a store holds at most "
                f"{_MAX_NAME} bytes. Shorten it"
            )


def _convert_categories(where: str, values: Any) -> Any:
    if values.categories.dtype != object:
        return values
    categories = pd.Series(values.categories)
    made = _convert_column(where, categories)
    return values if made is categories else values.rename_categories(pd.Index(made))


def _convert_column(where: str, column: pd.Series) -> Any:
    """Convert a column, or categories, of objects to the type of the values; texts without missing values stay."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        values = column.array
        made = _convert_categories(where, values)
        return column if made is values else made
    if column.dtype != object:
        return column
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind not in _TYPES:
        raise ValueError(
            f"`sdata`: {where} holds values of types that a store cannot mix ({kind}: "
            f"{', '.join(sorted({type(value).__name__ for value in column}))}); make it one type: {where} = {where}.astype('string')"
        )
    missing = column.isna().any()
    if kind == "string" and not missing:
        return column
    try:
        if missing and _TYPES[kind] == "float64":
            # pandas cannot convert pd.NA to float by itself.
            return pd.Series(column.to_numpy(float, na_value=np.nan), column.index)
        made = column.astype(_TYPES[kind]) if missing else column.infer_objects()
    except OverflowError:
        made = column
    if kind == "integer" and made.dtype == object:
        raise ValueError(
            f"`sdata`: {where} holds whole numbers that do not fit into 64 bits, up to {max(column.dropna())}; make them another "
            f"type: {where} = {where}.astype('string')"
        )
    return made


def _convert_objects(where: str, value: Any) -> Any:
    flat = np.asarray(value, object).ravel()
    kind = pd.api.types.infer_dtype(flat, skipna=False)
    # anndata writes lists with numpy, which turns whole numbers with NaN into floats.
    if isinstance(value, np.ndarray) and kind in _NUMBERS:
        # anndata would write arrays of objects as texts.
        value = np.array(value.tolist())
        if value.dtype != object:
            return value
    elif kind in (*_TYPES, "complex") or (kind == "integer-na" and np.asarray(value).dtype.kind == "f"):
        return value
    if flat.shape == np.shape(value) and pd.api.types.infer_dtype(flat, skipna=True) in ("string", "empty"):
        return pd.array(flat, dtype="string")
    raise ValueError(
        f"`sdata`: {where} holds values of types that a store cannot mix ({kind}: "
        f"{', '.join(sorted({type(part).__name__ for part in flat}))}); make them one type, or delete it"
    )
