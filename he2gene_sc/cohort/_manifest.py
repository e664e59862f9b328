"""Convert paths, or the rows of a manifest, to jobs, and check every cell."""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .._core import validate
from .._core.keys import check_key
from .._core.logs import warn
from .._core.mpp import check_mpp
from .._core.names import check_spelling, clean_name_argument
from .._core.stores import resolved
from .._settings import settings
from ..io._decode import IMAGE_SUFFIXES
from ..io._files import check_folder
from ..models import BUNDLED
from ..models._hub import PREFIX
from ..pp._tissue import METHODS
from ..tl._encoding import EncodingOptions, check_options
from ._job import Job, output_of

#: Columns of a manifest that are not arguments of ``tl.predict``: labels, and options of bare images with their types.
LABELS = ("patient", "section")
_IMAGE_OPTIONS = {"pitch_um": {"float"}, "tissue_method": {"str"}}
#: Column separators of manifests and summaries, by file suffix.
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_jobs(
    slides: str | Path | Iterable[str | Path] | pd.DataFrame,
    shared: Mapping[str, Any],
    *,
    output_dir: str | Path | None,
    keep_images: bool,
    overwrite: bool,
    is_local: bool = True,
) -> tuple[list[Job], list[Any]]:
    """Read the job and the model of each slide; a cell of the manifest overrides ``shared``.

    If ``is_local``, the device has to be available on this machine.
    """
    for name in ("path", "output"):
        if name in shared:
            raise ValueError(
                f"`{name}` is {shared[name]!r} for all slides, but belongs to one slide: use a column, "
                "pd.DataFrame({'path': [...], 'output': [...]}), or a folder: output_dir='predicted'"
            )
    _check_names(shared, "arguments of hg.cohort.predict")
    if output_dir is not None:
        output_dir = check_folder(output_dir, "output_dir")
    _check(shared, is_local)
    jobs, models = [], []
    for where, row, folder in _rows(slides):
        try:
            options = {**shared, **{column: _cell(column, value, folder) for column, value in row.items()}}
            models.append(options.pop("model", "breast-her2st"))
            path, output = options.pop("path"), options.pop("output", None)
            own = {name: _value(name, options.pop(name)) for name in _IMAGE_OPTIONS if name in options}
            labels = {
                name: clean_name_argument(options.pop(name), name, sample=name == "patient")
                for name in LABELS
                if name in options
            }
            _check({**options, **own}, is_local)
            if not isinstance(options.get("genes"), str | None):
                # An Index or array cannot be compared with the record in a store.
                options["genes"] = validate.names(options["genes"], "genes")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        place = output_of(path, output_dir) if output is None else output.resolve()
        jobs.append(Job(path, place, options, labels, **own, keep_image=keep_images, overwrite=overwrite))
    if not jobs:
        raise ValueError("`paths` names no slide; pass stores, images or a manifest with a column `path`")
    for label in LABELS:
        found = {f"slide {job.path.name!r}": [job.labels[label]] for job in jobs if label in job.labels}
        check_spelling(found, "paths", label, what=f"{label}s", fix="spell them alike")
    _check_outputs(jobs)
    _warn_of_duplicates(jobs, models)
    return jobs, models


@cache
def _types() -> dict[str, set[str]]:
    """Return the types of the options of bare images, and of the arguments of ``tl.predict`` that may differ between slides."""
    from ..tl import predict

    found = dict(_IMAGE_OPTIONS)
    for name, parameter in validate.parameters(predict).items():
        if name not in ("sdata", "copy", "show_progress_bar"):
            annotation = inspect.formatannotation(parameter.annotation)
            found[name] = {kind.strip(" '").partition("[")[0] for kind in annotation.split("|")}
    return found


def _check_names(names: Iterable[str], what: str) -> None:
    valid = ["path", "output", *LABELS, *_types()]
    for name in names:
        if name not in valid:
            raise ValueError(f"{name!r} is not among the {what}, valid: {valid}{validate.suggest(name, valid)}")


