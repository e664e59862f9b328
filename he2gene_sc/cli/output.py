"""Output of commands: only results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    import pandas as pd

#: Width of tables that are not printed to a terminal, in characters.
_WIDTH = 240
_STDOUT: ContextVar[TextIO] = ContextVar("stdout")

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
