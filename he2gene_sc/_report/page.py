"""What a page is made of, and the page as HTML without anything outside of it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

#: What marks a page as ours, and where in the file it stands at the latest.
_MARK, _HEAD = b'name="generator" content="he2gene_sc report"', 1000
_DPI, _COLOURS = 90, 255


@dataclass(frozen=True)
class Cell:
    """Text of a table, with a colour before it or a link to another page."""

    text: str
    color: str = ""
    link: str = ""


@dataclass
class Table:
    """Rows of cells below the names of the columns; without names a list of facts."""

    rows: list[list[Cell]]
    columns: list[str] = field(default_factory=list)


@dataclass
class Section:
    """A part of the page, which is left out where it holds nothing."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def draw(self, axes: Any, caption: str) -> None:
        """Add the figure of some axes as PNG, and close it."""
        import matplotlib.pyplot as plt
        from PIL import Image

        figure = np.ravel(np.asarray(axes, dtype=object))[0].figure
        raw, png = io.BytesIO(), io.BytesIO()
        try:
            figure.savefig(raw, dpi=_DPI, bbox_inches="tight")
        finally:
            plt.close(figure)
        # A palette takes a third of the bytes, and is hardly seen.
        Image.open(raw).convert("RGB").quantize(_COLOURS).save(png, "PNG", optimize=True)
        self.figures.append({"png": base64.b64encode(png.getvalue()).decode(), "caption": caption})

    def list_facts(self, facts: dict[str, Any]) -> None:
        """Add a table of names and values."""
        self.tables.append(Table([[Cell(name), Cell(shown(value))] for name, value in facts.items()]))

    def add_frame(self, frame: pd.DataFrame) -> None:
        """Add a table."""
        rows = [
            [value if isinstance(value, Cell) else Cell(shown(value)) for value in row]
            for row in frame.to_numpy(object)
        ]
        self.tables.append(Table(rows, [str(name) for name in frame.columns]))


def shown(value: Any) -> str:
    """Write a value for people: three digits, a dash for what is missing."""
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
        return ", ".join(f"{name}: {shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(shown(each) for each in value)
    return str(value)


def render(title: str, sections: Sequence[Section]) -> bytes:
    """Return the page."""
    from datetime import UTC, datetime
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("he2gene_sc", "_report"), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        version=version("he2gene_sc"),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return page.encode()


def is_ours(path: Path) -> bool:
    """Whether a file is a page that we made."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD)


def file_name(name: str) -> str:
    """Name of a file for a slide, without what links and file systems do not take."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "slide"
