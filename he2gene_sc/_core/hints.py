"""Hints of errors and warnings on µm per pixel: how the caller states it, in Python, in a shell or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Hint of verbs without an argument for µm per pixel.
STATE_MPP = "state it: sdata.attrs.setdefault('he2gene', {{}}).setdefault('mpp', {{}})[{image!r}] = {mpp}"
_HINT: ContextVar[str] = ContextVar("mpp_hint", default="")


@contextmanager
def use_mpp_hint(hint: str) -> Iterator[None]:
    """Give hints in the form of the caller, such as ``"give --mpp {mpp}"``; that of an outer caller has priority."""
    token = _HINT.set(_HINT.get() or hint)
    try:
        yield
    finally:
        _HINT.reset(token)


def mpp_hint(image_key: str, mpp: float | None = None) -> str:
    """Return how to set µm per pixel of an image to a value; ``None``: to one that only the user knows."""
    return (_HINT.get() or "pass mpp={mpp}").format(image=image_key, mpp="..." if mpp is None else f"{mpp:.4g}")
