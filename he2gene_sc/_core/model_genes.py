"""Match genes of a table to genes of a model, by symbol or Ensembl id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from . import validate
from .genes import match_previous_symbols, symbols_in
from .logs import logger
from .validate import format_list, suggest

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene

_MIN_MATCHED = 0.1
#: Probe names of Space Ranger: gene and hash.
_PROBE = r"\|[0-9a-f]{7}$"


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
    """Find the genes to predict and their columns; ``table`` is ``None`` if a new one will be made.

    A previous HGNC symbol is matched by its current one if the model does not know the symbol itself and the table does not
    hold the gene under both.
    """
    if genes is not None and not isinstance(genes, str):
        genes = validate.names(genes, "genes")
        if not genes:
            raise ValueError("`genes` is empty; name some genes, or use None or 'all'")
        _check_known(model, genes)
    everything = np.arange(len(model.genes))
    if table is None or (isinstance(genes, str) and genes == "all"):
        chosen = everything if genes is None or isinstance(genes, str) else pd.unique(_named_positions(model, genes))
        return WantedGenes(chosen, np.arange(len(chosen)), all_genes=table is not None)
    check_not_probes(table)
    names = symbols_in(table, gene_symbols)
    positions, renamed = _lookup(model, names)
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
    if genes is not None:
        named = _named_positions(model, genes)
        absent = [gene for gene, position in zip(genes, named, strict=True) if position not in positions]
        if absent:
            raise ValueError(
                f"`genes` {absent[:5]} are known to the model but not in the table; use genes='all' for a table of all "
                "model genes"
            )
        known &= np.isin(positions, named)
    columns = np.flatnonzero(known)
    return WantedGenes(positions[columns], columns, all_genes=False, renamed=renamed)


def positions_of(model: HE2Gene, genes: list[str]) -> np.ndarray:
    """Return positions in the model of genes that a user named, ``(g,)``; raise for unknown genes."""
    _check_known(model, genes)
    return _named_positions(model, genes)


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


def _lookup(model: HE2Gene, names: pd.Index, *, one_to_one: bool = True) -> tuple[np.ndarray, dict[str, str]]:
    """Return positions of names in the model (-1: unknown), and the names that were matched by another symbol.

    Match by symbol, else by Ensembl id without its version, else by another symbol of a gene that is not matched yet.
    """
    by_symbol = model.genes.index.get_indexer(names)
    ids = model.genes["ensembl_id"].astype(str).to_numpy()
    with_id = np.flatnonzero(ids != "")
    with_id = with_id[~pd.Index(ids[with_id]).duplicated(keep=False)]
    stripped = names.astype(str).str.replace(r"\.\d+$", "", regex=True)
    found = pd.Index(ids[with_id]).get_indexer(stripped)
    by_ensembl = np.append(with_id, -1)[found]
    known = np.where(by_symbol >= 0, by_symbol, by_ensembl)
    found = match_previous_symbols(names, model.genes.index, known, one_to_one=one_to_one)
    more = np.flatnonzero((found >= 0) & (known < 0))
    return found, {names[i]: str(model.genes.index[found[i]]) for i in more}


def _named_positions(model: HE2Gene, genes: Sequence[str]) -> np.ndarray:
    """Return positions of genes that the user named, -1 if unknown."""
    return _lookup(model, pd.Index([str(gene).strip() for gene in genes], dtype=object), one_to_one=False)[0]


def _check_known(model: HE2Gene, genes: list[str]) -> None:
    unknown = [gene for gene, position in zip(genes, _named_positions(model, genes), strict=True) if position < 0]
    if unknown:
        raise ValueError(
            f"`genes` {unknown[:5]} are unknown to model {model.name!r}{suggest(unknown[0], model.genes.index)}; see hg.models.load().genes"
        )
