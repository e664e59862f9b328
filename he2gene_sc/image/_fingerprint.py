"""Hash of the pixels of an image, independent of its file."""

from __future__ import annotations

import hashlib

import numpy as np

from ._pixels import to_rgb_uint8
from ._pyramid import Pyramid, direct

#: Number of blocks per side of the image, and side of a block in pixels.
_N_BLOCKS, _BLOCK_PX = 4, 256
#: Least standard deviation of a block that is not blank, and number of such blocks that identify a slide.
_LEAST_SD, _LEAST_BLOCKS = 3.0, 2


def pixels_sha256(pyramid: Pyramid, factor: float = 1.0) -> str | None:
    """Hash the size of level 0 and the pixels of up to 16 of its blocks; ``None`` if almost all blocks are blank.

    The hash does not depend on file format, chunks, further levels, alpha, or whether pixels are uint8 or float. Glass may have
    the same pixels on two slides, so blocks of glass alone give no hash.

    Examples
    --------
    >>> import numpy as np
    >>> from he2gene_sc.image import Pyramid, pixels_sha256
    >>> image = np.random.default_rng(0).integers(0, 256, (3, 900, 700), np.uint8)
    >>> pixels_sha256(Pyramid.single(image)) == pixels_sha256(Pyramid.single(image / np.float32(255)), 255.0)
    True
    >>> pixels_sha256(Pyramid.single(np.full((3, 900, 700), 255, np.uint8))) is None
    True
    """
    array = direct(pyramid.levels[0].array)
    rows, columns = _starts(pyramid.height), _starts(pyramid.width)
    blocks = [array[:, y : y + _BLOCK_PX, x : x + _BLOCK_PX] for y in rows for x in columns]
    if hasattr(array, "dask"):
        import dask

        blocks = dask.compute(*blocks)
    digest = hashlib.sha256(f"{pyramid.height} {pyramid.width}".encode())
    n_textured = 0
    for block in map(np.asarray, blocks):
        # Pixels far from the spots may be NaN, since predict never reads them.
        finite = np.clip(np.nan_to_num(block), 0, 255 / factor) if block.dtype.kind == "f" else block
        pixels = to_rgb_uint8(finite, factor, paint_black=False)
        n_textured += bool(pixels.std() >= _LEAST_SD)
        digest.update(pixels.tobytes())
    return digest.hexdigest() if n_textured >= min(_LEAST_BLOCKS, len(blocks)) else None


def _starts(n: int) -> list[int]:
    """Return the first pixel of each block along a side of ``n`` pixels."""
    middles = (np.arange(_N_BLOCKS) + 0.5) * n / _N_BLOCKS
    return [int(x) for x in np.unique(np.clip(middles - _BLOCK_PX / 2, 0, max(0, n - _BLOCK_PX)).astype(int))]
