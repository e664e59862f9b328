"""``hg.tl.train``: a model from sections with measured counts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._settings import settings
from .._slide import resolve

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData

    from ..models import HE2Gene
    from ..models._network import FeatureExtractor

logger = logging.getLogger("he2gene_sc")

#: Symmetries a training spot is seen under: one of each quarter turn, half of them mirrored.
_SYMMETRIES = ((0, False), (1, True), (2, False), (3, True))
_COLOURS = (
    "#d62728",
    "#ff9896",
    "#9467bd",
    "#2ca02c",
    "#ffdd57",
    "#1f77b4",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#17becf",
)
_MIN_CLASS = 5


@dataclass(frozen=True)
class _Section:
    name: str
    patient: str
    genes: pd.Index
    expression: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    mpp: float


def train(
    sdatas: SpatialData | Iterable[SpatialData],
    *,
    annotation_key: str | None = "annotation",
    sample_key: str = "patient",
    section_key: str = "section",
    encoder: str = "efficientnet-lite0",
    windows_um: Sequence[float] = (100.0, 200.0, 400.0),
    n_target_genes: int = 250,
    n_latent: int = 128,
    min_spot_share: float = 0.01,
    missing_genes_are_zero: bool = False,
    ignore_classes: Sequence[str] = ("undetermined",),
    class_colors: Mapping[str, str] | None = None,
    ensembl_ids: Mapping[str, str] | None = None,
    colour_share: float = 0.16,
    name: str = "my-model",
    version: str = "1",
    description: str = "",
    intended_use: str = "Research use only.",
    limitations: Sequence[str] = (),
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    show_progress_bar: bool | None = None,
) -> HE2Gene:
    """Train closed-form heads on a frozen encoder.

    Features of several windows, under four symmetries, and colour statistics are standardised, reduced by principal
    components and mapped to all genes by one ridge regression; the annotation is a multinomial logistic regression on
    the same embedding, calibrated by temperature. Penalties are chosen with whole sections held out. All of it is
    deterministic on the CPU.

    Parameters
    ----------
    sdatas
        Sections, each with an image, spots and a table of raw counts in ``X``. An iterable is read one by one, so that
        only one image is in memory.
    annotation_key
        Labels in ``obs``; missing ones are left out. ``None``: no annotation head.
    sample_key, section_key
        Patient and section in ``obs``.
    encoder
        Name in ``hg.models.ENCODERS`` or of timm.
    windows_um
        Sides of the windows, µm.
    n_target_genes
        Genes of highest mean, called ``"target"``; penalties are chosen by them.
    n_latent
        Length of the embedding.
    min_spot_share
        Genes seen in fewer of the spots are left out.
    missing_genes_are_zero
        Whether a gene that a section does not list was measured there and never seen. Otherwise only genes that all
        sections list are learned.
    ignore_classes
        Labels that are no class.
    class_colors
        Class name to colour (hex), for plots; further classes get one of a palette.
    ensembl_ids
        Symbol to Ensembl id, for the gene table.
    colour_share
        Weight of the colour statistics, as a share of that of the encoder's features.
    name, version, description, intended_use, limitations
        For the card.
    batch_size, device, dtype, show_progress_bar
        As in :func:`he2gene_sc.tl.predict`.

    Returns
    -------
    he2gene_sc.models.HE2Gene
        With ``.save(path)``; use it at once as ``hg.tl.predict(sdata, model=model)``.

    Raises
    ------
    ValueError
        If counts are not raw, a column is missing, fewer than two sections are given, or their genes do not overlap.
    """
    from ..inference import resolve_device, resolve_dtype
    from ..models._encoders import encoder_sha256, load_encoder
    from ..models._network import N_COLOUR, FeatureExtractor
    from ..training import Facts, TrainingSet, build_model

    device = resolve_device(settings.device if device is None else device)
    dtype = resolve_dtype(dtype, device)
    network, spec = load_encoder(encoder)
    extractor = FeatureExtractor(network, spec).to(device)
    if not isinstance(sdatas, Iterable):
        sdatas = [sdatas]
    bar = settings.show_progress_bar if show_progress_bar is None else show_progress_bar
    sections = [
        _read(
            sdata, extractor, annotation_key, sample_key, section_key, tuple(windows_um), batch_size, device, dtype, bar
        )
        for sdata in sdatas
    ]
    if len({section.name for section in sections}) < 2:
        raise ValueError(
            f"`sdatas` holds {len(sections)} section(s) named {sorted({s.name for s in sections})}; at least two are needed "
            "so that one can be held out"
        )
    genes, targets = _join(sections, missing_genes_are_zero, min_spot_share)
    classes, codes = _classes(sections, ignore_classes)
    facts = Facts(
        section_names=tuple(s.name for s in sections),
        patient_names=tuple(s.patient for s in sections),
        mpps=tuple(s.mpp for s in sections),
        genes=genes,
        ensembl_ids=dict(ensembl_ids or {}),
        classes=classes,
        class_colors=tuple(
            (class_colors or {}).get(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(classes)
        ),
        encoder=spec,
        encoder_sha256=encoder_sha256(network),
        windows_um=tuple(float(um) for um in windows_um),
        name=name,
        version=version,
        description=description or f"Trained on {len(sections)} sections with {spec.name}.",
        intended_use=intended_use,
        limitations=tuple(limitations),
    )
    sizes = [len(s.features) for s in sections]
    patients = sorted(set(facts.patient_names))
    data = TrainingSet(
        features=np.concatenate([s.features for s in sections]),
        targets=targets,
        codes=codes,
        sections=np.repeat(np.arange(len(sections)), sizes),
        patients=np.repeat([patients.index(name) for name in facts.patient_names], sizes),
        n_colour=N_COLOUR * len(facts.windows_um),
    )
    return build_model(
        data, facts, n_target=min(n_target_genes, len(genes)), n_latent=n_latent, colour_share=colour_share
    )


def _read(
    sdata: SpatialData,
    extractor: FeatureExtractor,
    annotation_key: str | None,
    sample_key: str,
    section_key: str,
    windows_um: tuple[float, ...],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    show_progress_bar: bool,
) -> _Section:
    """Features, expression and labels of the spots of one section whose centre lies in the image."""
    from tqdm.auto import tqdm

    from ..image import PatchReader
    from ..inference import encode
    from ..stats import log_normalise

    slides = resolve(sdata)
    if len(slides) > 1:
        raise ValueError(f"`sdatas`: a table annotates {[s.shapes_key for s in slides]}; pass one section an object")
    slide = slides[0]
    if slide.table_key is None:
        raise ValueError("`sdatas`: a section has no table; measured counts are needed to train")
    table = sdata[slide.table_key]
    for parameter, key in (
        ("annotation_key", annotation_key),
        ("sample_key", sample_key),
        ("section_key", section_key),
    ):
        if key is not None and key not in table.obs:
            raise ValueError(f"`{parameter}` {key!r} is no column of obs, valid: {list(table.obs.columns)}")
    kept = slide.rows[slide.inside]
    counts = table.X[kept]
    values = counts.data if hasattr(counts, "data") and not isinstance(counts, np.ndarray) else np.asarray(counts)
    if values.size and ((values < 0).any() or (values % 1 != 0).any()):
        raise ValueError("`sdatas`: `X` does not hold raw counts (whole numbers from 0); put them there")
    sums = np.asarray(counts.sum(axis=1)).ravel()
    kept, centres = kept[sums > 0], slide.centres[slide.inside][sums > 0]
    if (sums == 0).any():
        logger.warning("%d spots without counts are left out", (sums == 0).sum())
    names = [sorted(set(table.obs[key].iloc[kept].astype(str))) for key in (section_key, sample_key)]
    if any(len(found) != 1 for found in names):
        raise ValueError(f"`section_key`, `sample_key`: a section belongs to one patient, found {names}")
    if table.var_names.has_duplicates:
        raise ValueError(f"`sdatas`: duplicated genes {list(table.var_names[table.var_names.duplicated()][:5])}")
    reader = PatchReader(
        slide.pyramid,
        centres,
        slide.mpp,
        windows_um=windows_um,
        input_px=extractor.input_px,
        batch_size=batch_size,
        factor=slide.pixel_factor,
    )
    features = None
    import torch

    with (
        tqdm(total=len(kept), unit="spot", desc=f"encode {names[0][0]}", disable=not show_progress_bar) as bar,
        torch.inference_mode(),
    ):
        for batch, part in encode(extractor, reader, device=device, dtype=dtype, symmetries=_SYMMETRIES):
            part = part.cpu().numpy()
            if features is None:
                features = np.empty((len(kept), *part.shape[1:]), np.float32)
            features[batch.index] = part
            bar.update(len(batch.index))
    labels = np.full(len(kept), None, object)
    if annotation_key is not None:
        found = table.obs[annotation_key].iloc[kept].astype(object)
        labels = found.where(found.notna(), None).to_numpy(object)
    return _Section(
        name=names[0][0],
        patient=names[1][0],
        genes=table.var_names,
        expression=log_normalise(table.X[kept]),
        labels=labels,
        features=features,
        mpp=slide.mpp,
    )


def _join(sections: list[_Section], missing_are_zero: bool, min_share: float) -> tuple[pd.Index, np.ndarray]:
    """Bring the sections to one gene list and leave the rarest genes out."""
    genes = sections[0].genes
    for section in sections[1:]:
        genes = genes.union(section.genes) if missing_are_zero else genes.intersection(section.genes)
    genes = genes.sort_values()
    n = sum(len(section.expression) for section in sections)
    if len(genes) < 10:
        raise ValueError(f"`sdatas` have only {len(genes)} genes in common; do they use the same kind of names?")
    targets = np.zeros((n, len(genes)), np.float32)
    start = 0
    for section in sections:
        columns = section.genes.get_indexer(genes)
        stop = start + len(section.expression)
        targets[start:stop, columns >= 0] = section.expression[:, columns[columns >= 0]]
        start = stop
    kept = (targets > 0).mean(0) >= min_share
    return genes[kept], targets[:, kept]


def _classes(sections: list[_Section], ignored: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names with enough spots, and the code of each spot, -1 without a class."""
    labels = np.concatenate([section.labels for section in sections])
    counted = pd.Series([label for label in labels if label is not None and label not in ignored]).value_counts()
    rare = sorted(counted.index[counted < _MIN_CLASS])
    if rare:
        logger.warning("classes with fewer than %d spots are left out: %s", _MIN_CLASS, rare)
    classes = tuple(sorted(counted.index[counted >= _MIN_CLASS]))
    lookup = {label: i for i, label in enumerate(classes)}
    return classes, np.array([lookup.get(label, -1) for label in labels])
