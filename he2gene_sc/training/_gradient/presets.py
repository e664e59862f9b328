"""The recipes of the HE2Gene paper, with all their settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...models._paper import PAPER_MEAN, PAPER_MPP, PAPER_STD, PAPER_WINDOWS_PX, PAPER_WINDOWS_UM


@dataclass(frozen=True)
class Preset:
    """A recipe for training a whole network by gradient descent.

    Source: github.com/Microbiods/HE2Gene, ``src/he2gene_base.py`` and ``src/he2gene_spat.py`` (Bioinformatics 2024,
    btae343).
    """

    name: str
    aux_weight: float  # of auxiliary genes; target genes have weight 1
    annotation_weight: float  # of the cross entropy
    neighbour_weight: float  # of the distance to neighbours with the same label
    batch_size: int  # over all devices
    encoder: str = "resnet50"  # to which mean and std apply; other encoders keep their own
    mean: tuple[float, float, float] = PAPER_MEAN
    std: tuple[float, float, float] = PAPER_STD
    train_window_um: float = 100.0  # 150 px of HBCIS
    windows_um: tuple[float, ...] = PAPER_WINDOWS_UM  # averaged at inference
    tta: bool = True
    n_target_genes: int = 250  # of highest mean
    lr: float = 1e-5
    weight_decay: float = 1e-4  # of Adam, added to the gradient
    lr_step: int = 10  # epochs between decays
    lr_factor: float = 0.5
    max_epochs: int = 100
    patience: int = 10  # epochs without a better held-out error
    clip: float = 1.0  # largest norm of the gradient
    validation_share: float = 0.1  # of spots, or approximately of patients
    exact: bool = False  # one logit for two classes, uncalibrated, single precision, as in the paper

    def exact_recipe(self) -> Preset:
        """Return the exact recipe, with windows of 75, 150 and 225 px in the images of the paper."""
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
