"""Facts about a model that training writes on its card."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ..models import EncoderSpec


@dataclass(frozen=True)
class ModelMetadata:
    """Facts about a model that the arrays do not hold.

    Attributes
    ----------
    genes
        Names of the targets.
    ensembl_ids
        Of the genes, empty where unknown.
    classes, class_colors
        Names of the codes, and colours.
    encoder
        What is known of the encoder.
    windows_um
        Sides of the windows at inference, µm.
    name, version, description, intended_use, limitations
        For the card.
    encoder_sha256, stages, tiles
        Of a frozen encoder: hash of its weights, the stages that are read, and the tiles a side of each window.
    encoder_output
        Of a network of somebody's own: its fingerprint.
    """

    genes: pd.Index
    ensembl_ids: tuple[str, ...]
    classes: tuple[str, ...]
    class_colors: tuple[str, ...]
    encoder: EncoderSpec
    windows_um: tuple[float, ...]
    name: str
    version: str
    description: str
    intended_use: str
    limitations: tuple[str, ...]
    encoder_sha256: str = ""
    stages: tuple[int, ...] | None = None
    tiles: tuple[int, ...] | None = None
    encoder_output: tuple[float, ...] | None = None
