"""``hg.datasets.hest``: read samples from a folder of HEST-1k (Jaume et al., NeurIPS 2024).

The file formats were taken from HEST's own code (github.com/mahmoodlab/HEST, ``src/hest/readers.py``) and table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import summarize_values
from .._core.keys import IMAGE
from .._core.logs import logger, warn
from .._core.matrix import matrix_of
from ..io._files import described
from ..io._raster import image_element
from ..io._st import section_of, upright_levels
from ..io._text import check_columns, check_once, read_table
from ..stats import pitch_of
from ._sections import LazySections, add_symbols, check_inside, select_mask

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

_TEXTS = ("id", "dataset_title", "patient", "organ", "species", "st_technology")
_NUMBERS = ("pixel_size_um_estimated", "spot_diameter")
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
#: Side of the squares in which HEST sums transcripts and bins, µm.
_SQUARES_UM = {"Xenium": 100.0, "Visium HD": 128.0}
#: Cells and small bins are closer than this fraction of the side of a square; squares are not.
_MAX_CELL_PITCH = 0.5
#: Prefixes of the names of Xenium's controls, in lower case.
_CONTROLS = ("negcontrol", "blank_", "unassignedcodeword", "deprecatedcodeword", "antisense_", "intergenic_region")
#: Largest fraction of spots outside the image, which may show only a part of a Xenium sample.
_MAX_OUTSIDE = 0.5


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
    for parameter, wanted in (("organ", organ), ("species", species), ("technology", technology)):
        column = "st_technology" if parameter == "technology" else parameter
        if wanted is not None:
            unknown[column] = metadata.index[chosen & metadata[column].isna().to_numpy()]
        chosen &= select_mask(wanted, metadata[column], parameter, table, _ALIASES)
    if not chosen.any():
        raise ValueError(
            f"no sample of {table} is left of `ids` {ids!r}, `organ` {organ!r}, `species` {species!r} and `technology` "
            f"{technology!r}; drop one of them"
        )
    metadata = _usable(folder, metadata, chosen, unknown, table, all_listed=ids is None)
    there = metadata["species"].value_counts()
    if species is None and len(there) > 1:
        counted = ", ".join(f"{name} {n}" for name, n in there.items())
        warn(
            f"the samples are of {len(there)} species ({counted}), whose genes have different names: hg.tl.train raises for them, "
            "after encoding all; select one species, such as species='human'"
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
    """

    dataset = "HEST-1k"
    table = "its table"

    def _look_up(self, name: str, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
        files = _files(self.root, name)
        return files, [str(path.relative_to(self.root)) for path in files.values() if not path.is_file()]

    def _read(self, name: str, files: Mapping[str, Path], row: pd.Series) -> SpatialData:
        mpp = _positive_um(row, "pixel_size_um_estimated", name)
        technology = str(row["st_technology"])
        side_um = _SQUARES_UM.get(technology)
        diameter_um = side_um or _positive_um(row, "spot_diameter", name)
        table = _open(files["st"])
        centres = _centres(table, files["st"])
        values, genes = _genes(table, files["st"], technology)
        obs = table.obs.filter(["array_row", "array_col"])
        if side_um is not None and len(centres) > 1 and pitch_of(centres) < _MAX_CELL_PITCH * side_um / mpp:
            logger.info("sample %s: %d cells or bins are summed into squares of %g µm", name, len(centres), side_um)
            values, centres, obs = _sum_squares(values, centres, side_um / mpp)
        obs = obs.assign(
            patient=pd.Categorical([row["patient"]] * len(obs)),
            section=pd.Categorical([name] * len(obs)),
            dataset=pd.Categorical([row["dataset_title"]] * len(obs)),
            technology=pd.Categorical([technology] * len(obs)),
        )
        images = {IMAGE: image_element(upright_levels(files["wsi"]))}
        sdata = section_of(values, obs, genes, centres, diameter_um / mpp, mpp, images)
        check_inside(sdata, name, files["wsi"], files["st"], _MAX_OUTSIDE)
        add_symbols(sdata["table"])
        return sdata


def _files(root: Path, name: str) -> dict[str, Path]:
    return {"st": root / "st" / f"{name}.h5ad", "wsi": root / "wsis" / f"{name}.tif"}


def _is_there(root: Path, name: object) -> bool:
    return any(path.is_file() for path in _files(root, str(name)).values())


def _usable(
    root: Path,
    metadata: pd.DataFrame,
    chosen: np.ndarray,
    unknown: Mapping[str, pd.Index],
    table: str,
    *,
    all_listed: bool,
) -> pd.DataFrame:
    """Return the rows of the chosen samples, with ``all_listed`` those with a file and known µm/px; warn of the others.

    Samples with one of two files raise later, and so do all that are named by id.
    """
    where, advice = f"samples in {str(root)!r}", "download the newest table, or add what is missing to it"
    if all_listed:
        others = [path.stem for path in sorted((root / "st").glob("*.h5ad")) if path.stem not in metadata.index]
        _warn_left_out([name for name in others if _is_there(root, name)], f"{where} are not in {table}", advice)
    for column, names in unknown.items():
        _warn_left_out([n for n in names if _is_there(root, n)], f"{where} have no `{column}` in {table}", advice)
    metadata = metadata[chosen]
    if not all_listed:
        return metadata
    there = np.array([_is_there(root, name) for name in metadata.index])
    absent = metadata.index[~there]
    if not there.any():
        raise FileNotFoundError(
            f"`root` {str(root)!r} has none of the {len(metadata)} selected samples of {table}: neither st/{absent[0]}.h5ad "
            f"nor wsis/{absent[0]}.tif exists; download them from {_HUB}"
        )
    problem = f"of {len(metadata)} samples that {table} lists are not in {str(root)!r}"
    _warn_left_out(absent, problem, "name those you need in `ids` to get an error instead")
    metadata = metadata[there]
    mpp = pd.to_numeric(metadata["pixel_size_um_estimated"], errors="coerce").to_numpy(float)
    scaled = np.isfinite(mpp) & (mpp > 0)
    if not scaled.any():
        return metadata
    problem = f"samples have no `pixel_size_um_estimated` in {table}"
    _warn_left_out(metadata.index[~scaled], problem, "add it to the table to read them")
    return metadata[scaled]


def _warn_left_out(names: Sequence[str], problem: str, advice: str) -> None:
    if len(names):
        text = f"{len(names)} {problem} and are left out: {validate.format_list(names)}; {advice}"
        warn(text)


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
    text = dict.fromkeys(_TEXTS, str)
    frame = read_table(tables[-1], sep=",", encoding="utf-8-sig", dtype=text) if tables else _from_json(rows)
    check_columns(frame, [*_TEXTS, *_NUMBERS], f"{table} in {str(root)!r}")
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
        with described(OSError, f"{path} is damaged or not JSON", "; download it again"):
            row = json.loads(path.read_text(encoding="utf-8"))
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
    return first.where(first.isin(frame.index)).map(found).fillna(found)


def _positive_um(row: pd.Series, column: str, section: str) -> float:
    found = float(pd.to_numeric(row[column], errors="coerce"))
    if not np.isfinite(found) or found <= 0:
        raise ValueError(f"sample {section!r}: `{column}` is {row[column]}; a number of µm above 0 is needed")
    return found


def _open(path: Path) -> AnnData:
    """Read the table of a sample, without spots off the tissue."""
    import anndata

    with described(OSError, f"{path} is damaged or not an h5ad file", "; download it again"):
        table = anndata.read_h5ad(path)
    if not table.n_obs or not table.n_vars:
        raise ValueError(
            f"{path.name} has {table.n_obs} spots and {table.n_vars} genes; at least one of each is needed"
        )
    check_once(table.obs_names, f"{path.name} names spots")
    if "in_tissue" in table.obs:
        there = ~table.obs["in_tissue"].astype(str).str.strip().str.lower().isin(["0", "0.0", "false"]).to_numpy()
        if there.any() and not there.all():
            logger.info("sample %s: %d spots off the tissue are left out", path.stem, (~there).sum())
            return table[there]
    return table


def _centres(table: AnnData, path: Path) -> np.ndarray:
    if "spatial" not in table.obsm:
        raise ValueError(f"{path.name} lacks obsm['spatial'] with the pixels of the spots; it has {list(table.obsm)}")
    found = np.asarray(table.obsm["spatial"], dtype=float)
    if found.ndim != 2 or found.shape[1] < 2:
        raise ValueError(f"{path.name}: obsm['spatial'] has shape {found.shape}; x and y of each spot are needed")
    if not np.isfinite(found[:, :2]).all():
        wrong = list(table.obs_names[~np.isfinite(found[:, :2]).all(axis=1)][:5])
        raise ValueError(f"{path.name}: spots {wrong} have no pixels")
    return found[:, :2]


def _genes(table: AnnData, path: Path, technology: str) -> tuple[csr_matrix, pd.Index]:
    """Return raw counts and genes, without controls and ambiguous reads; columns of the same gene are summed."""
    from scipy.sparse import csr_matrix

    if table.X is None:
        raise ValueError(f"{path.name} has no X; move the raw counts there, from a layer of {list(table.layers)}")
    matrix = matrix_of(table, None)
    if problem := summarize_values(matrix).problem:
        raise ValueError(f"{path.name}: X does not hold raw counts (whole numbers from 0) but {problem}")
    names = table.var_names.astype(str)
    gene = ~names.str.startswith("__")
    if technology == "Xenium":
        gene &= ~names.str.lower().str.startswith(_CONTROLS)
    if not gene.any():
        raise ValueError(f"{path.name} has no genes: its columns are {list(names[:5])}")
    values, names = csr_matrix(matrix, dtype=np.float32)[:, np.flatnonzero(gene)], names[gene]
    if names.has_duplicates:
        codes, unique = pd.factorize(names)
        logger.info("%s: %d duplicated columns of genes are summed", path.name, len(names) - len(unique))
        ones = np.ones(len(codes), np.float32)
        values, names = values @ csr_matrix((ones, (np.arange(len(codes)), codes))), pd.Index(unique)
    return values, names


def _sum_squares(values: csr_matrix, centres: np.ndarray, side: float) -> tuple[csr_matrix, np.ndarray, pd.DataFrame]:
    """Sum rows into squares of a grid that begins at the first row and column."""
    from scipy.sparse import csr_matrix

    origin = centres.min(axis=0)
    places = np.floor((centres - origin) / side).astype(int)[:, ::-1]
    squares, codes = np.unique(places, axis=0, return_inverse=True)
    codes = codes.ravel()
    sums = csr_matrix((np.ones(len(codes), np.float32), (codes, np.arange(len(codes))))) @ values
    names = [f"{row:04d}x{column:04d}" for row, column in squares]
    obs = pd.DataFrame({"array_row": squares[:, 0], "array_col": squares[:, 1]}, index=names)
    return csr_matrix(sums), origin + (squares[:, ::-1] + 0.5) * side, obs
