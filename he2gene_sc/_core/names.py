"""Clean names of patients, sections, labels and rows, in the same way for every function."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import validate
from .logs import logger

if TYPE_CHECKING:
    from anndata import AnnData

#: Texts of a missing value: those that ``astype(str)`` writes, and those that pandas reads as missing.
MISSING = frozenset(
    ["", "nan", "NaN", "NAN", "-nan", "-NaN", "None", "<NA>", "NaT", "NA", "#NA", "N/A", "n/a", "#N/A", "NULL", "null"]
)
#: Texts that are not the name of a sample, but may be a label ("-" against "+", "none" against a treatment).
_MISSING_SAMPLE = frozenset(["-", "--", "?", ".", "n.a.", "none", "null", "nan", "na", "n/a"])
#: Texts that are valid names, but perhaps of several samples.
UNNAMED = frozenset(["unknown", "undefined", "missing"])
_WHOLE = re.compile(r"[-+]?\d+\.0+")
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_LEADING_ZEROS = re.compile(r"(?<![\d.,])0+(?=\d)")
#: Blanks, except between digits, where they separate two numbers.
_BLANKS = re.compile(r"(?<!\d) | (?!\d)")
#: The same for dashes and underscores, which are part of a label ("HER2-") but not of a patient ("P-1" is P1).
_JOINTS = re.compile(r"(?<!\d)[-_]|[-_](?!\d)")
_PATIENTS = ("samples", "patients")


def clean_name(value: object) -> str | None:
    """Return a name as text, the same for 3, 3.0, "3" and "3 "; ``None`` for missing values and their texts."""
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return None
        value = int(value) if float(value).is_integer() else value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")  # as HDF5 gives texts
    text = unicodedata.normalize("NFC", str(value))
    # Remove invisible characters, such as a byte order mark or a soft hyphen.
    text = "".join(mark for mark in text if unicodedata.category(mark) != "Cf").strip()
    if text in MISSING:
        return None
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text


def clean_names(values: Iterable[object]) -> np.ndarray:
    """Clean names, ``(n,)`` objects, ``None`` for missing ones."""
    column = pd.Series(values).astype(object)
    try:
        codes, unique = pd.factorize(column.to_numpy(object))
    except TypeError:
        odd = next(value for value in column if not pd.api.types.is_hashable(value))
        raise ValueError(f"names have to be texts or numbers; found {odd!r}, a {type(odd).__name__}") from None
    # factorize codes missing values as -1, which selects the last entry.
    cleaned = np.array([*map(clean_name, unique), None], object)
    return cleaned[codes]


def clean_samples(values: Iterable[object]) -> np.ndarray:
    """Clean names of samples, ``(n,)`` objects; ``"-"`` and ``"none"`` count as missing too."""
    names = clean_names(values)
    names[np.array([name is not None and name.casefold() in _MISSING_SAMPLE for name in names], bool)] = None
    return names


def column_of(table: AnnData, key: str, parameter: str, hint: str = "") -> pd.Series:
    """Return a column of ``obs``."""
    validate.key_in(key, list(table.obs.columns), parameter, hint=hint)
    return table.obs[key]


def names_of(table: AnnData, key: str, parameter: str, *, what: str = "labels", required: bool = False) -> np.ndarray:
    """Return the cleaned names in a column of ``obs``, ``(n,)`` objects, ``None`` for missing ones; ``what`` is their plural.

    Blanks around a name are removed. Texts of missing values (``"nan"``, ``"None"``, ``"<NA>"``) are missing. Whole numbers
    are names, with 3 and 3.0 as ``"3"``, since a column of integers with gaps has floats.
    """
    column = column_of(table, key, parameter)
    if column.dtype.kind == "f" and (column.dropna() % 1 != 0).any():
        raise ValueError(f"`{parameter}` {key!r} holds fractions; a column of {what} is needed")
    names = clean_names(column) if what == "labels" else clean_samples(column)
    missing = pd.isna(names)
    if required and missing.any():
        first = table.obs_names[missing][:3].tolist()
        raise ValueError(
            f"`{parameter}` {key!r} is missing for {int(missing.sum())} of {len(names)} spots, for example {first}; fill it, "
            "or remove these spots"
        )
    as_text = missing & column.notna().to_numpy()
    if as_text.any():
        logger.warning(
            "`%s` %r: %d spots have the text of a missing value, for example %r; they count as missing",
            *(parameter, key, int(as_text.sum()), column.iloc[int(np.flatnonzero(as_text)[0])]),
        )
    check_spelling({"": names}, parameter, key, what=what, rows={"": table.obs_names})
    return names


def stored_colours(table: AnnData, column: str) -> dict[str, str]:
    """Return the colour in ``uns`` of each label of a column; empty if the colours do not match its categories."""
    colours = np.asarray(table.uns.get(f"{column}_colors", ()), object).ravel()
    labels = table.obs[column].astype("category").cat.categories if len(colours) and column in table.obs else ()
    if len(labels) != len(colours):
        return {}
    return dict(zip(map(str, labels), map(str, colours), strict=True))


def check_spelling(
    names: Mapping[str, Sequence[str] | np.ndarray],
    parameter: str,
    key: str,
    *,
    what: str = "labels",
    rows: Mapping[str, Sequence[str]] | None = None,
    fix: str | None = None,
) -> None:
    """Raise for names that differ only in case, blanks, kinds of dashes or leading zeros; of samples also in dashes and underscores.

    ``names`` and ``rows`` map a place, such as ``"object 2"``, to names; ``fix`` replaces the call that the error suggests.
    """
    seen: dict[str, tuple[str, str]] = {}
    for place, found in names.items():
        for name in pd.unique(pd.Series(found, dtype=object).dropna()):
            folded = " ".join(unicodedata.normalize("NFKC", _DASHES.sub("-", name)).casefold().split())
            folded = _JOINTS.sub("", folded) if what in _PATIENTS else folded
            first, there = seen.setdefault(_LEADING_ZEROS.sub("", _BLANKS.sub("", folded)), (name, place))
            if first != name:
                shown = [_format_occurrences(text, at, names[at], rows) for text, at in ((first, there), (name, place))]
                call = f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).replace({{{name!r}: {first!r}}})"
                raise ValueError(
                    f"`{parameter}` {key!r}: the {what} {' and '.join(shown)} differ only in {_spelling_difference(first, name)}; "
                    f"{fix or f'spell them alike: {call}'}"
                )


def _spelling_difference(first: str, second: str) -> str:
    """Return in what two names differ that have the same folded spelling."""

    def same(pattern: str) -> bool:
        return re.findall(pattern, first) == re.findall(pattern, second)

    if _DASHES.search(first + second):
        return "dashes or leading zeros"
    if not same("[-_]"):
        return "dashes, underscores, blanks or case"
    return "case or blanks" if same(r"\d+") else "dashes or leading zeros"


def _format_occurrences(
    name: str, place: str, found: Sequence[str] | np.ndarray, rows: Mapping[str, Sequence[str]] | None
) -> str:
    """Format a name with its number of spots, the first of them, and its place."""
    parts = [place] if place else []
    if rows is not None:
        where = np.flatnonzero(np.asarray(found, object) == name)
        parts = [f"{len(where)} spots", f"from {rows[place][where[0]]!r}", *parts]
    return f"{name!r} ({', '.join(parts)})" if parts else repr(name)


def clean_name_argument(value: object, parameter: str, *, sample: bool = False) -> str:
    """Clean a name in an argument as :func:`names_of` cleans those of a column."""
    name = clean_samples([value])[0] if sample else clean_name(value)
    if name is None:
        raise ValueError(f"`{parameter}` holds {value!r}, which is a missing value; a name is needed")
    return name


def annotation_target(table: AnnData) -> Mapping[str, Any] | None:
    """Return ``uns["spatialdata_attrs"]``: which shapes or labels a table annotates; ``None`` if it annotates nothing."""
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        return None
    if not isinstance(attrs, Mapping) or not {"region", "region_key", "instance_key"} <= set(attrs):
        raise ValueError(
            f"uns['spatialdata_attrs'] is {attrs!r}; region, region_key and instance_key are needed: run table = "
            "spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=..., overwrite_metadata=True)"
        )
    return attrs


def as_list(names: str | Iterable[Any]) -> list[str]:
    """Return one or several names as a list."""
    return [names] if isinstance(names, str) else [str(name) for name in names]


def check_text_names(table: AnnData) -> AnnData:
    """Return the table; raise if its names are numbers, by which anndata cannot select rows."""
    for axis in ("obs_names", "var_names"):
        if pd.api.types.is_numeric_dtype(getattr(table, axis)):
            raise ValueError(f"`data`: {axis} are numbers; run table.{axis} = table.{axis}.astype(str)")
    return table


def section_and_patient(
    table: AnnData, rows: np.ndarray, shapes_key: str, section_key: str, sample_key: str
) -> tuple[str, str]:
    """Return section and patient of the spots of an element; raise unless there is exactly one of each."""
    found = []
    for parameter, key, clean in (
        ("section_key", section_key, clean_names),
        ("sample_key", sample_key, clean_samples),
    ):
        names = clean(table.obs[key].iloc[rows])
        values = set(names)
        if None in values:
            first = table.obs_names[rows[pd.isna(names)]][:3].tolist()
            raise ValueError(
                f"`{parameter}`: values of {key!r} are missing for spots of {shapes_key!r}, for example {first}"
            )
        found.append(sorted(values))
    if any(len(values) != 1 for values in found):
        raise ValueError(
            f"`section_key`, `sample_key`: the spots of {shapes_key!r} must be of one section of one patient, found "
            f"sections {found[0][:5]} and patients {found[1][:5]}"
        )
    return found[0][0], found[1][0]
