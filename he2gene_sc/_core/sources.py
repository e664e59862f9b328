"""Files that lazy arrays and points read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse

from .keys import LAZY


def sources(values: Any) -> list[Any]:
    """Return what a dask array or points read: zarr arrays and groups, parquet files and unknown sources; not arrays in memory."""
    if not hasattr(values, "__dask_graph__"):
        return []
    if hasattr(values, "expr"):
        inputs = [step for step in values.expr.walk() if not step.dependencies()]
        return [step for step in inputs if type(step).__name__ != "FromPandas"]
    graph: Any = getattr(values, "dask", None)
    found: list[Any] = []
    for name, layer in getattr(graph, "layers", {}).items():
        if name.startswith(LAZY):
            continue
        # A blockwise layer holds arrays beside its task.
        held = [layer.task, *(value for value, _ in layer.indices)] if hasattr(layer, "indices") else layer.values()
        # anndata reads a sparse matrix from its group.
        stored = (getattr(value, "group", value) for part in held for value in _literals(part))
        arrays = {id(value): value for value in stored if _is_zarr(value)}
        found += arrays.values()
        if not arrays and not graph.dependencies[name]:
            found += [part for part in held if not _is_in_memory(part)]
    return found


def folder_of(source: Any) -> Path | None:
    """Return the folder of a zarr array or group, or of a parquet file, on this machine; ``None`` for other sources."""
    if _is_zarr(source):
        store = source.store
        root: Any = getattr(store, "root", None)
        # dask opens a path that is a text by fsspec.
        if root is None and "local" in getattr(getattr(store, "fs", None), "protocol", ()):
            root = getattr(store, "path", None)
        return None if root is None else Path(root, source.path)
    path = getattr(source, "path", None) if type(source).__name__.startswith("ReadParquet") else None
    is_local = isinstance(path, str | Path) and Path(path).is_absolute() and "*" not in str(path)
    return Path(str(path)) if is_local else None


def _is_zarr(value: Any) -> bool:
    import zarr

    return isinstance(value, zarr.Array | zarr.Group)


def _is_in_memory(part: Any) -> bool:
    """Whether a task of dask only holds arrays; a function without one may read any file."""
    values = [value for value in _literals(part) if not callable(value)]
    return bool(values) and all(isinstance(value, np.ndarray) or issparse(value) for value in values)


def _literals(part: Any) -> Iterator[Any]:
    """Yield the values in a task of dask, a partial function or a container, also nested ones."""
    if isinstance(part, Mapping | list | tuple):
        parts = part.values() if isinstance(part, Mapping) else part
    elif type(part).__name__ == "DataNode":
        parts = [part.value]
    elif isinstance(getattr(part, "args", None), tuple):
        keywords = {**getattr(part, "kwargs", {}), **getattr(part, "keywords", {})}
        parts = [getattr(part, "func", None), *part.args, *keywords.values()]
    else:
        yield part
        return
    for value in parts:
        yield from _literals(value)
