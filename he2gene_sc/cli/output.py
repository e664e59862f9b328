"""Output of commands: only results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    "panel": "panel",
    "predictor": "predictor",
    "genes": "n_genes",
    "Pearson": "pearson_mean",
    "median": "pearson_median",
    "minus it": "pearson_difference_mean",
    "of ceiling": "ceiling_share_mean",
    "skill": "skill_mean",
}
_ANNOTATION = {
    "section": "section",
    "labelled spots": "n_labelled",
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


def say_list(title: str, row: Mapping[str, str]) -> None:
    """Print the texts of one row below each other, with their names."""
    _print(title, [("", "left", "top")] * 2, row.items(), box=None, show_header=False)


def say_table(title: str, rows: Sequence[Mapping[str, str]], *, err: bool = False) -> None:
    """Print a table of texts with a header; columns of numbers are aligned to the right."""
    from rich.box import SIMPLE_HEAD

    columns = []
    for name in rows[0]:
        cells = [row[name] for row in rows]
        head = name if max(map(len, cells)) >= len(name) else name.replace(" ", "\n")
        columns.append((head, "right" if all(map(_is_number, cells)) else "left", "bottom"))
    _print(title, columns, [row.values() for row in rows], err=err, box=SIMPLE_HEAD)


def _print(title: str, columns: Any, rows: Iterable[Iterable[str]], *, err: bool = False, **options: Any) -> None:
    """Print a table; columns have a header and a horizontal and vertical alignment."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head = Text(title, style="bold")
    table = Table(title=head, title_justify="left", show_edge=False, collapse_padding=True, **options)
    for name, justify, vertical in columns:
        table.add_column(Text(name), overflow="fold", justify=justify, vertical=vertical)
    for texts in rows:
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
    several = summary.loc[summary["scope"] == "section", "section"].nunique() > 1
    scopes = ["section"] + ["mean"] * several
    for scope in scopes:
        for section, frame in summary[summary["scope"] == scope].groupby("section", sort=False):
            title = f"{section}, {frame['n_spots'].iloc[0]} spots" if scope == "section" else "mean over sections"
            panels = frame.groupby("panel", sort=False, observed=True)
            say_table(title, [row for _, part in panels for row in rows_of(part, _COLUMNS)])
            say()
    if annotation:
        labelled = get.evaluation(sdata, "annotation", table_key=table_key)
        say_table("annotation", rows_of(labelled[labelled["scope"].isin(scopes)], _ANNOTATION))
        say()
    predictors = get.evaluation(sdata, "predictors", table_key=table_key).to_dict("records")
    status = [f"has seen {row['seen']}" if row["computed"] else f"left out: {row['reason']}" for row in predictors]
    say_list("predictors", dict(zip([row["predictor"] for row in predictors], status, strict=True)))
    left_out = get.evaluation(sdata, "left_out", table_key=table_key)
    counted = ", ".join(f"{row['n']} {row['what']}" for row in left_out.to_dict("records") if row["n"])
    say(f"Left out: {counted or 'nothing'}")


def rows_of(frame: pd.DataFrame, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the rows of a table as texts for printing; ``columns`` maps names in the output to columns, which may be missing."""
    shown = frame.reindex(columns=list(columns.values())).set_axis(list(columns), axis=1)
    return [{name: _text(value) for name, value in row.items()} for row in shown.to_dict("records")]


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
