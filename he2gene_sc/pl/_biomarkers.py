"""``hg.pl.biomarkers``: results of ``hg.tl.biomarkers`` as volcano plots or as dot plot over patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .._core import validate
from .._core.results import find_results
from ..get._results import biomarkers as get_biomarkers
from ..get._results import genes_of_result
from ._canvas import axes_for, finish, name_points

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_ABOVE, _BELOW, _NEITHER = "#b2182b", "#2166ac", "#bdbdbd"


def biomarkers(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    group: str | Sequence[str] | None = None,
    *,
    kind: Literal["volcano", "dot"] = "volcano",
    genes: str | Sequence[str] | None = None,
    n_genes: int = 10,
    fdr: float = 0.05,
    key: str = "he2gene_biomarkers",
    table_key: str | None = None,
    ncols: int = 3,
    figsize: Sequence[float] | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | list[Axes] | Figure | None:
    """Draw the results of biomarker tests.

    Parameters
    ----------
    data
        Object, table or several, as given to :func:`he2gene_sc.tl.biomarkers`.
    group
        Group or groups; default: all.
    kind
        ``"volcano"``: effect against p-value, one panel per group. ``"dot"``: the difference of a gene to the reference in every
        group and patient; the size of a dot is the number of spots of the group in the patient. An effect of only one patient is
        visible as a single dark dot.
    genes
        Genes to label (volcano) or to show (dot). Default: the ``n_genes`` with the highest and the ``n_genes`` with the lowest
        scores in each group; for the volcano only significant genes.
    n_genes
        See ``genes``.
    fdr
        Adjusted p-value below which a gene is coloured.
    key, table_key
        As given to :func:`he2gene_sc.get.biomarkers`.
    ncols
        Number of volcano plots in a row.
    ax
        Axes to draw in: one per group for volcano plots, one for the dot plot.
    figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes or list of them

    Raises
    ------
    ValueError
        If the result, a group or a gene does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((6, 6), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    >>> result = hg.tl.biomarkers(slides, "pathologist", layer=None)
    >>> len(hg.pl.biomarkers(slides))
    3
    """
    validate.arguments(biomarkers, locals())
    validate.one_of(kind, ("volcano", "dot"), "kind")
    table = find_results(data, "biomarkers", key, table_key)[0]
    record, frame = table.uns[key], get_biomarkers(table, group, key=key)
    named = None
    if genes is not None:
        named = genes_of_result(table, validate.names(genes, "genes", one=True), frame["names"], "tested")
    reference = str(record["params"]["reference"])
    parts = dict(iter(frame.groupby("group", sort=False, observed=True)))
    if kind == "dot":
        panels = axes_for(1, ax, 1, figsize, title, save, panel=6.0)
        if named is None:
            named = list(dict.fromkeys(name for part in parts.values() for name in _extremes(part, n_genes)))
        _dots(panels[0], record, list(parts), named, reference)
    else:
        panels = axes_for(len(parts), ax, ncols, figsize, title, save)
        for (name, part), panel in zip(parts.items(), panels, strict=True):
            _volcano(panel, part, name, reference, named, n_genes, fdr)
    return finish(panels, save, title, show, return_fig)


def _volcano(
    ax: Axes, part: pd.DataFrame, group: str, reference: str, named: list[str] | None, n_genes: int, fdr: float
) -> None:
    part = part.dropna(subset=["pvals"])
    height = -np.log10(part["pvals"].clip(lower=1e-300))
    passed = part["pvals_adj"] < fdr
    colours = np.where(passed, np.where(part["effect_size"] > 0, _ABOVE, _BELOW), _NEITHER)
    ax.scatter(part["effect_size"], height, c=colours, s=8, linewidths=0, rasterized=len(part) > 2000)
    if passed.any():
        ax.axhline(height[passed].min(), color="0.5", linewidth=0.8, linestyle=":")
    labelled = part["names"].isin(_extremes(part[passed], n_genes) if named is None else named)
    _label(ax, part["effect_size"], height, part[labelled])
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel=f"difference to {reference} (ln)", ylabel="-log10 p")
    marks = [part["method"].iloc[0]] + ["circular"] * bool(part["circular"].any()) if len(part) else []
    ax.set_title(f"{group}\n{', '.join(marks)}: {int(passed.sum())} of {len(part)} at FDR {fdr:g}", fontsize=10)


def _label(ax: Axes, x: pd.Series, y: pd.Series, labelled: pd.DataFrame) -> None:
    """Write gene names in two columns at the sides."""
    limit = 1.9 * max(float(x.abs().max()), 1e-9) if len(x) else 1.0
    top = 1.08 * max(float(y.max()), 1e-9) if len(y) else 1.0
    ax.set(xlim=(-limit, limit), ylim=(0, top))
    for place, part in ((0.98, labelled[labelled["effect_size"] > 0]), (0.02, labelled[labelled["effect_size"] <= 0])):
        order = y[part.index].sort_values(ascending=False, kind="stable").index
        step = top * min(0.05, 0.96 / max(len(order), 1))
        name_points(ax, part.loc[order, "names"].tolist(), np.column_stack([x[order], y[order]]), place, step)


def _extremes(part: pd.DataFrame, n: int) -> list[str]:
    """Return the genes with the highest and with the lowest scores."""
    return [*part.loc[part["scores"] > 0, "names"].head(n), *part.loc[part["scores"] < 0, "names"].tail(n)]


def _dots(ax: Axes, record: Mapping[str, Any], groups: list[str], genes: list[str], reference: str) -> None:
    """Draw the effect of each gene in each group and patient as a dot."""
    from matplotlib.colors import TwoSlopeNorm

    rows = pd.DataFrame(record["samples"])
    effects = pd.DataFrame(np.asarray(record["sample_effects"]), columns=np.asarray(record["genes"], object))
    block = pd.Index(groups).get_indexer(rows["group"])
    order = np.argsort(block, kind="stable")[(block < 0).sum() :]  # -1 are other groups
    rows, block, values = rows.iloc[order], block[order], effects.reindex(columns=genes).to_numpy()[order]
    # Write the name of a group once, in a separate line above its patients.
    lines = np.arange(len(rows)) + block + 1
    row, column = np.nonzero(np.isfinite(values))
    drawn, spots = values[row, column], rows["n_spots"].to_numpy(float)
    limit = float(np.abs(drawn).max(initial=0)) or 1.0
    area = 15 + 135 * spots / spots.max()
    style: dict[str, Any] = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(0, -limit, limit), "edgecolors": "0.6"}
    dots = ax.scatter(column, lines[row], c=drawn, s=area[row], linewidths=0.3, **style)
    for i, group in enumerate(groups):
        if (block == i).any():
            head = lines[block == i].min() - 1
            ax.text(-0.5, head, group, va="center", ha="left", fontsize=9, fontweight="bold")
    ax.set_xticks(range(len(genes)), genes, rotation=90, fontsize=8)
    ax.set_yticks(lines, rows["sample"].tolist(), fontsize=8)
    ax.set(xlim=(-0.7, len(genes) - 0.3), ylim=(lines.max() + 0.7, -0.7))
    ax.figure.colorbar(dots, ax=ax, shrink=0.6, pad=0.02, anchor=(0, 1)).set_label(f"difference to {reference} (ln)")
    for count in sorted({int(spots.min()), int(spots.max())}):
        ax.scatter([], [], s=15 + 135 * count / spots.max(), c="0.6", label=f"{count} spots")
    ax.legend(loc="lower left", bbox_to_anchor=(1.01, 0), frameon=False, fontsize=8)
