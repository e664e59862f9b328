"""The recipes of the HE2Gene paper, number by number."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...models._paper import PAPER_MEAN, PAPER_MPP, PAPER_STD, PAPER_WINDOWS_PX, PAPER_WINDOWS_UM


@dataclass(frozen=True)
class Preset:
    """A recipe for training a whole network by gradient.

    Source: github.com/Microbiods/HE2Gene, ``src/he2gene_base.py`` and ``src/he2gene_spat.py`` (Bioinformatics 2024,
    btae343).

    Attributes
    ----------
    name
        Its name.
    aux_weight, annotation_weight, neighbour_weight
        Of the squared error of the auxiliary genes, the cross entropy of the annotation, and the squared distance to
        the mean prediction of like-labelled neighbours; the squared error of the target genes weighs 1.
    batch_size
        Spots a step, over all devices.
    encoder
        The encoder that ``mean`` and ``std`` are meant for; others keep their own normalisation.
    mean, std
        Of the channels after scaling to 0..1.
    train_window_um
        Side of the only window seen in training (150 px of HBCIS), µm.
    windows_um
        Sides of the windows whose predictions are averaged at inference, µm.
    tta
        Whether inference averages over the eight symmetries.
    n_target_genes
        Genes of highest mean.
    lr, weight_decay
        Of Adam (the penalty is added to the gradient).
    lr_step, lr_factor
        Epochs between decays of the learning rate, and what it is multiplied by.
    max_epochs, patience
        Epochs at most, and epochs without a better held-out error after which training stops.
    clip
        Largest norm of the gradient.
    validation_share
        Share of the spots, or about that share of the patients, that is held out.
    exact
        Whether an annotation of two classes is one logit and a sigmoid, not calibrated, and precision is single, as in
        the paper.
    """

    name: str
    aux_weight: float
    annotation_weight: float
    neighbour_weight: float
    batch_size: int
    encoder: str = "resnet50"
    mean: tuple[float, float, float] = PAPER_MEAN
    std: tuple[float, float, float] = PAPER_STD
    train_window_um: float = 100.0
    windows_um: tuple[float, ...] = PAPER_WINDOWS_UM
    tta: bool = True
    n_target_genes: int = 250
    lr: float = 1e-5
    weight_decay: float = 1e-4
    lr_step: int = 10
    lr_factor: float = 0.5
    max_epochs: int = 100
    patience: int = 10
    clip: float = 1.0
    validation_share: float = 0.1
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("max_epochs", "patience", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; more than 0 is needed")

    def to_the_letter(self) -> Preset:
        """Return the recipe with windows that are 75, 150 and 225 px of the paper's images, and ``exact``."""
        windows = tuple(round(px * PAPER_MPP, 4) for px in PAPER_WINDOWS_PX)
        return replace(self, exact=True, train_window_um=windows[1], windows_um=windows)


#: Recipes by name.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("he2gene-base", aux_weight=20.0, annotation_weight=1.0, neighbour_weight=0.0, batch_size=256),
        Preset("he2gene-spat", aux_weight=100.0, annotation_weight=1.0, neighbour_weight=0.01, batch_size=32),
    )
}
