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
    """Return the scores of :func:`he2gene_sc.tl.domain_preservation`, one per row.

    Parameters
    ----------
    data
        Object or table that it wrote to.
    score
        Only this score, for example ``"ari"``.
    labels
        Only these labels, for example ``"predicted"``.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.

    Returns
    -------
    pandas.DataFrame
        One row per score, with columns:

        - ``sample``, ``section`` (``"all"``: mean over samples);
        - ``labels``: ``predicted``, ``measured``, the references ``depth``, ``mean colour``, ``coordinates``, ``random features`` and
          ``annotation head``, and ``domains`` themselves;
        - ``against``: ``domains``, ``measured``, or empty for scores of one label map;
        - ``score``: ``ari``, ``nmi``, ``ami``, ``homogeneity``, ``completeness``, ``nhood_enrichment`` (correlation of neighbourhood
          enrichment), ``silhouette`` (of the domains in the principal components), ``moran`` (Spearman correlation of Moran's I over
          genes), ``n_labels``, ``chaos`` and ``pas`` (lower is more coherent);
        - ``mean``, ``sd``: over ``n_seeds`` seeds;
        - ``pval``, ``n_shifts``: test of the adjusted Rand index; ``null_mean``: its mean over the shifts;
        - ``difference``: for depth, colour and coordinates, the index of the prediction minus that of the reference;
        - ``pval_better``: test that the prediction is better than the reference, and than the part of it that the reference
          explains; for the prediction, the largest of these: test that it is better than each reference;
        - ``trained_on_labels``: whether the model that made the labels was trained on such labels;
        - ``n_samples``: with several sections.

    Raises
    ------
    ValueError
        If nothing was written, or the score or labels do not exist.

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
