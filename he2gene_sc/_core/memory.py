"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")
_FREE = Path("/proc/meminfo")


def memory_of_machine() -> int | None:
    """Memory that is free on this machine, or in the container where that has less; ``None`` where nothing tells."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    there = min(there, int(limit)) if limit.isdigit() else there
    # What others use now, they will not give back for us.
    lines = _FREE.read_text().splitlines() if _FREE.is_file() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min(there, *free) if free else there