def _check(options: Mapping[str, Any], is_local: bool) -> None:
    """Raise for values that ``pp.tissue``, ``pp.grid`` or ``tl.predict`` would reject for every slide."""
    from ..tl import predict

    validate.arguments(predict, options)
    if "pitch_um" in options:
        validate.in_range(options["pitch_um"], "pitch_um", above=0)
    if "tissue_method" in options:
        validate.one_of(options["tissue_method"], METHODS, "tissue_method")
    mpp = options.get("mpp")
    for value in mpp.values() if isinstance(mpp, Mapping) else [mpp]:
        check_mpp(value)
    for name in ("key_added", "layer"):
        if options.get(name) is not None:
            check_key(options[name], name)
    genes = options.get("genes")
    if isinstance(genes, str) and genes != "all":
        raise ValueError(f"`genes` is {genes!r}; a list of genes, 'all' or None is needed")
    check_options("predict", {name: options[name] for name in EncodingOptions.__annotations__ if name in options})
    _check_device(options, is_local)


def _check_device(options: Mapping[str, Any], is_local: bool) -> None:
    import torch

    from ..inference import resolve_device, resolve_dtype

    device, dtype = options.get("device"), options.get("dtype", "auto")
    if is_local:
        resolve_dtype(dtype, resolve_device(settings.device if device is None else device))
        return
    # Devices of remote workers are unknown here: only check the names.
    try:
        found = torch.device("cuda" if device in (None, "auto") else device)
    except (RuntimeError, TypeError):
        found = resolve_device(str(device))  # raises
    if not isinstance(dtype, str) or dtype != "auto":
        resolve_dtype(dtype, found)


def _rows(slides: Any) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Yield the place of each slide for errors, its cells that are not empty, and the folder that they are relative to."""
    name, folder, header = "`paths`", Path.cwd(), ["path"]
    rows: Iterable[tuple[str, Iterable[Any]]]
    if isinstance(slides, pd.DataFrame):
        header = [str(column).strip() for column in slides.columns]
        cells = slides.itertuples(index=False, name=None)
        rows = ((f"`paths`, row {number}", values) for number, values in enumerate(cells))
    elif isinstance(slides, str | Path):
        path = validate.folder_or_file(slides, "paths")
        rows = [("`paths`", [slides])]
        if path.suffix.lower() in SEPARATORS:
            name, folder = path.name, path.resolve().parent
            header, rows = _read_manifest(path)
        elif path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
            # Tables in other formats would be read as an image.
            raise ValueError(
                f"`paths` {str(path)!r} ends in {path.suffix!r}; a store, an image ({', '.join(sorted(IMAGE_SUFFIXES))}), or a "
                "manifest (.csv, .tsv) is needed"
            )
    elif isinstance(slides, Iterable) and not isinstance(slides, Mapping | bytes):
        # Blanks around a text are part of a file name here, unlike in the cells of a manifest.
        paths = (Path(path) if isinstance(path, str) and path.strip() else path for path in slides)
        rows = ((f"`paths`, number {number}", [path]) for number, path in enumerate(paths))
    else:
        raise TypeError(
            f"`paths` is of type {type(slides).__name__}; paths, or a manifest (a csv file or a DataFrame), are needed"
        )
    validate.all_different(header, name, "columns")
    if "path" not in header:
        raise ValueError(f"{name} lacks the column `path` with the slide of each row; it has {header}")
    _check_names(header, f"columns of {name}")
    for where, values in rows:
        row = {column: value for column, value in zip(header, values, strict=False) if not _is_empty(value)}
        if "path" not in row:
            raise ValueError(f"{where}: `path` is empty")
        yield where, row, folder


def _read_manifest(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Read a manifest: column names, and place and stripped cells of each line that is not empty; the last may lack."""
    if not path.is_file():
        raise ValueError(f"`paths` {str(path)!r}: the file does not exist; name a csv or tsv file with a row per slide")
    separator = SEPARATORS[path.suffix.lower()]
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path.name} is not a manifest: line {reader.line_num}: {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise ValueError(f"{path.name} is empty; a header with a column `path`, and a row per slide, are needed")
    (_, header), *lines = lines
    if "path" not in header:
        other = next((mark for mark in (",", ";", "\t") if mark in header[0]), None)
        hint = f"; columns seem to be separated by {other!r}, {separator!r} is needed" if other else ""
        raise ValueError(
            f"{path.name} lacks the column `path` with the slide of each row; it has {header}"
            f"{hint or validate.suggest('path', header)}"
        )
    n = len(header)
    for number, cells in lines:
        if any(cells[n:]):
            raise ValueError(
                f"{path.name}, line {number}: {len(cells)} cells, but the header has {n}; quote texts that contain "
                f"{separator!r}, and write decimal numbers with a point"
            )
    # Excel writes empty columns.
    named = [i for i, name in enumerate(header) if name]
    if any(cell for _, cells in lines for i, cell in enumerate(cells) if i not in named):
        raise ValueError(f"{path.name} has a column without a name that is not empty; name or remove it")
    rows = [(f"{path.name}, line {number}", [cells[i] for i in named if i < len(cells)]) for number, cells in lines]
    return [header[i] for i in named], rows


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it is not a text file")
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not a manifest in UTF-8 ({error}); save it as 'CSV UTF-8 (comma delimited)'"
        ) from error
    return text


