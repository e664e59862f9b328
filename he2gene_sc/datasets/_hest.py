"""``hg.datasets.hest``: read samples from a folder of HEST-1k (Jaume et al., NeurIPS 2024)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from ..io._text import check_once, read_table
from ._sections import LazySections, select_mask

if TYPE_CHECKING:
    from spatialdata import SpatialData

_NEEDED = (
    "id",
    "dataset_title",
    "patient",
    "organ",
    "species",
    "st_technology",
    "pixel_size_um_estimated",
    "spot_diameter",
)
_HUB = "https://huggingface.co/datasets/MahmoodLab/hest"
#: Other names of species and technologies, in lower case.
_ALIASES = {"human": "homo sapiens", "mouse": "mus musculus", "st": "spatial transcriptomics"}
#: Samples of one patient that the table lists under several titles. E, F and H of her2st are BC23567, BC23810 and BC24044 of
#: HBCIS, by the names of their slides. The others are, by their titles and tissue samples, two sections of one block, two
#: panels on one section or block, or Visium and Xenium of one tumour.
_SAME_PATIENT = {
    **dict.fromkeys(("SPA128", "SPA129", "SPA130"), "SPA102"),
    **dict.fromkeys(("SPA125", "SPA126", "SPA127"), "SPA99"),
    **dict.fromkeys(("SPA119", "SPA120", "SPA121"), "SPA93"),
    "TENX14": "TENX13",
    "TENX23": "TENX24",
    "TENX96": "TENX94",
    "TENX97": "TENX95",
    "NCBI776": "NCBI785",
}


def hest(
    root: str | Path,
    *,
    ids: str | Iterable[str] | None = None,
    organ: str | Iterable[str] | None = None,
    species: str | Iterable[str] | None = None,
    technology: str | Iterable[str] | None = None,
) -> HESTSections:
    """Select samples of HEST-1k, which are read on access.

    The data are not downloaded: accept the licence on https://huggingface.co/datasets/MahmoodLab/hest and download all
    or some samples, as described there. Each sample has its own licence; many exclude commercial use.

    Parameters
    ----------
    root
        The folder, with ``HEST_v1_1_0.csv`` (the newest version is used) or the folder ``metadata`` (``<id>.json``).
    ids
        Samples to select, such as ``hg.datasets.HE2GENE_SPLIT.hest_train``; default: all. Their files have to exist.
    organ, species, technology
        Values of the columns ``organ``, ``species`` and ``st_technology`` to select, such as ``"Breast"``,
        ``"Homo sapiens"`` (or ``"human"``) and ``["Visium", "Xenium"]``; case is ignored; default: all.

    Returns
    -------
    HESTSections
        A sequence of ``SpatialData``, in the order of the table: it has a length, can be indexed by position, slice or id,
        and iterated any number of times. Only the table is read at once, and files are checked to exist; a sample is read
        each time it is accessed, and not kept. Each has image ``"he"`` (multiscale, uint8, read from the file by region),
        shapes ``"spots"`` (circles), table ``"table"``: raw counts in ``X`` (sparse float32, spots × genes),
        ``obsm["spatial"]`` (pixels), and in ``obs``

        - ``patient``: title of the data set and patient, since HEST's names are unique only within a data set. Samples of a
          data set without patient names count as one patient. Samples that are known to be of one patient under two titles
          have one name: E, F and H of her2st are patients of HBCIS;
        - ``section``: the id; ``dataset``, ``technology``;
        - ``array_row``, ``array_col``, if the sample has them.

        µm per pixel is ``pixel_size_um_estimated``. HEST has no labels.

    Raises
    ------
    FileNotFoundError
        If ``root`` or its table is missing, if a sample of ``ids`` lacks files, or no selected sample has files.
    ValueError
        If the table lacks columns or names a sample twice, if a name is unknown or no sample is left; when a sample is
        read: if its files do not belong together, or have invalid content.
    OSError
        If a file is damaged.

    Warns
    -----
    UserWarning
        If samples that are not named in ``ids`` are left out, since they are not in the folder or not in the table, or the
        table lacks their µm/px or a value to select by. If samples of several species are selected.

    Notes
    -----
    - Transcripts of a Xenium sample are summed in squares of 100 µm, bins of a Visium HD sample in squares of 128 µm; the
      spots are circles of that diameter. Tables of cells or small bins are summed into such squares. Control probes of
      Xenium are left out.
    - Spots off the tissue (``in_tissue``) and ambiguous reads (``__ambiguous[…]``) are left out; columns of the same gene
      are summed.
    - Xenium and targeted panels list some hundred genes: if they are among the samples, train without
      ``missing_genes_are_zero``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> data = hg.datasets.hest("HEST", organ="Breast", species="human", technology="Visium")
    >>> model = hg.tl.train(data)  # doctest: +SKIP
    """
    validate.arguments(hest, locals())
    folder = validate.folder_or_file(root, "root")
    metadata, table = _metadata(folder)
    chosen = select_mask(ids, metadata.index, "ids", table)
    unknown = {}
    for parameter, wanted, column in (
        ("organ", organ, "organ"),
        ("species", species, "species"),
        ("technology", technology, "st_technology"),
    ):
        if wanted is not None:
            unknown[column] = metadata.index[chosen & metadata[column].isna().to_numpy()]
        chosen &= select_mask(wanted, metadata[column], parameter, table, _ALIASES)
    if not chosen.any():
        raise ValueError(
            f"no sample of {table} is left of `ids` {ids!r}, `organ` {organ!r}, `species` {species!r} and `technology` "
            f"{technology!r}; drop one of them"
        )
    listed, metadata = metadata.index, metadata[chosen]
    _warn_of_others(folder, listed if ids is None else None, unknown, table)
    if ids is None:
        metadata = _usable(folder, metadata, table)
    there = metadata["species"].value_counts()
    if species is None and len(there) > 1:
        counted = ", ".join(f"{name} {n}" for name, n in there.items())
        warnings.warn(
            f"the samples are of {len(there)} species ({counted}), whose genes have different names: hg.tl.train raises for them, "
            "after encoding all; select one species, such as species='human'",
            stacklevel=2,
        )
    return HESTSections(folder, metadata)


class HESTSections(LazySections):
    """Sequence of HEST-1k samples that reads one sample at a time, see :func:`hest`.

    Attributes
    ----------
    root
        The folder.
    metadata
        One row per sample, indexed by its id: the table of HEST, with ``patient`` unique over data sets.

    Raises
    ------
    FileNotFoundError
        If a file of a sample is missing.
    """

    dataset = "HEST-1k"
    table = "its table"

    def _look_up(self, name: str, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
        files = _files(self.root, name)
        return files, [str(path.relative_to(self.root)) for path in files.values() if not path.is_file()]

    def _read(self, name: str, files: Mapping[str, Path], row: pd.Series) -> SpatialData:
        from ._hest_files import read_sample

        return read_sample(files["st"], files["wsi"], section=name, row=row)


def _files(root: Path, name: str) -> dict[str, Path]:
    return {"st": root / "st" / f"{name}.h5ad", "wsi": root / "wsis" / f"{name}.tif"}


def _is_there(root: Path, name: object) -> bool:
    return any(path.is_file() for path in _files(root, str(name)).values())


def _warn_of_others(root: Path, listed: pd.Index | None, unknown: Mapping[str, pd.Index], table: str) -> None:
    """Warn of samples in the folder that the table does not list, or for which it lacks a value to select by."""
    names = [] if listed is None else [path.stem for path in sorted((root / "st").glob("*.h5ad"))]
    others = {
        f"are not in {table}": [name for name in names if listed is not None and name not in listed],
        **{f"have no `{column}` in {table}": names for column, names in unknown.items()},
    }
    for problem, names in others.items():
        if found := [name for name in names if _is_there(root, name)]:
            warnings.warn(
                f"{len(found)} samples in {str(root)!r} {problem} and are left out: {validate.format_list(found)}; download the "
                "newest table, or add what is missing to it",
                stacklevel=3,
            )


def _usable(root: Path, metadata: pd.DataFrame, table: str) -> pd.DataFrame:
    """Select samples with known µm/px of which a file exists; samples with one of two files raise later."""
    there = [_is_there(root, name) for name in metadata.index]
    absent = list(metadata.index[[not found for found in there]])
    if not any(there):
        raise FileNotFoundError(
            f"`root` {str(root)!r} has none of the {len(metadata)} selected samples of {table}: neither st/{absent[0]}.h5ad "
            f"nor wsis/{absent[0]}.tif exists; download them from {_HUB}"
        )
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(metadata)} samples that {table} lists are not in {str(root)!r} and are left out: "
            f"{validate.format_list(absent)}; name those you need in `ids` to get an error instead",
            stacklevel=3,
        )
    metadata = metadata[there]
    mpp = pd.to_numeric(metadata["pixel_size_um_estimated"], errors="coerce").to_numpy(float)
    scaled = np.isfinite(mpp) & (mpp > 0)
    if scaled.any() and not scaled.all():
        warnings.warn(
            f"{(~scaled).sum()} samples have no `pixel_size_um_estimated` in {table} and are left out: "
            f"{validate.format_list(metadata.index[~scaled])}; add it to the table to read them",
            stacklevel=3,
        )
        metadata = metadata[scaled]
    return metadata


def _metadata(root: Path) -> tuple[pd.DataFrame, str]:
    """Read the metadata, one row per sample, indexed by id; return also the name of their table or folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"`root` {str(root)!r}: no such folder")
    tables = sorted(root.glob("HEST_v*.csv"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    rows = sorted((root / "metadata").glob("*.json"))
    if not tables and not rows:
        raise FileNotFoundError(
            f"`root` {str(root)!r} has neither a table HEST_v1_1_0.csv nor a folder metadata with <id>.json; download one of "
            f"them from {_HUB}"
        )
    table = tables[-1].name if tables else "metadata"
    text = dict.fromkeys(_NEEDED[:6], str)
    frame = read_table(tables[-1], sep=",", encoding="utf-8-sig", dtype=text) if tables else _from_json(rows)
    missing = [column for column in _NEEDED if column not in frame.columns]
    if missing:
        raise ValueError(f"{table} in {str(root)!r} lacks the columns {missing}; it has {list(frame.columns)}")
    for column in text:
        frame[column] = frame[column].where(frame[column].isna(), frame[column].astype(str).str.strip())
    if frame["id"].isna().any():
        raise ValueError(f"{table} has rows without an id: {[int(i) for i in frame.index[frame['id'].isna()][:5]]}")
    frame = frame.set_axis(pd.Index(frame["id"], name="section"), axis=0)
    check_once(frame.index, f"{table} names samples")
    return frame.assign(patient=_patients(frame)), table


def _from_json(paths: list[Path]) -> pd.DataFrame:
    rows = []
    for path in paths:
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise OSError(f"{path} is damaged or not JSON ({error}); download it again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} holds a {type(row).__name__}; an object with the fields of the sample is needed")
        rows.append({"patient": None, "spot_diameter": None, **row, "id": row.get("id", path.stem)})
    return pd.DataFrame(rows, dtype=object)


def _patients(frame: pd.DataFrame) -> pd.Series:
    """Return names of patients that are unique over data sets."""
    title = frame["dataset_title"].fillna("")
    name = frame["patient"].fillna("")
    found = title.where(name == "", title + ": " + name)
    # Without title and patient, each sample counts as its own patient.
    found = found.where(found != "", frame["id"])
    # Within a data set, names that differ only in case are one patient.
    found = found.groupby(found.where(name == "", title + ": " + name.str.casefold())).transform("first")
    first = pd.Series(_SAME_PATIENT).reindex(frame.index)
    known = first.isin(frame.index)
    return found.where(~known, first.where(known).map(found))
