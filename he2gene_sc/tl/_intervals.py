"""``hg.tl.intervals``: between which values an expression lies, with a stated coverage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .._intervals import check_by, check_coverage, of_adapted, of_model
from .._keys import Keys
from .._settings import settings
from .._tables import check_free, get_table, values_of, write_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene

_GENES_AT_ONCE = 2048


def intervals(
    data: SpatialData | AnnData,
    *,
    coverage: float = 0.9,
    layer: str | None = None,
    by: Literal["annotation"] | None = "annotation",
    model: str | Path | HE2Gene | None = None,
    gene_symbols: str | None = None,
    key_added: str = "he2gene",
    table_key: str | None = None,
) -> None:
    """Give every predicted value an interval that holds the measured one with a stated probability.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    coverage
        Share of measured values that shall lie inside, within what the model keeps quantiles for (0.1 to 0.98).
    layer
        Prediction to put intervals around: that of predict (default), or one of ``hg.tl.adapt``, whose own
        cross-validated residuals are used then.
    by
        ``"annotation"``: residuals of spots of the same predicted class, where there are enough of them, else of all;
        ``None``: of all spots.
    model
        The model that predicted. Default: the bundled one that is named in ``uns``, if its weights are those.
    gene_symbols
        As given to predict.
    key_added, table_key
        As given to predict.

    Returns
    -------
    ``None``. Written to the table, for ``layer="he2gene"``:

    ``.layers["he2gene_lower"]``, ``.layers["he2gene_upper"]``
        Ends of the intervals, float32 ``(n_obs, n_vars)``, in the unit of the prediction, the lower one floored at 0; NaN
        where there is no prediction. Left out, with a warning, where both would take more than
        ``hg.settings.memory_limit``.
    ``.var["he2gene_halfwidth"]``
        Median over the spots of half the width before the lower end is floored.
    ``.uns["he2gene_intervals"]``
        Coverage, and ``guarantee``: ``"hierarchical"`` or ``"none"``, with ``unit`` and ``n_groups``.

    Raises
    ------
    ValueError
        If the coverage lies outside (0, 1) or what is kept, or the model has no calibration residuals.

    Notes
    -----
    Split conformal: the absolute residual of held-out spots over a spread that rises with the prediction (Lei et al., J Am
    Stat Assoc 2018, sec. 5.2), its quantile by predicted class (Mondrian: Vovk, Gammerman and Shafer 2005, sec. 4.5), with
    sections or patients as the unit (Lee, Barber and Willett, arXiv 2306.06342). The guarantee needs nine groups, above
    90 % ``coverage / (1 - coverage)``; the bundled model has five sections of two patients: none. What that means is
    in ``docs/trust.md``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.intervals(sdata, coverage=0.8)
    >>> sdata["table"].uns["he2gene_intervals"]["guarantee"]
    'none'
    """
    check_coverage(coverage)
    check_by(by)
    table = get_table(data, table_key, key_added=key_added)
    keys = Keys(key_added)
    if keys.uns not in table.uns:
        raise ValueError(f"`data` holds no prediction {key_added!r}; run hg.tl.predict first")
    record = table.uns[keys.uns]
    layer = record["layer"] if layer is None else layer
    predicted = values_of(table, layer)
    adapted = table.uns.get(layer) if layer != record["layer"] else None
    if layer != record["layer"] and not (hasattr(adapted, "get") and adapted.get("verb") == "adapt"):
        raise ValueError(
            f"`layer` {layer!r} was written neither by hg.tl.predict(key_added={key_added!r}), which wrote "
            f"{record['layer']!r}, nor by hg.tl.adapt: nothing is known of its residuals"
        )
    names = {"lower": f"{layer}_lower", "upper": f"{layer}_upper", "halfwidth": f"{layer}_halfwidth"}
    uns = f"{layer}_intervals"
    check_free(table, "intervals", uns, layers=[names["lower"], names["upper"]], var=[names["halfwidth"]])
    if adapted is not None:
        found = of_adapted(adapted, coverage, table.n_vars)
    else:
        found = of_model(table, record, model, coverage, by, gene_symbols, keys)
    fits = 2 * predicted.nbytes <= settings.memory_limit
    layers: dict[str, np.ndarray] = {}
    halfwidth = np.full(table.n_vars, np.nan, np.float32)
    if fits:
        layers = {names[end]: np.full(table.shape, np.nan, np.float32) for end in ("lower", "upper")}
    else:
        warnings.warn(
            f"two layers of {predicted.nbytes / 2**30:.1f} GiB would pass hg.settings.memory_limit: only "
            f"var[{names['halfwidth']!r}] is written; raise the limit, or subset the genes first",
            UserWarning,
            stacklevel=2,
        )
    known = np.flatnonzero(found.known)
    for start in range(0, len(known), _GENES_AT_ONCE):
        genes = known[start : start + _GENES_AT_ONCE]
        low, high = found.ends(np.asarray(predicted[:, genes], np.float32), genes)
        there = np.isfinite(high).any(0)
        halfwidth[genes[there]] = np.nanmedian((high - low)[:, there], axis=0) / 2
        if fits:
            layers[names["lower"]][:, genes] = np.maximum(low, 0)
            layers[names["upper"]][:, genes] = np.maximum(high, 0)
    write_result(
        table,
        "intervals",
        uns,
        params={"coverage": float(coverage), "layer": layer, "by": by, "key_added": key_added},
        facts=found.facts,
        layers=layers,
        var={names["halfwidth"]: pd.Series(halfwidth, index=table.var_names)},
    )
