"""Read ``genes.csv`` of a model folder, and check each cell."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

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
_TRUTHS = ("True", "TRUE", "true", "False", "FALSE", "false")
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
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f"{where} lacks {missing}: it is not the gene table of a he2gene_sc model of this schema")
    unknown = [name for name in header if name not in (*COLUMNS, *FIGURES)]
    if unknown or len(set(header)) < len(header):
        duplicated = sorted({name for name in header if header.count(name) > 1})
        raise ValueError(
            f"{where} has unknown columns {unknown} or duplicated columns {duplicated}; valid: {[*COLUMNS, *FIGURES]}"
        )
    invalid = next((i for i, line in enumerate(lines) if len(line) != len(header)), None)
    if invalid is not None:
        raise ValueError(f"{where}: row {invalid + 2} has {len(lines[invalid])} cells, the header {len(header)}")
    columns = dict(zip(header, zip(*lines, strict=True) if lines else [()] * len(header), strict=True))
    genes = columns["gene"]
    if blank := [i + 2 for i, gene in enumerate(genes) if not is_gene_name(gene)]:
        raise ValueError(
            f"{where}: column 'gene' is empty, or has surrounding blanks or control characters, in rows {blank[:_MAX_LISTED]}"
        )
    if duplicated := [gene for gene, n in Counter(genes).items() if n > 1]:
        raise ValueError(
            f"{where}: {len(duplicated)} genes are duplicated, first {duplicated[:_MAX_LISTED]}; every row needs a unique name"
        )
    for name, (is_valid, needed) in _CHECKS.items():
        cells = columns.get(name, ())
        invalid_cells = np.flatnonzero(~is_valid(pd.Series(cells, dtype=object)).to_numpy(bool))
        if n := len(invalid_cells):
            first, others = invalid_cells[0], f" (and {n - 1:,} cells more)" if n > 1 else ""
            raise ValueError(
                f"{where}: column {name!r} of gene {genes[first]!r} is {cells[first]!r}{others}; {needed} is needed"
            )
    found = pd.read_csv(
        io.BytesIO(data),
        keep_default_na=False,
        na_values={name: [""] for name in _NUMBERS},
        dtype=dict.fromkeys(("gene", "ensembl_id", "group"), str),
    )
    return found.set_index("gene")


def _numbers(low: float = -np.inf, high: float = np.inf) -> Callable[[pd.Series], pd.Series]:
    def is_valid(cells: pd.Series) -> pd.Series:
        values = pd.to_numeric(cells, errors="coerce").astype(float)
        return (cells == "") | (np.isfinite(values) & (values >= low) & (values <= high))

    return is_valid


#: Check of the cells of each column, and what is valid.
_CHECKS: dict[str, tuple[Callable[[pd.Series], pd.Series], str]] = {
    "ensembl_id": (lambda cells: cells.map(is_identifier), "an id without blanks, or nothing,"),
    "group": (lambda cells: cells.isin(_GROUPS), f"one of {list(_GROUPS)}"),
    **dict.fromkeys(
        ("variable", "reliable", "reliable_known_patient"), (lambda cells: cells.isin(_TRUTHS), "True or False")
    ),
    **dict.fromkeys(_NUMBERS, (_numbers(), "a finite number, or nothing,")),
    **dict.fromkeys(_CORRELATIONS, (_numbers(-1, 1), "a number from -1 to 1, or nothing,")),
    "mean": (_numbers(low=0), "a number from 0, or nothing,"),
}
