"""``hg.tl.calibrate``: what intervals around any predicted layer need, from slides that were measured too."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import MAX_LOG, Scale, summarize_values
from .._core.keys import PATIENT
from .._core.names import clean_names
from .._core.ownership import is_prediction
from .._core.predictions import prediction_of
from ..stats import LEVELS, MIN_GROUPS
from ..training._calibrate import Calibration as Residuals
from ..training._calibrate import calibrate as residuals_of
from ..training._calibrate import join_calibrations
from ._paired import paired_spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

#: Values of a block of genes.
_BLOCK = 2**24
_SCHEMA = 1
_FACTS = ("layer", "layer_scale", "kinds", "unit", "groups", "n_spots")
_LATER = ("spread", "models")
#: Values of a slide are on another scale where their level is so many times that of every calibrated patient, or so small a part.
_OTHER_LEVEL = 1.25


@dataclass(frozen=True, eq=False)
class Calibration:
    """Residuals of a predicted layer on measured slides, in short; made by :func:`he2gene_sc.tl.calibrate`.

    Parameters
    ----------
    layer, layer_scale
        The layer, and what it holds: ``"log"`` or ``"counts"``.
    kinds
        What its values look like: ``"counts"``, ``"log"`` (from 0 to 30) or ``"other"``, as scaled values do; of some patients one,
        of others another.
    unit, groups
        What is exchangeable, ``"patient"`` unless another column was named, and its names.
    n_spots, genes, detected, residuals
        Number of spots, names of the genes, share of the spots that detect each, and its residuals.
    means, spread
        Mean predicted value of each gene, and how many times that the patients have, the least and the most.
    models
        What made the predictions, where :func:`he2gene_sc.tl.predict` did.

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
    # Not in files of older versions.
    means: np.ndarray | None = field(default=None, repr=False)
    spread: tuple[float, float] = field(default=(1.0, 1.0), repr=False)
    models: tuple[str, ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        from ..models._card import as_html

        n, verb = len(self.groups), "hg.tl.intervals(sdata, layer=..., calibration=calibration)"
        facts = {"from": f"{n} {self.unit}s, {self.n_spots:,} spots, {len(self.genes):,} genes", "next": verb}
        return as_html(f"Calibration of layer {self.layer!r}", facts)

    def save(self, path: str | Path) -> Path:
        """Write one compressed file of arrays (``.npz``), without pickle; a file that is not a calibration is not replaced."""
        from ..io._files import check_new_file, put_file

        path = validate.folder_or_file(path, "path")
        check_new_file(path, "path", (path.suffix.lower(),), overwrite=True)
        if path.exists():
            try:
                Calibration.load(path)
            except (OSError, ValueError):
                raise FileExistsError(
                    f"`path` {str(path)!r} is there and is not a calibration; choose another name, or delete it first"
                ) from None
        facts = {name: getattr(self, name) for name in (*_FACTS, *_LATER)} | {
            "schema": _SCHEMA,
            "levels": LEVELS.tolist(),
        }
        kept = {f"residuals.{part.name}": getattr(self.residuals, part.name) for part in fields(Residuals)}
        arrays: dict[str, Any] = {
            name: array for name, array in (kept | {"means": self.means}).items() if array is not None
        }
        made = BytesIO()
        np.savez_compressed(
            made, facts=np.array(json.dumps(facts)), genes=self.genes.to_numpy(str), detected=self.detected, **arrays
        )
        put_file(path, made.getvalue())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote; what is not a calibration, is damaged or of another version is refused."""
        path = validate.folder_or_file(path, "path")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise (IsADirectoryError if path.is_dir() else FileNotFoundError)(
                f"`path` {str(path)!r} {what}; name the file that hg.tl.calibrate(data, layer=...).save(path) wrote"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays["facts"]))
            residuals = Residuals(
                **{
                    part.name: arrays[f"residuals.{part.name}"]
                    for part in fields(Residuals)
                    # Those by predicted level are not in files of older versions.
                    if part.default is MISSING or f"residuals.{part.name}" in arrays
                }
            )
            genes, detected = pd.Index(arrays["genes"].astype(object)), arrays["detected"]
            later: dict[str, Any] = {name: tuple(facts[name]) for name in _LATER if name in facts}
            later["means"] = arrays.get("means")
            found = cls(
                **{name: facts[name] for name in _FACTS}, genes=genes, detected=detected, residuals=residuals, **later
            )
            widths = {array.shape[-1] for array in residuals.tensors().values()} | {len(detected)}
            widths |= set() if found.means is None else {len(found.means)}
            if (facts["schema"], facts["levels"], widths) != (_SCHEMA, LEVELS.tolist(), {len(genes)}):
                raise ValueError("another version wrote it, or its arrays do not fit its genes")
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"`path` {str(path)!r} is not a calibration, or is damaged ({error}); make it again: "
                "hg.tl.calibrate(data, layer=...).save(path)"
            ) from error
        return found


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
    """Calibrate intervals around a predicted layer of any model, on slides that were measured too.

    The model may be any: ours, one of LazySlide or omicverse, your own. Apply the result to slides of new patients by
    ``hg.tl.intervals(slide, layer=..., calibration=...)``.

    Parameters
    ----------
    data
        Object or table, or several, with the prediction in a layer and what was measured at the same spots. **The model
        must not have been fitted to these patients**: its residuals would be too small, and so the intervals.
    layer
        Predicted expression.
    layer_scale
        What it holds. ``"auto"``: natural logarithms of (1 + counts per 10,000) are expected and raw counts refused;
        ``"counts"``: it holds raw counts; ``"log"``: the values are meant as they are.
    measured
        Layer of measured counts; ``None``: ``X``. Spots without counts are left out.
    measured_scale
        The same of what was measured; ``"auto"`` expects raw counts.
    sample_key
        Column of ``obs`` with the patient, the unit that is exchangeable. ``"section"``: sections are, those of one name in several
        patients or objects apart; what follows then holds for new sections of these patients.
    section_key, table_key
        Column of ``obs`` with the section; table, where an object has several.

    Returns
    -------
    he2gene_sc.Calibration
        Residuals of the genes that every object has, in short. Nothing is written to ``data``.

    Notes
    -----
    The intervals are those of :func:`he2gene_sc.tl.intervals`, from the residuals of these slides in place of those that a
    model keeps: scores weighed so that each patient counts the same, and a quantile raised for one more patient. A spot of a
    new patient is covered with about that probability from nine patients on, above 90 % from ``coverage / (1 - coverage)``: 19
    for 95 %, 49 for 98 %. About, since the spread is fitted to the residuals that it is calibrated by: at these smallest numbers,
    where all spots of a patient err alike, 87 to 89 % for 90 % and 94 % for 95 % were seen. With fewer patients the plain quantile is taken and nothing is guaranteed.
    See ``docs/trust.md``.

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
    unit = "patient" if sample_key == PATIENT else sample_key
    codes, names = pd.factorize(predicted.samples)
    if len(names) < 2:
        raise ValueError(
            f"`sample_key` {sample_key!r}: the measured spots are of one {unit}, {names[0]!r}; at least 2 are needed, "
            f"{MIN_GROUPS} for a guarantee. sample_key='section' calibrates for new sections of one patient"
        )
    if len(names) < MIN_GROUPS:
        warnings.warn(
            f"`data`: {len(names)} of {unit!r}; with fewer than {MIN_GROUPS} the coverage of the intervals is not guaranteed for "
            "a new one, and is often lower than asked for",
            UserWarning,
            stacklevel=2,
        )
    every, parts, detected, means = np.ones(len(codes), bool), [], [], []
    levels = np.zeros(len(names))
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    step = max(1, _BLOCK // len(codes))
    for start in range(0, len(predicted.genes), step):
        genes = predicted.genes[start : start + step]
        counts = truth.values(every, genes)
        values = predicted.values(every, genes)
        of_groups = np.stack([values[codes == code].mean(axis=0) for code in range(len(names))])
        means.append(of_groups.mean(axis=0))
        levels += of_groups.sum(axis=1)
        np.fmin.at(low, codes, np.fmin.reduce(values, axis=1))
        np.fmax.at(high, codes, np.fmax.reduce(values, axis=1))
        parts.append(residuals_of(values, counts, codes, np.full(len(codes), -1), 0))
        n = np.isfinite(counts).sum(axis=0)
        detected.append(np.where(n, (counts > 0).sum(axis=0) / np.maximum(n, 1), np.nan))
    scaled = ((low < 0) | (high > MAX_LOG))[np.isfinite(low)]
    kinds = np.where(scaled, "other", "log") if predicted.scale == "log" else ["counts"]
    return Calibration(
        layer=layer,
        layer_scale=predicted.scale,
        kinds=sorted(set(map(str, kinds))),
        unit=unit,
        groups=[str(name) for name in names],
        n_spots=len(codes),
        genes=predicted.genes.astype(str),
        detected=np.concatenate(detected),
        residuals=join_calibrations(parts),
        means=np.concatenate(means).astype(np.float32),
        spread=(float(levels.min() / levels.mean()), float(levels.max() / levels.mean())),
        models=tuple(sorted({made_by(table, layer) for table in predicted.tables} - {""})),
    )


def made_by(table: AnnData, layer: str) -> str:
    """Digest of the model of ours that predicted a layer; empty where another did."""
    record = table.uns.get(prediction_of(table, layer) or "", {})
    return str(record.get("weights_sha256") or record.get("head") or "") if is_prediction(record) else ""


def check_calibrated(calibration: Any, table: AnnData, values: Any, layer: str, model: object) -> None:
    """Refuse a calibration of another layer or scale than that of a table."""
    validate.instance(
        calibration, Calibration, "calibration", "what hg.tl.calibrate returns, or hg.Calibration.load(path),"
    )
    if model is not None:
        raise ValueError("`model` and `calibration` are both given; intervals come from one of them")
    if layer != calibration.layer:
        raise ValueError(
            f"`layer` is {layer!r}, `calibration` is of layer {calibration.layer!r}; pass layer={calibration.layer!r}, or "
            f"calibrate the other: hg.tl.calibrate(data, layer={layer!r})"
        )
    found = summarize_values(values)
    if found.n_infinite or found.n_nan == np.prod(values.shape):
        what = f"holds {found.n_infinite} infinite value(s)" if found.n_infinite else "is NaN for every gene and spot"
        raise ValueError(f"`layer` {layer!r} {what}; predict again")
    is_counts = calibration.layer_scale == "counts"
    if found.high > 0 and (found.kind == "counts") != is_counts:
        here = "raw counts" if found.kind == "counts" else "fractions"
        raise ValueError(
            f"`layer` {layer!r} holds {here}, `calibration` is of a layer of scale {calibration.layer_scale!r}; bring the layer to "
            "that scale, or calibrate again"
        )
    if found.kind != "counts" and found.kind not in calibration.kinds:
        scaled = f"values below 0 or above {MAX_LOG:g}, as scaled or unlogged ones are"
        raise ValueError(
            f"`layer` {layer!r} goes from {found.low:.3g} to {found.high:.3g}, `calibration` is of a layer with "
            f"{scaled if 'other' in calibration.kinds else f'values from 0 to {MAX_LOG:g}, as logarithms are'}; bring the layer to "
            "that scale, or calibrate again: hg.tl.calibrate(data, layer=...)"
        )
    _warn_of_origin(calibration, table, layer)
    if is_counts and found.n_nan_spots > found.n_empty_spots:
        raise ValueError(
            f"`layer` {layer!r} holds {found.n_nan} NaN, in {found.n_nan_spots} spots: their total is not known, so counts cannot be "
            "normalised; leave these genes out, or set what was not seen to 0"
        )


def _warn_of_origin(calibration: Calibration, table: AnnData, layer: str) -> None:
    """Warn of slides that the calibration was made of, and of predictions of another model than its own."""
    names = set(clean_names(table.obs[calibration.unit])) if calibration.unit in table.obs else set()
    if known := sorted(names & set(calibration.groups)):
        warnings.warn(
            f"`data`: {calibration.unit}s {validate.format_list(known)} are among those that the `calibration` was made of: the "
            "intervals cover more there than in new ones, so coverage found there is too good; leave them out of either",
            UserWarning,
            stacklevel=4,
        )
    own = made_by(table, layer)
    if own and len(calibration.models) == 1 and own not in calibration.models:
        warnings.warn(
            f"`layer` {layer!r} was predicted by another model than that of the `calibration`, whose residuals say nothing of it: the "
            "coverage is not known; calibrate again: hg.tl.calibrate(data, layer=...)",
            UserWarning,
            stacklevel=4,
        )


def warn_of_level(calibration: Calibration, means: np.ndarray, at: np.ndarray, layer: str) -> None:
    """Warn where the mean values of genes of a slide, at places ``at`` of those of a calibration, are on another scale."""
    if calibration.means is None or calibration.kinds == ["other"]:
        return
    theirs = calibration.means[at]
    both = np.isfinite(theirs) & np.isfinite(means)
    # The patients' levels are of all genes: those of a few genes differ by more.
    if not theirs[both].sum() > np.nansum(calibration.means) / 2:
        return
    ratio = float(means[both].sum() / theirs[both].sum())
    low, high = calibration.spread
    if low / _OTHER_LEVEL <= ratio <= high * _OTHER_LEVEL:
        return
    warnings.warn(
        f"`layer` {layer!r} has on average {ratio:.2f} times the values of the slides of the `calibration`, whose {calibration.unit}s "
        f"have {low:.2f} to {high:.2f} times: another scale (logarithms to base 2: 1.44 times, to base 10: 0.43) or another model, so "
        "the intervals cover less than they say; bring the layer to that scale, or calibrate again",
        UserWarning,
        stacklevel=3,
    )
