"""``hg.io.to_geojson`` and ``hg.io.read_geojson``: exchange spots and annotations with QuPath, in pixels of level 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .._core import validate
from .._core.elements import check_spatialdata, find_shapes, match_rows, spot_element, spots_of_element
from .._core.genes import columns_of
from .._core.images import find_image, spots_to_pixels
from .._core.keys import Keys, check_key
from .._core.logs import logger, warn
from .._core.matrix import dense, matrix_of
from .._core.mpp import stored_mpp
from .._core.names import annotation_target, check_spelling, clean_name, clean_names, names_of, stored_colours
from .._core.ownership import check_free, unchanged_keys
from .._core.predictions import predicted_layer, record_of, symbols_of
from .._core.rasters import levels
from .._core.results import write_result
from .._core.slide import slides_of
from .._core.spots import get_table, sections_of, spots_of
from ..stats import pitch_of
from ._files import check_new_file, described, put_file
from ._geojson_content import check_crs, class_name, classification_of, other_unit, rgb_of, text_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_VERB = "io.read_geojson"
#: If overlaps with a spot differ by less than this fraction of the spot, the smaller annotation is used.
_SAME_AREA = 1e-6


def to_geojson(
    sdata: SpatialData,
    path: str | Path,
    *,
    genes: str | Sequence[str] | None = None,
    layer: str | None = "he2gene",
    annotation_key: str | None = None,
    object_type: Literal["detection", "annotation"] = "detection",
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the predicted spots to a GeoJSON file that QuPath reads.

    Each spot is an object in pixels of the full-resolution image, with its class and colour. Its measurements are the
    chosen genes, the confidence, the fraction of tissue and the out-of-distribution score. In QuPath: *File > Import
    objects*, then *Measure > Show measurement maps*.

    Parameters
    ----------
    sdata
        Object that :func:`he2gene_sc.tl.predict` wrote to.
    path
        File to write, ``.geojson`` or ``.json``.
    genes
        Genes to write as measurements; default: none.
    layer
        Layer of the values. Default: the layer of ``prediction_key``. ``None``: ``X``.
    annotation_key
        Column of ``obs`` with the classes. Default: the predicted annotation.
    object_type
        ``"detection"``: fast to draw, for many spots. ``"annotation"``: can be edited in QuPath.
    prediction_key
        ``key_added`` of predict.
    table_key, shapes_key
        As passed to predict; needed if there are several.
    overwrite
        Whether to replace an existing file.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ValueError
        If nothing was predicted, a gene or column is missing or has no values, the slide is ambiguous, or it was saved without its
        image, which gives the coordinates.
    FileExistsError
        If the file exists, without ``overwrite``.

    See Also
    --------
    read_geojson : Read annotations of QuPath.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> path = hg.io.to_geojson(sdata, "spots.geojson", genes=["ERBB2", "COL1A1"])
    """
    validate.arguments(to_geojson, locals())
    import geopandas as gpd

    validate.one_of(object_type, ("detection", "annotation"), "object_type")
    check_spatialdata(sdata)
    path = check_new_file(path, "path", (".geojson", ".json"), overwrite=overwrite)
    table = get_table(sdata, table_key, prediction_key=prediction_key)
    record = record_of(table, prediction_key)
    name = None if layer is None else predicted_layer(table, prediction_key, layer)
    names = [] if genes is None else list(dict.fromkeys(validate.names(genes, "genes", one=True)))
    columns = columns_of(table, names, symbols_of(table, record, None))
    if missing := [gene for gene, column in zip(names, columns, strict=True) if column < 0]:
        raise ValueError(f"`genes` {missing[:5]} are not in the table; hg.get.genes(sdata) lists the predicted ones")
    keys = Keys(prediction_key)
    label = annotation_key or keys.annotation
    if annotation_key is not None:
        validate.key_in(annotation_key, table.obs.columns, "annotation_key")
    slides = slides_of(sdata, table, prediction_key)
    chosen = [slide for slide in slides if shapes_key in (None, slide.shapes_key)]
    if len(chosen) != 1:
        raise ValueError(f"`shapes_key` is {shapes_key!r}; one of {[s.shapes_key for s in slides]} is needed")
    (slide,) = chosen
    rows, outlines = _outlines(sdata, table, slide.shapes_key, slide.image_key, slide.coordinate_system)
    own = table[rows]
    values = pd.DataFrame(dense(matrix_of(own[:, columns], name)), columns=names, index=own.obs_names)
    if empty := [gene for gene in names if values[gene].isna().all()]:
        raise ValueError(f"`genes` {empty[:5]} were not predicted; hg.get.genes(sdata) lists the predicted ones")
    measured = {keys.confidence: "Confidence", keys.tissue: "Tissue", keys.ood: "Out of distribution"}
    for column, title in measured.items():
        if column in own.obs and title not in names and (column != keys.confidence or annotation_key is None):
            values[title] = own.obs[column].to_numpy(float)
    measurements = [
        {str(name): round(float(v), 4) for name, v in row.items() if np.isfinite(v)}
        for row in values.to_dict("records")
    ]
    properties = {
        "objectType": object_type,
        "name": own.obs_names.astype(str),
        "classification": _classifications(table, rows, label),
        "measurements": measurements,
    }
    # Without a classification, QuPath needs no key for it.
    features = gpd.GeoDataFrame(properties, geometry=outlines).iterfeatures(na="drop", drop_id=True)
    content = {"type": "FeatureCollection", "features": list(features)}
    put_file(path, json.dumps(content, ensure_ascii=False, allow_nan=False).encode())
    return path


