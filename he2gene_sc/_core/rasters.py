"""Arrays of images and labels, and the zarr arrays that they read lazily."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def levels(element: Any) -> list[Any]:
    """Return the arrays of an image or labels, finest first."""
    if hasattr(element, "children"):
        return [next(iter(level.data_vars.values())) for level in element.children.values()]
    return [element]


def zarr_folders(array: Any) -> list[Path]:
    """Return the folders of the zarr arrays that a dask array reads."""
    return [folder for folder, _ in zarr_sources(array)]


def zarr_sources(array: Any) -> list[tuple[Path, Any]]:
    """Return the zarr arrays that a dask array reads, with their folders."""
    sources = []
    for name, layer in getattr(getattr(array, "dask", None), "layers", {}).items():
        if name.startswith("original-from-zarr"):
            sources.append(dict(layer)[name])
    roots = [(getattr(getattr(source, "store", None), "root", None), source) for source in sources]
    return [(Path(root, source.path), source) for root, source in roots if root is not None]
