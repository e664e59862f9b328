"""Our logger, and those of other libraries, kept quiet for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("he2gene_sc")


@contextmanager
def silence(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Let loggers pass nothing below a level, by default errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
