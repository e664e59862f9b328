"""``hg.pl.predictability``: how well each gene is predicted where it was held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.elements import is_object
from .._core.genes import find_genes, symbols_in
from .._core.keys import Keys
from .._core.predictions import predicting_model, symbols_of
from .._core.results import find_result
from .._core.spots import get_table
from ._canvas import axes_for, finish

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

    from ..models import HE2Gene

_COLOURS = {True: "#1f77b4", False: "#b0b0b0"}
_NEW_PATIENT = "#9467bd"
#: More labels do not fit beside each other.
_MAX_LABELS = 40
_FONT_SIZE = 7
#: Intervals of more labelled genes would hide the plot.
_MAX_BARS = 12
#: Above so many genes their points are drawn faint.
_MANY = 500
#: Running medians are taken over the ranks between one by this and times this.
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
    """Rank the genes by their held-out Pearson correlation, with its interval and the noise ceiling.

    With ``key`` the correlations are those of :func:`he2gene_sc.tl.evaluate` on the object, of a layer of any model.

    Parameters
    ----------
    model
        A model, its name or folder; or an object or table that :func:`he2gene_sc.tl.predict` wrote to by a bundled
        model, whose predicted genes are shown.
    genes
        Genes to label, or so many of the best; at most 40.
    key
        ``key_added`` of :func:`he2gene_sc.tl.evaluate`. Points are then means over the sections of the object, and the band goes
        from the lowest section to the highest.
    gene_symbols
        As given to predict; default: what it recorded.
    prediction_key
        ``key_added`` of predict.
    table_key
        As given to predict.
    ax
        Axes to draw in.
    save
        File to write the figure to.
    figsize, title, show, return_fig
        As in :func:`he2gene_sc.pl.spatial`.

    Returns
    -------
    matplotlib.axes.Axes
        Points are genes, best first on a logarithmic axis of ranks, the reliable ones in blue. The band is the 95 %
        interval of each gene's mean over what the legend says: held-out sections of known patients, or held-out
        patients. Of more than 500 genes it is the running median of its ends, and up to 12 labelled genes have their own. Where the model has them, the purple points are the correlations with whole patients held out. Lines
        are running medians over the genes between 0.8 and 1.25 times a rank: of those points, purple, and of the noise
        ceiling, orange: no prediction can correlate better with counts this shallow.

    Raises
    ------
    ValueError
        If the model has no held-out figures, a gene to label is none of its own, or there are too many.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> ax = hg.pl.predictability(genes=["ERBB2", "CD24"])
    """
    validate.arguments(predictability, locals())
    if key is None:
        table, rule = _genes_of(model, prediction_key, table_key, gene_symbols)
        band_of, of = f"95 % interval over {_unit(rule)}", "held-out Pearson correlation"
    else:
        table, rule, of = _genes_evaluated(model, key, table_key, gene_symbols)
        band_of = rule
    if table["pcc"].isna().all():
        what = "`model` has no held-out figures" if key is None else f"`key` {key!r} has no correlation of any gene"
        raise ValueError(f"{what}: nothing is known of how well it predicts any gene")
    table = table.dropna(subset="pcc").sort_values("pcc", ascending=False, kind="stable")
    chosen = _chosen(table, genes)
    (ax,) = axes_for(1, ax, ncols=1, panel=6.0, figsize=figsize, title=title, save=save)
    rank = np.arange(1, len(table) + 1)
    if {"pcc_low", "pcc_high"} <= set(table.columns) and table["pcc_high"].notna().any():
        low, high = table["pcc_low"], table["pcc_high"]
        # Of many genes the ends of each would be noise.
        band = (rank, low, high) if len(table) <= _MANY else (*_running(low), _running(high)[1])
        ax.fill_between(*band, color="#dfe6ee", lw=0, label=band_of)
        at = table.index.get_indexer(chosen if len(chosen) <= _MAX_BARS else [])
        gap = np.full(len(at), np.nan)
        bars = np.stack([low.iloc[at], high.iloc[at], gap], 1).ravel()
        ax.plot(np.repeat(at + 1.0, 3), bars, color="#8fa3b8", lw=1, zorder=2)
    if "pcc_new_patient" in table and table["pcc_new_patient"].notna().any():
        faint: dict[str, Any] = {"s": 2, "alpha": 0.2} if len(table) > _MANY else {"s": 8, "alpha": 0.7}
        ax.scatter(rank, table["pcc_new_patient"], lw=0, color=_NEW_PATIENT, zorder=2, rasterized=True, **faint)
        ax.plot(*_running(table["pcc_new_patient"]), color=_NEW_PATIENT, label=_new_patients(rule), zorder=4)
    for reliable, name in ((False, "not reliable"), (True, "reliable")) if key is None else ((True, "genes"),):
        here = table["reliable"].to_numpy(bool) == reliable
        ax.scatter(
            rank[here], table["pcc"][here], s=7, color=_COLOURS[reliable], label=f"{name} ({here.sum():,})", zorder=3
        )
    if "ceiling" in table and table["ceiling"].notna().any():
        ax.plot(*_running(table["ceiling"]), color="#ff7f0e", label="noise ceiling", zorder=3)
    ax.axhline(0, color="k", lw=0.5)
    ax.set_xscale("log")
    ax.set_xlim(0.8, 1.3 * len(table))
    ax.set_xlabel("genes, best predicted first (rank)")
    ax.set_ylabel(of)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    _label(ax, table, chosen)
    return finish([ax], save, title, show, return_fig)


def _chosen(table: pd.DataFrame, genes: Any) -> list[str]:
    """Genes to label, best first."""
    is_number = validate.is_whole(genes)
    if (is_number and genes < 0) or not (is_number or np.iterable(genes)):
        raise ValueError(f"`genes` is {genes!r}; names of genes, or a number of them from 0, are needed")
    if is_number:
        asked = list(table.index[:genes])
    else:
        asked = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    found = find_genes(asked, table.index, one_to_one=False)
    if "symbol" in table:
        found = np.where(found >= 0, found, find_genes(asked, table["symbol"], one_to_one=False))
    if unknown := [gene for gene, place in zip(asked, found, strict=True) if place < 0]:
        raise ValueError(f"`genes` {unknown[:5]} have no held-out figure in this model, or were not evaluated")
    asked = list(table.index[found])
    if len(asked) > _MAX_LABELS:
        raise ValueError(f"`genes`: {len(asked):,} labels do not fit, at most {_MAX_LABELS} do")
    return list(table.index[table.index.isin(asked)])


def _label(ax: Axes, table: pd.DataFrame, chosen: Sequence[str]) -> None:
    """Ring the chosen genes and write their names in a column on the right, with a line to each."""
    from sklearn.isotonic import isotonic_regression

    if not chosen:
        return
    x, y = 1.0 + table.index.get_indexer(chosen), table.loc[list(chosen), "pcc"].to_numpy(float)
    ax.scatter(x, y, s=30, facecolors="none", edgecolors="k", lw=0.8, zorder=5)
    left, right = ax.get_xlim()
    low, high = ax.get_ylim()
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    step = min(1.5 * _FONT_SIZE / height, 1 / len(chosen)) * (high - low)
    # Names stand as near as can be to the height of their points, a line apart, and inside the axes.
    order = step * np.arange(len(chosen))
    at = np.clip(isotonic_regression(y + order, increasing=False), low + order[-1] + step / 2, high - step / 2) - order
    for name, point, place in zip(chosen, zip(x, y, strict=True), at, strict=True):
        ax.annotate(
            name,
            point,
            xytext=(0.98, place),
            textcoords=("axes fraction", "data"),
            fontsize=_FONT_SIZE,
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#b8b8b8", "lw": 0.4, "shrinkA": 1, "shrinkB": 3, "zorder": 1.5},
            zorder=5,
        )
    # The share of the axis that the longest name takes.
    width = ax.get_window_extent().width * 72 / ax.figure.dpi
    share = min(0.7 * _FONT_SIZE * max(map(len, chosen)) / width, 0.5)
    ax.set_xlim(left, right * (right / left) ** ((0.04 + share) / (1 - share)))
    ax.set_ylim(low, high)


def _running(values: pd.Series) -> tuple[np.ndarray, list[float]]:
    """Ranks, evenly spaced on the axis, and the medians around them."""
    ranks = np.unique(np.geomspace(1, len(values), 200).round().astype(int))
    return ranks, [values.iloc[int(np.ceil(r / _WINDOW)) - 1 : int(r * _WINDOW)].median() for r in ranks]


def _unit(rule: str) -> str:
    """Name the groups that the bounds are taken over, as the card states them where it says what is reliable."""
    found = re.search(r"t over the (\d+) (patients|sections), held out", rule)
    if found is None:
        return "what was held out"
    return f"{found[1]} held-out " + ("patients" if found[2] == "patients" else "sections of known patients")


def _new_patients(rule: str) -> str:
    found = re.search(r"the (\d+) patients, held out whole", rule)
    return f"mean over {found[1]} patients held out whole" if found else "patients held out whole"


def _genes_of(
    model: object, prediction_key: str, table_key: str | None, gene_symbols: str | None
) -> tuple[pd.DataFrame, str]:
    """Gene table of a model, and what it calls reliable; of an object, the rows that were predicted, as named there."""
    from ..models import HE2Gene, load

    if isinstance(model, HE2Gene | str | Path):
        found = load(model)
        return found.genes, found.card.reliable_rule
    from .._core.model_genes import match_genes

    table = get_table(model, table_key, prediction_key=prediction_key)
    keys = Keys(prediction_key)
    if keys.predicted not in table.var:
        raise ValueError(
            f"`model` holds no prediction {prediction_key!r}; run hg.tl.predict first, or, with the layer of another model, "
            "hg.tl.evaluate(data, layer=...), and pass key='he2gene_eval'"
        )
    record = table.uns[keys.uns]
    found = predicting_model(record, None)
    wanted = match_genes(found, table, None, symbols_of(table, record, gene_symbols))
    genes = found.genes.iloc[wanted.positions]
    genes = genes.assign(symbol=genes.index).set_axis(table.var_names[wanted.columns], axis=0)
    return genes[table.var[keys.predicted].to_numpy(bool)[wanted.columns]], found.card.reliable_rule


def _genes_evaluated(
    data: Any, key: str, table_key: str | None, gene_symbols: str | None
) -> tuple[pd.DataFrame, str, str]:
    """Correlations of an evaluation, what their ends are of, and the layer."""
    if not is_object(data):
        raise ValueError("`key` names an evaluation of hg.tl.evaluate; pass the object that has it as `model`")
    found = find_result(data, "evaluate", key, table_key)["genes"]
    sections = found[found["scope"] == "section"].groupby("gene", observed=True)["pearson"]
    mean = found[found["scope"] == "mean"].set_index("gene")
    table = pd.DataFrame({"pcc": mean["pearson"], "ceiling": mean.get("ceiling_high", mean["ceiling"])})
    n = found.loc[found["scope"] == "section", "section"].nunique()
    if n > 1:
        table = table.assign(pcc_low=sections.min(), pcc_high=sections.max())
    layer = found["predictor"].iloc[0]
    table.index = pd.Index(table.index.astype(str))
    if gene_symbols is not None:
        source = get_table(data, table_key)
        names = pd.Series(symbols_in(source, gene_symbols), index=source.var_names.astype(str))
        table["symbol"] = names[~names.index.duplicated()].reindex(table.index).to_numpy(object)
    return (
        table.assign(reliable=True),
        f"lowest to highest of {n} sections",
        f"Pearson correlation, {layer} with measured",
    )
