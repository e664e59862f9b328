"""``hg.pl.predictability``: held-out accuracy of each gene."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.elements import is_object
from .._core.genes import find_genes, match_genes, symbols_in
from .._core.keys import Keys
from .._core.predictions import IF_NONE_RELIABLE, gene_flags, predicting_model, symbols_of
from .._core.results import find_result
from .._core.spots import get_table
from ._canvas import NAME_SIZE, axes_for, finish, name_points

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

    from ..models import HE2Gene

_COLOURS = {True: "#1f77b4", False: "#b0b0b0"}
_NEW_PATIENT = "#9467bd"
#: Units of the interval in the legend, by their name in the rule for reliable genes on the card.
_UNITS = {"patients": "patients", "sections": "sections of known patients"}
#: Maximum number of labels that fit.
_MAX_LABELS = 40
#: Maximum number of labelled genes with intervals; more would hide the plot.
_MAX_BARS = 12
#: With more genes, their points are drawn faint.
_MANY = 500
#: Running medians are over the ranks from rank / _WINDOW to rank * _WINDOW.
_WINDOW = 1.25


def predictability(
    model: HE2Gene | str | Path | SpatialData | AnnData = "breast-her2st",
    *,
    genes: str | Sequence[str] | int = 10,
    key: str | None = None,
    gene_symbols: str | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    figsize: Sequence[float] | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Plot genes ranked by held-out Pearson correlation, with its interval and the noise ceiling.

    With ``key``, the correlations are from :func:`he2gene_sc.tl.evaluate` on the object, for a layer of any model.

    Parameters
    ----------
    model
        Model, its name or folder; or an object or table with a prediction of a bundled model by :func:`he2gene_sc.tl.predict`, to
        show its predicted genes.
    genes
        Genes to label, or the number of best genes to label; at most 40.
    key
        ``key_added`` of :func:`he2gene_sc.tl.evaluate`. Then points are means over the sections of the object, and the band is from
        the lowest to the highest section.
    gene_symbols
        As given to predict. Default: the recorded value.
    ax
        Axes to draw in.
    prediction_key, table_key, figsize, title, save, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes
        Points are genes, best first on a logarithmic axis of ranks; reliable genes are blue. The band is the 95 % interval of the
        mean of each gene over the units in the legend: held-out sections of known patients, or held-out patients. With more than
        500 genes, the band is the running median of the ends, and up to 12 labelled genes have their own interval. Purple points are
        correlations with held-out patients, if the model has them. Lines are running medians over genes between 0.8 and 1.25 times
        a rank: of the purple points (purple), and of the noise ceiling (orange), the highest possible correlation at this depth.

    Raises
    ------
    ValueError
        If the model has no held-out metrics, a gene to label is not in the model, or there are too many genes to label.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> ax = hg.pl.predictability(genes=["ERBB2", "CD24"])
    """
    validate.arguments(predictability, locals())
    if key is None:
        table, rule = _model_genes(model, prediction_key, table_key, gene_symbols)
        unit = re.search(r"t over the (\d+) (patients|sections), held out", rule)
        over = f"{unit[1]} held-out {_UNITS[unit[2]]}" if unit else "what was held out"
        band_label, y_label = f"95 % interval over {over}", "held-out Pearson correlation"
    else:
        table, band_label, y_label = _evaluated_genes(model, key, table_key, gene_symbols)
        rule = ""
    if table["pcc"].isna().all():
        what = "`model` has no held-out metrics" if key is None else f"`key` {key!r} has no correlation of any gene"
        raise ValueError(f"{what}, so the accuracy of its genes is unknown; pass another one")
    table = table.dropna(subset="pcc").sort_values("pcc", ascending=False, kind="stable")
    chosen = _chosen(table, genes)
    (ax,) = axes_for(1, ax, 1, figsize, title, save, panel=6.0)
    rank = np.arange(1, len(table) + 1)
    if {"pcc_low", "pcc_high"} <= set(table.columns) and table["pcc_high"].notna().any():
        low, high = table["pcc_low"], table["pcc_high"]
        # With many genes, the ends of each gene are too noisy to draw.
        band = (rank, low, high) if len(table) <= _MANY else (*_running(low), _running(high)[1])
        ax.fill_between(*band, color="#dfe6ee", lw=0, label=band_label)
        rows = table.index.get_indexer(chosen if len(chosen) <= _MAX_BARS else [])
        gap = np.full(len(rows), np.nan)
        bars = np.stack([low.iloc[rows], high.iloc[rows], gap], 1).ravel()
        ax.plot(np.repeat(rows + 1.0, 3), bars, color="#8fa3b8", lw=1, zorder=2)
    if "pcc_new_patient" in table and table["pcc_new_patient"].notna().any():
        size, alpha = (2, 0.2) if len(table) > _MANY else (8, 0.7)
        style: dict[str, Any] = {"lw": 0, "color": _NEW_PATIENT, "zorder": 2, "rasterized": True}
        ax.scatter(rank, table["pcc_new_patient"], s=size, alpha=alpha, **style)
        n_patients = re.search(r"the (\d+) patients, held out whole", rule)
        label = f"mean over {n_patients[1]} held-out patients" if n_patients else "held-out patients"
        ax.plot(*_running(table["pcc_new_patient"]), color=_NEW_PATIENT, label=label, zorder=4)
    for reliable, name in ((False, "not reliable"), (True, "reliable")) if key is None else ((True, "genes"),):
        mask = table["reliable"].to_numpy(bool) == reliable
        label = f"{name} ({mask.sum():,})"
        ax.scatter(rank[mask], table["pcc"][mask], s=7, color=_COLOURS[reliable], label=label, zorder=3)
    if "ceiling" in table and table["ceiling"].notna().any():
        ax.plot(*_running(table["ceiling"]), color="#ff7f0e", label="noise ceiling", zorder=3)
    ax.axhline(0, color="k", lw=0.5)
    ax.set(xscale="log", xlim=(0.8, 1.3 * len(table)), xlabel="genes, best predicted first (rank)", ylabel=y_label)
    legend = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2, "frameon": False, "fontsize": 8}
    if key is None and not table["reliable"].any():
        hint = textwrap.fill(f"No gene is reliable. You can {IF_NONE_RELIABLE}.", 80)
        legend |= {"title": hint, "title_fontsize": 8}
    ax.legend(**legend)
    _label(ax, table, chosen)
    return finish([ax], save, title, show, return_fig)


