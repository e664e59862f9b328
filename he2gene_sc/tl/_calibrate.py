"""``hg.tl.calibrate``: residuals for intervals around any predicted layer, from measured slides."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import MAX_LOG, Scale, summarize_values
from .._core.logs import warn
from .._core.names import clean_names
from .._core.predictions import record_of_layer
from ..stats import LEVELS, MIN_GROUPS
from ..training._calibrate import Calibration as Residuals
from ..training._calibrate import calibrate as residuals_of
from ..training._calibrate import join_calibrations
from ._paired import paired_spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Number of values in a block of genes.
_BLOCK = 2**24
_SCHEMA = 1
_FACTS = ("layer", "layer_scale", "kinds", "unit", "groups", "n_spots", "spread", "models")
#: A slide is on another scale if its level is this factor above or below that of every calibrated patient.
_LEVEL_FACTOR = 1.25


@dataclass(frozen=True, eq=False)
class Calibration:
    """Summary of the residuals of a predicted layer on measured slides; made by :func:`he2gene_sc.tl.calibrate`.

    Parameters
    ----------
    layer, layer_scale
        Name of the layer, and its scale: ``"log"`` or ``"counts"``.
    kinds
        Kinds of values in the layer: ``"counts"``, ``"log"`` (from 0 to 30) or ``"other"`` (for example scaled values). There are
        several if patients differ.
    unit, groups
        Exchangeable unit, ``"patient"`` unless another column was given, and the names of the units.
    n_spots, genes, detected, residuals
        Number of spots, names of the genes, share of the spots that detect each gene, and its residuals.
    means, spread
        Mean predicted value of each gene, and the lowest and highest level of a patient relative to the mean level.
    models
        Digests of the models, if :func:`he2gene_sc.tl.predict` made the predictions.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((4, 4), seed=i, mpp=4.0) for i in range(9)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> path = hg.tl.calibrate(slides, layer="he2gene").save("he2gene.npz")
    >>> hg.Calibration.load(path).unit
    'patient'
    """

    layer: str
    layer_scale: Literal["counts", "log"]
    kinds: list[str]
    unit: str
    groups: list[str]
    n_spots: int
    genes: pd.Index = field(repr=False)
    detected: np.ndarray = field(repr=False)
    residuals: Residuals = field(repr=False)
    means: np.ndarray = field(repr=False)
    spread: tuple[float, float] = field(repr=False)
    models: tuple[str, ...] = field(repr=False)

    def _repr_html_(self) -> str:
        from ..models._card import as_html

        n, verb = len(self.groups), "hg.tl.intervals(sdata, layer=..., calibration=calibration)"
        facts = {"from": f"{n} {self.unit}s, {self.n_spots:,} spots, {len(self.genes):,} genes", "next": verb}
        return as_html(f"Calibration of layer {self.layer!r}", facts)

    def save(self, path: str | Path) -> Path:
        """Write one compressed file of arrays (``.npz``), without pickle; only replace a file that is a calibration."""
        from ..io._files import check_new_file, put_file

        path = validate.folder_or_file(path, "path")
        check_new_file(path, "path", overwrite=True)
        if path.exists():
            try:
                Calibration.load(path)
            except (OSError, ValueError):
                raise FileExistsError(
                    f"`path` {str(path)!r} exists and is not a calibration; choose another name, or delete the file first"
                ) from None
        facts = {name: getattr(self, name) for name in _FACTS} | {"schema": _SCHEMA, "levels": LEVELS.tolist()}
        arrays = {f"residuals.{part.name}": getattr(self.residuals, part.name) for part in fields(Residuals)}
        arrays |= {"genes": self.genes.to_numpy(str), "detected": self.detected, "means": self.means}
        stored: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
        buffer = BytesIO()
        np.savez_compressed(buffer, facts=np.array(json.dumps(facts)), **stored)
        put_file(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file of :meth:`save`; raise if it is not a calibration, is damaged or is of another version."""
        path = validate.folder_or_file(path, "path")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise (IsADirectoryError if path.is_dir() else FileNotFoundError)(
                f"`path` {str(path)!r} {what}; pass the file that hg.tl.calibrate(data, layer=...).save(path) wrote"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays.pop("facts")))
            versions = facts.pop("schema"), facts.pop("levels")
            widths = {array.shape[-1] for name, array in arrays.items() if name != "residuals.spots"}
            if versions != (_SCHEMA, LEVELS.tolist()) or len(widths) != 1:
                raise ValueError("another version wrote it, or its arrays do not fit its genes")
            facts |= {name: tuple(facts[name]) for name in ("spread", "models")}
            residuals = {name.removeprefix("residuals."): arrays.pop(name) for name in [*arrays] if "." in name}
            genes = pd.Index(arrays.pop("genes").astype(object))
            return cls(genes=genes, residuals=Residuals(**residuals), **facts, **arrays)
        except (ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"`path` {str(path)!r} is not a calibration, or is damaged ({error}); make it again: "
                "hg.tl.calibrate(data, layer=...).save(path)"
            ) from error


