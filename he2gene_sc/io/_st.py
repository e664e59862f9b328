"""``hg.io.read_st``: read a legacy Spatial Transcriptomics section as SpatialData."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core import validate
from .._core.keys import ATTRS, IMAGE, INSTANCE, REGION, SPOTS, TABLE
from .._core.logs import logger, warn
from .._core.mpp import attrs_with_mpp, check_mpp
from .._core.names import clean_name_argument
from ._decode import decode
from ._raster import image_element
from ._text import check_columns, check_header, check_once, read_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

_PITCH_UM, _DIAMETER_UM = 200.0, 100.0
#: Least pitch of an array in pixels; spots that are closer have wrong coordinates.
_LEAST_PITCH_PX = 1e-3


class UnmatchedSpots(UserWarning):
    """Spots are only in the counts or only in the spot file."""


def read_st(
    counts: str | Path | pd.DataFrame,
    spots: str | Path | pd.DataFrame,
    image: str | Path | None = None,
    *,
    labels: str | Path | pd.DataFrame | None = None,
    section: str = "section",
    patient: str | None = None,
    mpp: float | None = None,
    pitch_um: float = _PITCH_UM,
    diameter_um: float = _DIAMETER_UM,
) -> SpatialData:
    """Read a legacy ST section: counts, spot file, image and, optionally, labels.

    Parameters
    ----------
    counts
        TSV (may be gzipped) or DataFrame: rows named ``XxY`` by array position, columns gene names, whole numbers.
    spots
        TSV or DataFrame with the array position ``x, y`` and the centre ``pixel_x, pixel_y`` in the image;
        ``new_x, new_y``, the adjusted array position, refine the estimate of µm per pixel. Rows whose ``selected`` is 0 or
        false are left out.
    image
        H&E image that the pixels refer to, stored upright; ``None`` for a section without one.
    labels
        TSV or DataFrame with ``x, y`` (array position, rounded) and ``label``.
    section, patient
        Names, stored in ``obs``. ``patient`` defaults to ``section``.
    mpp
        µm per pixel. Default: from the pitch of the array.
    pitch_um, diameter_um
        Distance and diameter of the spots on the array, µm.

    Returns
    -------
    spatialdata.SpatialData
        Image ``"he"`` (multiscale, uint8), shapes ``"spots"`` (circles), table ``"table"``: raw counts in ``X``
        (sparse, float32), ``obsm["spatial"]``, ``obs`` with ``array_row, array_col, patient, section`` and, with
        labels, ``annotation``; all in the coordinate system ``"global"``, in pixels.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If a file is damaged.
    ValueError
        If columns are missing, ids or genes are duplicated, counts are negative or not whole numbers, no spot is in both
        files, no label belongs to a spot, or the image is stored mirrored or rotated.

    Notes
    -----
    Spots that are only in the counts or only in the spot file are dropped, with one warning.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.io.read_st("C5.tsv.gz", "C5_selection.tsv", "C5.jpg", patient="C")
    """
    validate.arguments(read_st, locals())
    from scipy.sparse import csr_matrix

    check_mpp(mpp)
    section = clean_name_argument(section, "section")
    patient = section if patient is None else clean_name_argument(patient, "patient", sample=True)
    validate.in_range(pitch_um, "pitch_um", above=0)
    validate.in_range(diameter_um, "diameter_um", above=0)
    with ThreadPoolExecutor(1, "he2gene-image") as pool:
        # Decoded while tables are read and SpatialData is imported: a third of the time.
        pixels = None if image is None else pool.submit(upright_levels, validate.folder_or_file(image, "image"))
        count_frame = _table(counts, "counts", index_col=0)
        count_frame = count_frame.set_axis(count_frame.index.astype(str), axis=0)
        spot_frame = _spot_table(spots)
        ids = _shared_ids(count_frame, spot_frame, section)
        values, genes = _raw_counts(count_frame.loc[ids], section)
        del count_frame  # before the image is complete
        spot_frame = spot_frame.loc[ids]
        centres = _numbers(spot_frame, ("pixel_x", "pixel_y"), "spots")
        if not np.isfinite(centres).all():
            raise ValueError(f"`spots` has NaN or infinite pixels: {list(ids[~np.isfinite(centres).all(1)][:5])}")
        mpp = float(mpp) if mpp is not None else _mpp_of_array(spot_frame, centres, pitch_um)
        positions = _numbers(spot_frame, ("x", "y"), "spots").round().astype(int)
        obs = pd.DataFrame({"array_row": positions[:, 1], "array_col": positions[:, 0]}, index=ids)
        obs["patient"] = pd.Categorical([patient] * len(ids))
        obs["section"] = pd.Categorical([section] * len(ids))
        if labels is not None:
            obs["annotation"] = pd.Categorical(_labels_of(ids, read_labels(labels), section))
        import spatialdata.models  # noqa: F401

        images = {} if pixels is None else {IMAGE: image_element(pixels.result())}
    return section_of(csr_matrix(values.astype(np.float32)), obs, genes, centres, diameter_um / mpp, mpp, images)


def _raw_counts(counts: pd.DataFrame, section: str) -> tuple[np.ndarray, pd.Index]:
    values, genes = counts.to_numpy(), pd.Index(counts.columns.astype(str).str.strip())
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all() or (values < 0).any() or (values % 1 != 0).any():
        raise ValueError(f"`counts` of section {section!r} are not raw counts: whole numbers from 0 are needed")
    if len(genes) == 0:
        raise ValueError(f"`counts` of section {section!r} has no genes; columns separated by tabs are needed")
    if genes.has_duplicates:
        raise ValueError(f"`counts` has duplicated genes: {list(genes[genes.duplicated()][:5])}")
    return values, genes


def section_of(
    counts: csr_matrix,
    obs: pd.DataFrame,
    genes: pd.Index,
    centres: np.ndarray,
    diameter_px: float,
    mpp: float,
    images: dict[str, Any],
) -> SpatialData:
    """Make an object from counts ``(n, genes)``, spots and image of a section, in pixels; ``images`` may be empty."""
    from anndata import AnnData
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    obs[REGION] = pd.Categorical([SPOTS] * len(obs))
    obs[INSTANCE] = obs.index.to_numpy()
    table = AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))
    table.obsm["spatial"] = centres
    shapes = ShapesModel.parse(
        centres, geometry=0, radius=diameter_px / 2, index=obs.index, transformations={"global": Identity()}
    )
    sdata = SpatialData(
        images=images,
        shapes={SPOTS: shapes},
        tables={TABLE: TableModel.parse(table, region=SPOTS, region_key=REGION, instance_key=INSTANCE)},
    )
    sdata.attrs[ATTRS] = attrs_with_mpp(sdata, IMAGE, mpp)
    return sdata


def upright_levels(path: Path) -> list[Any]:
    """Decode the levels of an image; raise if it is not stored upright."""
    decoded = decode(path)
    if decoded.orientation != 1:
        raise ValueError(
            f"`image` {path.name!r} is stored mirrored or rotated (orientation {decoded.orientation}). It is unclear whether the "
            "spots refer to the stored or the upright image. Save the image in the orientation of the spots, without the tag"
        )
    return decoded.levels


def _labels_of(ids: pd.Index, labels: pd.Series, section: str) -> pd.Series:
    found = labels.reindex(ids)
    if labels.notna().any() and not found.notna().any():
        raise ValueError(
            f"`labels` of section {section!r} has no label of any spot: its ids are {list(labels.index[:3])}, the spots {list(ids[:3])}"
        )
    if (missed := int((labels.notna() & ~labels.index.isin(ids)).sum())) > len(labels) / 2:
        warn(
            f"section {section!r}: {missed} of {len(labels)} labels do not belong to a spot and are left out; check that the "
            "files belong together"
        )
    return found


def read_labels(labels: str | Path | pd.DataFrame, column: str = "label") -> pd.Series:
    """Read the label of each spot, indexed by ``XxY``; rows without coordinates are dropped with a count."""
    frame = _table(labels, "labels")
    check_columns(frame, ["x", "y", column], "`labels`")
    located = frame["x"].notna() & frame["y"].notna()
    if not located.all():
        logger.info("labels: %d rows without coordinates dropped", (~located).sum())
    frame = frame[located]
    found = pd.Series(frame[column].to_numpy(object), index=_array_ids(frame, "labels"))
    found = found.where(found.notna() & (found != ""), None)
    check_once(found.index, "`labels` names spots")
    return found


def _table(data: str | Path | pd.DataFrame, parameter: str, index_col: int | None = None) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    path = validate.folder_or_file(data, parameter)
    if not path.is_file():
        raise FileNotFoundError(f"`{parameter}` {str(data)!r}: no such file")
    check_header(path, parameter, "columns" if index_col is None else "genes")
    return read_table(path, parameter, index_col=index_col)


def _array_ids(frame: pd.DataFrame, parameter: str) -> pd.Index:
    position = _numbers(frame, ("x", "y"), parameter, "array positions, numbers")
    lacking = ~np.isfinite(position).all(axis=1)
    if lacking.any():
        raise ValueError(f"`{parameter}` has rows without an array position: {list(frame.index[lacking][:5])}")
    return pd.Index([f"{x}x{y}" for x, y in position.round().astype(int)])


def _numbers(frame: pd.DataFrame, columns: tuple[str, str], parameter: str, needed: str = "numbers") -> np.ndarray:
    try:
        return frame[list(columns)].astype(float).to_numpy()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{parameter}`: {' and '.join(columns)} have to be {needed}: {error}") from error


#: Values of the column `selected` in spot files.
_SELECTED = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}


def _spot_table(spots: str | Path | pd.DataFrame) -> pd.DataFrame:
    frame = _table(spots, "spots")
    check_columns(frame, ["x", "y", "pixel_x", "pixel_y"], "`spots`")
    if "selected" in frame.columns:
        selected = frame["selected"].astype(str).str.strip().str.lower().map(_SELECTED)
        if selected.isna().any():
            unknown = list(dict.fromkeys(frame["selected"][selected.isna()].tolist()))[:5]
            raise ValueError(f"`spots`: the column 'selected' has {unknown}; 1 and 0, or true and false, are needed")
        frame = frame[selected.to_numpy(dtype=bool)]
    frame = frame.set_axis(_array_ids(frame, "spots"), axis=0)
    check_once(frame.index, "`spots` names spots")
    return frame


def _shared_ids(counts: pd.DataFrame, spots: pd.DataFrame, section: str) -> pd.Index:
    check_once(counts.index, "`counts` names spots")
    ids = spots.index[spots.index.isin(counts.index)]
    if len(ids) == 0:
        odd = next(
            (mark for mark in ",;" for frame in (counts, spots) if len(frame) and mark in str(frame.index[0])), None
        )
        raise ValueError(
            f"`counts` and `spots` of section {section!r} share no spot: {list(counts.index[:3])} and "
            f"{list(spots.index[:3])}" + (f"; columns seem to be separated by {odd!r}, tabs are needed" if odd else "")
        )
    if len(ids) < len(spots) or len(ids) < len(counts):
        warnings.warn(
            f"section {section!r}: {len(counts) - len(ids)} spots are only in the counts and {len(spots) - len(ids)} only in "
            f"the spot file; they are dropped, {len(ids)} remain",
            UnmatchedSpots,
            stacklevel=3,
        )
    return ids


def _mpp_of_array(spots: pd.DataFrame, centres: np.ndarray, pitch_um: float) -> float:
    """Return µm per pixel from the affine map of array positions to pixels, for any orientation of the array."""
    named = ("new_x", "new_y") if {"new_x", "new_y"} <= set(spots.columns) else ("x", "y")
    position = _numbers(spots, named, "spots")
    if not np.isfinite(position).all():
        raise ValueError(
            f"`spots` has NaN or infinite values of {' and '.join(named)}; give `mpp`, or remove these columns"
        )
    problem = "`mpp` cannot be found from spots in a single row or column; give it in µm per pixel"
    pitch, _ = fit_lattice(position, centres, problem)
    if not pitch > _LEAST_PITCH_PX:
        raise ValueError(
            f"`mpp` cannot be found: the distance of neighbouring spots is {pitch:.3g} pixels; check pixel_x and pixel_y of "
            "`spots`, or give `mpp` in µm per pixel"
        )
    return float(pitch_um / pitch)


def fit_lattice(position: np.ndarray, centres: np.ndarray, problem: str) -> tuple[float, np.ndarray]:
    """Fit an affine map of array positions to pixels; return the pitch and the residuals, in pixels."""
    design = np.column_stack([position, np.ones(len(position))])
    if np.linalg.matrix_rank(design) < 3:
        raise ValueError(problem)
    fit = np.linalg.lstsq(design, centres, rcond=None)[0]
    return np.sqrt(abs(np.linalg.det(fit[:2]))), centres - design @ fit
