"""What ``hg.tl.train`` is given: arguments checked before the work, sections read one by one."""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..._core.spots import check_spelling
from ...image._windows import MIN_PX, check_windows
from .gene_lists import Genes, check_gene_lists
from .labels import Labels, check_labels, check_merged
from .measured import MIN_SPOTS, TWICE, Keys, Measured, check_table, read_sections

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger("he2gene_sc")

PRESETS = ("default", "he2gene-base", "he2gene-spat")
#: Options of training by gradient, and the least of those that are whole numbers.
_FIT_OPTIONS = {
    "max_epochs": 1,
    "patience": 1,
    "lr": 0,
    "patches_at_once": 2,
    "precision": 0,
    "devices": 0,
    "num_nodes": 1,
    "strategy": 0,
    "checkpoint_dir": 0,
    "checkpoint_steps": 1,
    "resume": 0,
    "callbacks": 0,
    "cross_validate": 0,
}
#: Default of `min_spot_share`.
MIN_SPOT_SHARE = 0.01
_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
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
    seed: Any,
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
        if not is_whole(value) or value < 1:
            raise ValueError(f"`{parameter}` is {value!r}; a whole number from 1 is needed")
    if not is_number(min_share) or not 0 <= min_share < 1:
        raise ValueError(f"`min_spot_share` is {min_share!r}; a share from 0 to below 1 is needed")
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"`seed` is {seed!r}; a whole number from 0 is needed")
    if genes is not None and (isinstance(genes, str) or not isinstance(genes, Iterable) or not len(list(genes))):
        raise ValueError(f"`genes` is {genes!r}; a list of genes or None is needed")
    if windows_um is not None:
        check_windows(windows_um)
    check_fit_options(preset, fit_options)


def check_exact(exact: bool, preset: str, min_share: float, windows_um: object, fit_options: Mapping[str, Any]) -> None:
    """Refuse `exact` beside arguments that it sets."""
    if not exact:
        return
    if preset == "default":
        raise ValueError(
            f"`exact` is True, but preset 'default' is not one of the paper; pass preset= one of {list(PRESETS[1:])}, or drop "
            "`exact`"
        )
    precision = fit_options.get("precision")
    for parameter, given, its in (
        ("min_spot_share", min_share if min_share not in (MIN_SPOT_SHARE, 0) else None, "0: all genes are learned"),
        ("windows_um", windows_um, "75, 150 and 225 px at 0.69 µm/px"),
        ("precision", precision if precision not in (None, "32", "32-true") else None, "'32-true'"),
    ):
        if given is not None:
            raise ValueError(f"`{parameter}` is {given!r}, but `exact` sets it ({its}); drop one of them")


