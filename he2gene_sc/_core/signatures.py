"""Short digests of written values, by which later changes are detected."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .keys import ALIGNED, LAZY
from .rasters import levels

if TYPE_CHECKING:
    from anndata import AnnData

#: Values of a matrix that are read at a time.
_BLOCK = 1 << 22
#: Larger matrices are digested by a sample of their rows.
_MAX_VALUES = 1 << 26
#: Digests of lazy layers by name.
_LAZY_DIGESTS: dict[str, str] = {}


def slot_digest(table: AnnData, slot: str, name: str) -> str:
    """Return a digest of an entry of a table and of the names that it is aligned to: ``"<names>:<values>"``."""
    names = [getattr(table, f"{axis}_names") for axis, slots in ALIGNED.items() if slot in slots]
    value = getattr(table, slot)[name]
    lazy = str(getattr(value, "name", "")) if hasattr(value, "dask") else ""
    # The name of a lazy layer is a digest of its inputs, so the layer is computed only once.
    found = _LAZY_DIGESTS.get(lazy) or digest_of(value)
    if lazy.startswith(LAZY):
        _LAZY_DIGESTS[lazy] = found
    return f"{digest_of(*names)}:{found}"


def is_unchanged(table: AnnData, slot: str, name: str, signature: str | None) -> bool:
    """Whether an entry is unchanged; with other row names, or without a signature, it counts as unchanged."""
    if not signature:
        return True
    names, _, _ = signature.partition(":")
    found = slot_digest(table, slot, name)
    return not found.startswith(f"{names}:") or found == signature


def element_digest(element: Any) -> str:
    """Return a digest of labels or shapes: ``"<shape>:<values>"``."""
    if isinstance(element, pd.DataFrame):
        content = [element.index, element.geometry.to_wkb().to_numpy()]
        content += [element["radius"]] if "radius" in element else []
    else:
        element = levels(element)[0]
        content = [element]
    return f"{_shape(element)}:{digest_of(*content)}"


def is_element_unchanged(element: Any, signature: str) -> bool:
    """Whether labels or shapes have this digest; elements of another size are not read."""
    return signature.startswith(f"{_shape(levels(element)[0])}:") and element_digest(element) == signature


def row_digests(values: Any, names: pd.Index) -> np.ndarray:
    """Return a digest of each row and its name, ``(n,)`` uint64, valid in any subset and order of rows."""
    index = pd.Index(np.asarray(names.astype(str), object), dtype=object)
    return pd.util.hash_pandas_object(pd.DataFrame(np.asarray(values, np.float32), index=index)).to_numpy()


def same_digest(a: Any, b: Any) -> bool:
    """Whether two values are equal up to a zarr store, which turns lists into arrays and integers into numbers."""
    return digest_of(a) == digest_of(b)


def _shape(element: Any) -> str:
    return "x".join(map(str, element.shape))


def digest_of(*values: Any) -> str:
    """Return a short digest of values, which a round trip through a zarr store does not change."""
    digest = blake2b(digest_size=8)
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}\0".encode())
            _update(digest, value[key])
    elif isinstance(value, pd.DataFrame):
        for i, column in enumerate(value.columns):
            digest.update(f"{column}\0".encode())
            _update(digest, value.iloc[:, i])
    elif isinstance(value, pd.Series | pd.Index | pd.Categorical):
        numeric = (
            not isinstance(value, pd.Categorical) and isinstance(value.dtype, np.dtype) and value.dtype.kind in "fiub"
        )
        _update_array(digest, np.asarray(value, float)) if numeric else _update_texts(digest, value)
    elif hasattr(value, "shape") and len(value.shape) and getattr(value.dtype, "kind", "O") in "fiub":
        _update_array(digest, value)
    elif isinstance(value, list | tuple):
        try:
            array = np.asarray(value)
        except ValueError:  # lists of several lengths
            array = np.asarray([repr(part) for part in value])
        _update(digest, array)
    elif isinstance(value, np.ndarray) and value.ndim:
        _update_texts(digest, value.ravel())
    elif isinstance(value, bool | int | float | np.number | np.bool_):
        _update_array(digest, np.array([value], float))
    else:
        digest.update(f"{value}\0".encode())


def _update_texts(digest: Any, values: Any) -> None:
    objects = np.asarray(values, object)
    missing = pd.isna(objects)
    texts = ["\1" if gone else str(value) for value, gone in zip(objects.tolist(), missing.tolist(), strict=True)]
    digest.update("\0".join(texts).encode("utf-8", "surrogatepass"))


def _update_array(digest: Any, array: Any) -> None:
    """Add an array (numpy, sparse, dask or on disk) to a digest, block by block, in single precision."""
    digest.update(repr(tuple(int(n) for n in array.shape)).encode())
    width = int(np.prod(array.shape[1:])) or 1
    rows = np.arange(array.shape[0])
    if len(rows) * width > _MAX_VALUES:
        rows = np.unique(np.linspace(0, len(rows) - 1, max(1, _MAX_VALUES // width)).astype(int))
    step = max(1, _BLOCK // width)
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        block = array[chosen[0] : chosen[-1] + 1] if len(rows) == array.shape[0] else array[chosen]
        block = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
        block = block.astype(np.float32) + np.float32(0)  # turns -0.0 into 0.0
        block[np.isnan(block)] = np.nan  # one bit pattern for NaN

        digest.update(np.ascontiguousarray(block).tobytes())
