"""Find tables and spots of a SpatialData object, match rows to spots, and locate the spots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import validate
from .keys import ATTRS, MAPPINGS, OWN_TABLE
from .names import annotation_target, as_list
from .rasters import levels
from .sources import folder_of, sources
from .validate import format_list

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..image import Pyramid


@dataclass(frozen=True, eq=False)
class Slide:
    """One image with its spots."""

    image_key: str
    shapes_key: str
    table_key: str | None
    coordinate_system: str
    pyramid: Pyramid
    pixel_factor: float  # scales pixels to 0..255
    mpp: float
    mpp_source: str
    spot_ids: pd.Index  # index of the shapes or values of the labels, in the order of the table's rows
    rows: np.ndarray  # rows of the spots in the table, or in the element without a table
    centres: np.ndarray  # (n, 2), pixels of level 0
    inside: np.ndarray  # whether the centre lies inside the image
    diameter_um: float  # median over spots

    @property
    def diameter_px(self) -> float:
        """Diameter in pixels of level 0."""
        return self.diameter_um / self.mpp


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots of one element, in the units of that element."""

    ids: pd.Index  # index of the shapes, or values of the labels
    centres: np.ndarray  # centroids, (n, 2)
    diameters: np.ndarray  # for polygons and labels: side of the square of the same area


def he2gene_attrs(sdata: SpatialData) -> Mapping[str, Any]:
    """Return ``sdata.attrs["he2gene"]``, checked."""
    facts = sdata.attrs.get(ATTRS, {})
    names = ("mpp", "mpp_of", "written")
    maps: list[Any] = [facts.get(name, {}) for name in names] if isinstance(facts, Mapping) else [None]
    if all(isinstance(found, Mapping) for found in maps) and all(isinstance(v, Mapping) for v in maps[-1].values()):
        return facts
    raise ValueError(
        f"`sdata`: attrs[{ATTRS!r}] is {facts!r}; he2gene_sc stores µm per pixel there ({{'mpp': {{image: value}}}}). "
        f"Rename or delete it: del sdata.attrs[{ATTRS!r}]"
    )


def is_object(data: object) -> bool:
    """Whether this is a SpatialData object or a table."""
    return hasattr(data, "tables") or hasattr(data, "obs_names")


def objects_in(data: Any) -> list[Any]:
    """Return the objects or tables in ``data``, which is one of them or several."""
    if is_object(data):
        return [data]
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"`data` is a {type(data).__name__}; a SpatialData or AnnData object, or several, are needed")
    objects = list(data)
    if not objects:
        raise ValueError("`data` is empty; at least one object is needed")
    for item in objects:
        if not is_object(item):
            raise TypeError(f"`data` holds a {type(item).__name__}; SpatialData or AnnData objects are needed")
    return objects


def check_spatialdata(data: object, parameter: str = "sdata") -> None:
    """Raise if an object is not a SpatialData object, and say how to make one."""
    from spatialdata import SpatialData

    if isinstance(data, SpatialData):
        return
    if hasattr(data, "obs_names"):
        raise TypeError(
            f"`{parameter}` is an AnnData; a SpatialData object with the image is needed. If it comes from "
            "scanpy.read_visium or squidpy.read.visium: `import spatialdata_io.experimental`, "
            "`sdata = spatialdata_io.experimental.from_legacy_anndata(adata)`, then call again with `sdata`, for example "
            "hg.tl.predict(sdata). From Space Ranger's folder, with its full-resolution image: "
            "`sdata = spatialdata_io.visium(path, dataset_id='slide', fullres_image_file='slide.tif')`"
        )
    raise TypeError(
        f"`{parameter}` is a {type(data).__name__}; a SpatialData object is needed (for an image file: hg.io.read_he)"
    )


def find_table(sdata: SpatialData, table_key: str | None = None, shapes_key: str | None = None) -> str | None:
    """Return the name of the measured table; ``None`` if there is none."""
    if table_key is not None:
        validate.existing_key(table_key, sdata.tables, "table_key")
        if not regions_of(sdata[table_key], sdata):
            raise ValueError(
                f"`table_key` {table_key!r} does not annotate shapes or labels of this object: "
                f"{sorted(sdata.shapes) + sorted(sdata.labels)}"
            )
        return table_key
    measured = {key: regions_of(table, sdata) for key, table in sdata.tables.items() if OWN_TABLE not in table.uns}
    found = [key for key, regions in measured.items() if regions and shapes_key in (None, *regions)]
    validate.not_ambiguous(found, "table_key")
    return found[0] if found else None


