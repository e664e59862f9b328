"""Read tables from text files, plain or compressed, with errors that name the file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ._files import described


def read_table(path: Path, parameter: str | None = None, **options: Any) -> pd.DataFrame:
    """Read a table with :func:`pandas.read_csv`, by default tab-separated; ``parameter`` is named in errors."""
    what = f"`{parameter}` {str(path)!r}" if parameter else str(path)
    with described(
        OSError, f"{what} is empty, damaged, truncated or not a table with a header", "; copy or download it again"
    ):
        # low_memory=True would concatenate thousands of small columns for a table of all genes.
        return pd.read_csv(path, **{"sep": "\t", "low_memory": False, **options})


def check_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise if a table lacks columns; the error begins with ``what``."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f"{what} lacks the columns {missing}; it has {list(frame.columns[:40])}")


def check_once(names: pd.Index, what: str) -> None:
    """Raise for duplicated names; the error begins with ``what``, such as ``"`counts` names spots"``."""
    if names.has_duplicates:
        raise ValueError(f"{what} twice: {list(names[names.duplicated()][:5])}")


def check_header(path: Path, parameter: str | None = None, what: str = "genes") -> None:
    """Raise if a header has duplicated columns or genes without a name; the name of the spot column may be missing."""
    # Read each line as one field: a column for each gene would take pandas a second.
    lines = {"header": None, "nrows": 2, "dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_NONE}
    rows = [row.split("\t") for row in read_table(path, parameter, sep="\x1f", **lines)[0]]
    has_index = what == "genes" and (len(rows) < 2 or len(rows[1]) == len(rows[0]))
    names = pd.Index(rows[0][has_index:]).str.strip(' "')
    file = f"`{parameter}` {path.name!r}" if parameter else path.name
    if what != "genes":
        # Trailing tabs make empty columns.
        names = names[names != ""]
    if names.has_duplicates:
        raise ValueError(
            f"{file} has duplicated {what}: {list(names[names.duplicated()][:5])}; add up or rename their columns"
        )
    if what == "genes" and (names == "").any():
        raise ValueError(f"{file} has {int((names == '').sum())} columns without a name")
