"""The logger of the package, and a context manager that silences other loggers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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
