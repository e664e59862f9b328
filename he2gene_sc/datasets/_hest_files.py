"""Read the files of one sample of HEST-1k as ``SpatialData``.

The file formats were taken from HEST's own code (github.com/mahmoodlab/HEST, ``src/hest/readers.py``) and table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core.expression import summarize_values
from .._core.keys import IMAGE
from .._core.logs import logger
from .._core.matrix import matrix_of
from .._core.spots import pitch_of
from ..io._text import check_once
from ._hbcis_files import add_symbols
from ._sections import check_inside

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

#: Side of the squares in which HEST sums transcripts and bins, µm.
_SQUARES_UM = {"Xenium": 100.0, "Visium HD": 128.0}
#: Cells and small bins are closer than this fraction of the side of a square; squares are not.
_MAX_CELL_PITCH = 0.5
#: Prefixes of the names of Xenium's controls, in lower case.
_CONTROLS = ("negcontrol", "blank_", "unassignedcodeword", "deprecatedcodeword", "antisense_", "intergenic_region")
_AMBIGUOUS = "__"
#: Largest fraction of spots outside the image, which may show only a part of a Xenium sample.
_MAX_OUTSIDE = 0.5


def read_sample(counts: Path, image: Path, *, section: str, row: pd.Series) -> SpatialData:
    """Read the ``h5ad`` and ``tif`` of a sample; ``row`` is its row in HEST's table. See :func:`he2gene_sc.datasets.hest`."""
    from ..io._st import section_of, upright_image

    mpp = _positive_um(row, "pixel_size_um_estimated", section)
    technology = str(row["st_technology"])
    side_um = _SQUARES_UM.get(technology)
    diameter_um = side_um or _positive_um(row, "spot_diameter", section)
    table = _on_tissue(_open(counts), section)
    centres = _centres(table, counts)
    values, genes = _genes(table, counts, technology)
    obs = table.obs[[name for name in ("array_row", "array_col") if name in table.obs]].copy()
    if side_um is not None and len(centres) > 1 and pitch_of(centres) < _MAX_CELL_PITCH * side_um / mpp:
        logger.info("sample %s: %d cells or bins are summed into squares of %g µm", section, len(centres), side_um)
        values, centres, obs = _sum_squares(values, centres, side_um / mpp)
    obs = obs.assign(
        patient=pd.Categorical([row["patient"]] * len(obs)),
        section=pd.Categorical([section] * len(obs)),
        dataset=pd.Categorical([row["dataset_title"]] * len(obs)),
        technology=pd.Categorical([technology] * len(obs)),
    )
    images = {IMAGE: upright_image(image)}
    sdata = section_of(values, obs, genes, centres, diameter_um / mpp, mpp, images)
    check_inside(sdata, section, image, counts, _MAX_OUTSIDE)
    add_symbols(sdata["table"])
    return sdata


def _positive_um(row: pd.Series, column: str, section: str) -> float:
    found = float(pd.to_numeric(row[column], errors="coerce"))
    if not np.isfinite(found) or found <= 0:
        raise ValueError(f"sample {section!r}: `{column}` is {row[column]}; a number of µm above 0 is needed")
    return found


def _open(path: Path) -> AnnData:
    import anndata

    try:
        table = anndata.read_h5ad(path)
    except MemoryError:
        raise
    except Exception as error:  # HDF5 raises various errors for damaged bytes
        raise OSError(
            f"{path} is damaged or not an h5ad file ({type(error).__name__}: {error}); download it again"
        ) from error
    if not table.n_obs or not table.n_vars:
        raise ValueError(
            f"{path.name} has {table.n_obs} spots and {table.n_vars} genes; at least one of each is needed"
        )
    check_once(table.obs_names, f"{path.name} names spots")
    return table


def _on_tissue(table: AnnData, section: str) -> AnnData:
    if "in_tissue" not in table.obs:
        return table
    there = ~table.obs["in_tissue"].astype(str).str.strip().str.lower().isin(["0", "0.0", "false"]).to_numpy()
    if there.all() or not there.any():
        return table
    logger.info("sample %s: %d spots off the tissue are left out", section, (~there).sum())
    return table[there]


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
    gene = ~names.str.startswith(_AMBIGUOUS)
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