def check_names(
    annotation_key: object,
    sample_key: object,
    section_key: object,
    classes: Any,
    ignore_classes: object,
    class_colors: object,
    ensembl_ids: object,
    missing_genes_are_zero: object,
    words: Mapping[str, object],
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
    for parameter, value in (("ignore_classes", ignore_classes), ("limitations", words["limitations"])):
        if isinstance(value, str):
            raise ValueError(f"`{parameter}` is the text {value!r}; a list is needed: [{value!r}]")
        if not isinstance(value, Iterable) or not all(isinstance(part, str | int | float) for part in value):
            raise ValueError(f"`{parameter}` is {value!r}; a list of texts is needed, which may be empty")
    for parameter in ("name", "version", "description", "intended_use"):
        value = words[parameter]
        if not isinstance(value, str) and not (parameter == "version" and is_number(value)):
            raise ValueError(f"`{parameter}` is {value!r}; a text is needed")
    for parameter, value in (("classes", classes), ("class_colors", class_colors), ("ensembl_ids", ensembl_ids)):
        if value is not None and not isinstance(value, Mapping | pd.Series):
            raise ValueError(f"`{parameter}` is of type {type(value).__name__}; a mapping or None is needed")
    pairs = {} if classes is None else classes
    wrong = {label: name for label, name in pairs.items() if not (name is None or isinstance(name, str))}
    if wrong:
        raise ValueError(
            f"`classes` maps labels to {wrong}; the name of a class is needed, or None, which leaves it out"
        )
    if not isinstance(missing_genes_are_zero, int | np.bool_) or missing_genes_are_zero not in (0, 1):
        raise ValueError(f"`missing_genes_are_zero` is {missing_genes_are_zero!r}; True or False is needed")
    if len(pairs) and annotation_key is None:
        raise ValueError("`classes` names labels, but `annotation_key` is None; name the column of obs that holds them")


def is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and bool(np.isfinite(value))


def is_list_of_stages(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(is_whole(stage) and stage >= 0 for stage in value)


def check_fit_options(preset: str, options: Mapping[str, Any]) -> None:
    """Refuse, before a section is read, what training by gradient would refuse once all of them are."""
    unknown = sorted(set(options) - set(_FIT_OPTIONS))
    if unknown:
        from difflib import get_close_matches
        from inspect import signature

        from ... import tl

        named = [name for name in signature(tl.train).parameters if name != "fit_options"]
        near = get_close_matches(unknown[0], [*named, *_FIT_OPTIONS], n=3)
        hint = f"; near {unknown[0]!r}: {near}" if near else ""
        raise TypeError(
            f"train() got unexpected arguments {unknown}{hint}; valid beside those named: {sorted(_FIT_OPTIONS)}"
        )
    if options and preset == "default":
        raise ValueError(
            f"`{next(iter(options))}` is for the presets that are trained by gradient, {list(PRESETS[1:])}; "
            "'default' is solved in closed form"
        )
    for parameter, least in _FIT_OPTIONS.items():
        value = options.get(parameter)
        if least and value is not None and not (is_whole(value) and value >= least):
            raise ValueError(f"`{parameter}` is {value!r}; a whole number from {least} is needed")
    lr = options.get("lr")
    if lr is not None and not (is_number(lr) and lr > 0):
        raise ValueError(f"`lr` is {lr!r}; a number above 0 is needed")
    precision = options.get("precision")
    if precision is not None and str(precision) not in _PRECISIONS:
        raise ValueError(
            f"`precision` is {precision!r}, valid: {list(_PRECISIONS)}; the weights themselves stay single"
        )
    for parameter in ("resume", "cross_validate"):
        if not isinstance(options.get(parameter, False), bool | np.bool_):
            raise ValueError(f"`{parameter}` is {options[parameter]!r}; True or False is needed")
    callbacks = options.get("callbacks", ())
    if callbacks:
        from lightning.pytorch import Callback
    if not isinstance(callbacks, list | tuple) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise ValueError(f"`callbacks` is {callbacks!r}; a list of Lightning callbacks is needed, which may be empty")
    if options.get("checkpoint_dir") is not None:
        in_folds = "*/last.ckpt" if options.get("cross_validate") else "last.ckpt"
        _check_checkpoint_dir(options["checkpoint_dir"], None if options.get("resume") else in_folds)
    elif options.get("resume"):
        raise ValueError("`resume` needs the `checkpoint_dir` of the run that was stopped")


def _check_checkpoint_dir(folder: object, begun: str | None) -> None:
    """Refuse a folder that cannot be written, or, where a run is to begin, that holds one in such a place."""
    if not isinstance(folder, str | Path):
        raise ValueError(f"`checkpoint_dir` is {folder!r}; the path of a folder is needed")
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"`checkpoint_dir` {str(folder)!r} cannot be written ({error.strerror}); choose another",
            str(place),
        ) from error
    if begun is not None and any(place.glob(begun)):
        raise FileExistsError(
            f"`checkpoint_dir` {str(folder)!r} holds a run; go on with `resume=True`, or choose another folder"
        )


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
                f"({section.mpp:.4g} µm/px); {MIN_PX} px, {MIN_PX * section.mpp:.3g} µm, are the least"
            )
        yield section
        del section


def read_all(
    sdatas: SpatialData | Iterable[SpatialData],
    keys: Keys,
    symbols: Mapping[str, str],
    chosen: Genes,
    labels: Labels,
) -> Iterator[Measured]:
    """Read the sections one by one, holding none of them; check first what is at hand anyway."""
    if isinstance(sdatas, str | Path | Mapping):
        raise ValueError(
            f"`sdatas` is a {type(sdatas).__name__}; SpatialData objects are needed: spatialdata.read_zarr(path), or list(d.values())"
        )
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    # Other sequences may read a section, its image with it, each time that they are asked for it.
    if isinstance(sdatas, list | tuple):
        lists: dict[str, pd.Index] = {}
        places: dict[str, int] = {}
        patients: dict[str, str] = {}
        found: set[str] = set()
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
                found |= own
                check_labels(found, labels)
        if lists:
            check_gene_lists(lists, chosen)
        check_merged(found, labels.merged)
    n = spots = 0
    seen: dict[str, str] = {}
    classes: set[str] = set()
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
                raise ValueError(f"{TWICE.format(section.name)} (object {n + 1} of `sdatas`)")
            seen[section.name] = section.patient
            _check_spelling(seen, keys)
            spots = max(spots, len(section.centres))
            if len(section.centres) >= MIN_SPOTS:
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
    if keys.annotation is not None and not classes:
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


def check_memory(n_features: int) -> None:
    """Refuse what would not fit: squares of the features, twice in double precision while they are solved."""
    from ...training._memory import memory_of_machine

    there = memory_of_machine()
    needed = 3 * 8 * n_features**2
    if there is not None and needed > 0.8 * there:
        raise MemoryError(
            f"{n_features:,} features a spot need {needed / 2**30:.1f} GiB for their sums of squares, "
            f"{there / 2**30:.1f} are free here; use fewer `windows_um` or `stages`, or a smaller `encoder`"
        )
