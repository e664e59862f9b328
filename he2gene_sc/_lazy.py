"""Lazy re-export: a namespace names what it offers, and the file behind a name is imported when it is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable


def attach(package: str, exports: dict[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package from a mapping of name to submodule.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    exports
        Public name to the submodule (``"._predict"``) that defines it.
    """

    def __getattr__(name: str):
        if name in exports:
            return getattr(importlib.import_module(exports[name], package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}, valid names: {sorted(exports)}")

    def __dir__() -> list[str]:
        return sorted(exports)

    return __getattr__, __dir__, sorted(exports)
