"""``hg.get.programmes``: gene sets, and how well their scores are predicted."""

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
    """Return what :func:`he2gene_sc.tl.programmes` found; the scores of the spots are in ``obsm`` under the same name.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is read.
    reliable
        ``True``: sets that may be used on a new patient. ``False``: the others. Default: all.
    key
        ``key_added`` of the run.
    table_key
        Table, where an object holds several.

    Returns
    -------
    pandas.DataFrame
        A row a set, as :func:`he2gene_sc.tl.programmes` returns it.

    Raises
    ------
    ValueError
        If there is no such result.

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
    found = find_result(data, "programmes", key, table_key)["results"]
    kept = found if reliable is None else found[found["reliable"].to_numpy(bool) == reliable]
    return kept.reset_index(drop=True)
