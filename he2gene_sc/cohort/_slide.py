"""Predict one slide, from its file to its store, for ``he2gene predict`` and ``hg.cohort.predict``."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import io, pp, tl
from .._core.hints import mpp_hint
from .._core.keys import ATTRS
from .._core.mpp import stored_mpp
from .._core.names import clean_names
from .._core.ownership import is_prediction
from .._core.stores import digest, elements, fingerprints, remember
from .._core.validate import format_list
from ..io._open import open_store
from ..io._save import check_place, check_target, least_bytes
from ..models import HE2Gene
from ._job import FILES, SOURCE, Job, elements_of, find_finished

if TYPE_CHECKING:
    from spatialdata import SpatialData

T = TypeVar("T")
#: Longest time in which another process saves a slide.
_LONGEST_WAIT_S = 600


def predict_slide(job: Job, model: HE2Gene) -> Path:
    """Read a slide (with tissue mask and pseudo-spots for a bare image), predict and save it; return the store."""
    if not job.path.exists():
        raise ValueError(f"PATH {str(job.path)!r} does not exist")
    in_place, source = job.in_place, job.source  # before the slide is read
    files = {}
    # Elements that cannot be read raise when they are opened.
    with contextlib.suppress(OSError):
        if in_place:
            files = {each: digest(job.path, [each]) for each in elements(job.path) if each[0] != "tables"}
    if in_place and not job.keep_image:
        raise ValueError(
            f"`keep_images` is False (--no-image), but store {str(job.path)!r} is updated in place and keeps its image; name another "
            "store: --out, a column `output`, or `output_dir`"
        )
    sdata = None
    if job.path.is_dir():
        as_read = fingerprints(job.path)
        sdata = open_store(job.path)
        remember(sdata, as_read)
    check_target(job.output, overwrite=job.overwrite or in_place)
    _when_free(lambda: check_place(job.output, 0))
    if sdata is None:
        sdata = _read_image(job)
    _check_labels(sdata, job.labels)
    _when_free(lambda: check_place(job.output, least_bytes(sdata, images=job.keep_image and not in_place)))
    before = {name: table.uns.get(job.key) for name, table in sdata.tables.items()}
    tl.predict(sdata, model=model, **job.options)
    _write_labels(sdata, job)
    if in_place:
        _note_files(sdata, job, before, files)
    if not job.keep_image:
        sdata.images.clear()
    if source:
        sdata.attrs[ATTRS] = {**sdata.attrs.get(ATTRS, {}), SOURCE: source}
    try:
        return _when_free(lambda: io.save(sdata, job.output, overwrite=job.overwrite))
    except Exception as error:
        # Another process may have predicted the same slide meanwhile.
        if find_finished(job, model) is not None:
            return job.output
        kind = type(error) if isinstance(error, OSError | MemoryError) else ValueError
        raise kind(f"{error}. The prediction {_rescue(sdata, job.output)}") from error


def _when_free(call: Callable[[], T]) -> T:
    """Wait while another process saves to the store of a slide."""
    until = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            return call()
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(1)


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


def _read_image(job: Job) -> SpatialData:
    sdata = io.read_he(job.path, mpp=job.options.get("mpp"))
    if stored_mpp(sdata, "he") is None:
        raise ValueError(
            f"`mpp` of image 'he' is unknown: the file does not state it; {mpp_hint('he')}, in µm per pixel (0.5 for a 20× scan)"
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
