"""Recognise slides that a model was trained on, from facts on their images that training writes to the card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.logs import logger
from ..image import pixels_sha256

if TYPE_CHECKING:
    from .._core.slide import Slide
    from ..models import HE2Gene, ModelCard

#: Least share of the spots in the area of training spots; an image may show tissue of several patients.
_MIN_SHARE = 0.9


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
