"""``hg.get.genes``: names of the predicted genes, all or only reliable ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._core import validate
from .._core.keys import Keys
from .._core.predictions import gene_flags
from .._core.spots import get_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def genes(
    data: SpatialData | AnnData,
    *,
    reliable: bool | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
) -> list[str]:
    """List the predicted genes, best held-out correlation first.

    :func:`he2gene_sc.get.predicted` returns a table of these genes without missing values, for scanpy and squidpy.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to.
    reliable
        ``True``: only reliable genes; ``False``: only the others; ``None``: all.
    prediction_key
        ``key_added`` of predict.
    table_key
        Table, if several have predictions.

    Returns
    -------
    list of str
        Names in ``var_names``.

    Raises
    ------
    ValueError
        If there is no prediction.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> "ERBB2" in hg.get.genes(sdata)
    True
    """
    validate.arguments(genes, locals())
    keys = Keys(prediction_key)
    table = get_table(data, table_key, prediction_key=prediction_key)
    if keys.predicted not in table.var:
        raise ValueError(f"`data` holds no prediction {prediction_key!r}; run hg.tl.predict first")
    chosen = gene_flags(table, keys.predicted)
    if reliable is not None:
        chosen = chosen & (gene_flags(table, keys.reliable) == reliable)
    var = table.var[chosen]
    return var.sort_values(keys.pcc, ascending=False, kind="stable").index.tolist()