def _is_empty(value: Any) -> bool:
    return pd.api.types.is_scalar(value) and (bool(pd.isna(value)) or not str(value).strip())


def _cell(column: str, value: Any, folder: Path) -> Any:
    """Convert a cell of a manifest in ``folder`` to the value of its argument."""
    if column in ("path", "output"):
        path = validate.folder_or_file(value.strip() if isinstance(value, str) else value, column)
        # Do not follow links: the store is named after the link.
        return (folder / path).absolute()
    if column in ("model", "features") and isinstance(value, str | Path):
        text = str(value).strip()
        if column == "model" and (text in BUNDLED or text.startswith(PREFIX)):
            return text
        place = folder / Path(text).expanduser()
        is_name = isinstance(value, str) and len(Path(text).parts) == 1 and not text.startswith((".", "~"))
        # The function that reads a name that is not a folder finds it in obsm, or raises.
        return text if is_name and not place.is_dir() else place.absolute()
    return _value(column, value.item() if hasattr(value, "item") and not hasattr(value, "shape") else value)


def _value(column: str, value: Any) -> Any:
    """Convert a text to the type of its argument; other values are returned unchanged."""
    if column in LABELS:
        return value
    kinds = _types()[column]
    if "int" in kinds and isinstance(value, float) and value.is_integer():
        return int(value)  # a column of integers with gaps has floats
    if not isinstance(value, str):
        return value
    text = value.strip()
    if column == "genes":
        return text if text == "all" else [gene.strip() for gene in text.replace(";", ",").split(",") if gene.strip()]
    if "bool" in kinds:
        return validate.one_of(text.lower(), ("true", "false"), column) == "true"
    if not kinds & {"int", "float"}:
        return text
    try:
        # Python would read 1_0 as 10.
        number = float(text if "_" not in text else "")
    except ValueError:
        point = ", with a decimal point" if "," in text else ""
        raise ValueError(f"`{column}` is {text!r}; a number{point} is needed") from None
    if "int" not in kinds:
        return number
    if not number.is_integer():
        raise ValueError(f"`{column}` is {text!r}; a whole number is needed")
    return int(number)


def _check_outputs(jobs: list[Job]) -> None:
    """Raise if two slides share an output, an output is another slide, or one lies inside another."""
    writers: dict[Path, Job] = {}
    for job in jobs:
        other = writers.setdefault(job.output, job)
        if other is not job:
            raise ValueError(
                f"`paths`: {str(other.path)!r} and {str(job.path)!r} would both be written to {str(job.output)!r}; name each "
                "slide once, or give the manifest a column `output`"
            )
    slides = [resolved(job.path) for job in jobs]
    for place, job in zip(slides, jobs, strict=True):
        if (writer := writers.get(place, job)) is not job:
            raise ValueError(
                f"`paths`: {str(writer.path)!r} would be written to {str(job.path)!r}, which is also a slide; name "
                "another store in a column `output`"
            )
    places = dict.fromkeys([*writers, *slides])
    for place in places:
        if around := next((parent for parent in place.parents if parent in places), None):
            raise ValueError(
                f"`paths`: {str(place)!r} lies in {str(around)!r}, which is also a slide or an output; name another place in a "
                "column `output`"
            )


def _warn_of_duplicates(jobs: list[Job], models: list[Any]) -> None:
    """Warn of slides that are listed twice (also by links) with the same options."""
    seen: dict[Path, list[tuple[Job, Any]]] = {}
    for job, model in zip(jobs, models, strict=True):
        others = seen.setdefault(resolved(job.path), [])
        for other, its_model in others:
            if its_model == model and replace(other, path=job.path, output=job.output) == job:
                warn(
                    f"{str(other.path)!r} and {str(job.path)!r} are the same slide: it is predicted twice, and counts as two in "
                    "comparisons of slides; remove a row"
                )
                break
        others.append((job, model))
