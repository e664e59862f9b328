"""``HE2Gene``: card, genes and weights of one model, ready for ``hg.tl.predict``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._card import ModelCard, as_html, set_genes
from ._folder import save
from ._tensors import ENCODER, check_tensors

if TYPE_CHECKING:
    import torch

    from ._encoders.registry import EncoderSpec
    from ._network import Network
    from ._ood import OODDetector

__all__ = ["ENCODER", "HE2Gene"]


@dataclass(frozen=True, eq=False)
class HE2Gene:
    """A model: from patches to expression and annotation.

    Attributes
    ----------
    card
        What it is, what it was trained on, how it did.
    genes
        One row a gene, in the order of the gene head; index ``gene``; columns ``ensembl_id`` (empty where unknown),
        ``group`` (``"target"``: those of highest mean in training; ``"auxiliary"``), ``variable`` (the 50 of
        highest variance in training), ``mean``, ``pcc`` (held-out Pearson correlation), ``pcc_low`` (its lower 95 %
        bound), ``skill`` (held-out, against the training mean), ``reliable``; and, of models that state them, ``pcc_high``,
        ``pcc_patient_low`` (lowest over the patients of the 95 % bound from the spots of each),
        ``pcc_new_patient`` (mean over patients that were held out), ``ceiling`` (noise ceiling in training), ``pcc_depth`` (of
        a reference that sees no gene, as ``_colour``, ``_coordinates``) and ``minus_depth`` (paired difference to it, ``_low``, ``_high``).
    tensors
        Weights of the heads by name, see :class:`he2gene_sc.models._network.Network`; ``encoder.*``, those of the
        encoder where it was trained too (otherwise the registry has them); and ``colour.*``, the baseline that reads
        nothing but colour, where there is one.
    encoder
        Network and specification that were supplied; ``None``: those that the card names.
    source
        Address on the hub with the commit that it was loaded from; empty for any other.
    allow_encoder_source
        Whether the card may name a repository or a folder to take the encoder from, see
        :func:`he2gene_sc.models.load`.
    """

    card: ModelCard
    genes: pd.DataFrame
    tensors: dict[str, np.ndarray]
    encoder: tuple[torch.nn.Module, EncoderSpec] | None = None
    source: str = ""
    allow_encoder_source: bool = False

    @property
    def name(self) -> str:
        """Name on the card."""
        return self.card.name

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of ``weights.safetensors``; empty for a model that was never saved."""
        return self.card.files.get("weights.safetensors", "")

    @property
    def programmes(self) -> pd.DataFrame:
        """Gene sets named when the model was trained, and how well their scores are predicted on patients held out.

        Index the set; ``genes``, text as :func:`he2gene_sc.models._card.set_genes` writes it; figures as of
        :func:`he2gene_sc.tl.programmes`; ``n_patients``; ``n_learned``, genes of the model. Empty where none were named.
        """
        found = self.card.programmes or {"n_patients": 0, "sets": {}}
        rows = {name: {**facts, "genes": set_genes(facts["genes"])} for name, facts in found["sets"].items()}
        table = pd.DataFrame.from_dict(rows, orient="index")
        # A figure that is missing for every set is a number too.
        table = table.astype(dict.fromkeys(table.columns.difference(["genes", "reliable"]), float))
        return table.assign(n_patients=found["n_patients"], n_learned=self.card.n_genes)

    @cached_property
    def network(self) -> Network:
        """The network in float32 on the CPU, built when first used.

        Raises
        ------
        RuntimeError
            If the encoder's weights cannot be had here, or it is a network of somebody's own and was not supplied.
        ValueError
            If the model's own weights are not finite or do not fit its card; or the encoder at hand has other weights than
            the one the model was trained with, or is built otherwise.
        """
        import torch

        from ._embedding import ALONE, Context
        from ._encoders.load import encoder_of, encoder_sha256
        from ._network import FeatureExtractor, Network

        check_tensors(self.card, self.tensors, f"model {self.name!r}")
        tensors = {key: torch.from_numpy(value) for key, value in self.tensors.items()}
        own = {key.removeprefix(ENCODER): value for key, value in tensors.items() if key.startswith(ENCODER)}
        encoder, spec = encoder_of(self.card, self.encoder, pretrained=not own, allow_source=self.allow_encoder_source)
        if own:
            try:
                encoder.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(
                    f"`model` {self.name!r} carries weights that do not fit its encoder {spec.name!r} as timm builds it "
                    f"here: {error}"
                ) from error
        stated: dict[str, Any] = {
            key: tuple(self.card.encoder[key]) for key in ("mean", "std") if key in self.card.encoder
        }
        spec = replace(
            spec,
            # Cards before 0.7 do not state it: they were trained so, whatever the registry says now.
            interpolation=self.card.encoder.get("interpolation", "bilinear"),
            **stated,
        )
        found = encoder_sha256(encoder)
        if found != self.card.encoder["sha256"]:
            raise ValueError(
                f"`model` {self.name!r} was trained on encoder {spec.name!r} with weights {self.card.encoder['sha256'][:12]}…, "
                f"those found here are {found[:12]}…: its predictions would be meaningless; supply the right ones by "
                "`hg.models.load(path, encoder=(module, spec))`"
            )
        heads = {key: value for key, value in tensors.items() if not key.startswith(ENCODER)}
        stages, tiles = (
            None if found is None else tuple(found) for found in map(self.card.encoder.get, ("stages", "tiles"))
        )
        extractor = FeatureExtractor(encoder, spec, fusion=self.card.fusion, stages=stages, tiles=tiles)
        output = self.card.encoder.get("output")
        if output is not None and not np.allclose(extractor.fingerprint(), output, rtol=0.05, atol=0.11):
            raise ValueError(
                f"`model` {self.name!r} was trained on encoder {spec.name!r}; the one found here has its weights but gives "
                "another output, as where it reads another layer or pools otherwise: its predictions would be meaningless"
            )
        context = ALONE if self.card.context is None else Context(**self.card.context)
        around = (self.card.annotation or {}).get("context")
        return Network(extractor, heads, context, self.detector, ALONE if around is None else Context(**around))

    @property
    def detector(self) -> OODDetector | None:
        """What notices a slide unlike the training data; ``None`` where the model has no statistics of it."""
        from ._ood import BANK, MEAN, PROJECTION, SCALE, SIZE, WEIGHTS, OODDetector

        if self.card.guard is None:
            return None
        own = (MEAN, SCALE) if MEAN in self.tensors else ("latent.mean", "latent.scale")
        none = np.zeros(0, np.float32)
        mean, scale, weights, projection, bank, size = (
            np.asarray(self.tensors.get(name, none), np.float32) for name in (*own, WEIGHTS, PROJECTION, BANK, SIZE)
        )
        return OODDetector(mean, scale, weights, projection, bank, size, self.card.guard, self.card.windows_um)

    def save(self, path: str | Path) -> Path:
        """Write the model folder: ``card.json``, ``genes.csv``, ``weights.safetensors``, ``README.md``.

        Parameters
        ----------
        path
            Folder to make. It must not exist or be empty, unless it holds an older model and nothing else, which is replaced
            whole; what is hidden there (``.git``) is kept.

        Returns
        -------
        pathlib.Path
            The folder, absolute.
        """
        return save(self.card, self.genes, self.tensors, path)

    def __repr__(self) -> str:
        return (
            f"HE2Gene({self.name!r} {self.card.version}: {self.card.n_genes:,} genes, {len(self.card.classes)} classes, "
            f"encoder {self.card.encoder['name']}, windows {self.card.windows_um} µm)"
        )

    def _repr_html_(self) -> str:
        genes = self.genes
        good = f"{int(genes['reliable'].sum()):,} of {len(genes):,} genes are reliable"
        if "pcc_new_patient" in genes and genes["pcc_new_patient"].notna().any():
            good += f"; mean correlation of a gene over held-out patients {genes['pcc_new_patient'].mean():.2f}"
        further = "hg.tl.predict(sdata, model=model); hg.pl.predictability(model); model.card"
        return as_html(
            f"{self.name} {self.card.version}", {**self.card.facts(), "on a new patient": good, "next": further}
        )
