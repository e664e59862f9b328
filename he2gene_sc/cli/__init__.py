"""``he2gene``: the command line of he2gene_sc."""

from .app import main

__all__ = ["main"]
