"""``hg.tl.train``: a model from sections with measured counts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..._core import validate
from ..._core.logs import logger
from ..._settings import settings
from .arguments import identifiers, read_all, wide_enough
from .gene_lists import symbols_of
from .options import MIN_SPOT_SHARE, CardText, Classes, GeneSelection, Keys, Plan, SectionKeys
from .recipes import DefaultRecipe, PaperRecipe, recipe_of

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData

    from ...models import EncoderSpec, HE2Gene

T = TypeVar("T")


def train(
    sdatas: SpatialData | Iterable[SpatialData],
    *,
    preset: Literal["default", "he2gene-base", "he2gene-spat"] | DefaultRecipe | PaperRecipe = "default",
    annotation_key: str | None = None,
    sample_key: str = "patient",
    section_key: str = "section",
    keys: SectionKeys | None = None,
    classes: Mapping[Any, str | None] | Classes | None = None,
    genes: Iterable[str] | GeneSelection | None = None,
    encoder: str | Path | tuple[torch.nn.Module, EncoderSpec] | None = None,
    validation: Literal["grouped", "random"] = "grouped",
    cache: str | Path | None = None,
    seed: int = 0,
    name: str = "my-model",
    card: CardText | None = None,
    device: str | torch.device | None = None,
    show_progress_bar: bool | None = None,
) -> HE2Gene:
    """Train a model on sections with measured counts.

    ``"default"`` fits closed-form heads on a frozen encoder: maps of its last stages under several windows, with colour,
    standardised within the slide; principal components of a spot and of the rings of neighbours around it; a ridge to all
    genes, its small components shrunk; a calibrated multinomial logistic regression to the annotation. It is solved from
    sums: features, counts and held-out predictions stay on disk. Nothing in it needs a GPU, and on the CPU it is
    deterministic. What was tried, and why it is this, stands in ``docs/experiments.md``.

    ``"he2gene-base"`` and ``"he2gene-spat"`` train a whole network by gradient as HE2Gene (Bioinformatics 2024,
    btae343) does, with its faults mended: whole patients are held out, and absent neighbours count for nothing.

    Parameters
    ----------
    sdatas
        Sections, each with an image, spots and a table of raw counts. An iterable is read one by one, so that one image
        at a time is in memory.
    preset
        The recipe; :class:`he2gene_sc.DefaultRecipe` and :class:`he2gene_sc.PaperRecipe` are presets with changes.
    annotation_key
        Labels in ``obs``; missing ones are left out, and a section without any still trains expression. ``None``: no
        annotation head.
    sample_key, section_key
        Patient and section in ``obs``. Patients are the unit that is held out.
    keys
        Image, spots, table, layer of counts and names of genes, where the objects hold several or do not say; see
        :class:`he2gene_sc.SectionKeys`.
    classes
        Label to class, to merge labels, or :class:`he2gene_sc.Classes`, which has labels to ignore and colours too.
    genes
        Genes to learn, or :class:`he2gene_sc.GeneSelection`, which has the number of target genes too, and whether genes
        that a section does not list were seen to be absent. Default: all that were seen in 1 % of the spots.
    encoder
        Name in ``hg.models.ENCODERS`` or of timm, a folder as timm saves it, or ``(module, hg.models.EncoderSpec(...))``, which
        ``hg.models.load_encoder(name, weights=...)`` gives too. A UserWarning says if the windows show it another µm/px than
        it was trained at (``EncoderSpec.mpp``). Default:
        ``"efficientnet-lite0"``, which is in the package; for the paper's presets ``"resnet50"``, which it used.
    validation
        ``"grouped"``: whole patients are held out; whole sections, with a warning, where all are of one patient; parts
        of a section, with a stronger one, where there is no other. ``"random"``: random spots, as the paper did; their
        neighbours were trained on, so figures are too good. For comparison.
    cache
        Folder to keep the encoder's features in, keyed by pixels, windows and encoder, so that another head costs no
        second pass. Default: a temporary one. Not for the paper's presets.
    seed
        Of what is random.
    name, card
        Name of the model, and what its card says beside it, see :class:`he2gene_sc.CardText`.
    device, show_progress_bar
        As in :func:`he2gene_sc.tl.predict`.

    Returns
    -------
    he2gene_sc.models.HE2Gene
        With ``.save(path)``, ``.card`` and ``.genes``; use it at once as ``hg.tl.predict(sdata, model=model)``.

    Raises
    ------
    ValueError
        If an argument does not fit, counts are not raw, gene names stand twice, or gene lists hardly overlap.
    RuntimeError
        If the weights of the encoder cannot be had; the message says how to get them.
    OSError
        If the disk has no room for the features.
    MemoryError
        If the sums that training collects, or what a batch leaves behind for its gradient, would not fit into memory.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sections = [hg.datasets.toy(shape=(5, 5), seed=i) for i in range(2)]
    >>> for i, section in enumerate(sections):
    ...     section["table"].obs["section"] = f"S{i}"
    >>> model = hg.tl.train(sections, annotation_key="annotation", show_progress_bar=False)
    >>> hg.tl.predict(sections[0], model=model, show_progress_bar=False)
    """
    validate.arguments(train, locals())
    from ...inference import resolve_device
    from ...models import load_encoder
    from ...models._encoders.local import local_path
    from ...models._encoders.scale import describe_tiles, warn_of_scale

    recipe = recipe_of(preset)
    keys = _made(keys, SectionKeys, "keys")
    genes = genes if isinstance(genes, GeneSelection) else GeneSelection(genes=genes)
    classes = classes if isinstance(classes, Classes) else Classes(merge={} if classes is None else classes)
    card = _made(card, CardText, "card")
    validate.one_of(validation, ("grouped", "random"), "validation")
    if classes.merge and annotation_key is None:
        raise ValueError("`classes` names labels, but `annotation_key` is None; name the column of obs that holds them")
    folder = None if cache is None else validate.folder_or_file(cache, "cache")
    if isinstance(recipe, PaperRecipe):
        _check_paper(recipe, genes, cache)
    device = resolve_device(settings.device if device is None else device)
    encoder = recipe.usual_encoder if encoder is None else encoder
    network, spec = load_encoder(encoder)
    windows_um, tiles = recipe.windows(spec)
    if tiles is not None:
        logger.info(
            "encoder %r: windows of %s µm, %s",
            spec.name,
            [*windows_um],
            describe_tiles(windows_um, tiles, spec.input_px),
        )
    warn_of_scale(spec, windows_um, tiles)
    # What is not named cannot be found again by name.
    named = isinstance(encoder, str) and local_path(encoder) is None
    ids, symbols = identifiers(genes.ensembl_ids)
    if genes.genes is not None:
        genes = replace(genes, genes=symbols_of(genes.genes, symbols))
    columns = Keys(annotation_key, sample_key, section_key, keys)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="he2gene-")))
        plan = Plan(
            recipe=recipe,
            windows_um=windows_um,
            tiles=tiles,
            genes=genes,
            classes=classes,
            ids=ids,
            name=name,
            card=card,
            network=network,
            spec=spec,
            own_encoder=not named,
            validation=validation,
            seed=seed,
            device=device,
            show_progress=settings.show_progress_bar if show_progress_bar is None else show_progress_bar,
            work=work,
            cache=work if folder is None else folder,
        )
        sections = wide_enough(read_all(sdatas, columns, symbols, genes, classes), windows_um)
        if isinstance(recipe, PaperRecipe):
            from .network import train_by_gradient

            model = train_by_gradient(sections, plan)
        else:
            from .default import train_default

            model = train_default(sections, plan)
    if named:
        return replace(model, allow_encoder_source=True)
    return replace(model, encoder=encoder if isinstance(encoder, tuple) else (network, spec))


def _made(given: T | None, kind: type[T], parameter: str) -> T:
    """Return what was given, or, without it, what its defaults make."""
    if given is not None:
        validate.instance(given, kind, parameter, f"hg.{kind.__name__}(...)")
        return given
    return kind()


def _check_paper(recipe: PaperRecipe, genes: GeneSelection, cache: object) -> None:
    """Refuse what a preset of the paper does not read, or cannot write to."""
    if cache is not None:
        raise ValueError(
            f"`cache` is {cache!r}, which preset {recipe.name!r} does not read: it trains the encoder, on its own output, "
            "in the precision of `precision`"
        )
    if genes.programmes is not None:
        raise ValueError(
            f"`programmes` of `genes` are read by preset 'default' alone, not by {recipe.name!r}; leave them out"
        )
    if recipe.exact and genes.min_spot_share not in (MIN_SPOT_SHARE, 0):
        raise ValueError(
            f"`min_spot_share` is {genes.min_spot_share!r}, but `exact` sets it (0: all genes are learned); drop one of them"
        )
    recipe.check_folder("*/last.ckpt" if recipe.cross_validate else "last.ckpt")
