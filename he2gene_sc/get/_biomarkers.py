"""``hg.get.biomarkers``: what ``hg.tl.biomarkers`` found, as a tidy table."""

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
    """Return the tests of :func:`he2gene_sc.tl.biomarkers`, as ``scanpy.get.rank_genes_groups_df`` does those of scanpy.

    Parameters
    ----------
    data
        Object or table that it wrote to; of several, the first is read.
    group
        Group or groups; default: all.
    pval_cutoff
        Only adjusted p-values below this.
    log2fc_min, log2fc_max
        Only log2 fold changes above, or below this.
    reliable
        Only genes that are, or are not, reliable.
    key
        ``key_added`` of the run.
    table_key
        Table, where an object holds several.

    Returns
    -------
    pandas.DataFrame
        A row a group and gene, highest score first:

        - ``group``, ``names``: group and gene;
        - ``logfoldchanges``: log2 fold change, of the same contrast as ``effect_size``;
        - ``logfoldchanges_pooled``: scanpy's, over all labelled spots of all samples;
        - ``effect_size``, ``ci_low``, ``ci_high``: difference in natural logarithms, as the method estimates it, and its
          interval;
        - ``scores``, ``pvals``, ``pvals_adj``: test statistic, two-sided p-value, Benjamini and Hochberg's within the group (``adjust_over``);
        - ``n_samples``, ``n_spots``, ``n_spots_reference``: what the test used;
        - ``method``, ``reliable``, ``circular``.

    Raises
    ------
    ValueError
        If there is no such result or group.

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


def genes_of_result(table: AnnData, asked: Sequence[str], names: pd.Series, what: str) -> list[str]:
    """Names in a result of genes that a user named: as there, by symbols that predict was given, or by former ones."""
    known = pd.Index(names.unique())
    records = (record for record in table.uns.values() if is_prediction(record))
    symbols = next((record["gene_symbols"] for record in records if "gene_symbols" in record), None)
    columns = columns_of(table, asked, symbols)
    called = [table.var_names[column] if column >= 0 else gene for gene, column in zip(asked, columns, strict=True)]
    found = find_genes(called, known, one_to_one=False)
    if unknown := [gene for gene, place in zip(asked, found, strict=True) if place < 0]:
        raise ValueError(f"`genes` {unknown[:5]} were not {what}")
    return known[found].tolist()