def calibrate(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    *,
    layer: str,
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    sample_key: str = "patient",
    section_key: str = "section",
    table_key: str | None = None,
) -> Calibration:
    """Calibrate intervals around a predicted layer of any model, on measured slides.

    The model may be ours, a model of LazySlide or omicverse, or your own. Apply the result to slides of new patients with
    ``hg.tl.intervals(slide, layer=..., calibration=...)``.

    Parameters
    ----------
    data
        Object or table, or several, with the prediction in a layer and measured counts of the same spots. **The model must not
        have been fitted to these patients**; otherwise the residuals, and so the intervals, are too small.
    layer
        Predicted expression.
    layer_scale
        Scale of the layer. ``"auto"``: expect natural logarithms of (1 + counts per 10,000) and raise for raw counts;
        ``"counts"``: raw counts; ``"log"``: logarithms, used as they are.
    measured
        Layer of measured counts; ``None``: ``X``. Spots without counts are left out.
    measured_scale
        The same for the measured layer; ``"auto"`` expects raw counts.
    sample_key
        Column of ``obs`` with the patient, the exchangeable unit. ``"section"``: the section is the unit, also if sections of
        several patients or objects share a name; the guarantee then holds for new sections of these patients.
    section_key, table_key
        Column of ``obs`` with the section; table, if an object has several.

    Returns
    -------
    he2gene_sc.Calibration
        Summary of the residuals of the genes that every object has. Nothing is written to ``data``.

    Notes
    -----
    The intervals are those of :func:`he2gene_sc.tl.intervals`, with the residuals of these slides in place of those of a model.
    Scores are weighted so that each patient counts the same, and the quantile is raised for one more patient. A spot of a new
    patient is covered with about the nominal probability from nine patients on; above 90 % from ``coverage / (1 - coverage)``
    patients on: 19 for 95 %, 49 for 98 %. The coverage is approximate because the spread is fitted to the same residuals: with
    these minimal numbers of patients, and equal errors at all spots of a patient, it was 87 to 89 % for 90 % and 94 % for 95 %.
    With fewer patients the plain quantile is used and nothing is guaranteed. See ``docs/trust.md``.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((4, 4), seed=i, mpp=4.0) for i in range(10)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> calibration = hg.tl.calibrate(slides[:9], layer="he2gene")
    >>> hg.tl.intervals(slides[9], calibration=calibration)
    >>> slides[9]["table"].uns["he2gene_intervals"]["guarantee"]
    'hierarchical'
    """
    validate.arguments(calibrate, locals())
    predicted, truth = paired_spots(
        data,
        layer,
        layer_scale,
        measured,
        measured_scale,
        sample_key=sample_key,
        section_key=section_key,
        table_key=table_key,
    )
    codes, names = pd.factorize(predicted.samples)
    if len(names) < 2:
        raise ValueError(
            f"`sample_key` {sample_key!r}: the measured spots are of one {sample_key}, {names[0]!r}; at least 2 are needed, and "
            f"{MIN_GROUPS} for a guarantee. To calibrate for new sections of one patient, use sample_key='section'"
        )
    if len(names) < MIN_GROUPS:
        warn(
            f"`data` has {len(names)} values of {sample_key!r}. With fewer than {MIN_GROUPS}, the coverage for a new one is not "
            "guaranteed, and is often below the nominal value"
        )
    all_spots, parts, detected, means = np.ones(len(codes), bool), [], [], []
    levels = np.zeros(len(names))
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    step = max(1, _BLOCK // len(codes))
    for start in range(0, len(predicted.genes), step):
        genes = predicted.genes[start : start + step]
        counts = truth.values(all_spots, genes)
        values = predicted.values(all_spots, genes)
        group_means = np.stack([values[codes == code].mean(axis=0) for code in range(len(names))])
        means.append(group_means.mean(axis=0))
        levels += group_means.sum(axis=1)
        np.fmin.at(low, codes, np.fmin.reduce(values, axis=1))
        np.fmax.at(high, codes, np.fmax.reduce(values, axis=1))
        parts.append(residuals_of(values, counts, codes, np.full(len(codes), -1), 0))
        n = np.isfinite(counts).sum(axis=0)
        detected.append(np.where(n, (counts > 0).sum(axis=0) / np.maximum(n, 1), np.nan))
    if not (np.any(low) or np.any(high)):
        raise ValueError(
            f"`layer` {layer!r} is 0 for every gene and measured spot; name the predicted layer, or predict again"
        )
    scaled = ((low < 0) | (high > MAX_LOG))[np.isfinite(low)]
    kinds = np.where(scaled, "other", "log") if predicted.scale == "log" else ["counts"]
    return Calibration(
        layer=layer,
        layer_scale=predicted.scale,
        kinds=sorted(set(map(str, kinds))),
        unit=sample_key,
        groups=[str(name) for name in names],
        n_spots=len(codes),
        genes=predicted.genes.astype(str),
        detected=np.concatenate(detected),
        residuals=join_calibrations(parts),
        means=np.concatenate(means).astype(np.float32),
        spread=(float(levels.min() / levels.mean()), float(levels.max() / levels.mean())),
        models=tuple(sorted({model_digest(table, layer) for table in predicted.tables} - {""})),
    )


def model_digest(table: AnnData, layer: str) -> str:
    """Return the digest of the model that predicted a layer; empty if it was not one of our models."""
    record = record_of_layer(table, layer)
    return str(record.get("weights_sha256") or record.get("head") or "")


def check_calibrated(calibration: Any, table: AnnData, values: Any, layer: str, model: object) -> None:
    """Raise if the calibration is of another layer or scale than that of the table."""
    validate.instance(
        calibration, Calibration, "calibration", "what hg.tl.calibrate returns, or hg.Calibration.load(path),"
    )
    if model is not None:
        raise ValueError("`model` and `calibration` are both given, but intervals use only one of them; leave one out")
    if layer != calibration.layer:
        raise ValueError(
            f"`layer` is {layer!r}, `calibration` is of layer {calibration.layer!r}; pass layer={calibration.layer!r}, or "
            f"calibrate the other: hg.tl.calibrate(data, layer={layer!r})"
        )
    contents = summarize_values(values)
    if contents.n_infinite or contents.n_nan == np.prod(values.shape):
        infinite = f"holds {contents.n_infinite} infinite value(s)"
        raise ValueError(
            f"`layer` {layer!r} {infinite if contents.n_infinite else 'is NaN for every gene and spot'}; predict again"
        )
    is_counts = calibration.layer_scale == "counts"
    if contents.high > 0 and (contents.kind == "counts") != is_counts:
        kind = "raw counts" if contents.kind == "counts" else "fractions"
        raise ValueError(
            f"`layer` {layer!r} holds {kind}, `calibration` is of a layer of scale {calibration.layer_scale!r}; convert the layer to "
            "that scale, or calibrate again"
        )
    if contents.kind != "counts" and contents.kind not in calibration.kinds:
        scaled = f"values below 0 or above {MAX_LOG:g} (scaled or not logarithms)"
        logs = f"values from 0 to {MAX_LOG:g} (logarithms)"
        raise ValueError(
            f"`layer` {layer!r} has values from {contents.low:.3g} to {contents.high:.3g}, `calibration` is of a layer with "
            f"{scaled if 'other' in calibration.kinds else logs}; convert the layer to that scale, or calibrate again: "
            "hg.tl.calibrate(data, layer=...)"
        )
    _warn_of_origin(calibration, table, layer)
    if is_counts and contents.n_nan_spots > contents.n_empty_spots:
        raise ValueError(
            f"`layer` {layer!r} holds {contents.n_nan} NaN, in {contents.n_nan_spots} spots: their totals are unknown, so counts "
            "cannot be normalised; leave these genes out, or set unmeasured values to 0"
        )


def _warn_of_origin(calibration: Calibration, table: AnnData, layer: str) -> None:
    """Warn if the slide was used for the calibration, or if another model made the prediction."""
    names = set(clean_names(table.obs[calibration.unit])) if calibration.unit in table.obs else set()
    if known := sorted(names & set(calibration.groups)):
        warn(
            f"`data`: {calibration.unit}s {validate.format_list(known)} were used for the `calibration`: the intervals cover more "
            "there than in new ones, so coverage measured there is optimistic; leave them out of `data` or of the calibration"
        )
    digest = model_digest(table, layer)
    if digest and len(calibration.models) == 1 and digest not in calibration.models:
        warn(
            f"`layer` {layer!r} was predicted by another model than that of the `calibration`, so its residuals do not apply and the "
            "coverage is unknown; calibrate again: hg.tl.calibrate(data, layer=...)"
        )


def warn_of_level(calibration: Calibration, means: np.ndarray, positions: np.ndarray, layer: str) -> None:
    """Warn if the gene means of a slide are on another scale; ``positions`` are those of its genes in the calibration."""
    if calibration.kinds == ["other"]:
        return
    calibrated = calibration.means[positions]
    both = np.isfinite(calibrated) & np.isfinite(means)
    # The spread of the patients is over all genes; over a few genes the levels differ more.
    if not calibrated[both].sum() > np.nansum(calibration.means) / 2:
        return
    ratio = float(means[both].sum() / calibrated[both].sum())
    low, high = calibration.spread
    if low / _LEVEL_FACTOR <= ratio <= high * _LEVEL_FACTOR:
        return
    warn(
        f"`layer`: the values of {layer!r} are on average {ratio:.2f} times those of the slides of the `calibration` (over its "
        f"{calibration.unit}s: {low:.2f} to {high:.2f} times). It is on another scale (logarithms to base 2: 1.44 times, to base 10: 0.43) or "
        "of another model, so the coverage is below the nominal value; convert the layer to that scale, or calibrate again"
    )
