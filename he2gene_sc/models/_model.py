"""``HE2Gene`` holds the card, genes and weights of one model, for ``hg.tl.predict``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._card import ModelCard, as_html, set_genes
from ._embedding import NO_CONTEXT, Context
from ._encoders.registry import EncoderSpec
from ._folder import save
from ._ood import BANK, MEAN, PROJECTION, SCALE, SIZE, WEIGHTS, OODDetector
from ._tensors import ENCODER, check_tensors

if TYPE_CHECKING:
    import torch

    from ._network import Network


@dataclass(frozen=True, eq=False)
class HE2Gene:
    """A model that predicts expression and annotation from patches.

    Attributes
    ----------
    card
        Model card: description, training data and held-out metrics.
    genes
        One row per gene, in the order of the gene head, with index ``gene``. Columns: ``ensembl_id`` (empty if unknown),
        ``group`` (``"target"``, genes of highest mean in training, or ``"auxiliary"``), ``variable`` (the 50 genes of
        highest variance in training), ``mean``, ``pcc`` (held-out Pearson correlation), ``pcc_low`` (its lower 95 %
        bound), ``skill`` (held-out, relative to the training mean), ``reliable``. Some models also have ``pcc_high``,
        ``pcc_patient_low`` (lowest 95 % bound of any patient, from the spots of each),
        ``pcc_new_patient`` (mean over held-out patients), ``ceiling`` (noise ceiling in training), ``pcc_depth`` (of a reference
        without genes; also ``_colour``, ``_coordinates``) and ``minus_depth`` (paired difference to it; ``_low``, ``_high``).
    tensors
        Weights of the heads by name, see :class:`he2gene_sc.models._network.Network`; ``encoder.*``, weights of the encoder
        if it was trained too (otherwise the registry has them); ``colour.*``, the baseline from colour only, if there is one.
    encoder
        Network and specification that the user gave; ``None``: the encoder that the card names.
    source
        Address on the hub with the commit, for a model loaded from there; otherwise empty.
    allow_encoder_source
        Whether the card may name a repository or a folder from which the encoder is loaded, see
        :func:`he2gene_sc.models.load`.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> model = hg.models.load()
    >>> model.name
    'breast-her2st'
    >>> path = model.save("model")
    >>> hg.models.load(path).genes.equals(model.genes)
    True
    """

    card: ModelCard
    genes: pd.DataFrame
    tensors: dict[str, np.ndarray]
    encoder: tuple[torch.nn.Module, EncoderSpec] | None = None
    source: str = ""
    allow_encoder_source: bool = False
    #: The model of which this is a copy; they share one network.
    _original: HE2Gene | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """Name on the card."""
        return self.card.name

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of ``weights.safetensors``; empty for a model that has not been saved."""
        return self.card.files.get("weights.safetensors", "")

    @property
    def programmes(self) -> pd.DataFrame:
        """Gene sets given at training, and how well their scores are predicted on held-out patients.

        The index is the gene set. Columns: ``genes``, as :func:`he2gene_sc.models._card.set_genes` writes them; the metrics of
        :func:`he2gene_sc.tl.programmes`; ``n_patients``; ``n_learned``, number of genes of the model. Empty without gene sets.
        """
        found = self.card.programmes or {"n_patients": 0, "sets": {}}
        rows = {name: {**facts, "genes": set_genes(facts["genes"])} for name, facts in found["sets"].items()}
        table = pd.DataFrame.from_dict(rows, orient="index")
        # A metric that is missing for all sets must still be a number.
        table = table.astype(dict.fromkeys(table.columns.difference(["genes", "reliable"]), float))
        return table.assign(n_patients=found["n_patients"], n_learned=self.card.n_genes)

    @cached_property
    def network(self) -> Network:
        """Network in float32 on the CPU, built at first use.

        Raises
        ------
        RuntimeError
            If the weights of the encoder are not available, or the encoder is a user's own network and was not given.
        ValueError
            If the weights of the model are not finite or do not fit its card, or the encoder has other weights or another
            architecture than in training.
        """
        if self._original is not None:
            return self._original.network
        import torch

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
                    f"`model` {self.name!r} has weights that do not fit its encoder {spec.name!r} as this timm builds it: "
                    f"{error}"
                ) from error
        facts = self.card.encoder
        spec = replace(
            spec,
            # Cards before 0.7 lack this field: their models were trained with bilinear interpolation.
            interpolation=facts.get("interpolation", "bilinear"),
            mean=facts.get("mean", spec.mean),
            std=facts.get("std", spec.std),
        )
        found = encoder_sha256(encoder)
        if found != facts["sha256"]:
            raise ValueError(
                f"`model` {self.name!r} was trained on encoder {spec.name!r} with weights {facts['sha256'][:12]}…, "
                f"but this encoder has {found[:12]}…: its predictions would be meaningless; supply the right ones with "
                "`hg.models.load(path, encoder=(module, spec))`"
            )
        heads = {key: value for key, value in tensors.items() if not key.startswith(ENCODER)}
        options = {name: tuple(facts[name]) for name in ("stages", "tiles") if name in facts}
        extractor = FeatureExtractor(encoder, spec, fusion=self.card.fusion, **options)
        if "output" in facts and not np.allclose(extractor.fingerprint(), facts["output"], rtol=0.05, atol=0.11):
            raise ValueError(
                f"`model` {self.name!r} was trained on encoder {spec.name!r}; the one found here has the same weights but another "
                "output (another layer or pooling, perhaps): its predictions would be meaningless"
            )
        context, annotation_context = (
            NO_CONTEXT if fields is None else Context(**fields)
            for fields in (self.card.context, (self.card.annotation or {}).get("context"))
        )
        return Network(extractor, heads, context, self.detector, annotation_context)

    @property
    def detector(self) -> OODDetector | None:
        """Detector of slides out of distribution; ``None`` if the model has no statistics of its training data."""
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
            Folder to write. It must not exist or be empty, or hold only an older model, which is replaced. Hidden files there
            (``.git``) are kept.

        Returns
        -------
        pathlib.Path
            Absolute path of the folder.
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
