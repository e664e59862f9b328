"""Predicted layers above ``settings.memory_limit``: dask arrays of ``max(0, embedding @ weights + bias)``."""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from .._settings import settings
from .keys import LAZY

if TYPE_CHECKING:
    import dask.array as da

#: Values in memory at once, by blocks of spots (all genes) and by blocks of genes (all spots).
_SPOT_BLOCK, _GENE_BLOCK = 1 << 24, 1 << 26
#: Least and largest number of genes per block.
_GENES = 64, 1024


def is_large(n_obs: int, n_vars: int) -> bool:
    """Whether a dense layer would exceed ``settings.memory_limit``."""
    return 4 * n_obs * n_vars > settings.memory_limit


def genes_at_once(n_obs: int) -> int:
    """Return how many genes to compute at once for this many spots."""
    return int(np.clip(_GENE_BLOCK // max(1, n_obs), *_GENES))


def lazy_layer(embedding: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> da.Array:
    """Return lazy expression of an embedding ``(n, k)`` and weights ``(k, g)``; NaN where one of them is NaN.

    The layer keeps copies, so later changes of the arrays do not affect it.
    """
    import dask.array as da
    from dask.array.core import normalize_chunks

    embedding, weights, bias = (np.array(array, np.float32) for array in (embedding, weights, bias))
    digest = blake2b(digest_size=16)
    for array in (embedding, weights, bias):
        array.setflags(write=False)
        digest.update(f"{array.shape}".encode())
        digest.update(array.data)
    n, g = len(embedding), len(bias)
    rows, genes = max(1, _SPOT_BLOCK // g), genes_at_once(n)
    chunks = normalize_chunks((rows, genes), (n, g))
    block = partial(_block, embedding, weights, bias, rows, genes)
    name = f"{LAZY}{digest.hexdigest()}-{rows}-{genes}"
    return da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32), name=name)


def _block(
    embedding: np.ndarray, weights: np.ndarray, bias: np.ndarray, rows: int, genes: int, block_id: tuple[int, int]
) -> np.ndarray:
    i, j = block_id[0] * rows, block_id[1] * genes
    values = embedding[i : i + rows] @ weights[:, j : j + genes]
    values += bias[j : j + genes]
    return np.maximum(values, 0, out=values)


def insert_rows(before: Any, layer: da.Array, rows: np.ndarray) -> da.Array:
    """Insert ``rows`` of a lazy layer into the layer ``before``, which may be dense, sparse or lazy."""
    import dask.array as da

    here = np.zeros((len(layer), 1), bool)
    here[rows] = True
    if not hasattr(before, "dask"):
        before = da.from_array(before.toarray() if hasattr(before, "toarray") else np.array(before), layer.chunks)
    return da.where(here, layer, before.rechunk(layer.chunks).astype(np.float32))