def regions_of(table: AnnData, sdata: SpatialData) -> list[str]:
    """Return the shapes and labels elements of ``sdata`` that a table annotates."""
    attrs = annotation_target(table)
    regions = [] if attrs is None else as_list(attrs["region"])
    return [key for key in regions if key in sdata.shapes or key in sdata.labels]


def find_shapes(sdata: SpatialData, shapes_key: str | None, table_key: str | None) -> list[str]:
    """Return the elements that hold the spots: named, annotated by the table, or the only circles, polygons or labels.

    Tiles and tissue masks that we wrote are not candidates.
    """
    regions = [] if table_key is None else regions_of(sdata[table_key], sdata)
    if shapes_key is None and table_key is not None:
        return regions
    written = he2gene_attrs(sdata).get("written", {})
    masks = {f"{image}_tissue" for image in sdata.images} | set(written.get("labels", {}))
    cells = [key for key in sdata.labels if key not in masks]
    if shapes_key is not None:
        if shapes_key not in sdata.labels:
            validate.existing_key(shapes_key, [*sdata.shapes, *cells], "shapes_key")
        if table_key is not None and shapes_key not in regions:
            raise ValueError(f"`table_key` {table_key!r} annotates {regions}, not `shapes_key` {shapes_key!r}")
        return [shapes_key]
    circles = [key for key, element in sdata.shapes.items() if "radius" in element.columns]
    polygons = [key for key in sdata.shapes if key not in circles and key not in written.get("shapes", {})]
    found = circles or polygons or cells
    if not found:
        raise ValueError(
            "`sdata` has no spots (circles or polygons in sdata.shapes, or labels of cells); make pseudo-spots with "
            "hg.pp.tissue(sdata), hg.pp.grid(sdata)"
        )
    validate.not_ambiguous(found, "shapes_key")
    return found


def spot_element(sdata: SpatialData, shapes_key: str) -> Any:
    """Return the shapes or labels of this name."""
    return sdata.shapes[shapes_key] if shapes_key in sdata.shapes else sdata.labels[shapes_key]


def check_files(place: str, element: Any) -> None:
    """Raise if files of a lazy element, table or array are missing or others: zarr would read zeros or noise."""
    from zarr import Array, Group
    from zarr.storage import LocalStore

    if hasattr(element, "obs_names"):
        arrays = [element.X, *(value for slot in MAPPINGS for value in getattr(element, slot).values())]
    elif hasattr(element, "dims") or hasattr(element, "children"):
        arrays = [level.data for level in levels(element)]
    else:
        arrays = [element]
    for source in (found for array in arrays for found in sources(array)):
        folder = folder_of(source)
        if folder is None:
            continue
        if isinstance(getattr(source, "store", None), LocalStore):
            # Resolve a relative path now, since the working folder may change.
            source.store.root = source.store.root.absolute()
        is_array, is_zarr = isinstance(source, Array), isinstance(source, Array | Group)
        files = [folder / name for name in ("zarr.json", ".zarray", ".zgroup")] if is_zarr else [folder]
        metadata = next((file for file in files if file.exists()), None)
        if metadata is None:
            raise FileNotFoundError(
                f"`sdata`: {place} reads {str(folder.absolute())!r}, which does not exist: was the store moved or deleted, or "
                "has the working folder changed? Read it again with spatialdata.read_zarr"
            )
        shape = json.loads(metadata.read_bytes()).get("shape") if is_array else None
        if is_array and shape != list(source.shape):
            raise FileNotFoundError(
                f"`sdata`: {place} was read from {str(folder.absolute())!r} as an array of shape {list(source.shape)}, which now "
                f"has shape {shape}: was it replaced, or has the working folder changed? Read the store again with "
                "spatialdata.read_zarr"
            )


