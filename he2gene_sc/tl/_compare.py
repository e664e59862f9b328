"""``hg.tl.compare``: accuracy of predicted layers under named protocols, with references that use no gene."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale
from .._core.genes import find_genes
from .._core.logs import warn
from .._core.spots import SpotData, spots_of
from ..stats import neighbour_weights, pearson, pitch_of
from ..stats._baselines import position
from ..training._predictability import bounds, mean_by_patient
from ._biomarkers.reference_fields import COLOUR, COORDINATES, DEPTH, fields
from ._evaluate.aligned import MIN_SPOTS
from ._paired import paired_spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

Protocol = Literal["hest", "triplex", "section"]
PROTOCOLS: tuple[Protocol, ...] = ("hest", "triplex", "section")
#: Number of values in a block of genes.
_BLOCK = 2**22


def compare(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    layers: str | Sequence[str],
    *,
    protocols: Protocol | Sequence[Protocol] = PROTOCOLS,
    genes: Sequence[str] | None = None,
    layer_scale: Scale | Mapping[str, Scale] = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    sample_key: str = "patient",
    section_key: str = "section",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Compare predicted layers of any models under named protocols, on the same spots and genes; see ``docs/statistics/methods.md``.

    Parameters
    ----------
    data, measured, measured_scale, sample_key, section_key, table_key
        As for :func:`he2gene_sc.tl.calibrate`. The models must not have been fitted to these patients.
    layers
        Name of one layer or names of several.
    protocols
        ``"hest"``: over all spots of a patient, pooled as in HEST-Benchmark. Target and split differ from that benchmark: here
        measured counts are divided by the totals (HEST-Benchmark uses ln(1 + raw counts)), and the split is that of your predictions.
        ``"triplex"``: over the spots of a section, measured values averaged with those of the neighbours, as in TRIPLEX;
        ``"section"``: over the spots of a section, as measured. Sections with fewer than 10 spots are left out, with a warning.
    genes
        Default: all that every layer predicts. For a comparison with a benchmark, name its genes.
    layer_scale
        As for :func:`he2gene_sc.tl.calibrate`. If the layers differ, a mapping: ``{"a": "counts", "b": "log"}``.

    Returns
    -------
    pandas.DataFrame
        One row per predictor and protocol. ``pearson_mean`` and ``pearson_median`` are over genes, of the mean over patients.
        ``minus_section`` is the difference of ``pearson_mean`` to the same predictor under ``"section"``. ``minus_first`` is the
        correlation minus that of the first of ``layers`` under the same protocol, paired by gene and patient (with one patient: by
        section). ``minus_first_low`` and ``minus_first_high`` are its 95 % t interval over patients, from 3 patients on.
        ``is_reference`` marks depth, mean colour (with an image) and coordinates: lines fitted on the other patients (with one
        patient: on the other sections). A constant prediction of a gene that varies has correlation 0; genes whose measured
        values are constant are left out (``n_constant``). Numbers of genes, spots, sections and patients complete the row.

    Examples
    --------
    >>> import he2gene_sc as hg
    >>> slides = [hg.datasets.toy((5, 5), seed=i) for i in range(2)]
    >>> for i, slide in enumerate(slides):
    ...     slide["table"].obs["patient"] = f"P{i}"
    ...     hg.tl.predict(slide, show_progress_bar=False)
    >>> hg.tl.compare(slides, "he2gene", protocols=["section"])["predictor"].tolist()
    ['he2gene', 'depth', 'mean colour', 'coordinates']
    """
    validate.arguments(compare, locals())
    layers = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
    names = validate.names(protocols, "protocols", one=True)
    chosen = list(dict.fromkeys(validate.one_of(name, PROTOCOLS, "protocols") for name in names))
    if taken := [layer for layer in layers if layer in (DEPTH, COLOUR, COORDINATES)]:
        raise ValueError(f"`layers` {taken}: a reference has that name; give the layer another name")
    if not layers or not chosen:
        raise ValueError(f"`{'protocols' if layers else 'layers'}` is empty; name one or several")
    scales: Mapping[str, Scale] = layer_scale if isinstance(layer_scale, Mapping) else {}
    default: Scale = "auto" if isinstance(layer_scale, Mapping) else layer_scale
    if unknown := [layer for layer in scales if layer not in layers]:
        raise ValueError(f"`layer_scale` names {unknown}, valid: {layers}, as in `layers`")
    data = list(data) if isinstance(data, Iterator) else data
    read = partial(paired_spots, sample_key=sample_key, section_key=section_key, table_key=table_key)
    pairs = []
    for layer in layers:  # Not a comprehension: it would add a frame, and warnings would point to it.
        pairs.append(read(data, layer, scales.get(layer, default), measured, measured_scale))
    shared, truth = shared_spots(pairs)
    predicted = dict(zip(layers, shared, strict=True))
    panel = _shared_genes([spots.genes for spots in predicted.values()], genes)
    _warn_of_shared(pairs, truth, panel if genes is None else None)
    units, patients = (pd.factorize(names)[0] for names in (truth.units, truth.samples))
    patient_of_unit = pd.Series(patients).groupby(units).first().to_numpy()
    references = {name: values[:, None] for name, values in fields(data, truth.tables, truth, layers[0]).items()}
    if truth.xy is not None:
        if not np.isfinite(truth.xy).all():
            for table in truth.tables:
                spots_of(table)  # raises
        references[COORDINATES] = np.empty((len(units), 3))
        for unit in range(len(patient_of_unit)):
            references[COORDINATES][units == unit] = position(truth.xy[units == unit])
    elif "triplex" in chosen:
        raise ValueError(
            "`protocols` 'triplex' averages neighbours, but `data` has no obsm['spatial']; leave 'triplex' out"
        )
    all_spots = np.ones(len(units), bool)
    # With one patient, the units are its sections.
    one_patient = not patients.any()
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    for start in range(0, len(panel), step := max(1, _BLOCK // len(units))):
        block = panel[start : start + step]
        values = truth.values(all_spots, block).astype(np.float64)
        smoothed = {"triplex": _smooth(values, truth.xy, units)} if "triplex" in chosen else {}
        predictions = {layer: spots.values(all_spots, block) for layer, spots in predicted.items()}
        predictions |= predict_held_out(references, values, units, patients)
        for name, prediction in predictions.items():
            for protocol in chosen:
                codes, owners = (
                    (patients, np.arange(patients.max() + 1)) if protocol == "hest" else (units, patient_of_unit)
                )
                target = smoothed.get(protocol, values)
                r = np.stack(
                    [correlation(prediction[codes == code], target[codes == code]) for code in range(len(owners))]
                )
                r = r if one_patient else mean_by_patient(r, owners.tolist())
                scores.setdefault((name, protocol), []).append(r)
    n = {"n_spots": len(units), "n_sections": len(patient_of_unit), "n_patients": int(patients.max()) + 1}
    by_unit = {key: np.concatenate(r, axis=1) for key, r in scores.items()}
    table = pd.DataFrame(
        _row(name, name not in predicted, protocol, r, by_unit[layers[0], protocol]) | n
        for (name, protocol), r in by_unit.items()
    )
    section = table[table["protocol"] == "section"].set_index("predictor")["pearson_mean"]
    minus_section = table["pearson_mean"] - table["predictor"].map(section)
    table.insert(table.columns.get_loc("pearson_median"), "minus_section", minus_section)
    return table


def shared_spots(
    pairs: Sequence[tuple[SpotData, SpotData]], parameter: str = "data"
) -> tuple[list[SpotData], SpotData]:
    """Return the predictions of each layer and the measured values at spots that every layer predicts.

    Sections with fewer than 10 such spots are left out.
    """
    ids = [np.concatenate([i * 2**40 + rows for i, rows in enumerate(spots.rows)]) for spots, _ in pairs]
    common = reduce(np.intersect1d, ids)
    taken = [[spots.take(np.isin(own, common)) for spots in pair] for own, pair in zip(ids, pairs, strict=True)]
    names, units = np.unique(taken[0][1].units.astype(str), return_inverse=True)
    kept = np.bincount(units, minlength=1)[units] >= MIN_SPOTS
    if not kept.any():
        raise ValueError(
            f"`{parameter}`: none of the {len(names)} sections has {MIN_SPOTS} measured spots that every layer predicts"
        )
    if not kept.all():
        warn(
            f"`{parameter}`: [{validate.format_list(names[np.unique(units[~kept])])}] have fewer than {MIN_SPOTS} spots that every layer "
            "predicts and are left out under every protocol"
        )
    return [pair[0].take(kept) for pair in taken], taken[0][1].take(kept)


def _warn_of_shared(pairs: Sequence[tuple[SpotData, SpotData]], truth: SpotData, panel: pd.Index | None) -> None:
    """Warn if layers are compared on a subset of spots or genes."""
    spots, genes = max(len(own.labels) for own, _ in pairs), max(len(own.genes) for own, _ in pairs)
    lost = [f"{len(truth.labels):,} of {spots:,} spots"] if len({len(own.labels) for own, _ in pairs}) > 1 else []
    if panel is not None and len(panel) < genes:
        lost.append(f"{len(panel):,} of {genes:,} genes")
    if lost:
        warn(
            f"`layers` predict different spots or genes; they are compared on those that all predict: {' and '.join(lost)}"
        )


def _shared_genes(genes_of_layers: Sequence[pd.Index], chosen: Sequence[str] | None) -> pd.Index:
    """Return the chosen genes (default: all) that every layer predicts."""
    shared = reduce(lambda a, b: a[find_genes(a, b) >= 0], genes_of_layers)
    wanted = list(shared if chosen is None else dict.fromkeys(validate.names(chosen, "genes", one=True)))
    positions = find_genes(wanted, shared, one_to_one=False)
    if not len(wanted) or (positions < 0).any():
        absent = [gene for gene, position in zip(wanted, positions, strict=True) if position < 0]
        raise ValueError(
            f"`genes` {absent[:5]}: genes that every layer predicts are needed, such as {list(shared[:3])}"
        )
    return shared[positions]


def _smooth(values: np.ndarray, xy: np.ndarray | None, units: np.ndarray) -> np.ndarray:
    """Average each spot with its neighbours in the section."""
    out = np.empty_like(values)
    for unit in np.unique(units):
        rows = np.flatnonzero(units == unit)
        centres = np.asarray(xy)[rows]
        weights = neighbour_weights(centres, pitch_of(centres))
        n = np.diff(weights.indptr)[:, None]
        out[rows] = (n * (weights @ values[rows]) + values[rows]) / (n + 1)
    return out


def predict_held_out(
    references: Mapping[str, np.ndarray], values: np.ndarray, units: np.ndarray, patients: np.ndarray
) -> dict[str, np.ndarray]:
    """Predict values centred by section from each reference ``(n, f)``, by least squares on the other patients.

    With one patient, the lines are fitted on its other sections; with one section, there are none.
    """
    groups = patients if patients.any() else units
    if not groups.any():
        return {}
    centred = values - pd.DataFrame(values).groupby(units).transform("mean").to_numpy()
    out = {name: np.empty_like(values) for name in references}
    for name, x in references.items():
        for group in np.unique(groups):
            own, rest = groups == group, groups != group
            out[name][own] = x[own] @ np.linalg.lstsq(x[rest], centred[rest], rcond=None)[0]
    return out


def correlation(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each gene, 0 if the prediction is constant and the measured gene varies."""
    r = pearson(predicted, measured)
    constant = np.isnan(r) & np.isfinite(predicted).all(axis=0) & np.isfinite(pearson(measured, measured))
    return np.where(constant, 0, r)


def _row(name: str, is_reference: bool, protocol: str, by_unit: np.ndarray, first: np.ndarray) -> dict[str, object]:
    """Summarise the correlations ``(units, genes)`` of a predictor; ``first`` are those of the first layer."""
    r, _, _ = bounds(by_unit)
    known = r[np.isfinite(r)]
    mean, median = (known.mean(), np.median(known)) if len(known) else (np.nan, np.nan)
    row = {"predictor": name, "is_reference": is_reference, "protocol": protocol, "pearson_mean": mean}
    # Average over genes first: the patient is the unit, and its genes share the spots.
    ((gap,), (low,), (high,)) = bounds(bounds((by_unit - first).T)[0][:, None], most=2)
    row |= {"minus_first": gap, "minus_first_low": low, "minus_first_high": high}
    return row | {"pearson_median": median, "n_genes": len(known), "n_constant": len(r) - len(known)}
