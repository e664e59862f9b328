"""``hg.io.read_st``: a legacy Spatial Transcriptomics section as SpatialData."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._core.mpp import check_mpp
from .._keys import ATTRS, IMAGE, INSTANCE, REGION, SPOTS, TABLE
from ._decode import decode
from ._raster import image_element

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

_PITCH_UM, _DIAMETER_UM = 200.0, 100.0


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
    """Read a legacy ST section: counts, spot file, image and, if there are, labels.

    Parameters
    ----------
    counts
        TSV (may be gzipped) or DataFrame: rows named ``XxY`` by array position, columns gene names, whole numbers.
    spots
        TSV or DataFrame with the array position ``x, y`` and the centre ``pixel_x, pixel_y`` in the image;
        ``new_x, new_y``, the array position as found on the slide, sharpen the estimate of µm per pixel.
    image
        H&E image that the pixels refer to; ``None`` for a section without one.
    labels
        TSV or DataFrame with ``x, y`` (array position, rounded) and ``label``.
    section, patient
        Names, kept in ``obs``. ``patient`` defaults to ``section``.
    mpp
        µm per pixel. Default: from the pitch of the array.
    pitch_um, diameter_um
        Distance and diameter of the spots on the array, µm.

    Returns
    -------
    spatialdata.SpatialData
        Image ``"he"`` (multiscale, uint8), shapes ``"spots"`` (circles), table ``"table"``: raw counts in ``X``
        (sparse, float32), ``obsm["spatial"]``, ``obs`` with ``array_row, array_col, patient, section`` and, with
        labels, ``annotation``; all in the coordinate system ``"global"``, one unit a pixel.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If columns are missing, ids are duplicated, counts are negative or not whole, or no spot is in both files.

    Notes
    -----
    Spots that stand in only one of counts and spot file are dropped, with one warning that counts them.
    """
    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    check_mpp(mpp)
    count_frame = _table(counts, "counts", index_col=0)
    count_frame = count_frame.set_axis(count_frame.index.astype(str), axis=0)
    spot_frame = _spot_table(spots)
    ids = _shared_ids(count_frame, spot_frame, section)
    values = count_frame.loc[ids].to_numpy()
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all() or (values < 0).any() or (values % 1 != 0).any():
        raise ValueError(f"`counts` of section {section!r} are not raw counts: whole numbers from 0 are needed")
    genes = pd.Index(count_frame.columns.astype(str))
    if genes.has_duplicates:
        raise ValueError(f"`counts` has duplicated genes: {list(genes[genes.duplicated()][:5])}")
    spot_frame = spot_frame.loc[ids]
    centres = spot_frame[["pixel_x", "pixel_y"]].to_numpy(dtype=float)
    if not np.isfinite(centres).all():
        raise ValueError(f"`spots` has NaN or infinite pixels: {list(ids[~np.isfinite(centres).all(1)][:5])}")
    mpp = float(mpp) if mpp is not None else _mpp_of_array(spot_frame, pitch_um)
    obs = pd.DataFrame(
        {
            "array_row": spot_frame["y"].round().astype(int),
            "array_col": spot_frame["x"].round().astype(int),
            "patient": pd.Categorical([patient or section] * len(ids)),
            "section": pd.Categorical([section] * len(ids)),
        },
        index=ids,
    )
    if labels is not None:
        obs["annotation"] = pd.Categorical(read_labels(labels).reindex(ids))
    obs[REGION] = pd.Categorical([SPOTS] * len(ids))
    obs[INSTANCE] = ids.to_numpy()
    table = AnnData(csr_matrix(values.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))
    table.obsm["spatial"] = centres
    shapes = ShapesModel.parse(
        centres, geometry=0, radius=diameter_um / mpp / 2, index=ids, transformations={"global": Identity()}
    )
    sdata = SpatialData(
        images={} if image is None else {IMAGE: image_element(decode(Path(image).expanduser()).levels)},
        shapes={SPOTS: shapes},
        tables={TABLE: TableModel.parse(table, region=SPOTS, region_key=REGION, instance_key=INSTANCE)},
    )
    sdata.attrs[ATTRS] = {"mpp": {IMAGE: mpp}}
    return sdata


def read_labels(labels: str | Path | pd.DataFrame, column: str = "label") -> pd.Series:
    """Read the label of each spot, indexed by ``XxY``; rows without coordinates are dropped with a count.

    Raises
    ------
    ValueError
        If columns are missing or a spot has two labels.
    """
    frame = _table(labels, "labels")
    _need(frame, ["x", "y", column], "labels")
    located = frame["x"].notna() & frame["y"].notna()
    if not located.all():
        logger.info("labels: %d rows without coordinates dropped", (~located).sum())
    frame = frame[located]
    found = pd.Series(frame[column].to_numpy(object), index=_array_ids(frame))
    found = found.where(found.notna() & (found != ""), None)
    if found.index.has_duplicates:
        raise ValueError(f"`labels` names spots twice: {list(found.index[found.index.duplicated()][:5])}")
    return found


def _table(data: str | Path | pd.DataFrame, parameter: str, index_col: int | None = None) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    path = Path(data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`{parameter}` {str(data)!r}: no such file")
    return pd.read_csv(path, sep="\t", index_col=index_col)


def _need(frame: pd.DataFrame, columns: list[str], parameter: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"`{parameter}` lacks the columns {missing}; it has {list(frame.columns[:10])}")


def _array_ids(frame: pd.DataFrame) -> pd.Index:
    x, y = (frame[axis].astype(float).round().astype(int).astype(str) for axis in ("x", "y"))
    return pd.Index(x + "x" + y)


def _spot_table(spots: str | Path | pd.DataFrame) -> pd.DataFrame:
    frame = _table(spots, "spots")
    _need(frame, ["x", "y", "pixel_x", "pixel_y"], "spots")
    if "selected" in frame.columns:
        frame = frame[frame["selected"].astype(bool)]
    frame = frame.set_axis(_array_ids(frame), axis=0)
    if frame.index.has_duplicates:
        raise ValueError(f"`spots` names spots twice: {list(frame.index[frame.index.duplicated()][:5])}")
    return frame


def _shared_ids(counts: pd.DataFrame, spots: pd.DataFrame, section: str) -> pd.Index:
    if counts.index.has_duplicates:
        raise ValueError(f"`counts` names spots twice: {list(counts.index[counts.index.duplicated()][:5])}")
    ids = spots.index[spots.index.isin(counts.index)]
    if len(ids) == 0:
        raise ValueError(
            f"`counts` and `spots` of section {section!r} share no spot: {list(counts.index[:3])} against "
            f"{list(spots.index[:3])}"
        )
    if len(ids) < len(spots) or len(ids) < len(counts):
        warnings.warn(
            f"section {section!r}: {len(counts) - len(ids)} spots stand in the counts alone and {len(spots) - len(ids)} in "
            f"the spot file alone; they are dropped, {len(ids)} remain",
            UserWarning,
            stacklevel=3,
        )
    return ids


def _mpp_of_array(spots: pd.DataFrame, pitch_um: float) -> float:
    """µm per pixel from the affine map of array positions to pixels, whichever way the array lies in the image."""
    named = ("new_x", "new_y") if {"new_x", "new_y"} <= set(spots.columns) else ("x", "y")
    position = spots[list(named)].to_numpy(dtype=float)
    design = np.column_stack([position, np.ones(len(position))])
    if np.linalg.matrix_rank(design) < 3:
        raise ValueError("`mpp` cannot be found from spots in a single row or column; give it in µm per pixel")
    pixels = spots[["pixel_x", "pixel_y"]].to_numpy(dtype=float)
    linear = np.linalg.lstsq(design, pixels, rcond=None)[0][:2]
    return float(pitch_um / np.sqrt(abs(np.linalg.det(linear))))