def spots_of_element(sdata: SpatialData, shapes_key: str) -> Spots:
    """Return ids, centres and diameters of the spots of an element."""
    if shapes_key in sdata.shapes:
        shapes = sdata.shapes[shapes_key]
        points = shapes.geometry.centroid
        round_spots = "radius" in shapes.columns
        sizes = 2 * shapes["radius"].to_numpy(float) if round_spots else np.sqrt(shapes.geometry.area.to_numpy(float))
        spots = Spots(shapes.index, np.column_stack([points.x, points.y]).astype(float), sizes)
    else:
        check_files(f"labels[{shapes_key!r}]", sdata.labels[shapes_key])
        spots = _spots_of_labels(sdata.labels[shapes_key])
    if not len(spots.ids):
        raise ValueError(f"`shapes_key` {shapes_key!r} has no spots")
    if spots.ids.has_duplicates:
        duplicated = spots.ids[spots.ids.duplicated()]
        raise ValueError(f"`shapes_key` {shapes_key!r} has duplicated ids: {format_list(map(repr, duplicated))}")
    bad = ~np.isfinite(spots.centres).all(1)
    if bad.any():
        raise ValueError(
            f"`shapes_key` {shapes_key!r} has NaN or infinite coordinates in {int(bad.sum())} spots: {format_list(map(repr, spots.ids[bad]))}. "
            "A reader writes NaN if the file of positions lacks a barcode of the counts: check that both are of one slide, or "
            "leave these spots out of shapes and table"
        )
    diameter = float(np.median(spots.diameters))
    if not (np.isfinite(diameter) and diameter > 0):
        raise ValueError(f"`shapes_key` {shapes_key!r}: the spots have a diameter of {diameter}; circles are needed")
    return spots


def _spots_of_labels(element: Any) -> Spots:
    """Return the centroids of labels, read by blocks of rows; 0 is background."""
    array = levels(element)[0].transpose("y", "x")
    rows = max(1, 2**24 // array.sizes["x"])
    parts = []
    for start in range(0, array.sizes["y"], rows):
        block = np.asarray(array.data[start : start + rows])
        y, x = np.nonzero(block)
        ids, codes = np.unique(block[y, x], return_inverse=True)
        n = np.bincount(codes, minlength=len(ids))
        # The centre of a pixel is half a pixel from its edge.
        sums = [np.bincount(codes, weights=values + 0.5, minlength=len(ids)) for values in (x, y + start)]
        parts.append(pd.DataFrame({"x": sums[0], "y": sums[1], "n": n}, index=ids))
    total = pd.concat(parts).groupby(level=0).sum()
    centres = total[["x", "y"]].to_numpy(float) / total[["n"]].to_numpy(float)
    return Spots(total.index, centres, np.sqrt(total["n"].to_numpy(float)))


def match_rows(
    sdata: SpatialData, ids: pd.Index, shapes_key: str, table_key: str | None
) -> tuple[pd.Index, np.ndarray]:
    """Return the spot ids in the order of the table's rows, and those rows; without a table, in the order of the element."""
    if table_key is None:
        return ids, np.arange(len(ids))
    table = sdata[table_key]
    attrs = table.uns["spatialdata_attrs"]
    rows = np.flatnonzero((table.obs[attrs["region_key"]] == shapes_key).to_numpy())
    listed = pd.Index(table.obs[attrs["instance_key"]].iloc[rows])
    where = f"`table_key` {table_key!r} and `shapes_key` {shapes_key!r} do not match"
    if listed.hasnans:
        raise ValueError(f"{where}: {int(listed.isna().sum())} rows have no id in obs[{attrs['instance_key']!r}]")
    if isinstance(ids, pd.MultiIndex):
        raise ValueError(
            f"{where}: the ids of the shapes have several levels; one text or whole number per spot is needed"
        )
    if listed.has_duplicates:
        raise ValueError(f"{where}: duplicated ids in the table: {format_list(map(repr, listed[listed.duplicated()]))}")
    # Do not sort: ids of mixed types have no order.

    extra, missing = listed.difference(ids, sort=False), ids.difference(listed, sort=False)
    if len(extra):
        hint = "" if listed.dtype == ids.dtype else f" (ids are {listed.dtype} there, {ids.dtype} here)"
        raise ValueError(
            f"{where}: {len(extra)} extra ids in the table that are not spots: {format_list(map(repr, extra))}{hint}"
        )
    if len(missing) and shapes_key in sdata.shapes:
        raise ValueError(
            f"{where}: {len(missing)} spots are missing from the table: {format_list(map(repr, missing))}. "
            "If the table was filtered, filter the shapes too: "
            f"sdata[{shapes_key!r}] = spatialdata.match_element_to_table(sdata, {shapes_key!r}, {table_key!r})[0][{shapes_key!r}]"
        )
    return listed, rows
