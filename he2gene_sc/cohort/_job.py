"""A slide of a cohort: where it lies, where its prediction goes, with which options, and whether it is finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._core.keys import ATTRS, Keys
from .._core.names import clean_names
from .._core.ownership import recorded_keys
from .._core.stores import digest, newest_mtime, resolved, root_attrs

if TYPE_CHECKING:
    from ..models import HE2Gene

#: ``sdata.attrs["he2gene"][SOURCE]``: the slide that a store was made from, unless it was updated in place.
SOURCE = "source"
#: ``uns[key][FILES]``: digest of the files of image and spots, by region, in a store that was updated in place.
FILES = "files"
#: Summary of a predicted slide.
METRICS = ("spots", "mpp", "share_on_tissue", "share_like_training", "share_annotated", "verdict", "known_sections")
#: Arguments of ``tl.predict`` that change the result only by rounding; features in ``obsm`` are compared separately.
_SAME_RESULT = {"batch_size", "device", "features"}
#: Number of chunks of a matrix that are read to check that it is complete.
_SAMPLED = 64
#: Keys in the record of arguments that predict resolves by itself if they are not given.
_RESOLVED = {"image_key": "image", "shapes_key": "shapes", "coordinate_system": "coordinate_system", "mpp": "mpp"}


@dataclass(frozen=True)
class Job:
    """A slide to predict, with its options."""

    path: Path  # SpatialData store or H&E image
    output: Path  # store to write, absolute
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of tl.predict, without the model
    labels: Mapping[str, str] = field(default_factory=dict)  # columns of obs with one value: patient, section
    pitch_um: float = 100.0
    tissue_method: str = "auto"
    keep_image: bool = True
    overwrite: bool = False  # replace another store at output, or changes that others saved to path

    @property
    def in_place(self) -> bool:
        """Whether the store of the slide itself is updated."""
        return self.path.is_dir() and self.output == resolved(self.path)

    @property
    def key(self) -> str:
        return str(self.options.get("key_added") or "he2gene")

    @property
    def source(self) -> dict[str, Any]:
        """Identification of the slide, by which a store made from it is recognised; empty for an update in place."""
        if self.in_place:
            return {}
        place = resolved(self.path)
        if place.is_dir():
            return {"path": str(place), "files": digest(place)}
        stat = place.stat()
        return {
            "path": str(place),
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "pitch_um": float(self.pitch_um),
            "tissue_method": self.tissue_method,
        }


def output_of(path: Path, folder: Path | None = None) -> Path:
    """Return the default output of a prediction: the store itself, a store beside the image, or a store in ``folder``."""
    place = path if path.is_dir() else path.with_suffix(".zarr")
    return resolved(place if folder is None else folder / f"{path.stem}.zarr")


def elements_of(store: Path, record: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return image and spots in a store for each region of a prediction."""
    shapes, images = record["shapes"], record["image"]
    found = {}
    for region in [shapes] if isinstance(shapes, str) else map(str, shapes):
        image = str(images[region] if isinstance(images, Mapping) else images)
        spots = "labels" if (store / "labels" / region).is_dir() else "shapes"
        found[region] = [("images", image), (spots, region)]
    return found


def find_finished(job: Job, model: HE2Gene) -> dict[str, Any] | None:
    """Return the summary of a slide whose store holds a complete prediction of this model and options; else ``None``."""
    if job.overwrite or not model.weights_sha256 or not job.output.is_dir():
        return None
    try:
        attrs = root_attrs(job.output)
        if attrs is None or not (job.in_place or attrs.get(ATTRS, {}).get(SOURCE, {}) == job.source):
            return None
        for table, record in _predictions(job):
            if not _matches(table, record, job, model):
                continue
            labels = job.labels.items()
            if not all((clean_names(_read(table / "obs" / name)) == value).all() for name, value in labels):
                continue
            if not job.in_place or _is_of_slide(job, table, record):
                _check_complete(table, record, job.key)
                return _summary(table, record, job.key)
    except Exception:  # noqa: BLE001 - a damaged store raises again, and is reported, when it is predicted
        return None
    return None


def slide_summary(job: Job, model: HE2Gene) -> dict[str, Any]:
    """Return the summary of a slide that was just predicted."""
    found = _predictions(job)
    table, record = next((pair for pair in found if _matches(*pair, job, model)), found[0])
    return _summary(table, record, job.key)


def _summary(table: Path, record: Mapping[str, Any], key: str) -> dict[str, Any]:
    labels = table / "obs" / Keys(key).annotation
    share = float(pd.notna(_read(labels)).mean()) if labels.is_dir() else math.nan
    return recorded_summary(record) | {"share_annotated": share}


