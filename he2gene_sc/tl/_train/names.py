"""Genes and labels of training sections: their names, and checks over several sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..._core.genes import current_symbols, find_genes
from ..._core.logs import logger
from ..._core.validate import format_list
from ...models._schema import check_class_names

if TYPE_CHECKING:
    from .options import Classes, GeneSelection

#: Least share of the shorter of two gene lists that sections must have in common.
_MIN_SHARED = 0.1
_MIN_GENES = 10


def common_names(lists: Mapping[str, pd.Index]) -> dict[str, str]:
    """Map old symbols to current ones for genes that have different symbols in different sections.

    If a section lists both names, they remain two genes.
    """
    union = pd.Index(list(dict.fromkeys(chain.from_iterable(lists.values()))))
    current = pd.Series(current_symbols(union), index=union)
    several = current[current.duplicated(keep=False)]
    for genes in lists.values():
        here = several[several.index.isin(genes)]
        several = several[~several.isin(here[here.duplicated()])]
    renamed = several[several != several.index].to_dict()
    if renamed:
        logger.info(
            "%d genes have different symbols in different sections; current symbols are used: %s",
            *(len(renamed), format_list(f"{old} is {new}" for old, new in renamed.items())),
        )
    return renamed


def check_gene_lists(lists: Mapping[str, pd.Index], chosen: GeneSelection) -> pd.Index:
    """Return the sorted genes to learn, from the gene list of each section."""
    renamed = common_names(lists)
    if renamed:
        lists = {name: genes.map(lambda gene: renamed.get(gene, gene)) for name, genes in lists.items()}
    counted = pd.Series(Counter(chain.from_iterable(lists.values())))
    for name, genes in lists.items() if len(lists) > 1 else ():
        own = counted.index.isin(genes)
        elsewhere = counted.to_numpy() > own
        shared, shorter = int((own & elsewhere).sum()), min(int(elsewhere.sum()), len(genes))
        if shared < max(min(_MIN_GENES, shorter), _MIN_SHARED * shorter):
            others = counted.index[elsewhere]
            raise ValueError(
                f"`sdatas`: section {name!r} shares only {shared} of {shorter} genes with the others. It has "
                f"{list(genes.difference(others)[:3])}, they have {list(others.difference(genes)[:3])}. If some have symbols and others "
                "Ensembl ids, pass keys=hg.SectionKeys(gene_symbols=...) (column of var) or genes=hg.GeneSelection(ensembl_ids=...) "
                "(symbol to id)"
            )
    union = counted.index.sort_values()
    if chosen.genes is not None:
        asked = list(chosen.genes)
        found = find_genes(asked, counted.index, one_to_one=False)
        unknown = [gene for gene, place in zip(asked, found, strict=True) if place < 0]
        if unknown:
            raise ValueError(
                f"`genes` {unknown[:5]} are not in any section; genes of the sections are for example {list(union[:5])}"
            )
        union = pd.Index(sorted(set(counted.index[found])))
    if not chosen.missing_genes_are_zero and not (counted[union] == len(lists)).any():
        what = "gene" if chosen.genes is None else "gene of `genes`"
        fewest = min(lists, key=lambda name: len(union.intersection(lists[name])))
        raise ValueError(
            f"`sdatas`: no {what} was measured in all {len(lists)} sections, so sections cannot be compared; section {fewest!r} has the "
            "fewest. Leave sections out, or pass genes=hg.GeneSelection(missing_genes_are_zero=True) if genes that a section does not "
            "list were measured there and never detected"
        )
    return union


_MIN_CLASS = 5
#: Colours of classes without a given one.
PALETTE = (
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


def class_of(label: str | None, chosen: Classes) -> str | None:
    """Class of a label: its entry in ``classes``, else ``None`` if it is missing or ignored (in any case), else the label."""
    if label is None:
        return None
    if label in chosen.merge:
        return chosen.merge[label]
    return None if label.lower() in {name.lower() for name in chosen.ignore} else label


def code_classes(labels: list[np.ndarray], chosen: Classes) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Names of classes with enough spots, and codes of the spots of each section (-1 without a class)."""
    check_merged((label for part in labels for label in part if label is not None), chosen.merge)
    named = [np.array([class_of(label, chosen) for label in part], object) for part in labels]
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
    counted.update(name for label in part if (name := class_of(label, chosen)) is not None)
    classes = sorted(name for name, n in counted.items() if n >= _MIN_CLASS)
    if len(classes) > 2:
        raise ValueError(
            f"`exact` is True, which allows only two classes (one logit, as for tumour in the paper); found {classes}. Merge "
            "them with classes=hg.Classes(merge=...) (label to class, None leaves a label out), or drop exact=True of "
            "hg.PaperRecipe"
        )
