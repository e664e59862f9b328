"""Genes that hg.tl.evaluate judges, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core import validate
from ..._core.genes import columns_of, match_previous_symbols, symbols_in
from ..._core.keys import Keys
from ..._core.model_genes import match_genes

if TYPE_CHECKING:
    from anndata import AnnData

    from ...models import HE2Gene


def genes_in_common(
    table: AnnData, other: AnnData, known: np.ndarray, genes: Sequence[str] | None, gene_symbols: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of both tables that hold the same gene, predicted (``known``, ``(n_vars,)``) and asked for."""
    if gene_symbols is not None:
        validate.key_in(gene_symbols, list(other.var.columns), "gene_symbols", what="a column of var")
    if other is table:
        columns = np.arange(table.n_vars)
    else:
        names = symbols_in(other, gene_symbols)
        stripped = names.str.replace(r"\.\d+$", "", regex=True)
        by_id = pd.Index(table.var["ensembl_id"].astype(str)) if "ensembl_id" in table.var else table.var_names
        by_id = pd.Series(np.arange(len(by_id)), by_id)
        by_id = by_id[~by_id.index.duplicated(keep=False)]
        columns = table.var_names.get_indexer(names)
        columns = np.where(columns >= 0, columns, by_id.reindex(stripped).fillna(-1).to_numpy(int))
        columns = match_previous_symbols(names, table.var_names, columns)
    usable = (columns >= 0) & known[columns] & ~pd.Series(columns).duplicated().to_numpy()
    if not usable.any():
        raise ValueError(
            f"`data`: no measured gene was predicted; predicted: {list(table.var_names[known][:3])}, measured: "
            f"{list(other.var_names[:3])}. Where symbols stand in a column of var, name it by `gene_symbols`"
        )
    if genes is not None:
        if not len(genes):
            raise ValueError("`genes` is empty; name some genes, or use None")
        asked = list(dict.fromkeys(str(gene) for gene in genes))
        wanted = columns_of(table, asked, gene_symbols)
        absent = [gene for gene, column in zip(asked, wanted, strict=True) if column not in set(columns[usable])]
        if absent:
            raise ValueError(f"`genes` {absent[:5]} were not both predicted and measured; hg.get.genes lists what was")
        usable &= np.isin(columns, wanted)
    chosen = np.flatnonzero(usable)
    return columns[chosen], chosen


def known_of(
    table: AnnData, columns: np.ndarray, keys: Keys, model: HE2Gene | None, gene_symbols: str | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Training mean of each gene, and panels of genes: of the table, and of the model where it is at hand."""
    mean = np.full(table.n_vars, np.nan)
    if keys.mean in table.var:
        mean = np.array(table.var[keys.mean], float)
    panels = {"all genes": np.ones(len(columns), bool), "reliable": table.var[keys.reliable].to_numpy(bool)[columns]}
    if model is not None:
        symbols = gene_symbols if gene_symbols in table.var else None
        found = match_genes(model, table, None, symbols)
        position = np.full(table.n_vars, -1)
        position[found.columns] = found.positions
        facts = model.genes.iloc[position[columns]]
        is_known = position[columns] >= 0
        panels["target"] = is_known & (facts["group"] == "target").to_numpy()
        panels["most variable"] = is_known & facts["variable"].to_numpy(bool)
        mean[columns] = np.where(np.isnan(mean[columns]) & is_known, facts["mean"], mean[columns])
    return mean[columns], {name: mask for name, mask in panels.items() if mask.any()}


def model_of(record: Mapping[str, Any], model: HE2Gene | None) -> HE2Gene | None:
    """Model that made a prediction: the one given, else the bundled one if it was that."""
    from ...models import BUNDLED, load

    if model is not None:
        if model.weights_sha256 != record.get("weights_sha256"):
            raise ValueError(
                f"`model` is {model.name!r}, the prediction was made by {record.get('model')!r} of other weights"
            )
        return model
    if record.get("model") not in BUNDLED:
        return None
    model = load(record["model"])
    return model if model.weights_sha256 == record.get("weights_sha256") else None
