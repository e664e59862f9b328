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


def say_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table of texts with a header; a single row is printed as a list."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    one = len(rows) == 1
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=None if one else SIMPLE_HEAD, show_header=not one
    )
    for name in ("", "") if one else rows[0]:
        table.add_column(name, overflow="fold")
    for cells in rows[0].items() if one else (row.values() for row in rows):
        table.add_row(*map(Text, cells))
    Console(file=_STDOUT.get(), highlight=False).print(table)


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
