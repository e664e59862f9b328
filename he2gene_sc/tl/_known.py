"""Slides that a model was trained on: what training writes of their images, and how ``predict`` finds them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.logs import logger
from ..image import pixels_sha256

if TYPE_CHECKING:
    from .._core.slide import Slide
    from ..models import HE2Gene, ModelCard

#: Share of the spots that must lie where spots of training did: one image may show tissue of several patients.
_LEAST_SHARE = 0.9


def image_facts(slide: Slide, centres: np.ndarray) -> dict[str, Any] | None:
    """Facts by which the image of a section is known again, for the card; ``centres`` ``(n, 2)`` are those of its spots."""
    sha256 = pixels_sha256(slide.pyramid, slide.pixel_factor)
    if sha256 is None:
        return None
    low, high = np.floor(centres.min(0)), np.ceil(centres.max(0))
    return {
        "shape": [slide.pyramid.height, slide.pyramid.width],
        "sha256": sha256,
        "spots": [int(x) for x in (*low, *high)],
    }


def training_sections(slides: Sequence[Slide], card: ModelCard) -> list[str]:
    """Sections of training that the slides show, by their pixels; none unless every slide shows one."""
    found = [_shown(slide, card) for slide in slides]
    if not all(found):
        return []
    names = list(dict.fromkeys(name for own in found for name in own))
    logger.info(
        "predict: the image is that of section %s, which the model was trained on, so genes are called reliable as for known "
        "patients; pass known_patient=False to have those of new patients",
        ", ".join(map(repr, names)),
    )
    return names


def trained_on(record: Mapping[str, Any], model: HE2Gene | None, sections: Iterable[str]) -> list[str]:
    """Sections of a predicted table that its model was trained on: as predict found them by their pixels, and by name."""
    named = set() if model is None else {*map(str, sections)} & {*model.card.training.get("sections", ())}
    return sorted({*map(str, record.get("known_sections", ())), *named})


def _shown(slide: Slide, card: ModelCard) -> list[str]:
    shape = [slide.pyramid.height, slide.pyramid.width]
    images = {name: facts["image"] for name, facts in card.training.get("sections", {}).items() if "image" in facts}
    images = {name: image for name, image in images.items() if image["shape"] == shape}
    centres = slide.centres[slide.inside]
    # Pixels are read only where an image of this size was trained on.
    if not images or not len(centres):
        return []
    sha256 = pixels_sha256(slide.pyramid, slide.pixel_factor)
    inside = {
        name: ((centres >= image["spots"][:2]) & (centres <= image["spots"][2:])).all(1)
        for name, image in images.items()
        if image["sha256"] == sha256
    }
    if not inside or np.any([*inside.values()], axis=0).mean() < _LEAST_SHARE:
        return []
    return [name for name, spots in inside.items() if spots.any()]
