"""Sides of the windows around a spot, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real


def check_windows(windows_um: object) -> None:
    """Refuse sides of windows that are no lengths in µm.

    Raises
    ------
    ValueError
        If it is no list, or something in it is no finite number above 0.
    """
    listed = isinstance(windows_um, Iterable) and not isinstance(windows_um, str)
    sides = list(windows_um) if listed else []
    if not sides or not all(isinstance(um, Real) and not isinstance(um, bool) and 0 < um < math.inf for um in sides):
        raise ValueError(f"`windows_um` is {windows_um!r}; a list of sides in µm, finite and above 0, is needed")