def recorded_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a prediction recorded about its slide; shares that it did not record are NaN."""
    share_ood = record.get("share_out_of_distribution", math.nan)
    mpp = set(_values(record["mpp"]))
    return {
        "spots": int(sum(_values(record["n_spots"]))),
        "mpp": float(mpp.pop()) if len(mpp) == 1 else math.nan,
        "share_on_tissue": float(record.get("share_on_tissue", math.nan)),
        "share_like_training": 1 - float(share_ood),
        "verdict": str(record.get("verdict", "")),
        "known_sections": ", ".join(map(str, _values(record.get("known_sections", [])))),
    }


def _is_of_slide(job: Job, table: Path, record: Mapping[str, Any]) -> bool:
    """Whether image and spots are the predicted files; without a record of them, whether none is newer than the prediction."""
    noted = record.get(FILES, {})
    written = newest_mtime(job.output, [("tables", f"{table.name}/uns/{job.key}")])
    for region, chosen in elements_of(job.output, record).items():
        if region in noted:
            if noted[region] != " ".join(digest(job.output, [each]) for each in chosen):
                return False
        elif newest_mtime(job.output, chosen) > written:
            return False
    return True


def _check_complete(table: Path, record: Mapping[str, Any], key: str) -> None:
    """Read all that a prediction wrote, and the names of its spots and genes; only some chunks of a large matrix."""
    import zarr

    written = [table / slot / name for slot, names in recorded_keys(key, record).items() for name in names]
    for place in (table / "obs", table / "var", *written):
        found: Any = zarr.open(place, mode="r")
        if not isinstance(found, zarr.Array):
            _read(place)
            continue
        chunks = [-(-size // step) for size, step in zip(found.shape, found.chunks, strict=True)]
        n = math.prod(chunks)
        for number in np.unique(np.linspace(0, max(n - 1, 0), min(n, _SAMPLED)).astype(int)):
            index = np.unravel_index(number, chunks)
            found[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, found.chunks, strict=True))]


def _predictions(job: Job) -> list[tuple[Path, dict[str, Any]]]:
    """Return the tables with a prediction and its record, the likeliest first; nothing else is read."""
    found = [(place.parents[1], _read(place)) for place in sorted((job.output / "tables").glob(f"[!.]*/uns/{job.key}"))]
    # If there is a measured table, all genes are in a table that is named after the key.
    found.sort(key=lambda pair: (pair[0].name == job.key) != (job.options.get("genes") == "all"))
    return [(table, record) for table, record in found if isinstance(record, dict) and "weights_sha256" in record]


def _read(place: Path) -> Any:
    import zarr
    from anndata.io import read_elem

    return read_elem(zarr.open(place, mode="r"))


def _matches(table: Path, record: Mapping[str, Any], job: Job, model: HE2Gene) -> bool:
    options = {name: value for name, value in job.options.items() if value is not None}
    if options.get("dtype") == "auto":
        del options["dtype"]
    if options.get("genes") != "all" and options.get("table_key", table.name) != table.name:
        return False
    # Arguments that the first call gave and this one leaves to the default.
    if set(_values(record.get("given", []))) - set(options) or not _same_features(table, record, options):
        return False
    for name in ("key_added", "table_key", *_SAME_RESULT):
        options.pop(name, None)
    # By default, features in obsm are used as they were computed.
    tta = options.pop("tta", record["tta"] if "features" in record else model.card.tta)
    layer = options.pop("layer", job.key)
    if record["weights_sha256"] != model.weights_sha256 or bool(record["tta"]) != tta or record["layer"] != layer:
        return False
    if not _same_patient(record, options.pop("known_patient", None)):
        return False
    for name in ("genes", "gene_symbols", "exact", "lattice"):
        if _plain(record.get(name)) != _plain(options.pop(name, None) or None):
            return False
    return all(_matches_option(record.get(_RESOLVED.get(name, name)), value) for name, value in options.items())


def _same_patient(record: Mapping[str, Any], known_patient: bool | None) -> bool:
    """Whether reliable genes were flagged for the requested kind of patient.

    Without known training sections, the patient counts as new.
    """
    if "known_sections" in record and "known_patient" not in _values(record.get("given", [])):
        return known_patient is None
    found = _plain(record.get("known_patient"))
    return bool(found == known_patient or (found is None and known_patient is False))


def _same_features(table: Path, record: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether the same features in ``obsm`` were read, if any; features in a folder equal computed ones."""
    from ..tl._predict import feature_settings

    key = options.get("features")
    in_obsm = isinstance(key, str) and (table / "obsm" / key).exists()
    used = record.get("features")
    if used is None or not in_obsm:
        return used is None and not in_obsm
    settings = feature_settings(_read(table / "uns" / str(key).removeprefix("X_")))
    return bool(used["key"] == key) and _matches_option(used, {"key": key, **settings})


def _matches_option(found: Any, requested: Any) -> bool:
    if isinstance(requested, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == requested.keys()
            and all(_matches_option(found[name], value) for name, value in requested.items())
        )
    if isinstance(requested, float):
        return found is not None and all(math.isclose(float(x), requested, rel_tol=1e-6) for x in _values(found))
    return found is not None and all(bool(_plain(x) == _plain(requested)) for x in _values(found))


def _values(found: Any) -> list[Any]:
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, np.ndarray | list) else [found]


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value)
