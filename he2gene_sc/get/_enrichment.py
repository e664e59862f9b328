"""``hg.get.enrichment``: enrichment of gene sets in biomarkers as a tidy table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def enrichment(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    *,
    key: str = "he2gene_enrichment",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the results of :func:`he2gene_sc.tl.enrichment`.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is used.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.

    Returns
    -------
    pandas.DataFrame
        One row per group and gene set, highest score first: ``group``, ``source`` (the set), ``score``, ``pvals_adj`` (of
        decoupler, NaN if the method has no test), ``n_targets`` (number of tested genes of the set), ``pvals_adj_samples`` (samples
        are the unit, valid for co-expressed genes; NaN with fewer than 3 samples), ``method``, ``circular`` (as marked for the
        biomarkers).

    Raises
    ------
    ValueError
        If the result does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((6, 6), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    >>> markers = hg.tl.biomarkers(slides, "pathologist", layer=None)
    >>> sets = slides[0]["table"].var["planted"].rename_axis("target").reset_index(name="source")
    >>> scores = hg.tl.enrichment(slides, sets)
    >>> hg.get.enrichment(slides).equals(scores)
    True
    """
    validate.arguments(enrichment, locals())
    return find_result(data, "enrichment", key, table_key)["results"].copy()
