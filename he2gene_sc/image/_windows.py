"""Sides of the windows around a spot, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Set
from numbers import Real
from typing import Any

#: Pixels across a window from which on it shows something.
MIN_PX = 8


def check_windows(windows_um: Any) -> tuple[float, ...]:
    """Return the sides of windows in µm as a tuple of floats; anything but positive numbers in order is an error."""
    listed = isinstance(windows_um, Collection) and not isinstance(windows_um, str | bytes | Set | Mapping)
    sides = list(windows_um) if listed and getattr(windows_um, "ndim", 1) == 1 else []
    if not sides or not all(
        isinstance(um, Real) and not isinstance(um, bool) and 0 < float(um) < math.inf for um in sides
    ):
        raise ValueError(f"`windows_um` is {windows_um!r}; a list of sides in µm, finite and above 0, is needed")
    return tuple(float(um) for um in sides)
