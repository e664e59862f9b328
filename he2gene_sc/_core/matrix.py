"""The matrices of a table, in memory, on disk or as dask arrays, read some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from . import validate
from .elements import check_files

if TYPE_CHECKING:
    from anndata import AnnData

#: Values that are in memory, or normalised, at once.
_BLOCK = 2_000_000


def layer_names(table: AnnData) -> list[str]:
    """Names of the layers, in order; from 0.13 on, anndata lists ``X`` among them under the name ``None``."""
    return [name for name in table.layers if name is not None]


def matrix_of(table: AnnData, layer: str | None, parameter: str = "layer") -> Any:
    """``X`` (``layer=None``) or a layer, as the table keeps it: in memory, on disk or as a dask array."""
    if layer is not None:
        validate.key_in(layer, sorted(layer_names(table)), parameter, what="a layer", hint=" (None: X)")
    values = table.X if layer is None else table.layers[layer]
    if values is None:
        raise ValueError(f"`{parameter}`: X is empty; name a layer, of {sorted(layer_names(table))}")
    dtype = np.dtype(getattr(values, "dtype", float))
    if dtype.kind == "b":
        raise ValueError(f"`{parameter}`: {layer_label(layer)} holds True and False; counts are needed")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(
            f"`{parameter}`: {layer_label(layer)} is a masked array, of which {int(np.ma.count_masked(values))} values are masked; say "
            "what they are: values.filled(0), or values.filled(np.nan)"
        )
    if dtype.kind not in "iuf":
        raise ValueError(f"`{parameter}`: {layer_label(layer)} holds {dtype}; numbers are needed")
    if hasattr(values, "dask"):
        check_files(layer_label(layer), values)
    return values


def layer_label(layer: str | None) -> str:
    """Name a matrix in errors."""
    return "X" if layer is None else f"layer {layer!r}"


def values_of(table: AnnData, layer: str | None, parameter: str = "layer") -> Any:
    """``X`` (``layer=None``) or a layer, in memory, dense or csr."""
    return in_memory(matrix_of(table, layer, parameter))


def indexable_matrix(table: AnnData, layer: str | None) -> Any:
    """``X`` (``layer=None``) or a layer, of which rows and columns can be taken: lazy if it is a dask array, else in memory."""
    values = matrix_of(table, layer)
    return values if hasattr(values, "dask") else in_memory(values)


def in_memory(values: Any) -> Any:
    """Bring a matrix into memory, dense or csr."""
    values = values.compute() if hasattr(values, "compute") else values
    # A sparse matrix of a backed table.
    values = values.to_memory() if hasattr(values, "to_memory") else values
    # scipy has no sparse arrays in half precision or of foreign byte order.
    native = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype.newbyteorder("=")
    if not scipy.sparse.issparse(values):
        return np.asarray(values).astype(native, copy=False)
    values = scipy.sparse.csr_array(values.astype(native, copy=False))
    if not values.has_canonical_format:
        # An entry may be kept in parts, which make a count only together.
        values = values.copy()
        values.sum_duplicates()
    return values


def dense(values: Any) -> np.ndarray:
    """Bring a matrix into memory as an array."""
    values = in_memory(values)
    return values.toarray() if scipy.sparse.issparse(values) else values


def max_chunk_rows(values: Any) -> int:
    """Rows of the largest chunk of a dask array, which is computed whole; 0 for any other matrix."""
    return max(values.chunks[0], default=0) if hasattr(values, "dask") else 0


def blocks_of(values: Any) -> Iterator[tuple[slice, Any]]:
    """Rows of a matrix in memory, some at a time, dense or csr, and where they stand."""
    n_rows, n_columns = values.shape
    if scipy.sparse.issparse(values):
        values = in_memory(values)
    elif getattr(values, "format", None) == "csc":
        # Rows of a matrix on disk that is kept by columns: reading it once is cheaper.
        values = in_memory(values)
    ends = np.cumsum(values.chunks[0]).tolist() if hasattr(values, "compute") else [n_rows]
    step = max(1, _BLOCK // max(1, n_columns))
    start = 0
    for end in ends:
        # A chunk of a dask array is computed once.
        part = in_memory(values[start:end]) if len(ends) > 1 or hasattr(values, "compute") else values
        for first in range(0, end - start, step):
            last = min(first + step, end - start)
            yield slice(start + first, start + last), in_memory(part[first:last])
        start = end
