"""Free memory of the machine."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")
_FREE = Path("/proc/meminfo")


def memory_of_machine() -> int | None:
    """Return the free memory of this machine, or of its container if less, in bytes; ``None`` if unknown."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    total = min(total, int(limit)) if limit.isdigit() else total
    # Other processes keep the memory that they use now.
    lines = _FREE.read_text().splitlines() if _FREE.is_file() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min(total, *free) if free else total
