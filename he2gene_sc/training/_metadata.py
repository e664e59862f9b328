"""Facts about a model that training writes to its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .._core.predictions import IF_NONE_RELIABLE
from ..models import EncoderSpec, ModelCard
from ..models._encoders.registry import input_facts
from ._sections import Section

#: Fields that a card has under the same name.
_OF_CARD = ["name", "version", "description", "intended_use", "limitations", "windows_um", "classes", "class_colors"]


@dataclass(frozen=True, eq=False)
class Programmes:
    """Gene sets among the genes of a model."""

    genes: Mapping[str, Mapping[str, float]]  # genes and weights of each set
    weights: np.ndarray  # (g, sets), 0 outside a set


@dataclass(frozen=True)
class ModelMetadata:
    """Facts about a model that are not in its arrays."""

    genes: pd.Index  # names of the targets
    ensembl_ids: tuple[str, ...]  # empty if unknown
    classes: tuple[str, ...]
    class_colors: tuple[str, ...]
    encoder: EncoderSpec
    windows_um: tuple[float, ...]  # at inference
    name: str
    version: str
    description: str
    intended_use: str
    limitations: tuple[str, ...]
    encoder_sha256: str = ""  # of a frozen encoder
    stages: tuple[int, ...] | None = None  # stages of the encoder that are used
    tiles: tuple[int, ...] | None = None  # number per side of each window
    encoder_output: tuple[float, ...] | None = None  # fingerprint of a user's own encoder
    programmes: Programmes | None = None

    def table(
        self, target: np.ndarray, variable: np.ndarray, mean: np.ndarray, columns: dict[str, np.ndarray]
    ) -> pd.DataFrame:
        """Return the gene table; ``target`` and ``variable`` are positions of the genes of both panels."""
        index = np.arange(len(self.genes))
        own = {
            "ensembl_id": list(self.ensembl_ids),
            "group": np.where(np.isin(index, target), "target", "auxiliary"),
            "variable": np.isin(index, variable),
            "mean": mean,
        }
        return pd.DataFrame(own | columns, index=pd.Index(self.genes, name="gene"))

    def card(self, genes: pd.DataFrame, tensors: dict[str, np.ndarray], **facts: Any) -> ModelCard:
        """Return the card of a model with these genes and tensors; ``facts`` are its other fields."""
        own = {
            name: list(value)
            for name, value in (("stages", self.stages), ("tiles", self.tiles), ("output", self.encoder_output))
            if value is not None
        }
        encoder = {"name": self.encoder.name, "license": self.encoder.license, "sha256": self.encoder_sha256}
        given: dict[str, Any] = {name: getattr(self, name) for name in _OF_CARD}
        given |= {"n_genes": len(genes), "n_latent": len(tensors["genes.weight"])}
        given |= {"encoder": {**encoder, **input_facts(self.encoder), **own}, **facts}
        if not genes["reliable"].any():
            none_reliable = f"No gene is reliable on a new patient. You can {IF_NONE_RELIABLE}."
            given["limitations"] = (*given["limitations"], none_reliable)
        return ModelCard(**given)

    def spots(
        self, sections: Sequence[Section], n_spots: Sequence[int] | np.ndarray, codes: np.ndarray
    ) -> dict[str, Any]:
        """Describe the training spots for the card; ``codes`` are the classes of all spots."""
        mpps = [round(section.mpp, 4) for section in sections]
        labels = np.bincount(codes[codes >= 0], minlength=len(self.classes))
        return {
            "sections": {
                section.name: {
                    "patient": section.patient,
                    "n_spots": int(n),
                    "mpp": mpp,
                    **({} if section.image is None else {"image": section.image}),
                }
                for section, n, mpp in zip(sections, n_spots, mpps, strict=True)
            },
            "n_patients": len({section.patient for section in sections}),
            "n_spots": len(codes),
            "mpp_range": [min(mpps), max(mpps)],
            "labelled_spots": {name: int(n) for name, n in zip(self.classes, labels, strict=True)},
        }
