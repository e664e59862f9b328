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

from ..._core.elements import Slide
from ..._core.expression import raw_counts
from ..._core.genes import gene_names
from ..._core.hints import use_mpp_hint
from ..._core.logs import logger
from ..._core.names import clean_names, column_of, section_and_patient
from ..._core.placement import check_placement
from ..._core.provenance import image_facts
from ..._core.slide import resolve
from .names import check_gene_lists, code_classes, common_names
from .options import Classes, GeneSelection, TrainingKeys

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ...training import Section

#: Fewest spots of a section; with fewer, it cannot be measured how well genes are predicted.
MIN_SPOTS = 4
_COLUMN_HINTS = {
    "annotation_key": "; sections without labels need the column too, with missing values",
    "sample_key": "; set it, e.g. sdata['table'].obs['patient'] = 'P1'",
    "section_key": "; set it, e.g. sdata['table'].obs['section'] = 'S1'",
}
#: Fewest counts of common genes to rescale sections with different gene lists.
_ENOUGH_COUNTS = 1000
#: Share of all counts below which there is a warning about a short gene list.
_FULL_LIST = 0.9


@dataclass(frozen=True, eq=False)
class MeasuredSection:
    """One section: the spots that have counts and whose centre is in the image."""

    name: str
    patient: str
    mpp: float
    slide: Slide | None  # None once released
    centres: np.ndarray  # (n, 2) pixels of level 0
    genes: pd.Index
    counts: scipy.sparse.csr_array  # (n, genes) raw
    labels: np.ndarray  # (n,) None without a label
    image: dict[str, Any] | None = None  # identifies the image in the model card

    def release(self) -> MeasuredSection:
        """Release the image and move the counts to disk, to free memory for the next section."""
        from ...training import spill

        (counts,) = spill([self.counts])
        # A new index does not keep the lookup table of names.
        return replace(self, slide=None, counts=counts, genes=pd.Index(self.genes.to_numpy()))


def read_sections(
    sdata: SpatialData, keys: TrainingKeys, symbols: Mapping[str, str], *, checked: bool = False, pixels: bool = True
) -> Iterator[MeasuredSection]:
    """Check one object and yield its sections, one per shapes element.

    ``checked``: it was read before, so warnings are not repeated. Without ``pixels``, the image is not identified.
    """
    with use_mpp_hint("pass keys=hg.SectionKeys(mpp={mpp})"):
        slides = resolve(sdata, **keys.elements.places)
    if slides[0].table_key is None:
        raise ValueError("`sdatas`: a section has no table; training needs measured counts")
    table = sdata[slides[0].table_key]
    columns = {"annotation_key": keys.annotation, "sample_key": keys.sample, "section_key": keys.section}
    for parameter, key in columns.items():
        if key is not None:
            column_of(table, key, parameter, _COLUMN_HINTS[parameter])
    genes = gene_names(table, keys.elements.gene_symbols, symbols)
    matrix = raw_counts(table, keys.elements.layer)
    for slide in slides:
        if not checked:
            check_placement(sdata, slide)
        counts = matrix[slide.rows[slide.inside]]
        counted = np.asarray(counts.sum(axis=1)).ravel() > 0
        rows = slide.rows[slide.inside][counted]
        if not len(rows):
            raise ValueError(f"`sdatas`: no spot of {slide.shapes_key!r} lies in the image and has counts")
        counts = counts[counted]
        counts.sum_duplicates()
        name, patient = section_and_patient(table, rows, slide.shapes_key, keys.section, keys.sample)
        labels, n_converted = np.full(len(rows), None, object), 0
        if keys.annotation is not None:
            given = table.obs[keys.annotation].iloc[rows]
            labels = clean_names(given)
            n_converted = sum(isinstance(value, str) and value.strip() != "" for value in given[pd.isna(labels)])
        for n, what in (
            (int((~slide.inside).sum()), "spots outside the image are left out"),
            (int((~counted).sum()), "spots without counts are left out"),
            (n_converted, "labels are missing values converted to text; they count as missing"),
        ):
            if n and not checked:
                logger.warning("section %s: %d %s", name, n, what)
        centres = slide.centres[slide.inside][counted]
        image = image_facts(slide, centres) if pixels else None
        yield MeasuredSection(name, patient, slide.mpp, slide, centres, genes, counts, labels, image)


