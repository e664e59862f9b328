"""Match gene names by symbol, by Ensembl id, or by a previous HGNC symbol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from . import validate

if TYPE_CHECKING:
    from anndata import AnnData

#: Made by docs/make_previous_symbols.py from HGNC's complete set of June 2026 (CC0).
_PREVIOUS = Path(__file__).with_name("previous_symbols.csv.gz")


@cache
def previous_symbols() -> dict[str, str]:
    """Map each previous symbol of a human gene to its current symbol; previous symbols of several genes are left out."""
    frame = pd.read_csv(_PREVIOUS, keep_default_na=False, dtype=str)
    return dict(zip(frame["previous"], frame["symbol"], strict=True))


def current_symbols(names: Iterable[str]) -> np.ndarray:
    """Return current symbols of genes, ``(g,)`` objects; other names than previous symbols are returned unchanged."""
    table = previous_symbols()
    return np.array([table.get(name, name) for name in names], object)


def find_genes(names: Sequence[str], available: Sequence[str], *, one_to_one: bool = True) -> np.ndarray:
    """Return positions of genes in ``available``, by name or by a previous symbol, ``(g,)``; -1 if none or several match.

    With ``one_to_one``, a gene is not matched by a previous symbol if ``names`` also hold its own name. Without it, several
    names that a user gave may match one gene.
    """
    wanted, present = pd.Index(names, dtype=object).astype(str), pd.Index(available, dtype=object).astype(str)
    first = pd.Index(present[~present.duplicated()])
    place = np.append(np.flatnonzero(~present.duplicated()), -1)
    return match_previous_symbols(wanted, present, place[first.get_indexer(wanted)], one_to_one=one_to_one)


def match_previous_symbols(
    names: pd.Index, available: pd.Index, found: np.ndarray, *, one_to_one: bool = True
) -> np.ndarray:
    """Match names that were not found otherwise, by the current symbol of one gene that is not matched yet."""
    lost = np.flatnonzero(found < 0)
    free = np.setdiff1d(np.arange(len(available)), found) if one_to_one else np.arange(len(available))
    if not len(lost) or not len(free):
        return found
    old, new = current_symbols(names[lost]), current_symbols(available[free])
    once = ~pd.Index(new).duplicated(keep=False)
    place = np.append(free[once], -1)[pd.Index(new[once]).get_indexer(old)]
    if one_to_one:
        place[pd.Index(old).duplicated(keep=False)] = -1
    out = np.array(found)
    out[lost] = place
    return out


def symbols_in(table: AnnData, gene_symbols: str | None) -> pd.Index:
    """Return the gene names of a table, stripped: a column of ``var``, or its index; empty for missing names."""
    if gene_symbols is not None:
        validate.key_in(gene_symbols, list(table.var.columns), "gene_symbols", what="a column of var")
    given = pd.Series(table.var_names if gene_symbols is None else table.var[gene_symbols].to_numpy(), dtype=object)
    return pd.Index(given.where(given.notna(), "").astype(str).str.strip())


def columns_of(table: AnnData, genes: Sequence[str], gene_symbols: str | None = None) -> np.ndarray:
    """Return the columns of genes that a user named, by name, ``gene_symbols`` or a previous symbol; -1 for others."""
    genes = [str(name).strip() for name in genes]
    found = find_genes(genes, table.var_names, one_to_one=False)
    exact = table.var_names.isin(genes)
    if gene_symbols is not None and gene_symbols in table.var:
        symbols = symbols_in(table, gene_symbols)
        twice = symbols.duplicated(keep=False)
        unique = pd.Index(np.where(twice, "", symbols))
        by_symbol = find_genes(genes, unique, one_to_one=False)
        by_symbol[np.array([not name for name in genes])] = -1
        own = np.array([place >= 0 and exact[place] for place in found])
        found = np.where(own | (by_symbol < 0), found, by_symbol)
    return found
