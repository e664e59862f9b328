"""``hg.pl.concordance``: effects in predicted against measured expression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .._core import validate
from .._core.results import find_results
from ..get._results import concordance as get_concordance
from ..get._results import genes_of_result
from ._canvas import axes_for, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData


def concordance(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    group: str | Sequence[str] | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    key: str = "he2gene_concordance",
    table_key: str | None = None,
    ncols: int = 3,
    figsize: Sequence[float] | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw the effect of each gene in predicted against measured expression, one panel per group.

    Parameters
    ----------
    data
        Object, table or several, as given to :func:`he2gene_sc.tl.concordance`.
    group
        Group or groups; default: all.
    genes
        Genes to label.
    key, table_key
        As given to :func:`he2gene_sc.get.concordance`.
    ncols
        Panels in a row.
    ax
        Axes to draw in, one per group.
    figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        Reliable genes are drawn dark over the others; the title states the Spearman correlation of both sets.

    Raises
    ------
    ValueError
        If the result, a group or a gene does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((5, 5), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> result = hg.tl.concordance(slides, "pathologist", groups="tumour")
    >>> ax = hg.pl.concordance(slides, "tumour")
    """
    validate.arguments(concordance, locals())
    table = find_results(data, "concordance", key, table_key)[0]
    frame, scores = (get_concordance(table, by_gene=by_gene, key=key) for by_gene in (True, False))
    if "predictor" in scores:
        scores = scores[scores["predictor"] == scores["predictor"].iloc[0]]
    groups = list(dict.fromkeys(frame["group"]))
    wanted = groups if group is None else validate.names(group, "group", least=1, one=True)
    validate.all_in(wanted, groups, "group", "was not compared")
    given = [] if genes is None else validate.names(genes, "genes", one=True)
    named = genes_of_result(table, given, frame["names"], "compared")
    panels = axes_for(len(wanted), ax, ncols, figsize, title, save)
    for name, panel in zip(wanted, panels, strict=True):
        _panel(panel, frame[frame["group"] == name], scores[scores["group"] == name], name, named)
    return finish(panels, save, title, show, return_fig)


def _panel(ax: Axes, part: pd.DataFrame, scores: pd.DataFrame, group: str, named: Sequence[str]) -> None:
    reliable = part["reliable"].astype(bool)
    for chosen, colour, label in ((~reliable, "#bdbdbd", "not reliable"), (reliable, "#1b5e9b", "reliable")):
        genes = part[chosen]
        style: dict[str, Any] = {"s": 8, "c": colour, "linewidths": 0, "rasterized": len(genes) > 2000}
        x, y = genes["effect_size_measured"], genes["effect_size_predicted"]
        ax.scatter(x, y, label=f"{label} ({len(genes)})", **style)
    for _, row in part[part["names"].isin(named)].iterrows():
        point = (row["effect_size_measured"], row["effect_size_predicted"])
        ax.annotate(row["names"], point, xytext=(3, 2), textcoords="offset points", fontsize=7)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="measured difference (ln)", ylabel="predicted difference (ln)")
    spearman = ", ".join(f"{row['genes']} {row['spearman']:.2f}" for _, row in scores.iterrows())
    circular = ", circular" if scores["circular"].any() else ""
    ax.set_title(f"{group}{circular}\nSpearman: {spearman}", fontsize=10)
    ax.legend(frameon=False, fontsize=7)
