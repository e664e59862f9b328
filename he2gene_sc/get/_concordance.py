"""``hg.get.concordance``: how well predicted biomarkers match the measured ones, as a tidy table."""

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
    """Return what :func:`he2gene_sc.tl.concordance` found.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is read.
    by_gene
        Both tests, a row a group and gene, instead of the summary.
    key
        ``key_added`` of the run.
    table_key
        Table, where an object holds several.

    Returns
    -------
    pandas.DataFrame
        A row a group and set of genes (``genes``: ``"reliable"`` or ``"all"``), of the prediction and then of each reference:

        - ``n_genes``, ``n_significant`` (in measured expression), ``n_samples``, ``n_spots``;
        - ``spearman``: of the effects; chance is 0;
        - ``sign_agreement``, ``sign_agreement_significant``: share of genes, and of measured-significant genes, whose
          effects have the same sign; chance is one half;
        - ``auroc``: of the measured-significant genes, ranked by the size of the predicted score; chance is one half;
        - ``precision_at_<k>``: share of the k genes of highest predicted score that are among the k of highest measured
          score; chance is ``chance_at_<k>``;
        - ``predictor``: the layer, or a reference that knows no gene: ``"depth"``, ``"mean colour"``, ``"coordinates"``;
        - ``spearman_difference``, ``sign_agreement_difference``, ``sign_agreement_significant_difference``,
          ``auroc_difference``: of a reference, the score of the prediction minus its own, on the same genes;
        - ``method``, ``circular``.

    Raises
    ------
    ValueError
        If there is no such result.

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
