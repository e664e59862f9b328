"""Layers of a table, in every version of anndata."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def layer_names(table: AnnData) -> list[str]:
    """Names of the layers, in order; from 0.13 on, anndata lists ``X`` among them under the name ``None``."""
    return [name for name in table.layers if name is not None]
