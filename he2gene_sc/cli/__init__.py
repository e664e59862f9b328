"""``he2gene``: the main jobs from a shell."""

from .app import main

__all__ = ["main"]
