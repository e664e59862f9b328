"""Text output of ``he2gene evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .. import get

if TYPE_CHECKING:
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


def lines(sdata: SpatialData, table_key: str | None, *, annotation: bool) -> Iterator[str]:
    """Yield the lines of the summary: each section and, with several, the mean over sections."""
    summary = get.evaluation(sdata, table_key=table_key, dropna=False)
    sections = summary.loc[summary["scope"] == "section", "section"].unique()
    for scope in ["section"] + ["mean"] * (len(sections) > 1):
        for section, frame in summary[summary["scope"] == scope].groupby("section", sort=False):
            title = f"{section}, {frame['n_spots'].iloc[0]} spots" if scope == "section" else "mean over sections"
            yield ""
            yield f"{title:<44}  genes" + "".join(f"{name:>12}" for name in _COLUMNS)
            # Group the rows of predictors by panel.
            panels = list(frame["panel"].unique())
            for row in frame.sort_values("panel", key=lambda names: names.map(panels.index), kind="stable").to_dict(
                "records"
            ):
                figures = "".join(f"{_shown(row.get(column, np.nan)):>12}" for column in _COLUMNS.values())
                yield f"  {row['panel']:<20}{row['predictor']:<22}  {row['n_genes']:>5}{figures}"
    if annotation:
        yield ""
        for row in get.evaluation(sdata, "annotation", table_key=table_key).to_dict("records"):
            if row["scope"] == "section" or (row["scope"] == "mean" and len(sections) > 1):
                figures = ", ".join(f"{name} {_shown(row[column])}" for name, column in _ANNOTATION.items())
                yield f"annotation, {row['section']} ({row['scope']}), {row['n_labelled']} labelled spots: {figures}"
    predictors = get.evaluation(sdata, "predictors", table_key=table_key)
    yield ""
    for row in predictors.to_dict("records"):
        status = f"has seen {row['seen']}" if row["computed"] else f"left out: {row['reason']}"
        yield f"  {row['predictor']:<14} {status}"
    left_out = get.evaluation(sdata, "left_out", table_key=table_key)
    counted = ", ".join(f"{row['n']} {row['what']}" for row in left_out.to_dict("records") if row["n"])
    yield f"Left out: {counted or 'nothing'}"


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
