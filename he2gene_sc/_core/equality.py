"""Compare a value in memory with one that was read from a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

#: Bytes of an array that are compared at a time.
_BLOCK = 1 << 26


def is_same_value(a: Any, b: Any) -> bool:
    """Whether two values of a table are equal, including their type; missing values are equal."""
    try:
        return _is_same(a, b)
    except (TypeError, ValueError, AttributeError):
        return False


def _is_same(a: Any, b: Any) -> bool:
    # anndata reads numpy scalars and 0-d arrays as Python scalars.
    a, b = (
        value.item() if isinstance(value, np.number | np.ndarray) and np.ndim(value) == 0 else value for value in (a, b)
    )
    if a is None or b is None:
        return a is None and b is None
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        both = isinstance(a, Mapping) and isinstance(b, Mapping)
        return both and set(map(str, a)) == set(map(str, b)) and all(is_same_value(a[key], b[key]) for key in a)
    if isinstance(a, pd.DataFrame) or isinstance(b, pd.DataFrame):
        if type(a) is not type(b) or list(a.columns) != list(b.columns) or a.index.name != b.index.name:
            return False
        columns = ((a[name], b[name]) for name in a.columns)
        return all(same_column(*pair) for pair in ((a.index.to_series(), b.index.to_series()), *columns))
    if hasattr(a, "tocsr") or hasattr(b, "tocsr"):
        if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        same_places = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("indptr", "indices"))
        return same_places and np.array_equal(a.data, b.data, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, str | bytes) or isinstance(b, str | bytes):
        return any(isinstance(a, kind) and isinstance(b, kind) for kind in (str, bytes)) and a == b
    if hasattr(a, "dask") or hasattr(b, "dask"):
        a, b = (np.asarray(value) for value in (a, b))
    if any(isinstance(value, pd.api.extensions.ExtensionArray | pd.Series | pd.Index) for value in (a, b)):
        return same_column(pd.Series(a), pd.Series(b))
    return _same_values(np.asarray(a), np.asarray(b))


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    kinds = {a.dtype.kind, b.dtype.kind}
    if kinds <= set("OUT") or "O" in kinds:
        return same_column(pd.Series(a.ravel()), pd.Series(b.ravel()))
    if a.dtype.names or b.dtype.names:
        return a.dtype.names == b.dtype.names and all(_same_values(a[name], b[name]) for name in a.dtype.names or ())
    if a.dtype != b.dtype:
        return False
    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM")


def same_column(a: pd.Series, b: pd.Series) -> bool:
    """Whether two columns are equal, including categories and their order; all pandas text types are equivalent."""
    if len(a) != len(b):
        return False
    if isinstance(a.dtype, pd.CategoricalDtype) or isinstance(b.dtype, pd.CategoricalDtype):
        if not (isinstance(a.dtype, pd.CategoricalDtype) and isinstance(b.dtype, pd.CategoricalDtype)):
            return False
        return (
            a.cat.ordered == b.cat.ordered
            and same_column(pd.Series(a.cat.categories), pd.Series(b.cat.categories))
            and np.array_equal(a.cat.codes, b.cat.codes)
        )
    objects, texts = (
        [test(s.dtype) for s in (a, b)] for test in (pd.api.types.is_object_dtype, pd.api.types.is_string_dtype)
    )
    if any(objects) or all(texts):
        missing = a.isna().to_numpy()
        if not np.array_equal(missing, b.isna().to_numpy()):
            return False
        here, there = (s.to_numpy(dtype=object)[~missing] for s in (a, b))
        return _kind(here) == _kind(there) and all(x == y for x, y in zip(here, there, strict=True))
    return a.dtype == b.dtype and a.reset_index(drop=True).equals(b.reset_index(drop=True))


def _kind(values: np.ndarray) -> str:
    """Return the kind of objects in an array: 1, 1.0, True and "1" differ in a store."""
    kind = pd.api.types.infer_dtype(values, skipna=False)
    return "floating" if kind == "mixed-integer-float" else kind


def same_array(stored: Any, value: Any) -> bool:
    """Whether a zarr array equals a numpy or dask array; compared block by block."""
    if tuple(stored.shape) != tuple(value.shape):
        return False
    if not stored.shape or not all(np.dtype(x.dtype).kind in "biufc" for x in (stored, value)):
        return is_same_value(np.asarray(stored[...]), np.asarray(value))
    if stored.dtype != value.dtype:
        return False
    # Blocks are whole chunks, so that each chunk is read once.
    chunk = max(1, stored.chunks[0])
    step = chunk * max(1, _BLOCK // max(1, chunk * value.nbytes // max(1, value.shape[0])))
    blocks = (slice(first, first + step) for first in range(0, value.shape[0], step))
    equal_nan = stored.dtype.kind in "fc"
    return all(np.array_equal(stored[rows], np.asarray(value[rows]), equal_nan=equal_nan) for rows in blocks)
