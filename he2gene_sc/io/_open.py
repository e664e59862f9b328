"""Read a SpatialData store for the command line, with errors that name damaged elements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._core import logs
from .._core.rasters import levels
from .._core.stores import KINDS
from ._save import is_store

if TYPE_CHECKING:
    from spatialdata import SpatialData


def open_store(path: Path, parameter: str = "PATH") -> SpatialData:
    """Read a store."""
    import spatialdata as sd

    try:
        is_valid = path.is_dir() and is_store(path)
    except (ValueError, OSError) as error:  # not JSON, or not text
        raise OSError(
            f"{parameter} {str(path)!r} is damaged: its metadata cannot be read: {_first_line(error)}"
        ) from error
    if not is_valid:
        raise ValueError(f"{parameter} {str(path)!r} is not a SpatialData zarr store")
    try:
        # ome_zarr warns of labels that name no parent image; spatialdata writes all labels like that.
        with logs.silence("ome_zarr"):
            sdata = sd.read_zarr(path)
        _read_a_pixel(sdata)
    except MemoryError:
        raise
    except Exception as error:  # zarr, parquet and codecs raise various errors for damaged bytes
        raise OSError(
            f"{parameter} {str(path)!r} is damaged{_damaged(path)}: {type(error).__name__}: {_first_line(error)}. Restore it "
            "from a copy, or delete the damaged element"
        ) from error
    return sdata


def _read_a_pixel(sdata: SpatialData) -> None:
    """Read one pixel of each image, to check that its codec is available and its first chunk is complete."""
    for element in (*sdata.images.values(), *sdata.labels.values()):
        array = levels(element)[0]
        array[(slice(0, 1),) * array.ndim].compute()


def _damaged(path: Path) -> str:
    """Name the kinds of elements that cannot be read."""
    import warnings

    import spatialdata as sd

    found = []
    for kind in KINDS:
        if not (path / kind).is_dir():
            continue
        try:
            with warnings.catch_warnings(action="ignore"), logs.silence("ome_zarr"):
                _read_a_pixel(sd.read_zarr(path, selection=(kind,)))
        except Exception:  # noqa: BLE001 - any error means damage
            found.append(kind)
    return f" ({', '.join(found)} cannot be read)" if found else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]