def join(
    read: Sequence[MeasuredSection],
    features: Sequence[np.ndarray],
    chosen: GeneSelection,
    labels: Classes,
    *,
    all_listed: bool = False,
) -> tuple[list[Section], pd.Index, tuple[str, ...]]:
    """Join sections with a common gene list and common classes, without the rarest genes: sections, genes, classes.

    Features are ``(n, r, f)``; targets are on disk; ``all_listed`` keeps genes that were not detected in any spot.
    """
    from ...training import Section, log_targets, spill

    renamed = common_names({section.name: section.genes for section in read})
    if renamed:
        read = [replace(s, genes=s.genes.map(lambda gene: renamed.get(gene, gene))) for s in read]
    genes = check_gene_lists({section.name: section.genes for section in read}, chosen)
    everywhere = np.ones(len(genes), bool)
    measured = [everywhere if chosen.missing_genes_are_zero else genes.isin(section.genes) for section in read]
    classes, codes = code_classes([section.labels for section in read], labels)
    if chosen.genes is None and not all_listed:
        seen = sum(_n_detected(section, genes) for section in read)
        spots = sum(section.counts.shape[0] * mask for section, mask in zip(read, measured, strict=True))
        frequent = seen >= np.maximum(chosen.min_spot_share * spots, 1)
        if not frequent.any():
            largest = (seen / np.maximum(spots, 1)).max(initial=0)
            raise ValueError(
                f"`min_spot_share` is {chosen.min_spot_share:g}, but no gene was detected in so many spots: the largest share is "
                f"{largest:.3g}; pass a smaller one: genes=hg.GeneSelection(min_spot_share=...)"
            )
        genes, measured = genes[frequent], [mask[frequent] for mask in measured]
    totals = totals_of(read, chosen)
    targets = spill(
        _align(log_targets(section.counts, total), _gene_columns(genes, section))
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


def totals_of(sections: Sequence[MeasuredSection], chosen: GeneSelection) -> list[np.ndarray]:
    """Total counts of each spot, rescaled to the genes of all sections if a section lists fewer.

    The share of the counts that a section lists is estimated from the other sections; valid for similar tissue.
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
            "gene lists differ, and the genes that all sections measured have only %d counts in one section, too few to rescale: "
            "counts per 10,000 refer to each section's own genes and are hard to compare",
            int(least),
        )
        return own
    rate = counted / base
    totals = []
    for section, total in zip(sections, own, strict=True):
        share = rate[union.get_indexer(section.genes)].sum() / rate.sum()
        if share < _FULL_LIST:
            logger.warning(
                "section %s measures only part of the genes (about %.0f %% of the counts in the other sections): its library sizes are "
                "rescaled; pass genes=hg.GeneSelection(missing_genes_are_zero=True) to disable this",
                *(section.name, 100 * share),
            )
        totals.append(total / share)
    return totals


def _n_detected(section: MeasuredSection, genes: pd.Index) -> np.ndarray:
    """Count the spots of a section in which each gene was detected, ``(g,)``."""
    counts = section.counts
    detected = np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])
    positions = _gene_columns(genes, section)
    return np.where(positions >= 0, detected[positions], 0)


def _gene_columns(genes: pd.Index, section: MeasuredSection) -> np.ndarray:
    """Columns of genes in the counts of a section, -1 if missing; does not build a lookup table in the section."""
    columns = np.full(len(genes), -1)
    positions = genes.get_indexer(section.genes)
    columns[positions[positions >= 0]] = np.flatnonzero(positions >= 0)
    return columns


def _align(targets: scipy.sparse.csc_array, columns: np.ndarray) -> scipy.sparse.csc_array:
    """Take columns of a sparse array; position -1 gives an empty column."""
    padded = scipy.sparse.csc_array(
        (targets.data, targets.indices, np.append(targets.indptr, targets.indptr[-1])),
        shape=(targets.shape[0], targets.shape[1] + 1),
    )
    return scipy.sparse.csc_array(padded[:, columns])
