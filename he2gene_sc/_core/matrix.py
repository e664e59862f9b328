"""Read the matrices of a table, in memory, on disk or as dask arrays, by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from . import validate
from .elements import check_files

if TYPE_CHECKING:
    from anndata import AnnData

#: Values per block in memory.
_BLOCK = 2_000_000


def layer_names(table: AnnData) -> list[str]:
    """Return the names of the layers, in order; anndata 0.13 and later also list ``X``, as ``None``."""
    return [name for name in table.layers if name is not None]


def matrix_of(table: AnnData, layer: str | None, parameter: str = "layer") -> Any:
    """Return ``X`` (``layer=None``) or a layer as stored in the table: in memory, on disk or as a dask array."""
    if layer is not None:
        validate.key_in(layer, sorted(layer_names(table)), parameter, what="a layer", hint=" (None: X)")
    values = table.X if layer is None else table.layers[layer]
    if values is None:
        raise ValueError(f"`{parameter}`: X is empty; name a layer, one of {sorted(layer_names(table))}")
    dtype = np.dtype(getattr(values, "dtype", float))
    if dtype.kind == "b":
        raise ValueError(f"`{parameter}`: {layer_label(layer)} holds True and False; counts are needed")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(
            f"`{parameter}`: {layer_label(layer)} is a masked array with {int(np.ma.count_masked(values))} masked values; fill "
            "them: values.filled(0), or values.filled(np.nan)"
        )
    if dtype.kind not in "iuf":
        raise ValueError(f"`{parameter}`: {layer_label(layer)} holds {dtype}; numbers are needed")
    if hasattr(values, "dask"):
        check_files(layer_label(layer), values)
    return values


def layer_label(layer: str | None) -> str:
    """Return the name of a matrix for errors."""
    return "X" if layer is None else f"layer {layer!r}"


def values_of(table: AnnData, layer: str | None, parameter: str = "layer") -> Any:
    """Return ``X`` (``layer=None``) or a layer in memory, dense or csr."""
    return in_memory(matrix_of(table, layer, parameter))


def indexable_matrix(table: AnnData, layer: str | None) -> Any:
    """Return ``X`` (``layer=None``) or a layer that can be indexed: dask arrays as they are, others in memory."""
    values = matrix_of(table, layer)
    return values if hasattr(values, "dask") else in_memory(values)


def in_memory(values: Any) -> Any:
    """Bring a matrix into memory, dense or csr."""
    values = values.compute() if hasattr(values, "compute") else values
    # Sparse matrices of backed tables have to_memory.
    values = values.to_memory() if hasattr(values, "to_memory") else values
    # scipy does not support sparse arrays of half precision or non-native byte order.
    native = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype.newbyteorder("=")
    if not scipy.sparse.issparse(values):
        return np.asarray(values).astype(native, copy=False)
    values = scipy.sparse.csr_array(values.astype(native, copy=False))
    if not values.has_canonical_format:
        # Duplicate entries have to be summed to give the count.
        values = values.copy()
        values.sum_duplicates()
    return values


def dense(values: Any) -> np.ndarray:
    """Bring a matrix into memory as a dense array."""
    values = in_memory(values)
    return values.toarray() if scipy.sparse.issparse(values) else values


def take(values: Any, rows: np.ndarray) -> Any:
    """Return rows of a matrix in memory, without a copy if all rows are taken in order."""
    return values if np.array_equal(rows, np.arange(values.shape[0])) else values[rows]


def subsample(values: Any, n: int = 64) -> Any:
    """Choose at most ``n`` values, evenly through their order."""
    return values[np.linspace(0, len(values) - 1, min(n, len(values))).astype(int)]


def in_columns(values: np.ndarray, columns: np.ndarray, n: int) -> np.ndarray:
    """Return values ``(…, g)`` in the given columns of an array ``(…, n)``, float32; the other columns are NaN."""
    out = np.full((*values.shape[:-1], n), np.nan, np.float32)
    out[..., columns] = values
    return out


def blocks_of(values: Any) -> Iterator[tuple[slice, Any]]:
    """Yield blocks of rows of a matrix, in memory, dense or csr, with their position."""
    n_rows, n_columns = values.shape
    if scipy.sparse.issparse(values) or getattr(values, "format", None) == "csc":
        # Reading a csc matrix on disk once is cheaper than reading its rows.
        values = in_memory(values)
    is_lazy = hasattr(values, "compute")
    ends = np.cumsum(values.chunks[0]).tolist() if is_lazy else [n_rows]
    step = max(1, _BLOCK // max(1, n_columns))
    start = 0
    for end in ends:
        # Compute each chunk of a dask array once.
        part = in_memory(values[start:end]) if is_lazy else values
        for first in range(0, end - start, step):
            last = min(first + step, end - start)
            yield slice(start + first, start + last), in_memory(part[first:last])
        start = end