def read_geojson(
    data: SpatialData | AnnData,
    path: str | Path,
    *,
    key_added: str = "label",
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
) -> None:
    """Label spots by the annotations in a GeoJSON file from QuPath.

    A spot gets the class that covers the largest part of it; on equal overlap, the class of the smaller polygon. Spots
    that no polygon overlaps have a missing label. In QuPath: *File > Export objects as GeoJSON*.

    Parameters
    ----------
    data
        Object, or table with ``obsm["spatial"]`` in pixels of the full-resolution image. In a table, a spot is a circle with
        the diameter ``spot_diameter_fullres`` from ``uns["spatial"]``, else half the distance between spots.
    path
        The file, ``.zip`` if QuPath compressed it. Polygons with a class are read, with their holes: annotations, or, without any,
        detections and cells. Coordinates are pixels of level 0, as QuPath writes them.
    key_added
        Column of ``obs`` for the labels.
    table_key, shapes_key, image_key, coordinate_system
        Names of the elements, as in :func:`he2gene_sc.tl.predict`. If the table has several slides, ``shapes_key`` names the
        slide of the file; spots of other slides keep their labels.

    Raises
    ------
    ValueError
        If the file is not GeoJSON, states a map coordinate system (``crs``), or has no polygon with a class; if no polygon
        overlaps a spot; or if ``key_added`` is taken.

    Warns
    -----
    UserWarning
        If the coordinates of the polygons look like µm, or like degrees (all within some pixels of the corner).

    Notes
    -----
    Writes ``obs[key_added]`` (categorical) and colours in ``uns[key_added + "_colors"]``, if the file has them.

    See Also
    --------
    to_geojson : Write predicted spots for QuPath.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> path = hg.io.to_geojson(sdata, "spots.geojson", annotation_key="pathologist")
    >>> hg.io.read_geojson(sdata, path, key_added="qupath")
    >>> sdata["table"].obs["qupath"].tolist() == sdata["table"].obs["pathologist"].tolist()
    True
    """
    validate.arguments(read_geojson, locals())
    check_key(key_added, "key_added")
    colors_key = f"{key_added}_colors"
    table = get_table(data, table_key)
    check_free(table, _VERB, key_added, obs=[key_added], uns=[colors_key])
    path = validate.folder_or_file(path, "path")
    polygons, names, colors = _read_polygons(path)
    if hasattr(data, "tables"):
        (table_key,) = [key for key, value in data.tables.items() if value is table]
        regions = find_shapes(data, shapes_key, table_key)
        if len(regions) != 1:
            raise ValueError(
                f"`shapes_key` is {shapes_key!r}; the file is of one slide, name its spots: one of {regions}"
            )
        (shapes_key,) = regions
        rows, outlines = _outlines(data, table, shapes_key, image_key, coordinate_system)
        images = [image_key] if image_key else list(data.images)
        stated = [found[0] for key in images if (found := stored_mpp(data, key))]
    else:
        rows, outlines = _circles(table, shapes_key)
        stated = []
    labels = np.full(table.n_obs, None, object)
    if key_added in unchanged_keys(table, key_added).get("obs", ()):
        labels[:] = names_of(table, key_added, "key_added")
        colors = stored_colours(table, key_added) | colors
    labels[rows] = _labels_by_area(outlines, polygons, names)
    unit = other_unit(polygons, outlines, stated)
    spans = (
        f"The polygons span {_format_extent(polygons)}, the spots {_format_extent(outlines)} (x, y in px of level 0); "
    )
    if pd.isna(labels[rows]).all():
        cause = unit or "the file belongs to another image, or the coordinates were scaled"
        raise ValueError(f"`path` {str(path)!r}: no polygon overlaps a spot. {spans}{cause}")
    if unit:
        warn(f"`path` {str(path)!r}: the labels are wrong if the coordinates are not pixels. {spans}{unit}")
    categories = sorted(pd.unique(pd.Series(labels).dropna()))
    uns = {colors_key: [colors[name] for name in categories]} if set(categories) <= colors.keys() else {}
    column = pd.Series(pd.Categorical(labels, categories=categories), index=table.obs_names)
    params = {"path": str(path), "shapes": shapes_key}
    write_result(table, _VERB, key_added, params=params, obs={key_added: column}, uns=uns)


