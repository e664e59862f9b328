"""Predict one slide, from its file to its store, for ``he2gene predict`` and ``hg.cohort.predict``."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core.keys import ATTRS
from .._core.names import clean_names
from .._core.ownership import is_prediction
from .._core.validate import format_list

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ..models import HE2Gene

#: ``sdata.attrs["he2gene"][SOURCE]``: the slide that a store was made from, unless it was updated in place.
SOURCE = "source"
#: ``uns[key][FILES]``: digest of the files of image and spots, by region, in a store that was updated in place.
FILES = "files"


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
        from .._core.stores import resolved

        return self.path.is_dir() and self.output == resolved(self.path)

    @property
    def key(self) -> str:
        """Key of the prediction."""
        return str(self.options.get("key_added") or "he2gene")

    def has_same_options(self, other: Job) -> bool:
        """Whether two jobs have the same options and labels."""
        ours, theirs = ((job.options, job.labels, job.pitch_um, job.tissue_method) for job in (self, other))
        return ours == theirs

    @property
    def source(self) -> dict[str, Any]:
        """Identification of the slide, by which a store made from it is recognised; empty for an update in place."""
        from .._core.stores import digest, resolved

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
    from .._core.stores import resolved

    place = path if path.is_dir() else path.with_suffix(".zarr")
    return resolved(place if folder is None else folder / f"{path.stem}.zarr")


def predict_slide(job: Job, model: HE2Gene) -> Path:
    """Read a slide (with tissue mask and pseudo-spots for a bare image), predict and save it; return the store."""
    from .. import io, tl
    from ..io._save import check_place, check_target, least_bytes

    if not job.path.exists():
        raise ValueError(f"PATH {str(job.path)!r} does not exist")
    in_place, source = job.in_place, job.source  # before the slide is read
    files = _element_digests(job.path) if in_place else {}
    if in_place and not job.keep_image:
        raise ValueError("--no-image: PATH is updated in place and keeps its image; name another store with --out")
    sdata = _open(job.path) if job.path.is_dir() else None
    check_target(job.output, overwrite=job.overwrite or in_place)
    check_place(job.output, 0)
    if sdata is None:
        sdata = _read_image(job)
    _check_labels(sdata, job.labels)
    check_place(job.output, least_bytes(sdata, images=job.keep_image and not in_place))
    before = {name: table.uns.get(job.key) for name, table in sdata.tables.items()}
    tl.predict(sdata, model=model, **job.options)
    _write_labels(sdata, job)
    if in_place:
        _note_files(sdata, job, before, files)
    if not job.keep_image:
        for name in list(sdata.images):
            del sdata.images[name]
    if source:
        sdata.attrs[ATTRS] = {**sdata.attrs.get(ATTRS, {}), SOURCE: source}
    try:
        return io.save(sdata, job.output, overwrite=job.overwrite)
    except Exception as error:
        kind = type(error) if isinstance(error, OSError | MemoryError) else ValueError
        raise kind(f"{error}. The prediction {_rescue(sdata, job.output)}") from error


def elements_of(store: Path, record: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return image and spots in a store for each region of a prediction."""
    shapes, images = record["shapes"], record["image"]
    found = {}
    for region in [shapes] if isinstance(shapes, str) else map(str, shapes):
        image = str(images[region] if isinstance(images, Mapping) else images)
        spots = "labels" if (store / "labels" / region).is_dir() else "shapes"
        found[region] = [("images", image), (spots, region)]
    return found


def _element_digests(store: Path) -> dict[tuple[str, str], str]:
    from .._core.stores import digest, elements

    # Elements that cannot be read raise when they are opened.
    with contextlib.suppress(OSError):
        return {each: digest(store, [each]) for each in elements(store) if each[0] != "tables"}
    return {}


def _note_files(sdata: SpatialData, job: Job, before: Mapping[str, Any], files: Mapping[tuple[str, str], str]) -> None:
    """Record digests of the files of image and spots, taken before they were read, in the record of a prediction."""
    for name, table in sdata.tables.items():
        record = table.uns.get(job.key)
        if not is_prediction(record) or record is before.get(name):
            continue
        noted = dict(before.get(name, {}).get(FILES, {})) if is_prediction(before.get(name)) else {}
        regions = elements_of(job.path, record)
        now = [job.options["shapes_key"]] if job.options.get("shapes_key") else list(regions)
        noted |= {region: " ".join(files.get(each, "") for each in regions[region]) for region in now}
        table.uns[job.key] = {**record, FILES: {region: noted[region] for region in regions if region in noted}}


def _open(store: Path) -> SpatialData:
    from .._core.stores import fingerprints, remember
    from ..io._open import open_store

    as_read = fingerprints(store)
    sdata = open_store(store)
    remember(sdata, as_read)
    return sdata


def _read_image(job: Job) -> SpatialData:
    from .. import io, pp
    from .._core.mpp import stored_mpp

    sdata = io.read_he(job.path, mpp=job.options.get("mpp"))
    if stored_mpp(sdata, "he") is None:
        raise ValueError(
            "`mpp` of image 'he' is unknown: the file does not state it; give --mpp, or for many slides a column `mpp`, in "
            "µm per pixel (0.5 for a 20× scan)"
        )
    pp.tissue(sdata, method=job.tissue_method)  # type: ignore[arg-type]  # pp.tissue checks the name
    pp.grid(sdata, pitch_um=job.pitch_um)
    return sdata


def _check_labels(sdata: SpatialData, labels: Mapping[str, str]) -> None:
    """Raise if a table has another patient or section than the job."""
    for name, value in labels.items():
        for key, table in sdata.tables.items():
            if name in table.obs and not (clean_names(table.obs[name]) == value).all():
                raise ValueError(
                    f"`{name}` is {value!r}, but obs[{name!r}] of table {key!r} has "
                    f"{format_list(sorted(map(repr, table.obs[name].unique())))}; leave it out, or correct the table"
                )


def _write_labels(sdata: SpatialData, job: Job) -> None:
    key = job.key
    for table in sdata.tables.values():
        for name, value in job.labels.items():
            if key in table.uns and name not in table.obs:
                table.obs[name] = value
                table.obs[name] = table.obs[name].astype("category")


def _rescue(sdata: SpatialData, target: Path) -> str:
    """Save a prediction beside a store that cannot be written, else in the folder of temporary files; return where."""
    from spatialdata import SpatialData

    from .. import io

    # If an element cannot be written, the tables still may be.
    everything = ("labels", "points", "shapes", "tables")
    for kinds, attrs, left_out in ((everything, sdata.attrs, "the image"), (("tables",), None, "images and shapes")):
        elements = {name: element for kind in kinds for name, element in getattr(sdata, kind).items()}
        part = SpatialData.init_from_elements(elements, attrs=attrs)
        for folder in (target.parent, Path(tempfile.gettempdir())):
            places = (folder / f"{target.stem}-he2gene-{number}.zarr" for number in itertools.count(1))
            try:
                place = io.save(part, next(place for place in places if not place.exists()))
            except Exception as error:  # noqa: BLE001 - try the next place after any error
                last = error
            else:
                return f"is in {str(place)!r}, without {left_out}"
    return f"is lost: it could be written neither beside the store nor to the temporary files ({last})"
