"""``hg.get.biomarkers``: results of ``hg.tl.biomarkers`` as a tidy table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from .._core.genes import columns_of, find_genes
from .._core.ownership import is_prediction
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def biomarkers(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    group: str | Sequence[str] | None = None,
    *,
    pval_cutoff: float | None = None,
    log2fc_min: float | None = None,
    log2fc_max: float | None = None,
    reliable: bool | None = None,
    key: str = "he2gene_biomarkers",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return the results of :func:`he2gene_sc.tl.biomarkers` as a table, like ``scanpy.get.rank_genes_groups_df``.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is used.
    group
        Group or groups; default: all.
    pval_cutoff
        Only adjusted p-values below this.
    log2fc_min, log2fc_max
        Only log2 fold changes above the first and below the second value.
    reliable
        ``True``: only reliable genes; ``False``: only other genes.
    key
        ``key_added`` of the run.
    table_key
        Table, if an object has several.

    Returns
    -------
    pandas.DataFrame
        One row per group and gene, highest score first:

        - ``group``, ``names``: group and gene;
        - ``logfoldchanges``: log2 fold change, of the same contrast as ``effect_size``;
        - ``logfoldchanges_pooled``: as in scanpy, over all labelled spots of all samples;
        - ``effect_size``, ``ci_low``, ``ci_high``: difference in natural logarithms, as estimated by the method, and its
          confidence interval;
        - ``scores``, ``pvals``, ``pvals_adj``: test statistic, two-sided p-value, and p-value adjusted by Benjamini and Hochberg
          within the group (``adjust_over``);
        - ``n_samples``, ``n_spots``, ``n_spots_reference``: numbers of samples and spots in the test;
        - ``method``, ``reliable``, ``circular``.

    Raises
    ------
    ValueError
        If the result or a group does not exist.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((6, 6), seed=i) for i in range(4)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    >>> result = hg.tl.biomarkers(slides, "pathologist", layer=None)
    >>> hg.get.biomarkers(slides, "tumour", pval_cutoff=0.05)["group"].unique().tolist()
    ['tumour']
    """
    validate.arguments(biomarkers, locals())
    for name, value in (("pval_cutoff", pval_cutoff), ("log2fc_min", log2fc_min), ("log2fc_max", log2fc_max)):
        if value is not None:
            validate.in_range(value, name)
    frame = find_result(data, "biomarkers", key, table_key)["results"].copy()
    if group is not None:
        wanted = validate.names(group, "group", least=1, one=True)
        validate.all_in(wanted, frame["group"], "group", "was not tested")
        frame = frame[frame["group"].isin(wanted)]
    if pval_cutoff is not None:
        frame = frame[frame["pvals_adj"] < pval_cutoff]
    if log2fc_min is not None:
        frame = frame[frame["logfoldchanges"] > log2fc_min]
    if log2fc_max is not None:
        frame = frame[frame["logfoldchanges"] < log2fc_max]
    if reliable is not None:
        frame = frame[frame["reliable"].astype(bool) == reliable]
    return frame.reset_index(drop=True)


def genes_of_result(table: AnnData, genes: Sequence[str], names: pd.Series, what: str) -> list[str]:
    """Return the names in a result of ``genes``, which may be names, symbols given to predict, or previous symbols."""
    known = pd.Index(names.unique())
    records = (record for record in table.uns.values() if is_prediction(record))
    symbols = next((record["gene_symbols"] for record in records if "gene_symbols" in record), None)
    columns = columns_of(table, genes, symbols)
    var_names = [table.var_names[column] if column >= 0 else gene for gene, column in zip(genes, columns, strict=True)]
    positions = find_genes(var_names, known, one_to_one=False)
    if unknown := [gene for gene, position in zip(genes, positions, strict=True) if position < 0]:
        raise ValueError(f"`genes` {unknown[:5]} were not {what}")
    return known[positions].tolist()
