"""``hg.report``: a self-contained HTML page of a slide, or an index and pages of many slides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .._core import validate
from .._core.elements import is_object
from .._core.genes import columns_of
from .._core.keys import PATIENT, SECTION, Keys
from .._core.logs import warn
from .._core.names import clean_names
from .._core.predictions import gene_flags, predicted_table, predicting_model, record_of, symbols_of
from .._core.spots import get_table
from .._core.spots import sections_of as section_names
from ..cohort._job import METRICS, recorded_summary
from ..cohort._manifest import SEPARATORS
from ..io import _open
from ..io._files import check_folder, check_new_file, put_file
from ..io._store import is_store
from ..io._text import read_table
from .page import Cell, Section, file_name, is_ours, render
from .slide import Slide, sections_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene

_SUFFIXES = (".html", ".htm")
#: Columns of a summary of slides that are shown in the index.
_SUMMARY = ["status", *(name for name in METRICS if name != "mpp"), "warnings", "error"]


def report(
    data: SpatialData | AnnData | pd.DataFrame | str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    n_genes: int = 4,
    title: str | None = None,
    model: str | Path | HE2Gene | None = None,
    prediction_key: str = "he2gene",
    table_key: str | None = None,
    shapes_key: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an HTML page of a predicted slide, with all figures in the file; for many slides, an index and a page of each.

    The page begins with what holds for a new patient. Then follow slide and model, tissue and out-of-distribution score, quality of
    the image if :func:`he2gene_sc.pp.qc` was run, annotation, reliable genes, the chosen genes with their intervals, and results of
    evaluation, biomarkers and domains. No network is needed to open it.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, or the path of a store. For many slides: a list of stores, a
        folder of them, or the summary of :func:`he2gene_sc.cohort.predict`, as DataFrame or file.
    path
        File to write; default ``"report.html"``. For many slides, a folder, or the file of the index in it; default
        ``"reports/index.html"``. An earlier report is replaced; any other file only with ``overwrite``.
    genes
        Genes to show in addition to reliable genes.
    n_genes
        Number of reliable genes to draw.
    title
        Title of the page; default: the sections, else the name of the store, else the patient.
    model
        Model of the prediction if it is not bundled; its limitations are shown.
    prediction_key, table_key, shapes_key
        As given to predict; the last two are needed if there are several.
    overwrite
        Whether a file that is not a report may be replaced.

    Returns
    -------
    pathlib.Path
        The page, or the index.

    Raises
    ------
    ValueError
        If there is no prediction, or a gene was not predicted.
    FileExistsError
        If the file exists and is not a report, without ``overwrite``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> path = hg.report(sdata, "report.html", genes="ERBB2")
    """
    validate.arguments(report, locals())
    validate.whole_number(n_genes, "n_genes")
    options = {"prediction_key": prediction_key, "table_key": table_key, "shapes_key": shapes_key}
    page = partial(_page, genes=genes, n_genes=n_genes, model=model, options=options)
    slides = None if is_object(data) else _slides(data)
    if slides is not None:
        return _write_pages(slides, path, title, overwrite, page)
    file = _check_file("report.html" if path is None else path, overwrite)
    name, sections, _ = page(data if is_object(data) else _open.open_store(Path(data), "data"), title)  # type: ignore[arg-type]
    put_file(file, render(name, sections))
    return file


def _check_file(path: str | Path, overwrite: bool) -> Path:
    return check_new_file(
        path, "path", _SUFFIXES, overwrite=overwrite or is_ours(validate.folder_or_file(path, "path"))
    )


def _page(
    data: Any, title: str | None, *, genes: Any, n_genes: int, model: Any, options: dict[str, Any]
) -> tuple[str, list[Section], dict[str, Any]]:
    """Return title and sections of the page of a slide, and its row in an index."""
    prediction_key, table_key = options["prediction_key"], options["table_key"]
    if hasattr(data, "tables"):
        table_key = predicted_table(data, prediction_key, table_key)
    table = get_table(data, table_key, prediction_key=prediction_key)
    record = record_of(table, prediction_key)
    keys = Keys(prediction_key, str(record["layer"]))
    chosen = [] if genes is None else validate.names(genes, "genes", one=True)
    columns = columns_of(table, chosen, symbols_of(table, record, None))
    known = gene_flags(table, keys.predicted)
    if missing := [gene for gene, i in zip(chosen, columns, strict=True) if i < 0 or not known[i]]:
        raise ValueError(f"`genes` {missing[:5]} were not predicted; hg.get.genes(sdata) lists the predicted genes")
    try:
        card = predicting_model(record, model).card
    except ValueError:
        if model is not None:
            raise
        card = None
    options = {**options, "table_key": table_key}
    slide = Slide(data, table, keys, record, card, table.var_names[columns].tolist(), n_genes, options)
    if title is None:
        names = _names_of_slide(data, table)
        title = "Predicted expression" + (f": {validate.format_list(names, 3)}" if names else "")
    return title, sections_of(slide), recorded_summary(record)


