"""Read ``genes.csv`` of a model folder, and check each cell."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

_TEXTS = ("gene", "ensembl_id", "group")
_BOOLEANS = ("variable", "reliable", "reliable_known_patient")
#: Columns that every model has, in order.
COLUMNS = ["gene", "ensembl_id", "group", "variable", "mean", "pcc", "pcc_low", "skill", "reliable"]
#: References without genes, with which predictions are compared.
REFERENCES = ("depth", "colour", "coordinates")
#: Columns that only some models have.
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
_MAX_LISTED = 5


def is_identifier(text: str) -> bool:
    """Return whether a text may be an Ensembl id in the table: printable and without blanks, or empty."""
    return text.isprintable() and " " not in text


def check_identifiers(ensembl_ids: Mapping[str, str]) -> None:
    """Raise if an Ensembl id by symbol cannot be stored."""
    if wrong := {symbol: found for symbol, found in ensembl_ids.items() if not is_identifier(str(found))}:
        raise ValueError(f"`ensembl_ids` has {dict(list(wrong.items())[:_MAX_LISTED])}; ids without blanks are needed")


def is_gene_name(text: str) -> bool:
    """Return whether a text may be the name of a gene in the table."""
    return bool(text) and text == text.strip() and text.isprintable()


def read_genes(path: Path, where: str) -> pd.DataFrame:
    """Read ``genes.csv``, indexed by ``gene``, and check each cell; ``where`` names the file in errors."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is not a CSV table in UTF-8 ({error})") from error
    header, *lines = rows or [[]]
    _check_header(header, where)
    invalid = next((i for i, line in enumerate(lines) if len(line) != len(header)), None)
    if invalid is not None:
        raise ValueError(f"{where}: row {invalid + 2} has {len(lines[invalid])} cells, the header {len(header)}")
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
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{where} lacks {missing}: it is not the gene table of a he2gene_sc model of this schema")
    unknown = [name for name in header if name not in (*COLUMNS, *FIGURES)]
    if unknown or len(set(header)) < len(header):
        duplicated = sorted({name for name in header if header.count(name) > 1})
        raise ValueError(
            f"{where} has unknown columns {unknown} or duplicated columns {duplicated}; valid: {[*COLUMNS, *FIGURES]}"
        )


def _check_genes(genes: tuple[str, ...], where: str) -> None:
    blank = [i + 2 for i, gene in enumerate(genes) if not is_gene_name(gene)]
    if blank:
        raise ValueError(
            f"{where}: column 'gene' is empty, or has surrounding blanks or control characters, in rows {blank[:_MAX_LISTED]}"
        )
    duplicated = [gene for gene, n in Counter(genes).items() if n > 1]
    if duplicated:
        raise ValueError(
            f"{where}: {len(duplicated)} genes are duplicated, first {duplicated[:_MAX_LISTED]}; every row needs a unique name"
        )


def _check_column(name: str, cells: tuple[str, ...], genes: tuple[str, ...], where: str) -> None:
    column = pd.Series(cells, dtype=object)
    if name in _BOOLEANS:
        is_valid, valid = column.isin((*_TRUE, *_FALSE)), "True or False"
    elif name == "group":
        is_valid, valid = column.isin(_GROUPS), f"one of {list(_GROUPS)}"
    elif name == "ensembl_id":
        is_valid, valid = column.map(is_identifier), "an id without blanks, or nothing,"
    elif name in _NUMBERS:
        low, high, valid = -np.inf, np.inf, "a finite number, or nothing,"
        if name in _CORRELATIONS:
            low, high, valid = -1, 1, "a number from -1 to 1, or nothing,"
        elif name == "mean":
            low, valid = 0, "a number from 0, or nothing,"
        values = pd.to_numeric(column, errors="coerce").astype(float)
        is_valid = (column == "") | (np.isfinite(values) & (values >= low) & (values <= high))
    else:
        return
    invalid = np.flatnonzero(~is_valid.to_numpy(bool))
    if len(invalid):
        others = f" (and {len(invalid) - 1:,} cells more)" if len(invalid) > 1 else ""
        raise ValueError(
            f"{where}: column {name!r} of gene {genes[invalid[0]]!r} is {cells[invalid[0]]!r}{others}; {valid} is needed"
        )
