"""Labels of training spots, and the classes made from them."""

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
    """Labels as text; ``None`` for missing labels, also if a missing value was converted to text."""
    names = clean_names(column)
    missing = int(sum(isinstance(value, str) and value.strip() != "" for value in column[pd.isna(names)]))
    if missing:
        logger.warning(
            "section %s: %d labels are missing values converted to text; they count as missing", section, missing
        )
    return names


def check_labels(labels: Iterable[str], chosen: Classes) -> None:
    """Raise if the name of a class cannot be stored."""
    named = {class_of(label, chosen) for label in labels}
    try:
        check_class_names(sorted(name for name in named if name is not None))
    except ValueError as error:
        raise ValueError(
            f"`annotation_key`: {error}, with `classes`, which maps labels to classes (None leaves a label out)"
        ) from error


def check_merged(labels: Iterable[str], merged: Mapping[str, str | None]) -> None:
    """Raise if ``classes`` names labels that no spot has, unless all labels are missing."""
    seen = set(labels)
    unknown = sorted(set(merged) - seen)
    if unknown and seen:
        raise ValueError(f"`classes` names labels {unknown} that no spot has, valid: {sorted(seen)}")


def class_of(label: str, chosen: Classes) -> str | None:
    """Class of a label: its entry in ``classes``, else ``None`` for an ignored label (in any case), else the label itself."""
    if label in chosen.merge:
        return chosen.merge[label]
    return None if label.lower() in {name.lower() for name in chosen.ignore} else label


def code_classes(labels: list[np.ndarray], chosen: Classes) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Names of classes with enough spots, and codes of the spots of each section (-1 without a class)."""
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
        logger.warning("only one class (%r) has enough labelled spots; the annotation head is skipped", *classes)
        classes = ()
    lookup = {label: i for i, label in enumerate(classes)}
    return classes, [np.array([lookup.get(label, -1) for label in part], int) for part in named]


def check_two_classes(part: np.ndarray, chosen: Classes, counted: Counter[str]) -> None:
    """Add the labels of a section to a count of classes, and raise if there are more than two."""
    named = (class_of(label, chosen) for label in part if label is not None)
    counted.update(name for name in named if name is not None)
    classes = sorted(name for name, n in counted.items() if n >= _MIN_CLASS)
    if len(classes) > 2:
        raise ValueError(
            f"`exact` is True, which allows only two classes (one logit, as for tumour in the paper); found {classes}. Merge "
            "them with classes=hg.Classes(merge=...) (label to class, None leaves a label out), or drop exact=True of "
            "hg.PaperRecipe"
        )


def colours_of(classes: tuple[str, ...], given: Mapping[str, str]) -> tuple[str, ...]:
    """Colour of each class: the given one, else one of a palette."""
    return tuple(given.get(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(classes))
