"""Parts of elements: arrays of images, labels and tables, and transformations."""

from __future__ import annotations

from typing import Any


def levels(element: Any) -> list[Any]:
    """Return the arrays of an image or labels, finest first."""
    if hasattr(element, "children"):
        return [next(iter(level.data_vars.values())) for level in element.children.values()]
    return [element]


def entries_of(table: Any, slot: str) -> dict[str, Any]:
    """Return the entries of a slot by key; anndata 0.13 and later also list X among the layers, as ``None``."""
    return {key: value for key, value in dict(getattr(table, slot)).items() if key is not None}


def systems_of(element: Any) -> dict[str, Any]:
    """Return the transformations of an element by coordinate system."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, get_all=True)


def shared_systems(first: Any, *others: Any) -> list[str]:
    """Return the coordinate systems that elements share, ``"global"`` first."""
    shared = set(systems_of(first)).intersection(*map(systems_of, others))
    return sorted(shared, key=lambda name: (name != "global", name))
