"""``hg.get.domains``: scores of domain preservation as a tidy table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def domains(
    data: SpatialData | AnnData,
    *,
    score: str | None = None,
    labels: str | None = None,
    key: str = "he2gene_domains",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the scores that :func:`he2gene_sc.tl.domain_preservation` wrote, one a line.

    Parameters
    ----------
    data
        Object or table that it wrote to.
    score
        Only this score, for example ``"ari"``.
    labels
        Only of these labels, for example ``"predicted"``.
    key
        ``key_added`` of the run.
    table_key
        Table, where an object holds several.

    Returns
    -------
    pandas.DataFrame
        ``sample``, ``section`` (``"all"``: mean over samples); ``labels``: ``predicted``, ``measured``, the references
        ``depth``, ``mean colour``, ``coordinates``, ``random features`` and ``annotation head``, and ``domains`` themselves;
        ``against``: ``domains``, ``measured``, or empty for scores of one label map; ``score``: ``ari``, ``nmi``, ``ami``,
        ``homogeneity``, ``completeness``, ``nhood_enrichment`` (correlation of neighbourhood enrichment), ``silhouette``
        (of the domains in the principal components), ``moran`` (Spearman correlation of Moran's I over genes),
        ``n_labels``, ``chaos`` and ``pas`` (lower is more coherent); ``mean`` and ``sd`` over ``n_seeds`` seeds; ``pval``
        and ``n_shifts`` of the adjusted Rand index, ``null_mean`` its mean over the shifts; of depth, colour and coordinates
        ``difference``, the prediction's index minus theirs, and ``pval_better``, whether the prediction is better than these and
        than the part of it that they explain; of the prediction the largest of these, whether it is better than each;
        ``trained_on_labels``: whether a model that learnt such labels made these; ``n_samples`` where there are several sections.

    Raises
    ------
    ValueError
        If nothing was written, or there is no such score or labels.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((8, 8), mpp=2.0)
    >>> hg.tl.domain_preservation(sdata, "pathologist", layer=None, n_seeds=2)
    >>> hg.get.domains(sdata, score="ari", labels="measured")["n_seeds"].item()
    2
    """
    validate.arguments(domains, locals())
    table = find_result(data, "domain_preservation", key, table_key)["table"].copy()
    for name, value in (("score", score), ("labels", labels)):
        if value is not None:
            validate.key_in(value, sorted(set(table[name])), name, what="in the table")
            table = table[table[name] == value]
    return table.reset_index(drop=True)
