"""``hg.pl.predictability``: how well each gene is predicted where it was held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._keys import Keys
from .._predicted import predicted_by
from .._tables import get_table
from ._canvas import axes_for, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from ..models import HE2Gene

_COLOURS = {True: "#1f77b4", False: "#b0b0b0"}


def predictability(
    model: HE2Gene | str | Path | SpatialData | AnnData = "breast-her2st",
    *,
    genes: Sequence[str] | int = 10,
    key_added: str = "he2gene",
    table_key: str | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Rank the genes by their held-out Pearson correlation, with its interval and the noise ceiling.

    Parameters
    ----------
    model
        A model, its name or folder; or an object or table that :func:`he2gene_sc.tl.predict` wrote to by a bundled
        model, whose predicted genes are shown.
    genes
        Genes to label, or so many of the best.
    key_added, table_key
        As given to predict.
    ax
        Axes to draw in.
    save
        File to write the figure to.

    Returns
    -------
    matplotlib.axes.Axes
        Points are genes, best first, the reliable ones in blue; the band is the 95 % interval over held-out sections or
        patients, the orange line the noise ceiling (running median over 101 genes): no prediction can correlate better
        with counts this shallow.

    Raises
    ------
    ValueError
        If the model has no held-out figures, or a gene to label is none of its own.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> ax = hg.pl.predictability(genes=["ERBB2", "CD24"])
    """
    table = _genes_of(model, key_added, table_key)
    if table["pcc"].isna().all():
        raise ValueError("`model` has no held-out figures: nothing is known of how well it predicts any gene")
    table = table.dropna(subset="pcc").sort_values("pcc", ascending=False, kind="stable")
    if isinstance(genes, str):
        genes = [genes]
    chosen = list(table.index[:genes]) if isinstance(genes, int | np.integer) else list(genes)
    unknown = [gene for gene in chosen if gene not in table.index]
    if unknown:
        raise ValueError(f"`genes` {unknown[:5]} have no held-out figure in this model")
    (ax,) = axes_for(1, ax, ncols=1, panel=5.0)
    rank = np.arange(1, len(table) + 1)
    if {"pcc_low", "pcc_high"} <= set(table.columns) and table["pcc_high"].notna().any():
        ax.fill_between(
            rank, table["pcc_low"], table["pcc_high"], color="#cfd8e3", lw=0, label="95 % interval", zorder=1
        )
    for reliable, name in ((False, "not reliable"), (True, "reliable")):
        here = table["reliable"].to_numpy(bool) == reliable
        ax.scatter(
            rank[here], table["pcc"][here], s=4, color=_COLOURS[reliable], label=f"{name} ({here.sum():,})", zorder=2
        )
    if "ceiling" in table and table["ceiling"].notna().any():
        smooth = table["ceiling"].rolling(101, center=True, min_periods=1).median()
        ax.plot(rank, smooth, color="#ff7f0e", label="noise ceiling", zorder=3)
    for gene in chosen:
        ax.annotate(
            gene,
            (rank[table.index.get_loc(gene)], table.at[gene, "pcc"]),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
            zorder=4,
        )
    ax.axhline(0, color="k", lw=0.5)
    ax.set_xlabel("genes, best predicted first")
    ax.set_ylabel("held-out Pearson correlation")
    ax.legend(frameon=False, fontsize=8)
    return finish([ax], save)


def _genes_of(model: object, key_added: str, table_key: str | None) -> pd.DataFrame:
    """Gene table of a model; of an object, the rows that were predicted in it, under the names they have there."""
    from ..models import HE2Gene, load

    if isinstance(model, HE2Gene | str | Path):
        return load(model).genes
    from .._genes import match_genes

    table = get_table(model, table_key, key_added=key_added)
    keys = Keys(key_added)
    if keys.predicted not in table.var:
        raise ValueError(f"`model` holds no prediction {key_added!r}; run hg.tl.predict first")
    found = predicted_by(table.uns[keys.uns], None)
    wanted = match_genes(found, table, None, None)
    genes = found.genes.iloc[wanted.positions].set_axis(table.var_names[wanted.columns], axis=0)
    return genes[table.var[keys.predicted].to_numpy(bool)[wanted.columns]]
