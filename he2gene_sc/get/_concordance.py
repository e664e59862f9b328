"""``hg.get.concordance``: agreement of predicted and measured biomarkers as a tidy table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def concordance(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    *,
    by_gene: bool = False,
    key: str = "he2gene_concordance",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the results of :func:`he2gene_sc.tl.concordance`.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is used.
    by_gene
        Return both tests, with one row per group and gene, instead of the summary.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.

    Returns
    -------
    pandas.DataFrame
        One row per group and set of genes (``genes``: ``"reliable"`` or ``"all"``), for the prediction and then each reference:

        - ``n_genes``, ``n_significant`` (in measured expression), ``n_samples``, ``n_spots``;
        - ``spearman``: correlation of the effects; 0 by chance;
        - ``sign_agreement``, ``sign_agreement_significant``: share of genes, and of genes significant in measured expression, with
          effects of the same sign; one half by chance;
        - ``auroc``: of genes significant in measured expression, ranked by the absolute predicted score; one half by chance;
        - ``precision_at_<k>``: share of the k genes with the highest predicted score that are among the k with the highest measured
          score; ``chance_at_<k>`` by chance;
        - ``predictor``: the layer, or a reference without genes: ``"depth"``, ``"mean colour"``, ``"coordinates"``;
        - ``spearman_difference``, ``sign_agreement_difference``, ``sign_agreement_significant_difference``,
          ``auroc_difference``: for a reference, the score of the prediction minus that of the reference, on the same genes;
        - ``method``, ``circular``.

    Raises
    ------
    ValueError
        If the result does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((5, 5), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> result = hg.tl.concordance(slides, "pathologist", groups="tumour")
    >>> hg.get.concordance(slides)["group"].nunique()
    1
    """
    validate.arguments(concordance, locals())
    return find_result(data, "concordance", key, table_key)["genes" if by_gene else "table"].copy()
