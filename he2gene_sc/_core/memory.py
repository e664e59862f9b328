"""Free memory of the machine."""

from __future__ import annotations

from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_of_machine() -> int:
    """Return the free memory of this machine, or the limit of its container if less, in bytes."""
    import psutil

    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    free = int(psutil.virtual_memory().available)
    return min(free, int(limit)) if limit.isdigit() else free