def _names_of_slide(data: Any, table: AnnData) -> list[str]:
    """Return the names of the sections; if they have no own names, that of the store, else the patients."""
    names = [str(name) for name in pd.unique(pd.Series(section_names(table)))]
    # Without a column of sections, the name is that of the shapes.
    stated = set(clean_names(table.obs[SECTION])) - {SECTION} if SECTION in table.obs else set()
    if len(names) > 1 or stated & set(names):
        return names
    if getattr(data, "path", None) is not None:
        return [Path(data.path).stem]
    return [] if PATIENT not in table.obs else list(pd.unique(pd.Series(clean_names(table.obs[PATIENT])).dropna()))


def _slides(data: Any) -> pd.DataFrame | None:
    """Return the table of slides with their stores in ``output``, or ``None`` for a single store."""
    if isinstance(data, pd.DataFrame):
        frame = data
    elif isinstance(data, str | Path):
        path = validate.folder_or_file(data, "data")
        if not path.exists():
            raise FileNotFoundError(f"`data` {str(data)!r} does not exist")
        if path.is_dir() and _may_be_store(path):
            return None
        if path.is_dir():
            stores = sorted(folder for folder in path.iterdir() if folder.is_dir() and _may_be_store(folder))
            frame = pd.DataFrame({"output": [str(store) for store in stores]})
        elif path.suffix.lower() in SEPARATORS:
            frame = read_table(path, "data", sep=SEPARATORS[path.suffix.lower()])
        else:
            raise ValueError(f"`data` {str(data)!r} is neither a store, a folder of stores, nor a summary (.csv, .tsv)")
    elif isinstance(data, Sequence):
        frame = pd.DataFrame({"output": [str(validate.folder_or_file(store, "data")) for store in data]})
    else:
        raise TypeError(
            f"`data` is a {type(data).__name__}; an object, a table, stores or a summary of slides is needed"
        )
    if "output" not in frame:
        raise ValueError(
            f"`data` has no column 'output', columns: {list(frame)}; pass a summary of hg.cohort.predict, which has it"
        )
    if not len(frame):
        raise ValueError(f"`data` holds no store{f': {str(data)!r}' if isinstance(data, str | Path) else ''}")
    if (lacking := frame["output"].isna()).any():
        raise ValueError(
            f"`data`: column 'output' has missing values in rows {validate.format_list(frame.index[lacking])}; add the stores, or leave "
            "these rows out"
        )
    return frame


def _may_be_store(path: Path) -> bool:
    """Return whether a folder is a store, possibly a damaged one."""
    try:
        return is_store(path)
    except ValueError:  # damaged; open_store raises the error
        return True


def _write_pages(frame: pd.DataFrame, path: Any, title: str | None, overwrite: bool, page: Callable[..., Any]) -> Path:
    """Write the page of each slide, then the index, which lists slides that failed."""
    index = Path("reports") if path is None else validate.folder_or_file(path, "path")
    index = index if index.suffix.lower() in _SUFFIXES else index / "index.html"
    stores = [Path(str(store)) for store in frame["output"]]
    check_folder(index.parent, "path").mkdir(parents=True, exist_ok=True)
    taken, files = {index.stem.lower()}, []
    for store in stores:
        stem = file_name(store.stem)
        names = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())
        files.append(_check_file(index.parent / f"{name}.html", overwrite))
    index = _check_file(index, overwrite)
    rows = []
    for (_, row), store, file in zip(frame.iterrows(), stores, files, strict=True):
        given = {name: row[name] for name in _SUMMARY if name in frame and not pd.isna(row[name]) and row[name] != ""}
        cells: dict[str, Any] = {"slide": Cell(store.stem), **given}
        try:
            name, sections, recorded = page(_open.open_store(store, "data"), None)
            put_file(file, render(name, sections))
            cells = recorded | cells | {"slide": Cell(store.stem, link=file.name)}
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a slide that fails must not stop the others
            reason = f"{type(error).__name__}: {error}"
            warn(f"no report of {str(store)!r}: {reason}")
            cells["report"] = f"none: {reason}"
        # A column without any text is left out.
        rows.append({name: value for name, value in cells.items() if value != ""})
    shown = [name for name in ("slide", *_SUMMARY, "report") if any(name in row for row in rows)]
    section = Section("slides", "Slides", text=[f"{len(rows)} slides; each name links to the page of the slide."])
    section.add_frame(pd.DataFrame(rows, columns=shown))
    put_file(index, render(title or "Slides", [section]))
    return index
