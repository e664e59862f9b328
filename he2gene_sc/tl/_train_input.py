"""What ``hg.tl.train`` is given: arguments checked before the work, sections read one by one."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._gene_lists import Genes, check_gene_lists
from ._labels import Labels, check_labels
from ._measured import MIN_SPOTS, Keys, Measured, check_table, read_sections

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

PRESETS = ("default", "he2gene-base", "he2gene-spat")
#: Share of the largest feature below which spots do not differ.
_SAME = 1e-6


def check_arguments(
    preset: str,
    validation: str,
    n_target: int,
    n_latent: int | None,
    min_share: float,
    batch_size: int | None,
    fit_options: Mapping[str, Any],
    genes: object,
    windows_um: object,
) -> None:
    if preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}, valid: {list(PRESETS)}")
    if validation not in ("grouped", "random"):
        raise ValueError(f"`validation` is {validation!r}, valid: ['grouped', 'random']")
    for parameter, value in (
        ("n_target_genes", n_target),
        (("n_latent", 128 if n_latent is None else n_latent)),
        ("batch_size", 1 if batch_size is None else batch_size),
    ):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"`{parameter}` is {value!r}; a whole number from 1 is needed")
    if not 0 <= min_share < 1:
        raise ValueError(f"`min_spot_share` is {min_share!r}; a share from 0 to below 1 is needed")
    if isinstance(genes, str) or (genes is not None and not len(genes)):
        raise ValueError(f"`genes` is {genes!r}; a list of genes or None is needed")
    if windows_um is not None and (np.ndim(windows_um) != 1 or not len(windows_um) or min(windows_um) <= 0):
        raise ValueError(f"`windows_um` is {windows_um!r}; a list of sides in µm, above 0, or None is needed")
    valid = {
        "max_epochs",
        "patience",
        "lr",
        "patches_at_once",
        "precision",
        "devices",
        "num_nodes",
        "strategy",
        "checkpoint_dir",
        "checkpoint_steps",
        "resume",
        "callbacks",
        "cross_validate",
    }
    unknown = sorted(set(fit_options) - valid)
    if unknown:
        raise TypeError(f"train() got unexpected arguments {unknown}; valid beside those named: {sorted(valid)}")
    if fit_options and preset == "default":
        raise ValueError(
            f"`{next(iter(fit_options))}` is for the presets that are trained by gradient, {list(PRESETS[1:])}; "
            "'default' is solved in closed form"
        )


def check_names(
    annotation_key: object,
    sample_key: object,
    section_key: object,
    classes: Mapping[str, str | None] | None,
    ignore_classes: object,
    limitations: object,
) -> None:
    for parameter, key in (
        ("annotation_key", annotation_key),
        ("sample_key", sample_key),
        ("section_key", section_key),
    ):
        if not isinstance(key, str) and not (key is None and parameter == "annotation_key"):
            raise ValueError(
                f"`{parameter}` is of type {type(key).__name__}; the name of a column of obs is needed, which has a value for "
                "every spot"
            )
    for parameter, value in (("ignore_classes", ignore_classes), ("limitations", limitations)):
        if isinstance(value, str):
            raise ValueError(f"`{parameter}` is the text {value!r}; a list is needed: [{value!r}]")
    if classes and annotation_key is None:
        raise ValueError("`classes` names labels, but `annotation_key` is None; name the column of obs that holds them")


def check_unused(preset: str, **given: tuple[object, object]) -> None:
    """Refuse arguments that a preset does not read."""
    for parameter, (value, default) in given.items():
        if value is not default and value != default:
            raise ValueError(
                f"`{parameter}` is {value!r}, which preset {preset!r} does not read: it trains the encoder, on its own output, "
                "in the precision of `precision`"
            )


def identifiers(given: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Symbol to Ensembl id, and back where that is unambiguous."""
    from .._ensembl import symbol_to_ensembl

    ids = dict(symbol_to_ensembl() if given is None else given)
    counted = pd.Series(list(ids.values()), dtype=object).value_counts()
    return ids, {ensembl: symbol for symbol, ensembl in ids.items() if counted[ensembl] == 1}


def read_all(
    sdatas: SpatialData | Iterable[SpatialData],
    keys: Keys,
    symbols: Mapping[str, str],
    chosen: Genes,
    labels: Labels,
) -> Iterator[Measured]:
    """Read the sections one by one, holding none of them; check first what is at hand anyway."""
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    # Other sequences may read a section, its image with it, each time that they are asked for it.
    if isinstance(sdatas, list | tuple):
        lists = {}
        for i, sdata in enumerate(sdatas):
            with _naming(i):
                name, genes = check_table(sdata, keys, symbols)
                lists[name if name not in lists else f"{name} (object {i + 1})"] = genes
        if lists:
            check_gene_lists(lists, chosen)
    n, seen, classes = 0, set(), set()
    iterator = iter(sdatas)
    del sdatas
    while True:
        try:
            sdata = next(iterator)
        except StopIteration:
            break
        sections = read_sections(sdata, keys, symbols)
        while True:
            with _naming(n):
                section = next(sections, None)
                if section is None:
                    break
                classes.update(label for label in section.labels if label is not None)
                check_labels(classes, labels)
            if section.name in seen:
                raise ValueError(
                    f"`section_key`: two sections are named {section.name!r}; each needs a name of its own"
                )
            seen.add(section.name)
            if len(section.centres) >= MIN_SPOTS:
                yield section
            else:
                logger.warning(
                    "section %s is left out: it has %d spots, fewer than %d say nothing of how well a gene is predicted",
                    *(section.name, len(section.centres), MIN_SPOTS),
                )
                seen.discard(section.name)
        del sdata, section, sections
        # SpatialData objects hold themselves: without this, images wait for the collector while the next is decoded.
        gc.collect()
        n += 1
    if not seen:
        found = f"has no section of {MIN_SPOTS} spots" if n else "is empty"
        raise ValueError(f"`sdatas` {found}; at least one section is needed")


@contextlib.contextmanager
def _naming(i: int) -> Iterator[None]:
    """Say which object an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (object {i + 1} of `sdatas`)") from error


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


def check_memory(n_features: int) -> None:
    """Refuse what would not fit: squares of the features, twice in double precision while they are solved."""
    import os

    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 3 * 8 * n_features**2
    if needed > 0.8 * there:
        raise MemoryError(
            f"{n_features:,} features a spot need {needed / 2**30:.1f} GiB for their sums of squares, this machine has "
            f"{there / 2**30:.1f}; use fewer `windows_um` or `stages`, or a smaller `encoder`"
        )
