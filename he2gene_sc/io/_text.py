"""Tables in text files, plain or compressed, with errors that name the file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd


def read_table(path: Path, parameter: str | None = None, **options: Any) -> pd.DataFrame:
    """Read a table by :func:`pandas.read_csv`.

    Parameters
    ----------
    path
        The file.
    parameter
        The parameter that gave it, for errors.
    **options
        Passed on; fields are separated by tabs unless ``sep`` says otherwise.

    Raises
    ------
    OSError
        If the file is damaged, empty or not text.
    """
    what = f"`{parameter}` {str(path)!r}" if parameter else str(path)
    try:
        return pd.read_csv(path, **{"sep": "\t", **options})
    except (PermissionError, FileNotFoundError, MemoryError):
        raise
    except pd.errors.EmptyDataError as error:
        raise OSError(f"{what} is empty; a table with a header is needed") from error
    except Exception as error:
        raise OSError(
            f"{what} is damaged, truncated or not a table ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def check_header(path: Path, parameter: str | None = None) -> None:
    """Refuse a header that names a column twice, which pandas renames, or not at all.

    Raises
    ------
    ValueError
        If it does; the first name, of the column of spots, may be missing.
    """
    # As one field: pandas makes a column of each, which takes a second for a row of all genes.
    line = {"header": None, "nrows": 1, "dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_NONE}
    row = read_table(path, parameter, sep="\x1f", **line).iat[0, 0]
    names = pd.Index(row.split("\t")).str.strip(' "')
    what = f"`{parameter}` {path.name!r}" if parameter else path.name
    if names[1:].has_duplicates:
        raise ValueError(
            f"{what} has duplicated genes: {list(names[1:][names[1:].duplicated()][:5])}; add up or rename their columns"
        )
    if (names[1:] == "").any():
        raise ValueError(f"{what} has {int((names[1:] == '').sum())} columns without a name")
