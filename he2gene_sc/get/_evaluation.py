"""``hg.get.evaluation``: what hg.tl.evaluate found, as tidy tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Tables by name; ``"genes"`` are those of the model and of the baselines, one below the other.
TABLES = ("summary", "genes", "baselines", "predictors", "left_out", "annotation", "classes", "confusion")
#: Columns of the tables of metrics that are not metrics.
_PLACES = ["gene", "class", "scope", "section", "predictor", "panel", "n_spots", "n_genes", "n_constant", "n_labelled"]


def evaluation(
    data: SpatialData | AnnData,
    what: Literal[
        "summary", "genes", "baselines", "predictors", "left_out", "annotation", "classes", "confusion"
    ] = "summary",
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
        ``"summary"``: mean and median over panels of genes, a row a scope, section, predictor and panel.
        ``"genes"``: a row a scope, section, predictor and gene; baselines have ``pearson`` and ``skill`` alone, and those of the
        prediction minus theirs (``pearson_difference``, ``skill_difference``).
        ``"baselines"``: their rows of it.
        ``"predictors"``: what each predictor has seen, and why one was left out. ``"left_out"``: spots, genes and
        labels that were not judged, counted. ``"annotation"``: balanced accuracy, macro F1, macro AUROC and expected
        calibration error by section. ``"classes"``: recall, F1 and AUROC of each class. ``"confusion"``: number of
        spots by label and predicted class.
    dropna
        Leave out rows of genes, panels and classes without any metric: what was not evaluated, such as a gene that is constant
        in a section.
    key
        ``key_added`` of the run.
    table_key
        Table, where several were evaluated.

    Returns
    -------
    pandas.DataFrame
        A copy.

    Raises
    ------
    ValueError
        If there is no evaluation, ``what`` is unknown, or the annotation was not evaluated.

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
    validate.one_of(what, TABLES, "what")
    stored = find_result(data, "evaluate", key, table_key)
    if what == "baselines" and what not in stored:
        raise ValueError('`what`: no baseline was computed; see what="predictors" for the reasons')
    if what not in stored:
        raise ValueError(f"`what`: {what!r} was not evaluated; run hg.tl.evaluate(annotation_key=...)")
    parts = [stored[what]] + ([stored["baselines"]] if what == "genes" and "baselines" in stored else [])
    frame = pd.concat(parts, ignore_index=True)
    metrics = frame.columns.difference(_PLACES)
    if dropna and what in ("summary", "genes", "baselines", "classes"):
        frame = frame[frame[metrics].notna().any(axis=1)].reset_index(drop=True)
    texts = ("scope", "section", "predictor") if what in ("genes", "baselines") else ()
    return frame.astype(dict.fromkeys(texts, str))
