"""Provenance of values, labels and slides: measured or predicted, reliable or not, from one image, known from training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..image import pixels_sha256
from .genes import find_genes
from .keys import Keys
from .logs import logger
from .names import clean_names
from .ownership import is_prediction, is_record_of
from .predictions import prediction_of

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import HE2Gene, ModelCard
    from .elements import Slide

#: Least share of the spots in the area of training spots; an image may show tissue of several patients.
_MIN_SHARE = 0.9


def circularity(tables: Sequence[AnnData], groupby: str, layer: str | None) -> str:
    """Reason why the labels depend on the errors of the values, or an empty text.

    Predictions share the image with labels of the annotation head and with clusters of predicted genes. Measurements share
    the noise with clusters of measured genes. Such columns are found by name, and labels if they follow exactly from
    such a column (renamed or merged levels).
    """
    predicted = any(prediction_of(table, layer) is not None for table in tables)
    heads = set().union(*(_head_columns(table, layer) for table in tables)) if predicted else set()
    clusters = set().union(*(_cluster_columns(table, predicted) for table in tables))
    reason = (
        "predicted from the same image as the genes, so labels and genes share its errors"
        if predicted
        else "computed from the tested values, which differ between their own clusters even without a biological difference"
    )
    if groupby in heads | clusters:
        return f"obs[{groupby!r}] was {reason}"
    # Good clusters agree with the domains that they were compared with, but these do not depend on the clusters.
    compared = {record["params"].get("domain_key") for table in tables for record in _domain_records(table)}
    for name in sorted(heads | clusters):
        if name in clusters and groupby in compared:
            continue
        if _determined_share(tables, groupby, name) > 1 - 1e-9:
            return f"obs[{groupby!r}] follows level by level from obs[{name!r}], which was {reason}"
    return ""


def _head_columns(table: AnnData, layer: str | None) -> set[str]:
    """Columns with labels from predict, also if anndata.concat has dropped its record."""
    keys = [key for key, record in table.uns.items() if is_prediction(record)]
    named = {Keys(key).annotation for key in [*keys, prediction_of(table, layer)] if key is not None}
    suffix = Keys("").annotation
    for key in (str(name).removesuffix(suffix) for name in table.obs if str(name).endswith(suffix)):
        if Keys(key).ood in table.obs or Keys(key).confidence in table.obs:
            named.add(Keys(key).annotation)
    return named & set(table.obs)


def _domain_records(table: AnnData) -> list[Mapping]:
    return [record for record in table.uns.values() if is_record_of("domain_preservation", record)]


def _cluster_columns(table: AnnData, predicted: bool) -> set[str]:
    """Columns with clusters of predicted or of measured expression from hg.tl.domain_preservation."""
    # The default name, in case anndata.concat has dropped the record.
    found = {f"he2gene_domains_{'predicted' if predicted else 'measured'}"}
    for record in _domain_records(table):
        layers = {"predicted": record["params"].get("layer"), "measured": record["params"].get("measured")}
        for name in list(record["written"].get("obs", [])):
            source = layers[str(name).rsplit("_", 1)[1]]
            found.discard(name)
            if (prediction_of(table, source) is not None) == predicted:
                found.add(name)
    return found & set(table.obs)


def _determined_share(tables: Sequence[AnnData], groupby: str, name: str) -> float:
    """Share of spots whose label is the most common one of their level; 0 if it is hardly above that of the most common label overall."""
    chosen = [table for table in tables if name in table.obs]
    labels = np.concatenate([clean_names(table.obs[groupby]) for table in chosen])
    source = np.concatenate([clean_names(table.obs[name]) for table in chosen])
    labelled = pd.notna(labels)
    if not labelled.any():
        return 0.0
    counts = pd.crosstab(pd.Series(source[labelled]).fillna("").to_numpy(), labels[labelled]).to_numpy()
    share, most = counts.max(axis=1).sum() / counts.sum(), counts.sum(axis=0).max() / counts.sum()
    return float(share) if share - most > 0.8 * (1 - most) else 0.0


def are_reliable(names: pd.Series | pd.Index, tables: Sequence[AnnData], layer: str | None) -> np.ndarray:
    """Whether the model cards call genes reliable in every table, ``(g,)``; measured values are."""
    first = None
    for table in tables:
        key = prediction_of(table, layer)
        if key is None:
            continue
        name = Keys(key).reliable
        flags = table.var[name].astype(bool) if name in table.var else pd.Series(False, index=table.var_names)
        if first is None:
            first = flags
        else:
            first &= np.append(flags.to_numpy(), False)[find_genes(first.index, flags.index)]
    return np.ones(len(names), bool) if first is None else first.rename(index=str).reindex(names).to_numpy(bool)


def image_facts(slide: Slide, centres: np.ndarray) -> dict[str, Any] | None:
    """Return facts for the card that identify the image of a section; ``centres`` ``(n, 2)`` are its spot centres."""
    sha256 = pixels_sha256(slide.pyramid, slide.pixel_factor)
    if sha256 is None:
        return None
    low, high = np.floor(centres.min(0)), np.ceil(centres.max(0))
    return {
        "shape": [slide.pyramid.height, slide.pyramid.width],
        "sha256": sha256,
        "spots": [int(x) for x in (*low, *high)],
    }


def known_training_sections(record: Mapping[str, Any], model: HE2Gene | None, sections: Iterable[str]) -> list[str]:
    """Return the sections of a predicted table that its model was trained on, recognised by their pixels or by name."""
    named = set() if model is None else {*map(str, sections)} & {*model.card.training.get("sections", ())}
    return sorted({*map(str, record.get("known_sections", ())), *named})


def training_sections(slides: Sequence[Slide], card: ModelCard) -> list[list[str]]:
    """Return the training sections in the image of each slide; none unless every slide shows one."""
    sections = [_sections_in(slide, card) for slide in slides]
    if not all(sections):
        return [[] for _ in slides]
    names = dict.fromkeys(name for own in sections for name in own)
    logger.info("predict: the model was trained on the image of section %s", ", ".join(map(repr, names)))
    return sections


def _sections_in(slide: Slide, card: ModelCard) -> list[str]:
    shape = [slide.pyramid.height, slide.pyramid.width]
    images = {name: facts["image"] for name, facts in card.training.get("sections", {}).items() if "image" in facts}
    images = {name: image for name, image in images.items() if image["shape"] == shape}
    centres = slide.centres[slide.inside]
    # Read pixels only if a training image has this size.
    if not images or not len(centres):
        return []
    sha256 = pixels_sha256(slide.pyramid, slide.pixel_factor)
    inside = {
        name: ((centres >= image["spots"][:2]) & (centres <= image["spots"][2:])).all(1)
        for name, image in images.items()
        if image["sha256"] == sha256
    }
    if not inside or np.any([*inside.values()], axis=0).mean() < _MIN_SHARE:
        return []
    return [name for name, spots in inside.items() if spots.any()]
