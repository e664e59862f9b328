"""``hg.tl.train``: train a model on sections with measured counts."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from ..._core import validate
from ..._core.logs import logger
from ..._core.names import check_spelling
from ..._settings import settings
from .measured import MIN_SPOTS, MeasuredSection, read_sections
from .names import check_gene_lists, check_labels, check_merged
from .options import (
    MIN_SPOT_SHARE,
    PRESETS,
    CardText,
    Classes,
    DefaultRecipe,
    GeneSelection,
    PaperRecipe,
    Plan,
    SectionKeys,
    TrainingKeys,
)

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData

    from ...models import EncoderSpec, HE2Gene


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

    ``"default"`` fits closed-form heads on a frozen encoder. Features are maps of its last stages under several windows, with
    colour; then principal components of a spot and of the rings of neighbours around it. The heads are a ridge regression to
    all genes, with features standardised within the slide and small components shrunk, and a calibrated multinomial logistic
    regression to the annotation. On slides below 1.5 µm/px, expression is the mean of a prediction with and one without rings.
    The heads are solved from sums: features, counts and held-out predictions stay on disk. No GPU is needed, and on the CPU
    training is deterministic. ``docs/experiments.md`` compares alternatives.

    ``"he2gene-base"`` and ``"he2gene-spat"`` train a whole network by gradient as HE2Gene (Bioinformatics 2024,
    btae343), with two corrections: whole patients are held out, and missing neighbours have no weight.

    Parameters
    ----------
    sdatas
        Sections, each with an image, spots and a table of raw counts. An iterable is read section by section, with one image
        in memory at a time.
    preset
        The recipe; :class:`he2gene_sc.DefaultRecipe` and :class:`he2gene_sc.PaperRecipe` are presets with changes.
    annotation_key
        Labels in ``obs``. Spots without a label are not used for the annotation, but for expression. ``"default"`` also encodes
        four recoloured copies of each section with labels (``n_recoloured`` of :class:`he2gene_sc.DefaultRecipe`). ``None``: no
        annotation head.
    sample_key, section_key
        Patient and section in ``obs``. Whole patients are held out.
    keys
        Image, spots, table, layer of counts and names of genes, if the objects hold several or do not define them; see
        :class:`he2gene_sc.SectionKeys`.
    classes
        Label to class, to merge labels, or :class:`he2gene_sc.Classes`, for labels to ignore and colours too.
    genes
        Genes to learn, or :class:`he2gene_sc.GeneSelection`, for the number of target genes too, and whether genes
        that a section does not list are zero. Default: all genes detected in 1 % of the spots.
    encoder
        Name in ``hg.models.ENCODERS`` or of timm, a folder saved by timm, or ``(module, hg.models.EncoderSpec(...))``, also from
        ``hg.models.load_encoder(name, weights=...)``. A UserWarning is given if the windows have another µm/px than the
        encoder was trained at (``EncoderSpec.mpp``). Default: ``"efficientnet-lite0"``, which is in the package; for the paper's
        presets ``"resnet50"``, as in the paper.
    validation
        ``"grouped"``: hold out whole patients; whole sections, with a warning, if there is one patient; parts
        of a section, with a stronger warning, if there is one section. ``"random"``: random spots as in the paper, only for
        comparison: neighbouring spots were in training, so metrics are too good.
    cache
        Folder for the encoder's features, keyed by pixels, windows and encoder, so that further models do not encode again.
        Default: a temporary folder. Not for the paper's presets.
    seed
        Random seed.
    name, card
        Name of the model, and further texts of the model card, see :class:`he2gene_sc.CardText`.
    device, show_progress_bar
        As in :func:`he2gene_sc.tl.predict`.

    Returns
    -------
    he2gene_sc.models.HE2Gene
        Model with ``.save(path)``, ``.card`` and ``.genes``, ready for ``hg.tl.predict(sdata, model=model)``.

    Raises
    ------
    ValueError
        If an argument is not valid, counts are not raw, gene names are duplicated, or gene lists hardly overlap.
    RuntimeError
        If the weights of the encoder are not available; the message tells how to get them.
    OSError
        If the disk has too little space for the features.
    MemoryError
        If the sums of training, or the activations of a batch for its gradient, do not fit into memory.

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
    from ..._core.genes import current_names, symbol_to_ensembl
    from ...inference import resolve_device
    from ...models import load_encoder
    from ...models._encoders.local import local_path
    from ...models._encoders.scale import describe_tiles, warn_of_scale
    from .fit import train_by_gradient, train_default

    recipe = preset
    if not isinstance(recipe, DefaultRecipe | PaperRecipe):
        validate.one_of(recipe, PRESETS, "preset")
        recipe = DefaultRecipe() if recipe == "default" else PaperRecipe(recipe)
    keys = SectionKeys() if keys is None else keys
    validate.instance(keys, SectionKeys, "keys", "hg.SectionKeys(...)")
    genes = genes if isinstance(genes, GeneSelection) else GeneSelection(genes=genes)
    classes = classes if isinstance(classes, Classes) else Classes(merge={} if classes is None else classes)
    card = CardText() if card is None else card
    validate.instance(card, CardText, "card", "hg.CardText(...)")
    validate.one_of(validation, ("grouped", "random"), "validation")
    validate.name(name, "name")
    if classes.merge and annotation_key is None:
        raise ValueError("`classes` names labels, but `annotation_key` is None; name the column of obs with the labels")
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
    # A network or folder cannot be loaded again by name.
    named = isinstance(encoder, str) and local_path(encoder) is None
    ids = dict(symbol_to_ensembl() if genes.ensembl_ids is None else genes.ensembl_ids)
    counted = pd.Series(list(ids.values()), dtype=object).value_counts()
    symbols = {ensembl: symbol for symbol, ensembl in ids.items() if counted[ensembl] == 1}  # without ambiguous ids
    if genes.genes is not None:
        genes = replace(genes, genes=current_names(genes.genes, symbols))
    columns = TrainingKeys(annotation_key, sample_key, section_key, keys)
    with tempfile.TemporaryDirectory(prefix="he2gene-") as work:
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
            work=Path(work),
            cache=Path(work) if folder is None else folder,
        )
        sections = read_all(sdatas, columns, symbols, genes, classes)
        model = (train_by_gradient if isinstance(recipe, PaperRecipe) else train_default)(sections, plan)
    if named:
        return replace(model, allow_encoder_source=True)
    return replace(model, encoder=encoder if isinstance(encoder, tuple) else (network, spec))


def _check_paper(recipe: PaperRecipe, genes: GeneSelection, cache: object) -> None:
    """Raise for arguments that the presets of the paper do not use, and for a folder that cannot be written."""
    if cache is not None:
        raise ValueError(
            f"`cache` is {cache!r}, but preset {recipe.name!r} trains the encoder and has no features to cache; leave it out"
        )
    if genes.programmes is not None:
        raise ValueError(
            f"`programmes` of `genes` are only for preset 'default', not for {recipe.name!r}; leave them out"
        )
    if recipe.exact and genes.min_spot_share not in (MIN_SPOT_SHARE, 0):
        raise ValueError(
            f"`min_spot_share` is {genes.min_spot_share!r}, but `exact` sets it (0: all genes are learned); drop one of them"
        )
    recipe.check_folder("*/last.ckpt" if recipe.cross_validate else "last.ckpt")


def read_all(
    sdatas: SpatialData | Iterable[SpatialData],
    keys: TrainingKeys,
    symbols: Mapping[str, str],
    chosen: GeneSelection,
    classes: Classes,
) -> Iterator[MeasuredSection]:
    """Read the sections one by one without keeping them; a list or tuple is checked first."""
    if isinstance(sdatas, str | Path | Mapping):
        raise ValueError(
            f"`sdatas` is a {type(sdatas).__name__}; pass SpatialData objects: spatialdata.read_zarr(path), or list(d.values())"
        )
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    # Other sequences may load a section with its image on each access.
    checked = isinstance(sdatas, list | tuple)
    if checked:
        # Check all sections together, before pixels of any are read.
        lists: dict[str, pd.Index] = {}
        labels: set[str] = set()
        for section in _read(sdatas, keys, symbols, classes, pixels=False):
            lists[section.name] = section.genes
            labels.update(label for label in section.labels if label is not None)
        check_gene_lists(lists, chosen)
        check_merged(labels, classes.merge)
        del lists, section
    yield from _read(sdatas, keys, symbols, classes, checked=checked)


def _read(
    sdatas: Iterable[SpatialData],
    keys: TrainingKeys,
    symbols: Mapping[str, str],
    classes: Classes,
    *,
    checked: bool = False,
    pixels: bool = True,
) -> Iterator[MeasuredSection]:
    """Yield the sections with enough spots; raise if their names do not fit together. See :func:`read_sections`."""
    from ...training._folds import N_BLOCKS

    n = spots = 0
    objects: dict[str, int] = {}  # of each section
    patients: dict[str, str] = {}  # of each section
    labels: set[str] = set()
    counted: dict[str, str] = {}
    for sdata in sdatas:
        try:
            for section in read_sections(sdata, keys, symbols, checked=checked, pixels=pixels):
                spots = max(spots, len(section.centres))
                if len(section.centres) < MIN_SPOTS:
                    if not checked:
                        logger.warning(
                            "section %s is left out: it has %d spots, but at least %d are needed to measure how well a gene is "
                            "predicted",
                            *(section.name, len(section.centres), MIN_SPOTS),
                        )
                    continue
                if section.name in objects:
                    raise ValueError(
                        f"`section_key`: two sections are named {section.name!r}, also in object {objects[section.name] + 1}; give "
                        "each section a unique name, also across patients"
                    )
                objects[section.name], patients[section.name] = n, section.patient
                by_section = {f"section {name!r}": [patient] for name, patient in patients.items()}
                check_spelling({"": [*patients]}, "section_key", keys.section, what="sections")
                check_spelling(by_section, "sample_key", keys.sample, what="patients")
                labels.update(label for label in section.labels if label is not None)
                check_labels(labels, classes)
                digest = hashlib.blake2b(section.counts.data.tobytes())
                digest.update(section.counts.indices.tobytes())
                same = counted.setdefault(digest.hexdigest(), section.name)
                if same != section.name and not checked:
                    logger.warning(
                        "sections %s and %s have the same counts: one may be in training while the other is held out, so held-out "
                        "metrics are too good; give the section once",
                        *(same, section.name),
                    )
                yield section
        except (ValueError, TypeError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{error} (object {n + 1} of `sdatas`)") from error
        del sdata, section
        # SpatialData objects contain reference cycles: free the image before the next one is decoded.
        gc.collect()
        n += 1
    if not patients:
        what = f"has no section of {MIN_SPOTS} spots" if n else "is empty"
        raise ValueError(f"`sdatas` {what}; at least one section is needed")
    if len(patients) == 1 and spots < N_BLOCKS:
        raise ValueError(
            f"`sdatas` is one section with {spots} spots; at least {N_BLOCKS} are needed to hold out parts of it"
        )
    if keys.annotation is not None and not labels and not checked:
        logger.warning("`annotation_key`: no spot has a label in %r; the annotation head is skipped", keys.annotation)
