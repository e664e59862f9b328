"""``hg.get.programmes``: accuracy of the scores of gene sets as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def programmes(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    *,
    reliable: bool | None = None,
    key: str = "he2gene_programmes",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the results of :func:`he2gene_sc.tl.programmes`; the scores of the spots are in ``obsm`` under the same key.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is used.
    reliable
        ``True``: only sets that are reliable on a new patient. ``False``: only the others. Default: all.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.

    Returns
    -------
    pandas.DataFrame
        One row per set, as returned by :func:`he2gene_sc.tl.programmes`.

    Raises
    ------
    ValueError
        If the result does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((5, 5))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> found = hg.tl.programmes(sdata, {"fat": ["ADIPOQ", "FABP4", "PLIN1", "PLIN4", "LPL"]})
    >>> hg.get.programmes(sdata)["source"].tolist()
    ['fat']
    >>> ax = hg.pl.spatial(sdata, "fat")
    """
    validate.arguments(programmes, locals())
    results = find_result(data, "programmes", key, table_key)["results"]
    kept = results if reliable is None else results[results["reliable"].to_numpy(bool) == reliable]
    return kept.reset_index(drop=True)
