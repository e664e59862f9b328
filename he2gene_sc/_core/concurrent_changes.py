"""Detect elements of a store that another process may have changed since an object was read.

Nothing records when an object was read. It cannot have been read before its process started, so files older than the
process are those that it was read from. Of younger files, an element may have changed if the object holds something else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .differences import Difference, read_elements, spatial_difference, table_difference
from .equality import same_column

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Marks an element that was not compared.
NOT_COMPARED = "anything"


def _process_start() -> float:
    """Return the start time of this process, in seconds since 1970."""
    if sys.platform == "linux":
        # psutil is only exact to a second on Linux.
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            return time.time() - age
    import psutil

    return float(psutil.Process().create_time())


def _clock_offset() -> float:
    """Return how far the clock is ahead of the time since boot, which nobody can set."""
    boot = time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
    return time.time() - boot


#: Taken at import, since a forked process holds what its parent read.
_START = _process_start()
_OFFSET = _clock_offset()


def _start() -> float:
    """Return the start time of this process, by the clock of then or of now: the earlier one, if the clock was set back."""
    return _START + min(0.0, _clock_offset() - _OFFSET)


def is_young(*stats: os.stat_result) -> bool:
    """Whether a file was changed, or moved to its place, after this process started."""
    start = _start()
    return any(max(stat.st_mtime, stat.st_ctime) > start for stat in stats)


def is_moved(*folders: os.stat_result) -> bool:
    """Whether a folder was moved to its place after this process started: its ctime is later than its mtime."""
    start = _start()
    return any(stat.st_ctime > start >= stat.st_mtime for stat in folders)


def _rewritten_texts(difference: Difference, table: AnnData) -> list[str]:
    """List text columns that differ only because anndata writes missing values as "None" and "nan"."""
    found = []
    for axis, there in difference.frames.items():
        here = getattr(table, axis)
        for key in set(there) & set(here):
            if here[key].dtype == object and same_column(there[key], here[key].map(str)):
                found.append(f"{axis}[{key!r}]")
    return found


def find_possible_changes(
    sdata: SpatialData, store: Path, young: set[tuple[str, str]]
) -> dict[tuple[str, str], set[str]]:
    """List differences between an object and the ``young`` elements of its store; images and points are not read.

    An element that could not be compared is listed as ``NOT_COMPARED``.
    """
    kinds = {kind for kind, _ in young} - {"tables"}
    stored: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        stored = read_elements(store, kinds)
    found: dict[tuple[str, str], set[str]] = {}
    for kind, name, element in sdata.gen_elements():
        if (kind, name) not in young:
            continue
        difference, is_compared = Difference(), False
        with contextlib.suppress(Exception):
            if kind == "tables":
                difference = table_difference(store / kind / name, element)
                texts = _rewritten_texts(difference, element)
                difference.altered = [item for item in difference.altered if item not in texts]
                is_compared = True
            elif name in stored:
                data = kind in ("labels", "shapes")
                difference = spatial_difference(kind, name, stored[name], element, data=data)
                is_compared = kind != "points" or stored[name]._name == getattr(element, "_name", None)
        found[kind, name] = {*difference.lost, *difference.altered, *([] if is_compared else [NOT_COMPARED])}
    return {place: items for place, items in found.items() if items}
