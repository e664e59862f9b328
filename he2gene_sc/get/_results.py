"""Results of evaluations, biomarkers, domains and gene sets as tidy tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from .._core import validate
from .._core.genes import columns_of, find_genes
from .._core.ownership import is_prediction
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Names of the tables; ``"genes"`` is the table of the model followed by that of the baselines.
Table = Literal["summary", "genes", "baselines", "predictors", "left_out", "annotation", "classes", "confusion"]


def evaluation(
    data: SpatialData | AnnData,
    what: Table = "summary",
    *,
    dropna: bool = True,
    key: str = "he2gene_eval",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Return a tidy table of an evaluation.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.evaluate` wrote to.
    what
        ``"summary"``: mean and median over gene panels, one row per scope, section, predictor and panel.
        ``"genes"``: one row per scope, section, predictor and gene; baselines only have ``pearson`` and ``skill``, and the value of
        the prediction minus that of the baseline (``pearson_difference``, ``skill_difference``).
        ``"baselines"``: the rows of ``"genes"`` for baselines.
        ``"predictors"``: data that each predictor has seen, and the reason if it was left out. ``"left_out"``: numbers of spots,
        genes and labels that were not compared. ``"annotation"``: balanced accuracy, macro F1, macro AUROC and expected
        calibration error by section. ``"classes"``: recall, F1 and AUROC of each class. ``"confusion"``: number of spots by label
        and predicted class.
    dropna
        Leave out rows of genes, panels and classes without any metric, for example of a gene that is constant in a section, and, if
        one section was evaluated, the scopes ``"pooled"`` and ``"mean"``, which repeat it.
    key
        ``key_added`` of the run.
    table_key
        Table, if several were evaluated.

    Returns
    -------
    pandas.DataFrame
        Copy of the table.

    Raises
    ------
    ValueError
        If the table has no evaluation, ``what`` is unknown, or the annotation was not evaluated.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy(shape=(6, 6))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> hg.tl.evaluate(sdata)
    >>> {"gene", "section", "predictor", "pearson", "skill"} <= set(hg.get.evaluation(sdata, "genes"))
    True
    """
    validate.arguments(evaluation, locals())
    validate.one_of(what, get_args(Table), "what")
    stored = find_result(data, "evaluate", key, table_key)
    if what not in stored:
        if what == "baselines":
            raise ValueError('`what`: no baseline was computed; see what="predictors" for the reasons')
        raise ValueError(f"`what`: {what!r} was not evaluated; run hg.tl.evaluate(annotation_key=...)")
    tables = ("genes", "baselines") if what == "genes" else (what,)
    frame = pd.concat([stored[name] for name in tables if name in stored], ignore_index=True)
    if dropna and what in ("summary", "genes", "baselines", "classes"):
        frame = frame[frame.select_dtypes(np.floating).notna().any(axis=1)]
    if dropna and "scope" in frame:
        is_section = frame["scope"] == "section"
        if frame.loc[is_section, "section"].nunique() == 1:
            frame = frame[is_section]
    frame = frame.reset_index(drop=True)
    texts = ("scope", "section", "predictor") if what in ("genes", "baselines") else ()
    return frame.astype(dict.fromkeys(texts, str))


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
    frame = find_result(data, "biomarkers", key, table_key)["results"].copy()
    if group is not None:
        wanted = validate.names(group, "group", least=1, one=True)
        validate.all_in(wanted, frame["group"], "group", "was not tested")
        frame = frame[frame["group"].isin(wanted)]
    for name, cutoff, column, keep in (
        ("pval_cutoff", pval_cutoff, "pvals_adj", np.less),
        ("log2fc_min", log2fc_min, "logfoldchanges", np.greater),
        ("log2fc_max", log2fc_max, "logfoldchanges", np.less),
    ):
        if cutoff is not None:
            frame = frame[keep(frame[column], validate.in_range(cutoff, name))]
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
    frame = find_result(data, "programmes", key, table_key)["results"]
    if reliable is not None:
        frame = frame[frame["reliable"].astype(bool) == reliable]
    return frame.reset_index(drop=True)
