"""Reading ``genes.csv`` of a model folder, cell by cell."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

_TEXTS = ("gene", "ensembl_id", "group")
_TRUTHS = ("variable", "reliable", "reliable_known_patient")
#: Columns of every model, in their order.
COLUMNS = ["gene", "ensembl_id", "group", "variable", "mean", "pcc", "pcc_low", "skill", "reliable"]
#: What sees no gene: a prediction is compared with each.
REFERENCES = ("depth", "colour", "coordinates")
#: Columns that not every model has.
FIGURES = [
    "pcc_high",
    "pcc_patient_low",
    "pcc_new_patient",
    "pcc_given_depth",
    "ceiling",
    "detected",
    *(
        column
        for name in REFERENCES
        for column in (f"pcc_{name}", f"minus_{name}", f"minus_{name}_low", f"minus_{name}_high")
    ),
    "reliable_known_patient",
]
_NUMBERS = ("mean", "pcc", "pcc_low", "skill", *FIGURES[:-1])
_CORRELATIONS = ("pcc", "pcc_new_patient", "pcc_given_depth", *(f"pcc_{name}" for name in REFERENCES))
_GROUPS = ("target", "auxiliary")
_TRUE, _FALSE = ("True", "TRUE", "true"), ("False", "FALSE", "false")
_SHOWN = 5


def read_genes(path: Path, where: str) -> pd.DataFrame:
    """Read ``genes.csv``, indexed by ``gene``, and check each cell; ``where`` is named in errors."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is not a CSV table in UTF-8 ({error})") from error
    header, *lines = rows or [[]]
    _check_header(header, where)
    odd = next((i for i, line in enumerate(lines) if len(line) != len(header)), None)
    if odd is not None:
        raise ValueError(f"{where}: row {odd + 2} has {len(lines[odd])} cells, the header {len(header)}")
    columns = dict(zip(header, zip(*lines, strict=True) if lines else [()] * len(header), strict=True))
    _check_genes(columns["gene"], where)
    for name in header:
        _check_column(name, columns[name], columns["gene"], where)
    found = pd.read_csv(
        io.BytesIO(data),
        keep_default_na=False,
        na_values={name: [""] for name in _NUMBERS},
        dtype=dict.fromkeys(_TEXTS, str),
    )
    return found.set_index("gene")


def _check_header(header: list[str], where: str) -> None:
    lacking = [name for name in COLUMNS if name not in header]
    if lacking:
        raise ValueError(f"{where} lacks {lacking}: it is not the gene table of a he2gene_sc model of this schema")
    unknown = [name for name in header if name not in (*COLUMNS, *FIGURES)]
    if unknown or len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise ValueError(
            f"{where} has columns that this version does not know, {unknown}, or twice, {twice}; valid: "
            f"{[*COLUMNS, *FIGURES]}"
        )


def _check_genes(genes: tuple[str, ...], where: str) -> None:
    blank = [i + 2 for i, gene in enumerate(genes) if not gene or gene != gene.strip() or not gene.isprintable()]
    if blank:
        raise ValueError(
            f"{where}: column 'gene' is empty, or has blanks around a name or control characters, in rows {blank[:_SHOWN]}"
        )
    twice = [gene for gene, n in Counter(genes).items() if n > 1]
    if twice:
        raise ValueError(
            f"{where}: {len(twice)} genes stand twice, first {twice[:_SHOWN]}; every row needs its own name"
        )


def _check_column(name: str, cells: tuple[str, ...], genes: tuple[str, ...], where: str) -> None:
    fits: Callable[[str], bool]
    if name in _TRUTHS:
        fits, valid = (*_TRUE, *_FALSE).__contains__, "True or False"
    elif name == "group":
        fits, valid = _GROUPS.__contains__, f"one of {list(_GROUPS)}"
    elif name == "ensembl_id":
        fits, valid = lambda cell: cell.isprintable() and " " not in cell, "an id without blanks, or nothing,"
    elif name in _NUMBERS:
        low, high, valid = -math.inf, math.inf, "a finite number, or nothing,"
        if name in _CORRELATIONS:
            low, high, valid = -1, 1, "a number from -1 to 1, or nothing,"
        elif name == "mean":
            low, valid = 0, "a number from 0, or nothing,"
        if _are_numbers(cells, low, high):
            return
        fits = partial(_is_number, low=low, high=high)
    else:
        return
    odd = [(gene, cell) for gene, cell in zip(genes, cells, strict=True) if not fits(cell)]
    if odd:
        gene, cell = odd[0]
        more = f" (and {len(odd) - 1:,} cells more)" if len(odd) > 1 else ""
        raise ValueError(f"{where}: column {name!r} of gene {gene!r} is {cell!r}{more}; {valid} is needed")


def _are_numbers(cells: tuple[str, ...], low: float, high: float) -> bool:
    """Whether all cells are numbers as :func:`_is_number` takes them, in a tenth of the time."""
    try:
        values = np.array([cell for cell in cells if cell], float)
    except ValueError:
        return False
    return bool((np.isfinite(values) & (values >= low) & (values <= high)).all()) and "_" not in "".join(cells)


def _is_number(cell: str, low: float, high: float) -> bool:
    """Whether a cell is empty, or a finite number as files write it, in a range."""
    try:
        value = float(cell or max(low, 0))
    except ValueError:
        return False
    return math.isfinite(value) and "_" not in cell and low <= value <= high
