"""Sections with measured counts, read and checked for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse

from ..._core.expression import summarize_values
from ..._core.logs import logger
from ..._core.matrix import in_memory, layer_label, layer_names, matrix_of
from ..._core.names import clean_names, clean_samples, column_of
from ..._core.placement import check_placement
from ..._core.slide import Slide, resolve
from .._known import image_facts
from .gene_lists import check_gene_lists, common_names, gene_names
from .labels import clean_labels, code_classes
from .options import Classes, GeneSelection, Keys

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ...training import Section

TWICE = "`section_key`: two sections are named {!r}; each needs a name of its own, those of other patients too"
#: Spots below which a section says nothing of how well its genes are predicted.
MIN_SPOTS = 4
_COLUMN_HINTS = {
    "annotation_key": "; sections without labels need the column all the same, with missing values",
    "sample_key": "; set it, e.g. sdata['table'].obs['patient'] = 'P1'",
    "section_key": "; set it, e.g. sdata['table'].obs['section'] = 'S1'",
}
#: Counts of common genes below which sections with different lists cannot be brought to one scale.
_ENOUGH_COUNTS = 1000
#: Share of all counts below which a gene list is called short.
_WHOLE_LIST = 0.9


@dataclass(frozen=True, eq=False)
class Measured:
    """One section: the spots whose centre lies in the image and on which something was counted."""

    name: str
    patient: str
    mpp: float
    slide: Slide | None  # None once released
    centres: np.ndarray  # (n, 2) pixels of level 0
    genes: pd.Index
    counts: scipy.sparse.csr_array  # (n, genes) raw
    labels: np.ndarray  # (n,) None without a label
    image: dict[str, Any] | None = None  # by which the card knows it again

    def set_down(self) -> Measured:
        """Let the image go and move the counts to disk, so that the next section finds room."""
        from ...training import spill

        (counts,) = spill([self.counts])
        # Another index has no table of where each name stands.
        return replace(self, slide=None, counts=counts, genes=pd.Index(self.genes.to_numpy()))


def read_sections(
    sdata: SpatialData, keys: Keys, symbols: Mapping[str, str], *, checked: bool = False
) -> Iterator[Measured]:
    """Check one object and yield its sections, one a shapes element; ``checked``: by :func:`check_table` already."""
    slides, table, names, matrix = _opened(sdata, keys, symbols)
    for slide in slides:
        if not checked:
            check_placement(sdata, slide)
        yield _section(table, slide, names, matrix, keys)


def check_table(
    sdata: SpatialData, keys: Keys, symbols: Mapping[str, str]
) -> tuple[dict[str, str], set[str], pd.Index]:
    """Check what can be checked of one object without its pixels; return patients by section, labels and genes."""
    slides, table, genes, matrix = _opened(sdata, keys, symbols)
    patients, labels = {}, set()
    for slide in slides:
        check_placement(sdata, slide)
        rows, _, _ = _counted(slide, matrix)
        name, patient = _names(table, rows, slide, keys)
        if len(rows) < MIN_SPOTS:
            continue
        if name in patients:
            raise ValueError(TWICE.format(name))
        patients[name] = patient
        if keys.annotation is not None:
            labels |= set(clean_names(table.obs[keys.annotation].iloc[rows]))
    return patients, labels - {None}, genes


def _opened(
    sdata: SpatialData, keys: Keys, symbols: Mapping[str, str]
) -> tuple[tuple[Slide, ...], AnnData, pd.Index, scipy.sparse.csr_array]:
    """Slides, table, gene names and counts of one object."""
    slides = resolve(sdata, **keys.elements.places)
    if slides[0].table_key is None:
        raise ValueError("`sdatas`: a section has no table; measured counts are needed to train")
    table = sdata[slides[0].table_key]
    for parameter, key in (
        ("annotation_key", keys.annotation),
        ("sample_key", keys.sample),
        ("section_key", keys.section),
    ):
        if key is not None:
            column_of(table, key, parameter, _COLUMN_HINTS[parameter])
    return slides, table, gene_names(table, keys.elements.gene_symbols, symbols), _matrix(table, keys.elements.layer)


def _counted(slide: Slide, matrix: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray, scipy.sparse.csr_array]:
    """Rows of the spots in the image on which something was counted, which of those in the image they are, their counts."""
    counts = matrix[slide.rows[slide.inside]]
    counted = np.asarray(counts.sum(axis=1)).ravel() > 0
    rows = slide.rows[slide.inside][counted]
    if not len(rows):
        raise ValueError(f"`sdatas`: no spot of {slide.shapes_key!r} lies in the image and has counts")
    summed = counts[counted]
    summed.sum_duplicates()
    return rows, counted, summed


def _section(table: AnnData, slide: Slide, names: pd.Index, matrix: scipy.sparse.csr_array, keys: Keys) -> Measured:
    rows, counted, summed = _counted(slide, matrix)
    name, patient = _names(table, rows, slide, keys)
    for n, what in ((int((~slide.inside).sum()), "outside the image"), (int((~counted).sum()), "without counts")):
        if n:
            logger.warning("section %s: %d spots %s are left out", name, n, what)
    labels = np.full(len(rows), None, object)
    if keys.annotation is not None:
        labels = clean_labels(table.obs[keys.annotation].iloc[rows], name)
    centres = slide.centres[slide.inside][counted]
    return Measured(
        name=name,
        patient=patient,
        mpp=slide.mpp,
        slide=slide,
        centres=centres,
        genes=names,
        counts=summed,
        labels=labels,
        image=image_facts(slide, centres),
    )


def _names(table: AnnData, rows: np.ndarray, slide: Slide, keys: Keys) -> tuple[str, str]:
    """Section and patient of some spots, one each."""
    found = []
    for parameter, key in (("section_key", keys.section), ("sample_key", keys.sample)):
        names = (clean_samples if parameter == "sample_key" else clean_names)(table.obs[key].iloc[rows])
        values = set(names)
        if None in values:
            first = table.obs_names[rows[pd.isna(names)]][:3].tolist()
            raise ValueError(
                f"`{parameter}`: values of {key!r} are missing for spots of {slide.shapes_key!r}, for example {first}"
            )
        found.append(sorted(values))
    if any(len(values) != 1 for values in found):
        raise ValueError(
            f"`section_key`, `sample_key`: the spots of {slide.shapes_key!r} belong to one section of one patient, found "
            f"sections {found[0][:5]} and patients {found[1][:5]}"
        )
    return found[0][0], found[1][0]


def _matrix(table: AnnData, layer: str | None) -> scipy.sparse.csr_array:
    matrix = matrix_of(table, layer)
    problem = summarize_values(matrix).problem
    if problem:
        raw = [name for name in layer_names(table) if not summarize_values(matrix_of(table, name)).problem]
        hint = f"layer {raw[0]!r} does:" if raw else "put them into a layer and"
        raise ValueError(
            f"`layer`: {layer_label(layer)} does not hold raw counts (whole numbers from 0) but {problem}; {hint} pass "
            f"keys=hg.SectionKeys(layer={repr(raw[0]) if raw else '...'})"
        )
    return scipy.sparse.csr_array(in_memory(matrix))


def join(
    read: Sequence[Measured],
    features: Sequence[np.ndarray],
    chosen: GeneSelection,
    labels: Classes,
    *,
    all_listed: bool = False,
) -> tuple[list[Section], pd.Index, tuple[str, ...]]:
    """Bring sections to one gene list and one list of classes, without the rarest genes: sections, genes, classes.

    Features are ``(n, r, f)``; targets are on disk; ``all_listed`` learns genes that no spot shows too.
    """
    from ...training import Section, log_targets, spill

    renamed = common_names({section.name: section.genes for section in read})
    if renamed:
        read = [replace(s, genes=s.genes.map(lambda gene: renamed.get(gene, gene))) for s in read]
    genes, measured = _join_genes(read, chosen)
    classes, codes = code_classes([section.labels for section in read], labels)
    if chosen.genes is None and not all_listed:
        seen = sum(_seen(section, genes) for section in read)
        spots = sum(section.counts.shape[0] * there for section, there in zip(read, measured, strict=True))
        frequent = seen >= np.maximum(chosen.min_spot_share * spots, 1)
        genes, measured = genes[frequent], [there[frequent] for there in measured]
    totals = totals_of(read, chosen)
    targets = spill(
        _align(log_targets(section.counts, total), _places(genes, section))
        for section, total in zip(read, totals, strict=True)
    )
    sections = [
        Section(
            name=section.name,
            patient=section.patient,
            mpp=section.mpp,
            centres_um=section.centres * section.mpp,
            features=features[i],
            targets=targets[i],
            totals=totals[i],
            measured=measured[i],
            codes=codes[i],
            image=section.image,
        )
        for i, section in enumerate(read)
    ]
    return sections, genes, classes


def totals_of(sections: Sequence[Measured], chosen: GeneSelection) -> list[np.ndarray]:
    """Count each spot over the genes of all sections; where a section lists fewer, as if it listed all.

    Its share of all counts is taken from the sections that measured the rest; right for tissue that is alike.
    """
    own = [np.asarray(section.counts.sum(axis=1), np.float64).ravel() for section in sections]
    listed = pd.Series(Counter(chain.from_iterable(section.genes for section in sections))).sort_index()
    union, common = listed.index, listed.to_numpy() == len(sections)
    if chosen.missing_genes_are_zero or common.all():
        return own
    counted, base, least = np.zeros(len(union)), np.zeros(len(union)), np.inf
    for section in sections:
        sums = np.asarray(section.counts.sum(axis=0), np.float64).ravel()
        places = union.get_indexer(section.genes)
        counted[places] += sums
        shared = sums[common[places]].sum()
        base[places] += shared
        least = min(least, shared)
    if least < _ENOUGH_COUNTS:
        logger.warning(
            "gene lists differ, and the genes that all sections measured have only %d counts in one of them: counts per 10,000 are "
            "of each section's own genes and cannot be compared well",
            int(least),
        )
        return own
    rate = counted / base
    found = []
    for section, total in zip(sections, own, strict=True):
        share = rate[union.get_indexer(section.genes)].sum() / rate.sum()
        if share < _WHOLE_LIST:
            logger.warning(
                "section %s lists genes that make up %.0f %% of the counts of all genes, by the sections that list more: its "
                "counts are taken for that part of all (genes=hg.GeneSelection(missing_genes_are_zero=True): for all)",
                *(section.name, 100 * share),
            )
        found.append(total / share)
    return found


def _seen(section: Measured, genes: pd.Index) -> np.ndarray:
    """Count the spots of a section in which each gene was seen, ``(g,)``."""
    counts = section.counts
    found = np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])
    positions = _places(genes, section)
    return np.where(positions >= 0, found[positions], 0)


def _places(genes: pd.Index, section: Measured) -> np.ndarray:
    """Columns of genes in the counts of a section, -1 where it lacks them; no table of names is left in the section."""
    found = np.full(len(genes), -1)
    there = genes.get_indexer(section.genes)
    found[there[there >= 0]] = np.flatnonzero(there >= 0)
    return found


def _join_genes(sections: Sequence[Measured], chosen: GeneSelection) -> tuple[pd.Index, list[np.ndarray]]:
    """All genes, sorted, and for each section whether they were measured there."""
    union = check_gene_lists({section.name: section.genes for section in sections}, chosen)
    everywhere = np.ones(len(union), bool)
    return union, [everywhere if chosen.missing_genes_are_zero else union.isin(section.genes) for section in sections]


def _align(targets: scipy.sparse.csc_array, columns: np.ndarray) -> scipy.sparse.csc_array:
    """Take columns of a sparse array, empty ones where the position is -1."""
    padded = scipy.sparse.csc_array(
        (targets.data, targets.indices, np.append(targets.indptr, targets.indptr[-1])),
        shape=(targets.shape[0], targets.shape[1] + 1),
    )
    return scipy.sparse.csc_array(padded[:, columns])
