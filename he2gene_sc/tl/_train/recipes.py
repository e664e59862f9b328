"""Presets of ``hg.tl.train`` and changes of them, validated on creation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..._core import validate
from ...image._geometry import check_windows
from ...training._gradient.run_options import RunOptions

if TYPE_CHECKING:
    import torch

    from ...models import EncoderSpec
    from ...training import Preset

PRESETS = ("default", "he2gene-base", "he2gene-spat")
#: Default of `windows_um` for encoders of unknown µm/px.
WINDOWS_UM = (100.0, 200.0, 400.0)


@dataclass(frozen=True, kw_only=True)
class DefaultRecipe(validate.Checked):
    """Preset ``"default"`` of :func:`he2gene_sc.tl.train`, with changes.

    Parameters
    ----------
    windows_um
        Sides of the windows around a spot, µm; resolution may differ between sections. Default: 100, 200 and 400. For an
        encoder trained at a known µm/px: its input size at that µm/px, and twice this size (112 and 224 for 224 px at
        0.5 µm/px).
    stages
        Stages of the encoder whose averaged feature maps are the features. ``"auto"``: the last three of a convolutional
        network, and the output of a transformer; ``None``: the output.
    tile_windows
        Whether an encoder trained at a known µm/px reads a wider window as tiles at its own µm/px, whose features
        are averaged: 2 × 2 for 224 µm, 4 × 4 for 448. ``False``: each window is resized to one input at any µm/px. The
        model card states the tiles.
    n_latent
        Length of the embedding.
    by_level
        Whether to keep the residuals for ``hg.tl.intervals(by="level")``: 440 bytes per gene in the model file.
    batch_size
        Spots per batch of the encoder; does not change the result.
    dtype
        As in :func:`he2gene_sc.tl.predict`.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> preset = hg.DefaultRecipe(windows_um=[100, 200], n_latent=64)
    """

    #: Default encoder.
    usual_encoder: ClassVar[str] = "efficientnet-lite0"

    windows_um: Sequence[float] | None = None
    stages: Sequence[int] | Literal["auto"] | None = "auto"
    tile_windows: bool = True
    n_latent: int = 128
    by_level: bool = True
    batch_size: int = 32
    dtype: str | torch.dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.stages, list | tuple) and len(self.stages) > 0
        if not (
            self.stages is None
            or self.stages == "auto"
            or (listed and all(validate.is_whole(stage) and stage >= 0 for stage in self.stages))
        ):
            raise ValueError(f"`stages` is {self.stages!r}; pass a list of positions from 0, 'auto' or None")
        validate.whole_number(self.n_latent, "n_latent")
        validate.whole_number(self.batch_size, "batch_size")
        self.set(windows_um=None if self.windows_um is None else check_windows(self.windows_um))

    def windows(self, spec: EncoderSpec) -> tuple[tuple[float, ...], tuple[int, ...] | None]:
        """Windows for an encoder, and the tiles per side of each."""
        from ...models._encoders.scale import default_windows, tiles_of

        windows_um = tuple(self.windows_um or default_windows(spec) or WINDOWS_UM)
        return windows_um, tiles_of(spec, windows_um) if self.tile_windows else None


@dataclass(frozen=True)
class PaperRecipe(RunOptions):
    """One of the paper's presets of :func:`he2gene_sc.tl.train`, with changes.

    Parameters
    ----------
    name
        ``"he2gene-base"`` or ``"he2gene-spat"``.
    exact
        Train exactly as in the paper: learn all genes that a section lists; an annotation of two classes has one logit with a
        sigmoid and no calibration; single precision; windows of 75, 150 and 225 px at the 0.69 µm/px of the
        paper's images (51.75, 103.5 and 155.25 µm). The paper also used ``validation="random"``. Remaining differences are
        listed in ``docs/reproduce.md``.
    windows_um
        Sides of the windows over which predictions are averaged, µm. Default: 50, 100 and 150.
    batch_size, max_epochs, patience, lr
        Spots per step, over all devices; largest number of epochs; number of epochs without a lower held-out error before
        training stops; learning rate. Default: those of the preset.
    cross_validate
        Compute held-out metrics by cross-validation, in folds that were not used for early stopping; several times the work.
    patches_at_once, precision, devices, num_nodes, strategy, checkpoint_dir, checkpoint_steps, resume, callbacks
        How to train on this machine, see :class:`he2gene_sc.training.RunOptions`.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> preset = hg.PaperRecipe("he2gene-base", exact=True, patches_at_once=32)
    """

    usual_encoder: ClassVar[str] = "resnet50"

    name: str
    _: KW_ONLY
    exact: bool = False
    windows_um: Sequence[float] | None = None
    batch_size: int | None = None
    max_epochs: int | None = None
    patience: int | None = None
    lr: float | None = None
    cross_validate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of(self.name, PRESETS[1:], "name")
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) is not None:
                validate.whole_number(getattr(self, name), name)
        if self.lr is not None:
            validate.in_range(self.lr, "lr", above=0)
        self.set(windows_um=None if self.windows_um is None else check_windows(self.windows_um))
        for name, value, exact_value in (
            ("windows_um", self.windows_um, "75, 150 and 225 px at 0.69 µm/px"),
            ("precision", None if self.precision in ("32", "32-true") else self.precision, "'32-true'"),
        ):
            if self.exact and value is not None:
                raise ValueError(f"`{name}` is {value!r}, but `exact` sets it ({exact_value}); drop one of them")

    def preset(self) -> Preset:
        """Return the preset of the paper with the changes."""
        from ...training import PRESETS as known

        preset = known[self.name].exact_recipe() if self.exact else known[self.name]
        changes = {name: getattr(self, name) for name in ("windows_um", "batch_size", "max_epochs", "patience", "lr")}
        return replace(preset, **{name: value for name, value in changes.items() if value is not None})

    def windows(self, spec: EncoderSpec) -> tuple[tuple[float, ...], None]:
        """Windows at inference; without tiles."""
        return self.preset().windows_um, None


def recipe_of(preset: Any) -> DefaultRecipe | PaperRecipe:
    """Recipe of a preset, which may be given by name."""
    if isinstance(preset, DefaultRecipe | PaperRecipe):
        return preset
    return DefaultRecipe() if validate.one_of(preset, PRESETS, "preset") == "default" else PaperRecipe(preset)
