"""``hg.get.evaluation``: results of ``hg.tl.evaluate`` as tidy tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pandas as pd

from .._core import validate
from .._core.results import find_result

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Names of the tables; ``"genes"`` is the table of the model followed by that of the baselines.
TABLES = ("summary", "genes", "baselines", "predictors", "left_out", "annotation", "classes", "confusion")
#: Columns of the tables that are not metrics.
_ID_COLUMNS = [
    "gene",
    "class",
    "scope",
    "section",
    "predictor",
    "panel",
    "n_spots",
    "n_genes",
    "n_constant",
    "n_labelled",
]


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
    metrics = frame.columns.difference(_ID_COLUMNS)
    if dropna and what in ("summary", "genes", "baselines", "classes"):
        frame = frame[frame[metrics].notna().any(axis=1)]
    if dropna and "scope" in frame:
        is_section = (frame["scope"] == "section").to_numpy()
        is_only_one = frame.loc[is_section, "section"].nunique() == 1
        frame = frame[is_section | (not is_only_one)]
    frame = frame.reset_index(drop=True)
    texts = ("scope", "section", "predictor") if what in ("genes", "baselines") else ()
    return frame.astype(dict.fromkeys(texts, str))
