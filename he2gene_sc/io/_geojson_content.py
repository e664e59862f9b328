"""Read parts of GeoJSON files: classes and colours of versions of QuPath and of other tools; coordinates in other units."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._core.validate import is_number

#: Names of the coordinate system that GDAL (and geopandas) gives to files without one.
_DEGREES = ("CRS84", "4326")
#: Largest longitude and latitude, in degrees.
_MAX_DEGREES = np.array([180.0, 90.0])
#: Overlap (intersection over union) above which two boxes match, and below which they do not.
_MATCH, _MISMATCH = 0.8, 0.5
_READ_CALL = "gdf = geopandas.read_file(path).set_crs(None, allow_override=True)"


def text_of(path: Path) -> str:
    """Return the text of a file; QuPath compresses files to ``.zip`` on request."""
    content = path.read_bytes()
    if content.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            # macOS adds a file with attributes of each file.
            files = [name for name in archive.namelist() if not name.startswith("__MACOSX/") and not name.endswith("/")]
            files = [name for name in files if name.lower().endswith(".geojson")] or files
            if len(files) != 1:
                raise ValueError(f"the zip file holds {len(files)} files {files[:5]}; one is needed")
            content = archive.read(files[0])
    return content.decode("utf-8-sig")


def classification_of(properties: Mapping[str, Any]) -> Any:
    """Return the classification of an object; GDAL (and geopandas) writes its JSON as text."""
    given = properties.get("classification")
    if isinstance(given, str) and given.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(given)
    return given


def class_name(classification: Any) -> Any:
    """Return the name of a classification; QuPath writes several parts as a list."""
    if not isinstance(classification, dict):
        return classification if isinstance(classification, str) else None
    names = classification.get("names")
    return ": ".join(map(str, names)) if isinstance(names, list) and names else classification.get("name")


def rgb_of(classification: Any) -> list[int] | None:
    """Return the colour of a classification; before QuPath 0.4 it was one number."""
    if not isinstance(classification, Mapping):
        return None
    rgb, packed = classification.get("color"), classification.get("colorRGB")
    if rgb is None and isinstance(packed, int):
        rgb = [packed >> shift & 255 for shift in (16, 8, 0)]
    is_colour = isinstance(rgb, list) and len(rgb) == 3 and all(is_number(v) and 0 <= v <= 255 for v in rgb)
    return rgb if is_colour else None


def check_crs(content: Any, shapes: np.ndarray, path: Path) -> None:
    """Raise if a file states map coordinates. GDAL calls pixels degrees; values beyond 180 or 90 show that they are not."""
    import shapely

    found = content.get("crs") if isinstance(content, dict) else None
    if not found or not len(shapes):
        return
    name = str(found.get("properties", found) if isinstance(found, dict) else found)
    far = np.abs(np.reshape(shapely.total_bounds(shapes), (2, 2))).max(axis=0)
    if any(word in name for word in _DEGREES) and (far > _MAX_DEGREES).any():
        return
    raise ValueError(
        f"`path` {str(path)!r}: the member 'crs' ({name[:80]}) says that the coordinates are not pixels; pixels of level 0, as "
        f"QuPath writes them, are needed. If they are pixels, write the file without it: {_READ_CALL}; gdf.to_file(path)"
    )


def other_unit(polygons: np.ndarray, spots: np.ndarray, mpp: Iterable[float]) -> str:
    """Describe coordinates that look like µm, or like degrees (all in one corner); empty if they look like pixels."""
    import shapely

    there, here = (np.reshape(shapely.total_bounds(shapes), (2, 2)) for shapes in (polygons, spots))
    for value in mpp:
        if _overlap(there, here) < _MISMATCH and _overlap(there / value, here) > _MATCH:
            return (
                f"taken as µm, they match the spots. Convert µm to pixels: {_READ_CALL}; gdf.geometry = gdf.scale("
                f"{1 / value:.4g}, {1 / value:.4g}, origin=(0, 0)); gdf.to_file(path)"
            )
    if (np.abs(there) <= _MAX_DEGREES).all() and (np.ptp(here, axis=0) > 4 * _MAX_DEGREES).all():
        return "they may be degrees, or fractions of the image; export them in pixels"
    return ""


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes."""
    common = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None))
    return float(common / max(np.prod(a[1] - a[0]) + np.prod(b[1] - b[0]) - common, 1e-12))
