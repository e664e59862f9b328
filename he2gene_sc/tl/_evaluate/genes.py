"""Genes that ``hg.tl.evaluate`` compares, their training means and gene panels."""

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
    """Return the columns of both tables that hold the same predicted gene (``known``, ``(n_vars,)``) of ``genes``."""
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
            f"{list(other.var_names[:3])}. If gene symbols are in a column of var, pass its name as `gene_symbols`"
        )
    if genes is not None:
        if not len(genes):
            raise ValueError("`genes` is empty; name at least one gene, or use None for all")
        names = list(dict.fromkeys(str(gene) for gene in genes))
        wanted = columns_of(table, names, gene_symbols)
        absent = [gene for gene, column in zip(names, wanted, strict=True) if column not in set(columns[usable])]
        if absent:
            raise ValueError(
                f"`genes` {absent[:5]} were not both predicted and measured; hg.get.genes lists the predicted genes"
            )
        usable &= np.isin(columns, wanted)
    chosen = np.flatnonzero(usable)
    return columns[chosen], chosen


def training_facts(
    table: AnnData, columns: np.ndarray, keys: Keys, model: HE2Gene | None, gene_symbols: str | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the training mean of each gene, and gene panels of the table and, if it is available, of the model."""
    mean = np.full(table.n_vars, np.nan)
    if keys.mean in table.var:
        mean = np.array(table.var[keys.mean], float)
    panels = {"all genes": np.ones(len(columns), bool), "reliable": table.var[keys.reliable].to_numpy(bool)[columns]}
    if model is not None:
        symbols = gene_symbols if gene_symbols in table.var else None
        matched = match_genes(model, table, None, symbols)
        position = np.full(table.n_vars, -1)
        position[matched.columns] = matched.positions
        facts = model.genes.iloc[position[columns]]
        is_known = position[columns] >= 0
        panels["target"] = is_known & (facts["group"] == "target").to_numpy()
        panels["most variable"] = is_known & facts["variable"].to_numpy(bool)
        mean[columns] = np.where(np.isnan(mean[columns]) & is_known, facts["mean"], mean[columns])
    return mean[columns], {name: mask for name, mask in panels.items() if mask.any()}


def find_model(record: Mapping[str, Any], model: HE2Gene | None) -> HE2Gene | None:
    """Return the model that made a prediction: ``model`` if given, else a bundled one with the same weights."""
    from ...models import BUNDLED, load

    if model is not None:
        if model.weights_sha256 != record.get("weights_sha256"):
            raise ValueError(
                f"`model` is {model.name!r}, the prediction was made by {record.get('model')!r} with other weights; pass that "
                "model, or predict again"
            )
        return model
    if record.get("model") not in BUNDLED:
        return None
    model = load(record["model"])
    return model if model.weights_sha256 == record.get("weights_sha256") else None
