"""Tables in text files, plain or compressed, with errors that name the file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def read_table(path: Path, parameter: str | None = None, **options: Any) -> pd.DataFrame:
    """Read a table by :func:`pandas.read_csv`, by default separated by tabs; ``parameter`` gave it, for errors."""
    what = f"`{parameter}` {str(path)!r}" if parameter else str(path)
    try:
        # In parts, which is the default, a table of all genes is thousands of small columns to be put together.
        return pd.read_csv(path, **{"sep": "\t", "low_memory": False, **options})
    except (PermissionError, FileNotFoundError, MemoryError):
        raise
    except pd.errors.EmptyDataError as error:
        raise OSError(f"{what} is empty; a table with a header is needed") from error
    except Exception as error:
        raise OSError(
            f"{what} is damaged, truncated or not a table ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def check_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Refuse a table that lacks columns; ``what`` it is begins the error."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f"{what} lacks the columns {missing}; it has {list(frame.columns[:10])}")


def check_once(names: pd.Index, what: str) -> None:
    """Refuse names that stand twice; ``what`` begins the error, as ``"`counts` names spots"``."""
    if names.has_duplicates:
        raise ValueError(f"{what} twice: {list(names[names.duplicated()][:5])}")


def check_header(path: Path, parameter: str | None = None, what: str = "genes") -> None:
    """Refuse a header that names a column twice, or a gene not at all; the name of the column of spots may be missing."""
    # As one field: pandas makes a column of each, which takes a second for a row of all genes.
    lines = {"header": None, "nrows": 2, "dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_NONE}
    rows = [row.split("\t") for row in read_table(path, parameter, sep="\x1f", **lines)[0]]
    beside = what == "genes" and (len(rows) < 2 or len(rows[1]) == len(rows[0]))
    names = pd.Index(rows[0][beside:]).str.strip(' "')
    file = f"`{parameter}` {path.name!r}" if parameter else path.name
    if what != "genes":
        # Columns of trailing tabs.
        names = names[names != ""]
    if names.has_duplicates:
        raise ValueError(
            f"{file} has duplicated {what}: {list(names[names.duplicated()][:5])}; add up or rename their columns"
        )
    if what == "genes" and (names == "").any():
        raise ValueError(f"{file} has {int((names == '').sum())} columns without a name")
