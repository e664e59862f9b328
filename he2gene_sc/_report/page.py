"""Parts of a page, and rendering of a page as self-contained HTML."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

#: Text that identifies our pages, and the number of bytes at the start of the file that contain it.
_MARK, _HEAD_BYTES = b'name="generator" content="he2gene_sc report"', 1000
_DPI, _COLOURS = 90, 255


@dataclass(frozen=True)
class Cell:
    """Cell of a table: a text, with a colour before it or a link to another page."""

    text: str
    color: str = ""
    link: str = ""


@dataclass
class Table:
    """Rows of cells below the names of the columns; without names, a list of facts."""

    rows: list[list[Cell]]
    columns: list[str] = field(default_factory=list)


@dataclass
class Section:
    """Section of a page; empty sections are left out."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def draw(self, axes: Any, caption: str) -> None:
        """Add the figure of ``axes`` as PNG, and close it."""
        import matplotlib.pyplot as plt
        from PIL import Image

        figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
        raw, png = io.BytesIO(), io.BytesIO()
        try:
            figure.savefig(raw, dpi=_DPI, bbox_inches="tight")
        finally:
            plt.close(figure)
        # A palette reduces the size to a third, with hardly visible differences.
        Image.open(raw).convert("RGB").quantize(_COLOURS).save(png, "PNG", optimize=True)
        self.figures.append({"png": base64.b64encode(png.getvalue()).decode(), "caption": caption})

    def add_rows(self, rows: Iterable[Iterable[Any]], columns: Iterable[object] = ()) -> None:
        """Add a table of values or cells."""
        cells = [[value if isinstance(value, Cell) else Cell(as_text(value)) for value in row] for row in rows]
        self.tables.append(Table(cells, [str(name) for name in columns]))

    def add_frame(self, frame: pd.DataFrame) -> None:
        """Add a table."""
        self.add_rows(frame.to_numpy(object), frame.columns)


def as_text(value: Any) -> str:
    """Format a value for the reader: three digits, and a dash for missing values."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return "–"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {as_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(as_text(item) for item in value)
    return str(value)


def render(title: str, sections: Sequence[Section]) -> bytes:
    """Return the page as HTML."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("he2gene_sc", "_report"), autoescape=True, trim_blocks=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.get_template("page.html.j2")
    return page.render(title=title, sections=sections, version=version("he2gene_sc"), date=date).encode()


def is_ours(path: Path) -> bool:
    """Return whether a file is a page of ``hg.report``."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD_BYTES)


def file_name(name: str) -> str:
    """Return a file name for a slide, with characters that are valid in links and file systems."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "slide"
