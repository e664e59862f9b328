"""``hg.tl.predict``: predict an expression layer and an annotation column from the image at the spots."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from .._core import validate
from .._core.element_results import copy_tables
from .._core.elements import Slide
from .._core.fill import StackedPredictions, check_fillable, fill_table, pool_regions
from .._core.genes import match_genes
from .._core.keys import REGION_FACTS, TABLE, Keys, check_key
from .._core.lazy import is_large
from .._core.logs import logger, warn
from .._core.own_table import check_new_table, make_table, put_table
from .._core.placement import check_on_tissue
from .._core.predictions import IF_NONE_RELIABLE, describe_reliable, find_features, gene_flags, head_digest, summary_of
from .._core.provenance import training_sections
from ..image import MIN_TISSUE
from ._encoding import (
    Encoding,
    EncodingOptions,
    KeptFeatures,
    check_options,
    encode_slide,
    find_slides,
    is_interpolated,
    parts_of,
)

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData

    from ..inference import Predictions
    from ..models import HE2Gene


def predict(
    sdata: SpatialData,
    *,
    model: str | Path | HE2Gene = "breast-her2st",
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Mapping[str, float] | None = None,
    genes: Sequence[str] | Literal["all"] | None = None,
    gene_symbols: str | None = None,
    layer: str | None = None,
    key_added: str = "he2gene",
    known_patient: bool | None = None,
    features: str | Path | None = None,
    exact: bool = False,
    device: str | torch.device | None = None,
    show_progress_bar: bool | None = None,
    copy: bool = False,
    **options: Unpack[EncodingOptions],
) -> SpatialData | None:
    """Predict gene expression and pathology annotation at every spot from the H&E image.

    Parameters
    ----------
    sdata
        Object with an RGB H&E image and spots (circles, polygons or labels) in a shared coordinate system. A table that annotates
        the spots is filled in place; without one, a new table ``"table"`` is created.
    model
        Name of a bundled model, a model folder, or a loaded model.
    image_key, shapes_key, table_key, coordinate_system
        Elements to use; only needed if the object has several candidates. Of several images of the same tissue, the one with the
        highest resolution that is not blank is used. ``image_key`` may map shapes elements to images.
    mpp
        µm per pixel of the full-resolution image, or a mapping from shapes elements to it. Default: from the metadata of the object, a
        coordinate system in µm, the shapes of Xenium, or the pitch of a known assay.
    genes
        Genes to predict. ``None``: all genes of the table that the model knows (without a table, all genes of the model). A list:
        only these. ``"all"``: all genes of the model, in a second table named ``key_added``.
    gene_symbols
        Column of ``var`` that holds gene symbols or Ensembl ids. Default: the ``var`` index.
    layer
        Name of the layer; default ``key_added``.
    key_added
        Prefix of all keys that are written.
    known_patient
        Whether the model was trained on other sections of the same patients (the card lists them). Then
        ``var["he2gene_reliable"]`` is that for known patients, and a warning names slides that look like a new patient. Default:
        ``True`` if the image of every slide is that of a training section, by a hash of its pixels on the card, and nine in ten
        spots are in the area of the training spots. The log and ``uns`` record it.
    features
        Stored features: a key of ``obsm`` that :func:`embed` wrote, or a folder. A folder is searched by pixels, windows and encoder;
        missing features are encoded and stored in blocks, so an interrupted run can be resumed. An error is raised if features in
        ``obsm`` are of another image, encoder or windows.
    exact
        Encode each spot even if spots are closer than half the smallest window (bins of Visium HD, cells). Default: interpolate the
        features of such spots from lattices, see Notes.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"auto"``; default ``hg.settings.device``.
    show_progress_bar
        Whether to show a bar and print a summary with the verdict on the slide; default ``hg.settings.show_progress_bar``.
    copy
        Do not change ``sdata``; return an object that shares its elements and has its own tables.
    **options
        ``tta``: average over the eight symmetries of the square, eight times the work, slightly better; default: as on the card of
        the model (``True`` for the paper's models, ``False`` for the bundled model). ``batch_size=32``: spots per batch, of which a
        CPU encodes eight at once; it does not change the result. ``dtype="auto"``: precision of the encoder, ``"float32"``,
        ``"bfloat16"`` or ``"float16"``; ``"auto"`` is bfloat16 on CUDA. ``lattice=0.25``: step of the lattices of dense spots, as a
        share of the window.

    Returns
    -------
    ``None``, or the new object if ``copy=True``. Results are written to the table (``key_added="he2gene"``):

    ``.layers["he2gene"]``
        Predicted expression, natural log of (1 + counts per 10,000), float32, ``(n_obs, n_vars)``; NaN for genes that the model
        does not know and spots outside the image. Above ``hg.settings.memory_limit`` it is a dask array that is computed when it
        is read, see Notes.
    ``.var["he2gene_predicted"]``, ``.var["he2gene_pcc"]``, ``.var["he2gene_mean"]``
        Whether the model knows the gene, its held-out Pearson correlation, and its mean in training (unit of the layer).
    ``.var["he2gene_reliable"]``, ``.var["he2gene_pcc_new_patient"]``, ``.var["he2gene_pcc_given_depth"]``
        Whether the gene is reliable on a new patient (on a known patient with ``known_patient``), its mean correlation over
        held-out patients, and its partial correlation given the counts of each spot.
    ``.var["he2gene_reliable_known_patient"]``
        Whether the gene is reliable on another section of a patient that the model was trained on. On a slide out of
        distribution, no gene is reliable.
    ``.obs["he2gene_annotation"]``, ``.obs["he2gene_annotation_confidence"]``
        Most probable class and its calibrated probability. Both are missing if the class is unknown: on glass, and out of
        distribution. The probabilities in ``obsm`` are kept.
    ``.obs["he2gene_tissue"]``
        Share of tissue in the smallest window of the spot. Below ``uns["he2gene"]["min_tissue"]`` (0.25) the spot is treated as
        glass: its predicted expression is not based on tissue, and it is drawn in grey.
    ``.obs["he2gene_ood"]``
        Distance of the image at the spot from the training data; above 1 the spot is out of distribution, see ``docs/trust.md``.
        Only for models that store statistics of their training spots.
    ``.obsm["he2gene_annotation_proba"]``
        DataFrame with one column per class.
    ``.obsm["X_he2gene"]``
        Embedding, the input of the heads, ``(n_obs, k)`` float32. Models of the preset ``"default"`` since 0.7: the first half of
        the columns is without neighbours, the second with. Both are halved on slides below 1.5 µm/px; on coarser ones the first
        is 0. Do not compare embeddings of slides on different sides of this limit.
    ``.uns["he2gene"]``
        Model, hash of its weights, encoder and licence, µm/px, image, level, coordinate system, unit and versions. ``lazy``: the
        layer is a dask array. ``head``: digest of the head. ``gene_symbols``: the argument, if given; verbs that read the prediction
        use it. ``genes``, ``known_patient``, ``exact`` and ``lattice``: the arguments, if given. ``given``: names of the arguments
        that chose image, spots, µm/px, precision and kind of patient. ``known_sections``: training sections that the slides were
        recognised as; ``known_patient`` is then recorded even if not given. ``verdict``: comparison of the slide with the training
        data; ``reasons``: texts, if it is out of distribution or without tissue. With several shapes elements these entries
        concern all of them, also if they were predicted one by one; ``regions`` has them for each. ``features``: the key in
        ``obsm`` and how they were computed. ``interpolated`` and ``lattice_um``: shapes with interpolated features, and the step
        for each window.

    ``.uns["X_he2gene_rows"]``
        Digest of each row of the embedding, with which :func:`he2gene_sc.get.expression` checks it.

    If this changes a value in the layer of an earlier prediction with the same ``key_added``, in any region, results that other
    verbs computed from it (intervals, evaluation, adapted layers and results of those, domains, biomarkers) are removed, with a
    warning that names them.

    Raises
    ------
    ValueError
        If an argument or the object is invalid; if no spot is inside the image, or the image is blank at all spots; or if a key
        to be written exists and was not written by an earlier prediction with this ``key_added``, or was changed since. Then
        nothing is encoded or changed.

    Notes
    -----
    Task and name are those of HE2Gene (Bioinformatics 2024, btae343). The bundled model is not the network of the paper; it has
    closed-form heads on several windows of a frozen encoder, see ``docs/design.md``.

    The prediction of a spot also depends on its slide and its neighbours: predict all spots of a slide together. The prediction
    of a subset of the spots differs.

    If spots are closer than half the smallest window, the windows of neighbours show nearly the same pixels. Then each window is
    encoded on its own lattice, with a step of a quarter of its side, and features are interpolated bilinearly. A bin or cell is
    predicted from its surroundings, at least the smallest window. Much smaller structures are not resolved, even with small bins.

    A lazy layer is ``max(0, embedding @ weights + bias)``. :func:`he2gene_sc.io.save` and ``sdata.write`` write all its values in
    blocks of spots. To store only the embedding, first delete the layer: ``del sdata["table"].layers["he2gene"]``.
    :func:`he2gene_sc.get.expression` can compute any gene again.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> sdata = hg.datasets.toy(shape=(4, 4))
    >>> hg.tl.predict(sdata, show_progress_bar=False)
    >>> sdata["table"].layers["he2gene"].shape == sdata["table"].shape
    True
    """
    validate.arguments(predict, locals())
    from ..models import load

    check_key(key_added, "key_added")
    if layer is not None:
        check_key(layer, "layer")
    check_options("predict", options)
    keys = Keys(key_added, layer)
    model = load(model)
    how = Encoding.checked(model, device, show_progress_bar, exact, options)
    places = {
        "image_key": image_key,
        "shapes_key": shapes_key,
        "table_key": table_key,
        "coordinate_system": coordinate_system,
        "mpp": mpp,
    }
    slides = find_slides(sdata, model, **places)
    measured = slides[0].table_key
    if isinstance(genes, str) and genes != "all":
        raise ValueError(f"`genes` is {genes!r}; a list of genes, 'all' or None is needed")
    table = sdata[measured] if measured is not None else None
    wanted = match_genes(model, table, genes, gene_symbols)
    if table is not None and not wanted.all_genes:
        check_fillable(table, model, keys)
    new_table = None if table is not None and not wanted.all_genes else (key_added if table is not None else TABLE)
    if new_table is not None:
        check_new_table(sdata, new_table, slides, wanted, model, keys)
    found = find_features(features, table)
    kept = KeptFeatures(*found) if isinstance(found, tuple) else found
    if isinstance(kept, KeptFeatures):
        how = Encoding.checked(model, device, show_progress_bar, exact, options, kept.record)
    new_shape = (sum(len(slide.spot_ids) for slide in slides), len(wanted.positions))
    shape = table.shape if table is not None and new_table is None else new_shape
    lazy = is_large(*shape)
    if lazy:
        logger.info(
            "predict: layer %r would need %.1f GB, so it is lazy (dask)", keys.layer, 4e-9 * shape[0] * shape[1]
        )
    sections = training_sections(slides, model.card)
    if known_patient is None and any(sections):
        logger.info("predict: reliable genes are those for known patients; pass known_patient=False for new patients")
    results = [_predict_slide(slide, model, how, kept) for slide in slides]
    predictions = [prediction for _, _, prediction in results]
    dense = [slide.shapes_key for slide, (_, interpolated, _) in zip(slides, results, strict=True) if interpolated]
    given = [name for name, value in {**places, "known_patient": known_patient}.items() if value is not None]
    given += ["dtype"] * (options.get("dtype", "auto") != "auto")
    known: dict[str, Any] = {}
    if any(sections) or known_patient is not None:
        known["known_patient"] = any(sections) if known_patient is None else known_patient
    regions = _regions(slides, predictions, sections, known)
    _warn_of_slides(slides, predictions, keys, bool(known_patient) and "known" in (model.card.guard or {}))
    record = {
        "model": model.name,
        "model_version": model.card.version,
        "weights_sha256": model.weights_sha256,
        "head": head_digest(model),
        **({"model_source": model.source} if model.source else {}),
        "expression_scale": model.card.expression_scale,
        "layer": keys.layer,
        "device": how.device.type,
        **how.facts(model, dense),
        **_describe(slides, [level for level, _, _ in results]),
        **pool_regions(regions),
        **({} if gene_symbols is None else {"gene_symbols": gene_symbols}),
        **({} if genes is None else {"genes": genes if isinstance(genes, str) else [str(gene) for gene in genes]}),
        **({"exact": True} if exact else {}),
        **({"lattice": float(options["lattice"])} if "lattice" in options else {}),
        **({"features": {"key": kept.key, **feature_settings(kept.record)}} if isinstance(kept, KeptFeatures) else {}),
        **({"given": given} if given else {}),
        **({} if model.programmes.empty else {"programmes": model.programmes}),
        **({"n_genes_renamed": len(wanted.renamed)} if wanted.renamed else {}),
        "versions": {name: version(name) for name in ("he2gene_sc", "torch", "timm", "spatialdata", "anndata")},
    }
    for slide, result in zip(slides, predictions, strict=True):
        check_on_tissue(sdata, slide, result.tissue)
    stacked = StackedPredictions.collect(slides, predictions, model, wanted=wanted, keys=keys, record=record, lazy=lazy)
    target = copy_tables(sdata) if copy else sdata
    if new_table is None:
        fill_table(target[measured], stacked)
    else:
        put_table(target, new_table, make_table(slides, stacked, like=table), keys)
    written = target[measured if new_table is None else new_table]
    summary = f"{summary_of(record)}; {describe_reliable(written, keys)}"
    if "reasons" not in record and not gene_flags(written, keys.reliable).any():
        summary += f". You can {IF_NONE_RELIABLE}"
    logger.info("predict: %s", summary)
    if how.bar:
        print(f"predict: {summary}", file=sys.stderr)
    return target if copy else None


def feature_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how features in ``obsm`` were computed, from the record of :func:`embed`."""
    return {"tta": bool(record["tta"]), "dtype": str(record["dtype"]), "lattice": float(record["lattice"])}


def _regions(
    slides: Sequence[Slide], predictions: Sequence[Predictions], sections: Sequence[list[str]], known: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return what the record states of each shapes element: spots on tissue and out of distribution, verdict, and patient."""
    regions: dict[str, dict[str, Any]] = {}
    for slide, result, names in zip(slides, predictions, sections, strict=True):
        n_on_tissue = int((result.tissue >= MIN_TISSUE).sum())
        facts = {"n_inside": len(result.tissue), "n_on_tissue": n_on_tissue, **known}
        if result.ood is not None:
            facts |= {"n_out_of_distribution": int((result.ood.score > 1).sum()), "verdict": result.ood.verdict}
            facts |= {"reasons": list(result.ood.reasons)} if result.ood.reasons else {}
        regions[slide.shapes_key] = facts | ({"known_sections": names} if names else {})
    return regions


def _warn_of_slides(
    slides: Sequence[Slide], predictions: Sequence[Predictions], keys: Keys, declared_known: bool
) -> None:
    """Warn of slides out of distribution, and of those that are declared as of a known patient but look like a new one."""
    reasons = [
        f"{slide.shapes_key!r}: {'; '.join(result.ood.reasons)} (mpp {slide.mpp:.4g}, {slide.mpp_source})"
        for slide, result in zip(slides, predictions, strict=True)
        if result.ood is not None and result.ood.reasons
    ]
    if reasons:
        warn(
            f"out of distribution, unlike what the model was trained on: {', '.join(reasons)}. Check the tissue, the stain (H&E, not "
            "fluorescence or IHC), the µm/px, and that the spots are on tissue, not on blank glass. If all are right, do not trust "
            "this prediction: its spots are not annotated, and no gene is called reliable"
        )
    new = [
        repr(slide.shapes_key)
        for slide, result in zip(slides, predictions, strict=True)
        if declared_known and result.ood is not None and result.ood.verdict == "new"
    ]
    if new:
        warn(
            f"`known_patient` is True, but {', '.join(new)} looks like a new patient. If it is one, fewer genes are reliable than "
            f"var[{keys.reliable!r}] marks. Compare the patients on the card of the model with yours, or predict with "
            "known_patient=False"
        )


def _predict_slide(
    slide: Slide, model: HE2Gene, how: Encoding, kept: KeptFeatures | Path | None
) -> tuple[int, bool, Predictions]:
    """Predict the spots with centres inside the image; also return the image level, and whether features are interpolated."""
    from tqdm.auto import tqdm

    from ..inference import predict as run

    parts = parts_of(slide, model, how)
    reader, dense = parts[0].reader, is_interpolated(parts)
    options: dict[str, Any] = {"device": how.device, "dtype": how.dtype, "tta": how.tta}
    if kept is None and not dense:
        with tqdm(total=reader.n_spots, unit="spot", desc=f"predict {slide.shapes_key}", disable=not how.bar) as bar:
            return reader.plan.level, dense, run(model.network, reader, progress=bar.update, **options)
    if isinstance(kept, KeptFeatures):
        features = kept.of_slide(slide, parts, how.encoder(model))
    else:
        features, _ = encode_slide(slide, model, how, parts, kept)
    return reader.plan.level, dense, run(model.network, features, **options)


def _describe(slides: Sequence[Slide], levels: Sequence[int]) -> dict[str, object]:
    """Describe the slides: plain values for one slide, mappings from shapes elements to values for several."""
    facts = {}
    for s, level in zip(slides, levels, strict=True):
        n, n_outside = len(s.spot_ids), int((~s.inside).sum())
        facts[s.shapes_key] = s.image_key, s.coordinate_system, level, s.mpp, s.mpp_source, n, n_outside
    if len(facts) == 1:
        (key,) = facts
        return {"shapes": key, **dict(zip(REGION_FACTS, facts[key], strict=True))}
    by_fact = zip(REGION_FACTS, zip(*facts.values(), strict=True), strict=True)
    return {"shapes": list(facts), **{name: dict(zip(facts, values, strict=True)) for name, values in by_fact}}
