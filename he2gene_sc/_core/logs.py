"""The logger and the warnings of the package, and what silences those of other packages."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("he2gene_sc")


def warn(message: str) -> None:
    """Warn at the line that called a public function: outside of this package, or in its command line."""
    frame, level = inspect.currentframe(), 1
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("he2gene_sc.") or module.startswith("he2gene_sc.cli."):
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@contextmanager
def silence(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence loggers below a level (default: ERROR)."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


def import_squidpy() -> Any:
    """Import squidpy without the warnings about its docstrings, which the first import shows."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        import squidpy
    return squidpy