def _chosen(table: pd.DataFrame, genes: Any) -> list[str]:
    """Return the genes to label, best first."""
    if validate.is_whole(genes) and genes >= 0:
        wanted = list(table.index[:genes])
    elif np.iterable(genes):
        wanted = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    else:
        raise ValueError(f"`genes` is {genes!r}; names of genes, or a number of genes from 0, are needed")
    positions = find_genes(wanted, table.index, one_to_one=False)
    if "symbol" in table:
        positions = np.where(positions >= 0, positions, find_genes(wanted, table["symbol"], one_to_one=False))
    if unknown := [gene for gene, position in zip(wanted, positions, strict=True) if position < 0]:
        raise ValueError(f"`genes` {unknown[:5]} have no held-out correlation in this model, or were not evaluated")
    wanted = list(table.index[positions])
    if len(wanted) > _MAX_LABELS:
        raise ValueError(f"`genes`: {len(wanted):,} labels do not fit; pass at most {_MAX_LABELS} genes")
    return list(table.index[table.index.isin(wanted)])


def _label(ax: Axes, table: pd.DataFrame, chosen: Sequence[str]) -> None:
    """Circle the chosen genes and write their names in a column on the right."""
    if not chosen:
        return
    x, y = 1.0 + table.index.get_indexer(chosen), table.loc[list(chosen), "pcc"].to_numpy(float)
    ax.scatter(x, y, s=30, facecolors="none", edgecolors="k", lw=0.8, zorder=5)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    width, height = (size * 72 / ax.figure.dpi for size in ax.get_window_extent().size)
    step = min(1.5 * NAME_SIZE / height, 1 / len(chosen)) * (high - low)
    name_points(ax, chosen, np.column_stack([x, y]), 0.98, step)
    # The share of the axis that the longest name takes.
    share = min(0.7 * NAME_SIZE * max(map(len, chosen)) / width, 0.5)
    ax.set(xlim=(left, right * (right / left) ** ((0.04 + share) / (1 - share))), ylim=(low, high))


def _running(values: pd.Series) -> tuple[np.ndarray, list[float]]:
    """Return ranks, evenly spaced on the axis, and the running medians at them."""
    ranks = np.unique(np.geomspace(1, len(values), 200).round().astype(int))
    return ranks, [values.iloc[int(np.ceil(r / _WINDOW)) - 1 : int(r * _WINDOW)].median() for r in ranks]


def _model_genes(
    model: object, prediction_key: str, table_key: str | None, gene_symbols: str | None
) -> tuple[pd.DataFrame, str]:
    """Return the gene table of a model and its rule for reliable genes; for an object, only the predicted genes."""
    from ..models import HE2Gene, load

    if isinstance(model, HE2Gene | str | Path):
        loaded = load(model)
        return loaded.genes, loaded.card.reliable_rule
    table = get_table(model, table_key, prediction_key=prediction_key)
    keys = Keys(prediction_key)
    if keys.predicted not in table.var:
        raise ValueError(
            f"`model` holds no prediction {prediction_key!r}; run hg.tl.predict first. For a layer of another model, run "
            "hg.tl.evaluate(data, layer=...) and pass key='he2gene_eval'"
        )
    record = table.uns[keys.uns]
    loaded = predicting_model(record, None)
    matched = match_genes(loaded, table, None, symbols_of(table, record, gene_symbols))
    genes = loaded.genes.iloc[matched.positions]
    genes = genes.assign(symbol=genes.index).set_axis(table.var_names[matched.columns], axis=0)
    return genes[gene_flags(table, keys.predicted)[matched.columns]], loaded.card.reliable_rule


def _evaluated_genes(
    data: Any, key: str, table_key: str | None, gene_symbols: str | None
) -> tuple[pd.DataFrame, str, str]:
    """Return the correlations of an evaluation, the label of the band, and the label of the axis."""
    if not is_object(data):
        raise ValueError("`key` names an evaluation of hg.tl.evaluate; pass the object that has it as `model`")
    genes = find_result(data, "evaluate", key, table_key)["genes"]
    sections = genes[genes["scope"] == "section"].groupby("gene", observed=True)["pearson"]
    mean = genes[genes["scope"] == "mean"].set_index("gene")
    table = pd.DataFrame({"pcc": mean["pearson"], "ceiling": mean.get("ceiling_high", mean["ceiling"])})
    n = genes.loc[genes["scope"] == "section", "section"].nunique()
    if n > 1:
        table = table.assign(pcc_low=sections.min(), pcc_high=sections.max())
    table.index = pd.Index(table.index.astype(str))
    if gene_symbols is not None:
        source = get_table(data, table_key)
        names = pd.Series(symbols_in(source, gene_symbols), index=source.var_names.astype(str))
        table["symbol"] = names[~names.index.duplicated()].reindex(table.index).to_numpy(object)
    y_label = f"Pearson correlation, {genes['predictor'].iloc[0]} with measured"
    return table.assign(reliable=True), f"lowest to highest of {n} sections", y_label
