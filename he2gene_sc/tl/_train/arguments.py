"""Inputs of ``hg.tl.train``: arguments are checked first, then sections are read one by one."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.logs import logger
from ..._core.names import check_spelling
from ...image._geometry import MIN_PX
from .measured import MIN_SPOTS, MeasuredSection, read_sections
from .names import check_gene_lists, check_labels, check_merged

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .options import Classes, GeneSelection, TrainingKeys

#: SD of a feature, as a share of its largest value, below which all spots are the same.
_MIN_SD = 1e-6


def identifiers(given: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Symbol to Ensembl id, and Ensembl id to symbol if it is unambiguous."""
    from ..._core.genes import symbol_to_ensembl

    ids = dict(symbol_to_ensembl() if given is None else given)
    counted = pd.Series(list(ids.values()), dtype=object).value_counts()
    return ids, {ensembl: symbol for symbol, ensembl in ids.items() if counted[ensembl] == 1}


def check_window_pixels(sections: Iterator[MeasuredSection], windows_um: Sequence[float]) -> Iterator[MeasuredSection]:
    """Yield the sections, and raise if pixels are too coarse for the smallest window."""
    for section in sections:
        pixels = min(windows_um) / section.mpp
        if pixels < MIN_PX:
            raise ValueError(
                f"`windows_um`: a window of {min(windows_um):g} µm is {pixels:.3g} px in section {section.name!r} "
                f"({section.mpp:.4g} µm/px), but at least {MIN_PX} px ({MIN_PX * section.mpp:.3g} µm) are needed. "
                "Pass wider windows: preset=hg.DefaultRecipe(windows_um=...)"
            )
        yield section
        del section


def read_all(
    sdatas: SpatialData | Iterable[SpatialData],
    keys: TrainingKeys,
    symbols: Mapping[str, str],
    chosen: GeneSelection,
    classes: Classes,
) -> Iterator[MeasuredSection]:
    """Read the sections one by one without keeping them; a list or tuple is checked first."""
    if isinstance(sdatas, str | Path | Mapping):
        raise ValueError(
            f"`sdatas` is a {type(sdatas).__name__}; pass SpatialData objects: spatialdata.read_zarr(path), or list(d.values())"
        )
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    # Other sequences may load a section with its image on each access.
    checked = isinstance(sdatas, list | tuple)
    if checked:
        _check_all(sdatas, keys, symbols, chosen, classes)
    n = spots = 0
    seen = _Seen(keys, classes)
    counted: dict[str, str] = {}
    iterator = iter(sdatas)
    del sdatas
    for sdata in iterator:
        sections = read_sections(sdata, keys, symbols, checked=checked)
        while True:
            with _name_object(n):
                section = next(sections, None)
                if section is None:
                    break
                is_large = seen.add(section, n)
            spots = max(spots, len(section.centres))
            if is_large:
                digest = hashlib.blake2b(section.counts.data.tobytes())
                digest.update(section.counts.indices.tobytes())
                same = counted.setdefault(digest.hexdigest(), section.name)
                if same != section.name:
                    logger.warning(
                        "sections %s and %s have the same counts: one may be in training while the other is held out, so held-out "
                        "metrics are too good; give the section once",
                        *(same, section.name),
                    )
                yield section
            else:
                logger.warning(
                    "section %s is left out: it has %d spots, but at least %d are needed to measure how well a gene is predicted",
                    *(section.name, len(section.centres), MIN_SPOTS),
                )
        del sdata, section, sections
        # SpatialData objects contain reference cycles: free the image before the next one is decoded.
        gc.collect()
        n += 1
    if not seen.patients:
        what = f"has no section of {MIN_SPOTS} spots" if n else "is empty"
        raise ValueError(f"`sdatas` {what}; at least one section is needed")
    from ...training._folds import N_BLOCKS

    if len(seen.patients) == 1 and spots < N_BLOCKS:
        raise ValueError(
            f"`sdatas` is one section with {spots} spots; at least {N_BLOCKS} are needed to hold out parts of it"
        )
    if keys.annotation is not None and not seen.labels:
        logger.warning("`annotation_key`: no spot has a label in %r; the annotation head is skipped", keys.annotation)


def _check_all(
    sdatas: Iterable[SpatialData],
    keys: TrainingKeys,
    symbols: Mapping[str, str],
    chosen: GeneSelection,
    classes: Classes,
) -> None:
    """Check all sections together, before pixels of any are read."""
    seen = _Seen(keys, classes)
    lists: dict[str, pd.Index] = {}
    for i, sdata in enumerate(sdatas):
        with _name_object(i):
            for section in read_sections(sdata, keys, symbols, pixels=False):
                if seen.add(section, i):
                    lists[section.name] = section.genes
    if lists:
        check_gene_lists(lists, chosen)
    check_merged(seen.labels, classes.merge)


@dataclass
class _Seen:
    """Names of the sections that were read so far."""

    keys: TrainingKeys
    classes: Classes
    objects: dict[str, int] = field(default_factory=dict)  # of each section
    patients: dict[str, str] = field(default_factory=dict)  # of each section
    labels: set[str] = field(default_factory=set)

    def add(self, section: MeasuredSection, i: int) -> bool:
        """Add a section of object ``i`` unless it is too small; raise if its names do not fit those of the others."""
        if len(section.centres) < MIN_SPOTS:
            return False
        if section.name in self.objects:
            raise ValueError(
                f"`section_key`: two sections are named {section.name!r}, also in object {self.objects[section.name] + 1}; give "
                "each section a unique name, also across patients"
            )
        self.objects[section.name], self.patients[section.name] = i, section.patient
        by_section = {f"section {name!r}": [patient] for name, patient in self.patients.items()}
        check_spelling({"": [*self.patients]}, "section_key", self.keys.section, what="sections")
        check_spelling(by_section, "sample_key", self.keys.sample, what="patients")
        self.labels.update(label for label in section.labels if label is not None)
        check_labels(self.labels, self.classes)
        return True


@contextlib.contextmanager
def _name_object(i: int) -> Iterator[None]:
    """Add the position of the object to errors."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{error} (object {i + 1} of `sdatas`)") from error


def check_features(name: str, features: np.ndarray) -> None:
    """Raise if all spots of an image have the same features."""
    x = np.asarray(features[:, 0], np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"`encoder` gives NaN or infinite features in section {name!r}")
    if (x.std(axis=0) <= _MIN_SD * np.abs(x).max(initial=1)).all():
        raise ValueError(
            f"`sdatas`: all spots of section {name!r} have the same encoder features; the image may be blank or belong to another "
            "section. Correct the image or leave the section out"
        )
