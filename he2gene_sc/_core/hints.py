"""Hints of errors and warnings: how the caller sets a parameter, in Python, in a shell or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

#: Form of the hint on a parameter, with ``{0}`` for its value; other parameters are keyword arguments.
_FORMS: ContextVar[Mapping[str, str] | None] = ContextVar("forms", default=None)


@contextmanager
def set_by(**forms: str) -> Iterator[None]:
    """Give hints on parameters in the form of the caller, such as ``mpp="give --mpp {0}"``; an outer caller has priority."""
    token = _FORMS.set({**forms, **(_FORMS.get() or {})})
    try:
        yield
    finally:
        _FORMS.reset(token)


def set_to(parameter: str, value: object, form: str = "") -> str:
    """Return how to set a parameter to a value; ``form`` replaces ``pass parameter=value``, the default."""
    return (_FORMS.get() or {}).get(parameter, form or f"pass {parameter}={{0}}").format(value)
