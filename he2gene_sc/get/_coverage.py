"""``hg.get.coverage``: coverage of intervals on measured spots, by detection of the gene and depth of the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import SCALES, Scale
from .._core.keys import Keys
from .._core.matrix import dense, matrix_of
from .._core.predictions import prediction_of
from .._core.results import find_results

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Groups of genes: share of measured spots that detect them, above the first and up to the second number.
_DETECTED = {"all": (-1, 1), "half or more": (np.nextafter(0.5, 0), 1)} | {
    f"{low:.0%} to {high:.0%}": (low, high)
    for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1))
}
_DEPTHS = ("shallowest third", "middle third", "deepest third")


def coverage(
    data: SpatialData | AnnData,
    *,
    layer: str = "he2gene",
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    gene_symbols: str | None = None,
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the coverage of intervals on measured spots, by detection of the gene and depth of the spot.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.intervals` wrote to, with measured counts.
    layer, layer_scale
        Layer that has the intervals, and its scale if another model predicted it.
    measured, measured_scale, gene_symbols
        Measured expression, as in :func:`he2gene_sc.tl.evaluate`.
    table_key
        Table, if several have intervals.

    Returns
    -------
    pandas.DataFrame
        One row per group of genes (``detected``: by the share of these spots that detect them) and group of spots (``depth``:
        thirds by total counts; only ``"all"`` if logarithms were measured), with ``n_genes``, ``n_spots``, ``coverage``, and
        ``coverage_expressing``: the coverage of spots that express the gene, far lower for genes that few spots detect. Spots
        that an adapted layer was fitted on, and sections with fewer than ten spots, are left out.

    Raises
    ------
    ValueError
        If there are no intervals, only their widths were kept, or no spot was measured.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.intervals(sdata)
    >>> frame = hg.get.coverage(sdata)
    >>> frame.loc[frame["detected"].eq("half or more") & frame["depth"].eq("all"), "coverage"].between(0, 1).item()
    True
    """
    validate.arguments(coverage, locals())
    from ..tl._evaluate.aligned import align_expression

    (table,) = find_results(data, "intervals", f"{layer}_intervals", table_key)
    ends = [f"{layer}_lower", f"{layer}_upper"]
    if lacking := [end for end in ends if end not in table.layers]:
        raise ValueError(
            f"`layer` {layer!r}: `data` has no layers {lacking}, because hg.tl.intervals does not write them above "
            "hg.settings.memory_limit; raise the limit, or subset the genes, and run hg.tl.intervals again"
        )
    # Intervals of a calibration record no prediction_key.
    ours = table.uns[f"{layer}_intervals"]["params"].get("prediction_key") or prediction_of(table, layer)
    scale = validate.one_of(layer_scale, SCALES, "layer_scale") if ours is None else None
    keys = Keys(ours or "he2gene")
    aligned = align_expression(
        data, table, keys, layer, measured, measured_scale, other_scale=scale, gene_symbols=gene_symbols
    )
    low, high = (np.asarray(dense(matrix_of(table, end)[aligned.rows][:, aligned.columns])) for end in ends)
    truth = aligned.measured
    known = np.isfinite(high) & np.isfinite(truth)
    genes = known.any(0)
    known, inside, expressed = (
        mask[:, genes] for mask in (known, (truth >= low) & (truth <= high), known & (truth > 0))
    )
    share = expressed.sum(0) / known.sum(0)
    spots = {"all": np.arange(len(truth))}
    if aligned.depth is not None:
        spots |= dict(zip(_DEPTHS, np.array_split(np.argsort(aligned.depth, kind="stable"), 3), strict=True))
    results = []
    for detected, (above, most) in _DETECTED.items():
        part = np.flatnonzero((share > above) & (share <= most))
        for depth, rows in spots.items():
            own = np.ix_(rows, part)
            shares = (inside[own][mask[own]].mean() if mask[own].any() else np.nan for mask in (known, expressed))
            results.append((detected, depth, len(part), len(rows), *shares))
    return pd.DataFrame(results, columns=["detected", "depth", "n_genes", "n_spots", "coverage", "coverage_expressing"])
