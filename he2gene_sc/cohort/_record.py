"""Find the prediction of a job in a store, and read its summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.keys import ATTRS, Keys
from .._core.names import clean_names
from .._core.ownership import recorded_keys
from ._job import FILES, SOURCE, Job, elements_of

if TYPE_CHECKING:
    from ..models import HE2Gene

#: Arguments of ``tl.predict`` that change the result only by rounding; features in ``obsm`` are compared separately.
_SAME_RESULT = {"batch_size", "device", "features"}
#: Number of chunks of a matrix that are read to check that it is complete.
_SAMPLED = 64
#: Keys in the record of arguments that predict resolves by itself if they are not given.
_RESOLVED = {"image_key": "image", "shapes_key": "shapes", "coordinate_system": "coordinate_system", "mpp": "mpp"}


def find_finished(job: Job, model: HE2Gene) -> dict[str, Any] | None:
    """Return the summary of a slide whose store holds a complete prediction of this model and options; else ``None``."""
    from ..io._store import root_attrs

    if job.overwrite or not model.weights_sha256 or not job.output.is_dir():
        return None
    try:
        attrs = root_attrs(job.output)
        if attrs is None or not (job.in_place or attrs.get(ATTRS, {}).get(SOURCE, {}) == job.source):
            return None
        for table, record in _matching_predictions(job, model):
            valid = _has_labels(table, job.labels) and (not job.in_place or _is_of_slide(job, table, record))
            if valid and all(_can_be_read(place) for place in _parts(table, record, job.key)):
                return _summary(table, record, job.key)
    except Exception:  # noqa: BLE001 - a damaged store raises again, and is reported, when it is predicted
        return None
    return None


def slide_summary(job: Job, model: HE2Gene) -> dict[str, Any]:
    """Return the summary of a slide that was just predicted."""
    found = _matching_predictions(job, model) or _sort_by_likelihood(_predictions(job.output, job.key), job)
    return _summary(*found[0], job.key)


def _summary(table: Path, record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return recorded_summary(record) | {"share_annotated": _annotated_share(table, Keys(key))}


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
    from .._core.stores import digest, newest_mtime

    noted = record.get(FILES, {})
    written = newest_mtime(job.output, [("tables", f"{table.name}/uns/{job.key}")])
    for region, chosen in elements_of(job.output, record).items():
        if region in noted:
            if noted[region] != " ".join(digest(job.output, [each]) for each in chosen):
                return False
        elif newest_mtime(job.output, chosen) > written:
            return False
    return True


def _parts(table: Path, record: Mapping[str, Any], key: str) -> Iterator[Path]:
    """Yield all parts that a prediction wrote, and the names of its spots and genes."""
    yield from (table / "obs", table / "var")
    for slot, names in recorded_keys(key, record).items():
        for name in names:
            yield table / slot / name


def _can_be_read(place: Path) -> bool:
    """Whether a part of a table exists and is complete; only some chunks of a large matrix are read."""
    import zarr

    found: Any = zarr.open(place, mode="r")
    if not isinstance(found, zarr.Array):
        _read(place)
        return True
    chunks = [-(-size // step) for size, step in zip(found.shape, found.chunks, strict=True)]
    n = math.prod(chunks)
    for number in np.unique(np.linspace(0, max(n - 1, 0), min(n, _SAMPLED)).astype(int)):
        index = np.unravel_index(number, chunks)
        found[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, found.chunks, strict=True))]
    return True


def _predictions(store: Path, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the tables with a prediction and its record; nothing else is read."""
    for place in sorted((store / "tables").glob(f"[!.]*/uns/{key}")):
        record = _read(place)
        if isinstance(record, dict) and "weights_sha256" in record:
            yield place.parents[1], record


def _matching_predictions(job: Job, model: HE2Gene) -> list[tuple[Path, dict[str, Any]]]:
    """Return the tables that hold the prediction of a job, the likeliest first."""
    found = _predictions(job.output, job.key)
    return _sort_by_likelihood(
        (pair for pair in found if _matches(*pair, job, model) and _is_requested_table(pair[0], job)), job
    )


def _sort_by_likelihood(found: Iterable[tuple[Path, dict[str, Any]]], job: Job) -> list[tuple[Path, dict[str, Any]]]:
    # If there is a measured table, all genes are in a table that is named after the key.
    all_genes = job.options.get("genes") == "all"
    return sorted(found, key=lambda pair: (pair[0].name == job.key) != all_genes)


def _is_requested_table(table: Path, job: Job) -> bool:
    table_key = job.options.get("table_key")
    return table_key is None or job.options.get("genes") == "all" or table.name == table_key


def _read(place: Path) -> Any:
    import zarr
    from anndata.io import read_elem

    return read_elem(zarr.open(place, mode="r"))


def _matches(table: Path, record: Mapping[str, Any], job: Job, model: HE2Gene) -> bool:
    options = {name: value for name, value in job.options.items() if value is not None}
    if options.get("dtype") == "auto":
        del options["dtype"]
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
    """Whether reliable genes were flagged for the requested kind of patient; without training sections, that is a new one."""
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
    record = _read(table / "uns" / str(key).removeprefix("X_"))
    return bool(used["key"] == key) and _matches_option(used, {"key": key, **feature_settings(record)})


def _matches_option(found: Any, requested: Any) -> bool:
    if isinstance(requested, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == requested.keys()
            and all(_matches_option(found[name], value) for name, value in requested.items())
        )
    return found is not None and all(_equal(value, requested) for value in _values(found))


def _equal(found: Any, requested: Any) -> bool:
    if isinstance(requested, float):
        return math.isclose(float(found), requested, rel_tol=1e-6)
    return bool(_plain(found) == _plain(requested))


def _values(found: Any) -> list[Any]:
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, np.ndarray | list) else [found]


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else list(value)


def _has_labels(table: Path, labels: Mapping[str, str]) -> bool:
    return all(bool((clean_names(_read(table / "obs" / name)) == value).all()) for name, value in labels.items())


def _annotated_share(table: Path, keys: Keys) -> float:
    import pandas as pd

    place = table / "obs" / keys.annotation
    return float(pd.notna(_read(place)).mean()) if place.is_dir() else math.nan
