"""Output of commands: only results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    import pandas as pd
    from spatialdata import SpatialData

#: Width of tables that are not printed to a terminal, in characters.
_WIDTH = 240
_STDOUT: ContextVar[TextIO] = ContextVar("stdout")
#: Columns of a summary of an evaluation, and of its annotation, by their names in the output.
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

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]


class Command(TyperCommand):
    """Command that sends the output of libraries to stderr, so that stdout holds only its result."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        _STDOUT.set(sys.stdout)
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def say(text: str = "", *, err: bool = False) -> None:
    """Print a line."""
    typer.echo(text, file=sys.stderr if err else _STDOUT.get())


def say_json(value: Any) -> None:
    """Print a value as JSON."""
    say(json.dumps(value, ensure_ascii=False))


def say_table(title: str, rows: Sequence[Mapping[str, str]], *, err: bool = False, as_list: bool | None = None) -> None:
    """Print a table of texts with a header; ``as_list`` prints one row as a list, the default for a single row."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    one = len(rows) == 1 if as_list is None else as_list
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=None if one else SIMPLE_HEAD,
        show_header=not one,
        show_edge=False,
        collapse_padding=True,
    )
    for name in ("", "") if one else rows[0]:
        # Align columns of numbers to the right.
        cells = [] if one else [row[name] for row in rows]
        numbers = not one and all(map(_is_number, cells))
        head = name if max(map(len, cells), default=0) >= len(name) else name.replace(" ", "\n")
        table.add_column(
            Text(head), overflow="fold", justify="right" if numbers else "left", vertical="top" if one else "bottom"
        )
    for texts in rows[0].items() if one else (row.values() for row in rows):
        table.add_row(*map(Text, texts))
    file = sys.stderr if err else _STDOUT.get()
    # A file or pipe has no width, so do not wrap rows there.
    Console(file=file, highlight=False, width=None if file.isatty() else _WIDTH).print(table)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("-").replace(",", "").replace(".", "", 1).rstrip("%").isdigit()


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for JSON, with null for NaN."""
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return rows


def split_names(given: list[str]) -> list[str]:
    """Return gene names from an option that is repeated or has commas."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if given and not names:
        raise ValueError(f"--genes {list(given)} names no gene; pass one or more, such as --genes ERBB2,CD24")
    return names


def say_evaluation(sdata: SpatialData, table_key: str | None, *, annotation: bool) -> None:
    """Print the summary of an evaluation: each section and, with several, the mean over sections."""
    from .. import get

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
            | {name: _number(row[column]) for name, column in _ANNOTATION.items()}
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
        | {name: _number(row.get(column, math.nan)) for name, column in _COLUMNS.items()}
        for row in rows
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
