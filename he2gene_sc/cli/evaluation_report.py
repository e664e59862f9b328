"""Text output of ``he2gene evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import get
from .output import say, say_table

if TYPE_CHECKING:
    import pandas as pd
    from spatialdata import SpatialData

_COLUMNS = {
    "Pearson": "pearson_mean",
    "median": "pearson_median",
    "minus it": "pearson_difference_mean",
    "of ceiling": "ceiling_share_mean",
    "skill": "skill_mean",
}
_ANNOTATION = {
    "balanced accuracy": "balanced_accuracy",
    "macro F1": "macro_f1",
    "macro AUROC": "macro_auroc",
    "calibration error": "calibration_error",
}


def say_evaluation(sdata: SpatialData, table_key: str | None, *, annotation: bool) -> None:
    """Print the summary: each section and, with several, the mean over sections."""
    summary = get.evaluation(sdata, table_key=table_key, dropna=False)
    sections = summary.loc[summary["scope"] == "section", "section"].unique()
    several = len(sections) > 1
    for scope in ["section"] + ["mean"] * several:
        for section, frame in summary[summary["scope"] == scope].groupby("section", sort=False):
            title = f"{section}, {frame['n_spots'].iloc[0]} spots" if scope == "section" else "mean over sections"
            say_table(title, _scores(frame), as_list=False)
            say()
    if annotation:
        labelled = get.evaluation(sdata, "annotation", table_key=table_key)
        shown = labelled[labelled["scope"].isin(["section"] + ["mean"] * several)].to_dict("records")
        rows = [
            {"section": str(row["section"]), "labelled spots": str(row["n_labelled"])}
            | {name: _shown(row[column]) for name, column in _ANNOTATION.items()}
            for row in shown
        ]
        say_table("annotation", rows, as_list=False)
        say()
    predictors = get.evaluation(sdata, "predictors", table_key=table_key).to_dict("records")
    status = [f"has seen {row['seen']}" if row["computed"] else f"left out: {row['reason']}" for row in predictors]
    say_table("predictors", [dict(zip([row["predictor"] for row in predictors], status, strict=True))], as_list=True)
    left_out = get.evaluation(sdata, "left_out", table_key=table_key)
    counted = ", ".join(f"{row['n']} {row['what']}" for row in left_out.to_dict("records") if row["n"])
    say(f"Left out: {counted or 'nothing'}")


def _scores(frame: pd.DataFrame) -> list[dict[str, str]]:
    # Group the rows of predictors by panel.
    panels = list(frame["panel"].unique())
    ordered = frame.sort_values("panel", key=lambda names: names.map(panels.index), kind="stable")
    rows: list[dict[str, Any]] = ordered.to_dict("records")
    return [
        {"panel": row["panel"], "predictor": row["predictor"], "genes": str(row["n_genes"])}
        | {name: _shown(row.get(column, np.nan)) for name, column in _COLUMNS.items()}
        for row in rows
    ]


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
