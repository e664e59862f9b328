"""Names of patients and sections, labels of training spots, and the classes that are made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.logs import logger
from ..._core.names import clean_names
from ...models._schema import check_class_names

if TYPE_CHECKING:
    from .options import Classes

_MIN_CLASS = 5
_COLOURS = (
    "#d62728",
    "#ff9896",
    "#9467bd",
    "#2ca02c",
    "#ffdd57",
    "#1f77b4",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#17becf",
)


def clean_labels(column: pd.Series, section: str) -> np.ndarray:
    """Labels as text, ``None`` without one, also where a missing value has become text."""
    names = clean_names(column)
    missing = int(sum(isinstance(value, str) and value.strip() != "" for value in column[pd.isna(names)]))
    if missing:
        logger.warning("section %s: %d labels are the text of a missing value; they count as missing", section, missing)
    return names


def check_labels(labels: Iterable[str], chosen: Classes) -> None:
    """Refuse labels that would be classes whose names cannot be stored."""
    named = {class_of(label, chosen) for label in labels}
    try:
        check_class_names(sorted(name for name in named if name is not None))
    except ValueError as error:
        raise ValueError(
            f"`annotation_key`: {error}, by `classes`, which maps labels to classes (None leaves a label out)"
        ) from error


def check_merged(labels: Iterable[str], merged: Mapping[str, str | None]) -> None:
    """Refuse to merge labels that no spot has, where any spot has one."""
    seen = set(labels)
    unknown = sorted(set(merged) - seen)
    if unknown and seen:
        raise ValueError(f"`classes` names labels {unknown} that no spot has, valid: {sorted(seen)}")


def class_of(label: str, chosen: Classes) -> str | None:
    """Class of a label: what `classes` says, else none where it is to be ignored, however capitalised, else the label."""
    if label in chosen.merge:
        return chosen.merge[label]
    return None if label.lower() in {name.lower() for name in chosen.ignore} else label


def code_classes(labels: list[np.ndarray], chosen: Classes) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Class names with enough spots, and for each section the code of each spot, -1 without a class."""
    check_merged((label for part in labels for label in part if label is not None), chosen.merge)
    named = [
        np.array([None if label is None else class_of(label, chosen) for label in part], object) for part in labels
    ]
    counted = pd.Series([label for part in named for label in part if label is not None], dtype=object).value_counts()
    rare = sorted(counted.index[counted < _MIN_CLASS])
    if rare:
        logger.warning("classes with fewer than %d spots are left out: %s", _MIN_CLASS, rare)
    classes = tuple(sorted(counted.index[counted >= _MIN_CLASS]))
    if len(classes) == 1:
        logger.warning(
            "all labelled spots are %r: one class is nothing to tell apart, no annotation is learned", *classes
        )
        classes = ()
    lookup = {label: i for i, label in enumerate(classes)}
    return classes, [np.array([lookup.get(label, -1) for label in part], int) for part in named]


def check_two_classes(part: np.ndarray, chosen: Classes, counted: Counter[str]) -> None:
    """Add the labels of a section to a count of classes; refuse a third class."""
    named = (class_of(label, chosen) for label in part if label is not None)
    counted.update(name for name in named if name is not None)
    classes = sorted(name for name, n in counted.items() if n >= _MIN_CLASS)
    if len(classes) > 2:
        raise ValueError(
            f"`exact` is True, which has one logit for two classes, as the paper has for tumour; found {classes}. Merge "
            "them by `classes`: hg.Classes(merge=...) (label to class, None leaves a label out), or drop exact=True of "
            "hg.PaperRecipe"
        )


def colours_of(classes: tuple[str, ...], given: Mapping[str, str]) -> tuple[str, ...]:
    """Colour of each class: the one given, else one of a palette."""
    return tuple(given.get(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(classes))
