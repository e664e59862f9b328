"""What other tools than QuPath make of a GeoJSON file: classes as text, coordinates in degrees, in µm, or of a map."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: Names of the coordinate system that GDAL, and geopandas by it, gives to files that name none.
_DEGREES = ("CRS84", "4326")
#: Degrees of longitude and latitude.
_EARTH = np.array([180.0, 90.0])
#: Boxes that have this part in common lie alike; with less than that they do not.
_ALIKE, _UNLIKE = 0.8, 0.5
_READ = "gdf = geopandas.read_file(path).set_crs(None, allow_override=True)"


def classification_of(properties: Mapping[str, Any]) -> Any:
    """Return the class as QuPath has it; GDAL, and geopandas by it, makes text of its JSON."""
    given = properties.get("classification")
    if isinstance(given, str) and given.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(given)
    return given


def check_crs(content: Any, shapes: np.ndarray, path: Path) -> None:
    """Refuse a file whose coordinates are those of a map; GDAL calls pixels degrees, which exceed the Earth."""
    import shapely

    found = content.get("crs") if isinstance(content, dict) else None
    if not found or not len(shapes):
        return
    name = str(found.get("properties", found) if isinstance(found, dict) else found)
    far = np.abs(np.reshape(shapely.total_bounds(shapes), (2, 2))).max(axis=0)
    if any(word in name for word in _DEGREES) and (far > _EARTH).any():
        return
    raise ValueError(
        f"`path` {str(path)!r}: the member 'crs' ({name[:80]}) says that the coordinates are not pixels; pixels of level 0, as "
        f"QuPath writes them, are needed. If they are pixels, write the file without it: {_READ}; gdf.to_file(path)"
    )


def other_unit(polygons: np.ndarray, spots: np.ndarray, mpp: Iterable[float]) -> str:
    """Say what the polygons look like, if not like pixels: like the spots in µm, or all of them in one corner; else ''."""
    import shapely

    there, here = (np.reshape(shapely.total_bounds(shapes), (2, 2)) for shapes in (polygons, spots))
    for value in mpp:
        if _overlap(there, here) < _UNLIKE and _overlap(there / value, here) > _ALIKE:
            return (
                f"in µm they would lie like the spots. From µm to pixels: {_READ}; gdf.geometry = gdf.scale({1 / value:.4g}, "
                f"{1 / value:.4g}, origin=(0, 0)); gdf.to_file(path)"
            )
    if (np.abs(there) <= _EARTH).all() and (np.ptp(here, axis=0) > 4 * _EARTH).all():
        return "they may be degrees, or shares of the image; export them in pixels"
    return ""


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two boxes have in common, of that of both together."""
    common = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None))
    return float(common / max(np.prod(a[1] - a[0]) + np.prod(b[1] - b[0]) - common, 1e-12))
