"""``hg.report``: a self-contained HTML page of a slide, or an index of many with a page of each."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .._core import validate
from .._core.elements import is_object
from .._core.genes import columns_of
from .._core.keys import SECTION, Keys
from .._core.predictions import gene_flags, predicted_table, predicting_model, record_of, symbols_of
from .._core.spots import get_table
from .._core.spots import sections_of as section_names
from ..io._files import check_new_file, put_file
from .page import Cell, Section, file_name, is_ours, render
from .slide import Slide, sections_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene


_SUFFIXES = (".html", ".htm")
#: Columns of a summary of slides that its index shows.
_SUMMARY = (
    "status",
    "spots",
    "share_on_tissue",
    "share_like_training",
    "share_annotated",
    "verdict",
    "warnings",
    "error",
)


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
    """Write a page (HTML) of a predicted slide, with all figures in the file; of many slides an index and a page of each.

    The page says first what holds for a new patient. Then come slide and model, tissue and out-of-distribution score, quality of the
    image where :func:`he2gene_sc.pp.qc` was run, annotation, reliable genes, the chosen genes with their intervals, and what was run:
    evaluation, biomarkers, domains. It opens without a network.

    Parameters
    ----------
    data
        Object or table that :func:`he2gene_sc.tl.predict` wrote to, or the path of a store. For many slides: a list of stores, a
        folder of them, or the summary of :func:`he2gene_sc.cohort.predict`, as DataFrame or file.
    path
        File to write; default ``"report.html"``. For many slides a folder, or the file of the index in it; default
        ``"reports/index.html"``. A page that we made is replaced, another file only with ``overwrite``.
    genes
        Genes to show in any case.
    n_genes
        Number of reliable genes that are drawn.
    title
        Title of the page; default: the name of the section.
    model
        Model that predicted, where it is not bundled: its limitations are shown.
    prediction_key, table_key, shapes_key
        As given to predict; the last two where there are several.
    overwrite
        Whether a file that is not a report may be replaced.

    Returns
    -------
    pathlib.Path
        The page, or the index.

    Raises
    ------
    ValueError
        If nothing was predicted, or a gene is not there.
    FileExistsError
        If a file is there that is not a report, without ``overwrite``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy((4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> path = hg.report(sdata, "report.html", genes="ERBB2")
    """
    validate.arguments(report, locals())
    validate.whole_number(n_genes, "n_genes")
    options = {"genes": genes, "n_genes": n_genes, "model": model, "prediction_key": prediction_key}
    options |= {"table_key": table_key, "shapes_key": shapes_key}
    if is_object(data):
        return _one(data, path, title, overwrite, options)
    from ..io._open import open_store

    slides = _slides(data)
    if slides is None:
        return _one(open_store(Path(data), "data"), path, title, overwrite, options)  # type: ignore[arg-type]
    return _many(slides, path, title, overwrite, options)


def _one(data: Any, path: str | Path | None, title: str | None, overwrite: bool, options: dict[str, Any]) -> Path:
    place = _free("report.html" if path is None else path, overwrite)
    put_file(place, render(*_page(data, title, **options)))
    return place


def _free(path: str | Path, overwrite: bool) -> Path:
    return check_new_file(
        path, "path", _SUFFIXES, overwrite=overwrite or is_ours(validate.folder_or_file(path, "path"))
    )


def _page(
    data: Any,
    title: str | None,
    *,
    genes: str | Sequence[str] | None,
    n_genes: int,
    model: str | Path | HE2Gene | None,
    prediction_key: str,
    table_key: str | None,
    shapes_key: str | None,
) -> tuple[str, list[Section]]:
    if hasattr(data, "tables"):
        table_key = predicted_table(data, prediction_key, table_key)
    table = get_table(data, table_key, prediction_key=prediction_key)
    record = record_of(table, prediction_key)
    keys = Keys(prediction_key, str(record["layer"]))
    asked = [] if genes is None else validate.names(genes, "genes", one=True)
    columns = columns_of(table, asked, symbols_of(table, record, None))
    known = gene_flags(table, keys.predicted)
    if missing := [gene for gene, i in zip(asked, columns, strict=True) if i < 0 or not known[i]]:
        raise ValueError(f"`genes` {missing[:5]} were not predicted; hg.get.genes(sdata) lists those that were")
    try:
        card = predicting_model(record, model).card
    except ValueError:
        if model is not None:
            raise
        card = None
    options = {"prediction_key": prediction_key, "table_key": table_key, "shapes_key": shapes_key}
    slide = Slide(data, table, keys, record, card, table.var_names[columns].tolist(), n_genes, options)
    if title is None:
        names = pd.unique(pd.Series(section_names(table)))
        title = "Predicted expression" + (f": {', '.join(names[:3])}" if list(names) != [SECTION] else "")
    return title, sections_of(slide)


def _slides(data: Any) -> pd.DataFrame | None:
    """Table of slides with their stores in ``output``; ``None`` for a single store."""
    from ..cohort._manifest import SEPARATORS

    if isinstance(data, pd.DataFrame):
        frame = data
    elif isinstance(data, str | Path):
        place = validate.folder_or_file(data, "data")
        if not place.exists():
            raise FileNotFoundError(f"`data` {str(data)!r} is not there")
        if place.is_dir() and _may_be_store(place):
            return None
        if place.is_dir():
            stores = sorted(each for each in place.iterdir() if each.is_dir() and _may_be_store(each))
            frame = pd.DataFrame({"output": [str(store) for store in stores]})
        elif place.suffix.lower() in SEPARATORS:
            frame = pd.read_csv(place, sep=SEPARATORS[place.suffix.lower()])
        else:
            raise ValueError(f"`data` {str(data)!r} is neither a store, a folder of stores, nor a summary (.csv, .tsv)")
    elif isinstance(data, Sequence):
        frame = pd.DataFrame({"output": [str(validate.folder_or_file(each, "data")) for each in data]})
    else:
        raise TypeError(
            f"`data` is a {type(data).__name__}; an object, a table, stores or a summary of slides is needed"
        )
    if "output" not in frame:
        raise ValueError(
            f"`data` has no column 'output', columns: {list(frame)}; a summary of hg.cohort.predict has it"
        )
    if not len(frame):
        raise ValueError(f"`data` holds no store{f': {str(data)!r}' if isinstance(data, str | Path) else ''}")
    if (lacking := frame["output"].isna()).any():
        raise ValueError(
            f"`data`: column 'output' is missing in rows {validate.format_list(frame.index[lacking])}; name the store of each, or "
            "leave these rows out"
        )
    return frame


def _may_be_store(place: Path) -> bool:
    from ..io._store import is_store

    try:
        return is_store(place)
    except ValueError:  # a damaged one, which open_store describes
        return True


def _many(frame: pd.DataFrame, path: Any, title: str | None, overwrite: bool, options: dict[str, Any]) -> Path:
    """Write the pages one after the other, then the index; a slide that fails is named there."""
    from ..io._open import open_store

    index = Path("reports") if path is None else validate.folder_or_file(path, "path")
    index = index if index.suffix.lower() in _SUFFIXES else index / "index.html"
    stores = [Path(str(store)) for store in frame["output"]]
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"`path`: {str(index.parent)!r} is a file, or lies in one; a folder is needed") from None
    taken, places = {index.stem.lower()}, []
    for store in stores:
        stem = file_name(store.stem)
        names = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())
        places.append(_free(index.parent / f"{name}.html", overwrite))
    index = _free(index, overwrite)
    rows = []
    for (_, row), store, place in zip(frame.iterrows(), stores, places, strict=True):
        cells: dict[str, Any] = {"slide": Cell(store.stem), **{name: row[name] for name in _SUMMARY if name in frame}}
        try:
            name, sections = _page(open_store(store, "data"), None, **options)
            put_file(place, render(name, sections))
            cells["slide"] = Cell(store.stem, link=place.name)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a slide holds, the others get their pages
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"no report of {str(store)!r}: {reason}", stacklevel=3)
            cells["report"] = f"none: {reason}"
        rows.append(cells)
    section = Section("slides", "Slides", text=[f"{len(rows)} slides; a name leads to the page of the slide."])
    section.add_frame(pd.DataFrame(rows))
    put_file(index, render(title or "Slides", [section]))
    return index
