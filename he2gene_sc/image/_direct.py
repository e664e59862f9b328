"""The array that a dask array was made of."""

from __future__ import annotations

from typing import Any


def direct(array: Any) -> Any:
    """Return what a dask array reads from, where regions of that can be read without dask.

    For every block that is computed, dask looks through the graph of the whole image. An image that was cropped,
    transformed or rechunked has another graph than :func:`dask.array.from_array` makes, and stays as it is.

    Parameters
    ----------
    array
        Any array.

    Returns
    -------
    array
        A zarr array or an image of :func:`he2gene_sc.io.read_he`, of the same pixels; ``array`` itself otherwise.
    """
    name, layers = getattr(array, "name", None), getattr(getattr(array, "dask", None), "layers", None)
    original = f"original-{name}"
    if layers is None or set(layers) != {name, original} or len(layers[original]) != 1:
        return array
    (source,) = dict(layers[original]).values()
    source = getattr(source, "value", source)
    known = getattr(source, "reads_regions", False) or type(source).__module__.split(".")[0] == "zarr"
    same = getattr(source, "shape", None) == array.shape and getattr(source, "dtype", None) == array.dtype
    return source if known and same else array
