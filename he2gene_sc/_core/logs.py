"""The logger of the package, and what silences loggers and warnings of other packages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("he2gene_sc")


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