def _outlines(
    sdata: SpatialData, table: AnnData, shapes_key: str, image_key: str | None, coordinate_system: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a region in its table, and the outlines of these spots in pixels of level 0."""
    import shapely
    from spatialdata import to_polygons

    spots = spots_of_element(sdata, shapes_key)
    image_key = find_image(sdata, shapes_key, image_key, coordinate_system, spots)
    (table_key,) = [key for key, value in sdata.tables.items() if value is table]
    ids, rows = match_rows(sdata, spots.ids, shapes_key, table_key)
    _, matrix = spots_to_pixels(sdata, image_key, shapes_key, coordinate_system, spots)
    element, shift = spot_element(sdata, shapes_key), 0.0
    if shapes_key in sdata.labels:
        # to_polygons refers to the centres of pixels, images to their corners.
        element, shift = to_polygons(levels(element)[0]), 0.5
    chosen = element.loc[ids]
    geometry = chosen.geometry.buffer(chosen["radius"]) if "radius" in chosen else chosen.geometry
    return rows, shapely.transform(
        np.asarray(geometry), lambda xy: np.round((xy + shift) @ matrix[:2, :2].T + matrix[:2, 2], 2)
    )


def _circles(table: AnnData, shapes_key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of one slide of a table, and circles around their centres."""
    import shapely

    rows = np.arange(table.n_obs)
    if shapes_key is not None:
        attrs = annotation_target(table)
        regions = np.full(0, "", object) if attrs is None else table.obs[attrs["region_key"]].to_numpy(object)
        validate.key_in(shapes_key, pd.unique(regions), "shapes_key", what="a region of the table")
        rows = np.flatnonzero(regions == shapes_key)
    if len(found := pd.unique(sections_of(table[rows]))) > 1:
        raise ValueError(
            f"`shapes_key` is {shapes_key!r}; the file is of one slide, the table has {validate.format_list(found)}: name the spots "
            "of one slide, or pass only its rows as a table"
        )
    xy = spots_of(table)[rows]
    libraries = list(table.uns.get("spatial", {}).values()) if isinstance(table.uns.get("spatial"), dict) else []
    stated = libraries[0].get("scalefactors", {}).get("spot_diameter_fullres") if len(libraries) == 1 else None
    if stated is None and len(xy) < 2:
        raise ValueError(
            "`data` has one spot of unknown size; uns['spatial'][name]['scalefactors']['spot_diameter_fullres'] (px) is needed"
        )
    diameter = float(pitch_of(xy) / 2 if stated is None else stated)
    return rows, np.asarray(shapely.buffer(shapely.points(xy), diameter / 2))


def _classifications(table: AnnData, rows: np.ndarray, label: str) -> list[dict[str, Any] | None]:
    """Return the classification of each spot in QuPath's format, ``None`` for missing ones."""
    from matplotlib.colors import to_rgb

    if label not in table.obs:
        return [None] * len(rows)
    labels = names_of(table, label, "annotation_key")
    colors = {clean_name(name): color for name, color in stored_colours(table, label).items()}
    found: dict[Any, dict[str, Any] | None] = {None: None}
    for name in pd.unique(pd.Series(labels).dropna()):
        rgb = {"color": [round(255 * part) for part in to_rgb(colors[name])]} if name in colors else {}
        found[name] = {"name": name, **rgb}
    return [found[name] for name in labels[rows]]


def _read_polygons(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Read polygons, the class of each, and the colours of the classes."""
    import shapely
    from matplotlib.colors import to_hex
    from shapely.geometry import shape

    if not path.exists():
        raise FileNotFoundError(f"`path` {str(path)!r} does not exist; name the file that QuPath exported")
    with described(ValueError, f"`path` {str(path)!r} is not GeoJSON; in QuPath run File > Export objects as GeoJSON"):
        content = json.loads(text_of(path))
        features = content.get("features", [content]) if isinstance(content, dict) else content
        found = [(f["geometry"], f.get("properties") or {}) for f in features if f.get("geometry")]
        shapes = shapely.make_valid(np.array([shape(geometry) for geometry, _ in found], object))
        # QuPath before 0.4 uses another key; objects without a type are annotations.
        kinds = [str(p.get("objectType", p.get("object_type", "annotation"))) for _, p in found]
        given = [classification_of(p) for _, p in found]
    check_crs(content, shapes, path)
    names = clean_names(class_name(value) for value in given)
    usable = (shapely.area(shapes) > 0) & pd.notna(names)
    is_annotation = np.array([kind == "annotation" for kind in kinds], bool)
    chosen = usable & is_annotation if (usable & is_annotation).any() else usable
    if not chosen.any():
        raise ValueError(
            f"`path` {str(path)!r} has {len(features)} object(s), none is a polygon with a class; set the class of the "
            "annotations in QuPath and export again"
        )
    if n_skipped := len(features) - int(chosen.sum()):
        logger.info(
            "%d of %d objects of %s have no class or no area, or are not annotations", n_skipped, len(features), path
        )
    check_spelling({"": names[chosen]}, "path", path.name, what="classes", fix="rename one in QuPath and export again")
    colors: dict[str, str] = {}
    for name, value in zip(names[chosen], (g for g, c in zip(given, chosen, strict=True) if c), strict=True):
        if rgb := rgb_of(value):
            colors.setdefault(name, to_hex((rgb[0] / 255, rgb[1] / 255, rgb[2] / 255)))
    return shapes[chosen], names[chosen], colors


def _labels_by_area(outlines: np.ndarray, polygons: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return the class that covers most of each spot, ``None`` if no polygon overlaps it."""
    import geopandas as gpd
    import shapely

    # Merge overlapping polygons of a class into disjoint parts.
    parts = gpd.GeoDataFrame({"name": names}, geometry=polygons).dissolve("name").explode().reset_index()
    geometry = parts.geometry.to_numpy()
    spot, part = shapely.STRtree(geometry).query(outlines, predicate="intersects")
    area = shapely.area(shapely.intersection(outlines[spot], geometry[part])) / shapely.area(outlines)[spot]
    pairs = pd.DataFrame({"spot": spot, "name": parts["name"].to_numpy()[part], "area": area})
    pairs["size"] = shapely.area(geometry)[part]
    pairs = pairs[pairs["area"] > _SAME_AREA]
    pairs = pairs.groupby(["spot", "name"], as_index=False).agg({"area": "sum", "size": "min"})
    pairs["area"] = (pairs["area"] / _SAME_AREA).round()
    pairs = pairs.sort_values(["spot", "area", "size", "name"], ascending=[True, False, True, True])
    best = pairs.drop_duplicates("spot")
    labels = np.full(len(outlines), None, object)
    labels[best["spot"].to_numpy()] = best["name"].to_numpy(object)
    return labels


def _format_extent(shapes: np.ndarray) -> str:
    import shapely

    left, top, right, bottom = shapely.total_bounds(shapes)
    return f"{left:.0f} to {right:.0f}, {top:.0f} to {bottom:.0f}"
