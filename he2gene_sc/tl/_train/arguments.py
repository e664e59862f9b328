"""What ``hg.tl.train`` is given: arguments checked before the work, sections read one by one."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.logs import logger
from ..._core.names import check_spelling
from ...image._geometry import MIN_PX
from .gene_lists import check_gene_lists
from .labels import check_labels, check_merged
from .measured import MIN_SPOTS, TWICE, Measured, check_table, read_sections

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from .options import Classes, GeneSelection, Keys

#: Share of the largest feature below which spots do not differ.
_SAME = 1e-6


def identifiers(given: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Symbol to Ensembl id, and back where that is unambiguous."""
    from ..._ensembl import symbol_to_ensembl

    ids = dict(symbol_to_ensembl() if given is None else given)
    counted = pd.Series(list(ids.values()), dtype=object).value_counts()
    return ids, {ensembl: symbol for symbol, ensembl in ids.items() if counted[ensembl] == 1}


def wide_enough(sections: Iterator[Measured], windows_um: Sequence[float]) -> Iterator[Measured]:
    """Pass sections on, refusing one whose pixels are too coarse for the smallest window."""
    for section in sections:
        pixels = min(windows_um) / section.mpp
        if pixels < MIN_PX:
            raise ValueError(
                f"`windows_um`: a window of {min(windows_um):g} µm is {pixels:.3g} px of section {section.name!r} "
                f"({section.mpp:.4g} µm/px); {MIN_PX} px, {MIN_PX * section.mpp:.3g} µm, are the least. "
                "Pass wider windows by `preset`, such as preset=hg.DefaultRecipe(windows_um=...)"
            )
        yield section
        del section


def read_all(
    sdatas: SpatialData | Iterable[SpatialData],
    keys: Keys,
    symbols: Mapping[str, str],
    chosen: GeneSelection,
    classes: Classes,
) -> Iterator[Measured]:
    """Read the sections one by one, holding none of them; check first what is at hand anyway."""
    if isinstance(sdatas, str | Path | Mapping):
        raise ValueError(
            f"`sdatas` is a {type(sdatas).__name__}; SpatialData objects are needed: spatialdata.read_zarr(path), or list(d.values())"
        )
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    # Other sequences may read a section, its image with it, each time that they are asked for it.
    checked = isinstance(sdatas, list | tuple)
    if checked:
        lists: dict[str, pd.Index] = {}
        places: dict[str, int] = {}
        patients: dict[str, str] = {}
        labels: set[str] = set()
        for i, sdata in enumerate(sdatas):
            with _naming(i):
                names, own, genes = check_table(sdata, keys, symbols)
                for name in names:
                    if name in places:
                        raise ValueError(f"{TWICE.format(name)}, found in object {places[name] + 1} too")
                    places[name] = i
                _check_spelling(patients := patients | names, keys)
                if names:
                    lists[", ".join(names)] = genes
                labels |= own
                check_labels(labels, classes)
        if lists:
            check_gene_lists(lists, chosen)
        check_merged(labels, classes.merge)
    n = spots = 0
    seen: dict[str, str] = {}
    counted: dict[str, str] = {}
    found: set[str] = set()
    iterator = iter(sdatas)
    del sdatas
    for sdata in iterator:
        sections = read_sections(sdata, keys, symbols, checked=checked)
        while True:
            with _naming(n):
                section = next(sections, None)
                if section is None:
                    break
                found.update(label for label in section.labels if label is not None)
                check_labels(found, classes)
            if section.name in seen:
                raise ValueError(f"{TWICE.format(section.name)} (object {n + 1} of `sdatas`)")
            seen[section.name] = section.patient
            _check_spelling(seen, keys)
            spots = max(spots, len(section.centres))
            if len(section.centres) >= MIN_SPOTS:
                digest = hashlib.blake2b(section.counts.data.tobytes())
                digest.update(section.counts.indices.tobytes())
                same = counted.setdefault(digest.hexdigest(), section.name)
                if same != section.name:
                    logger.warning(
                        "sections %s and %s have the same counts: while one is held out the other is trained on, and held-out figures "
                        "are too good; give the section once",
                        *(same, section.name),
                    )
                yield section
            else:
                logger.warning(
                    "section %s is left out: it has %d spots, fewer than %d say nothing of how well a gene is predicted",
                    *(section.name, len(section.centres), MIN_SPOTS),
                )
                seen.pop(section.name)
        del sdata, section, sections
        # SpatialData objects hold themselves: without this, images wait for the collector while the next is decoded.
        gc.collect()
        n += 1
    if not seen:
        what = f"has no section of {MIN_SPOTS} spots" if n else "is empty"
        raise ValueError(f"`sdatas` {what}; at least one section is needed")
    from ...training._folds import N_BLOCKS

    if len(seen) == 1 and spots < N_BLOCKS:
        raise ValueError(
            f"`sdatas` is one section of {spots} spots; at least {N_BLOCKS} are needed, so that parts of it can be held out"
        )
    if keys.annotation is not None and not found:
        logger.warning("`annotation_key`: no spot has a label in %r, no annotation is learned", keys.annotation)


def _check_spelling(patients: Mapping[str, str], keys: Keys) -> None:
    """Refuse sections, or patients, whose names differ only in case from one section to another."""
    for parameter, key, what, names in (
        ("section_key", keys.section, "sections", {"": list(patients)}),
        ("sample_key", keys.sample, "patients", {f"section {name!r}": [of] for name, of in patients.items()}),
    ):
        check_spelling(names, parameter, key, what=what)


@contextlib.contextmanager
def _naming(i: int) -> Iterator[None]:
    """Say which object an error is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{error} (object {i + 1} of `sdatas`)") from error


def check_features(name: str, features: np.ndarray) -> None:
    """Refuse an image on which no spot looks different from another."""
    x = np.asarray(features[:, 0], np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"`encoder` gives NaN or infinite features in section {name!r}")
    if (x.std(axis=0) <= _SAME * np.abs(x).max(initial=1)).all():
        raise ValueError(
            f"`sdatas`: all spots of section {name!r} look the same to the encoder, as where its image is blank or not the one "
            "of these spots; mend it or leave the section out"
        )
