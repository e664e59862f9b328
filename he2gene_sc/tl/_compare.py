"""``hg.tl.compare``: predicted layers under named protocols, beside references that see no gene."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .._core import validate
from .._core.expression import Scale
from .._core.genes import find_genes
from .._core.spots import SpotData, pitch_of, spots_of
from ..stats import neighbour_weights, pearson
from ..stats._baselines import position
from ..training._predictability import bounds
from ._biomarkers.reference_fields import COLOUR, COORDINATES, DEPTH, fields
from ._evaluate.aligned import MIN_SPOTS
from ._paired import paired_spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

Protocol = Literal["hest", "triplex", "section"]
PROTOCOLS: tuple[Protocol, ...] = ("hest", "triplex", "section")
#: Values of a block of genes.
_BLOCK = 2**22


def compare(
    data: SpatialData | AnnData | Iterable[SpatialData | AnnData],
    layers: str | Sequence[str],
    *,
    protocols: Protocol | Sequence[Protocol] = PROTOCOLS,
    genes: Sequence[str] | None = None,
    layer_scale: Scale = "auto",
    measured: str | None = None,
    measured_scale: Scale = "auto",
    sample_key: str = "patient",
    section_key: str = "section",
    table_key: str | None = None,
) -> pd.DataFrame:
    """Judge predicted layers of any models under named protocols, on the same spots and genes; see ``docs/statistics/methods.md``.

    Parameters
    ----------
    data, layer_scale, measured, measured_scale, sample_key, section_key, table_key
        As for :func:`he2gene_sc.tl.calibrate`. No model may have been fitted to these patients.
    layers
        One layer or several.
    protocols
        ``"hest"``: over all spots of a patient, which is how HEST-Benchmark pools them. Its target and split are not: measured counts
        are divided by the totals here, HEST-Benchmark takes ln(1 + raw counts), and the split is that of your predictions.
        ``"triplex"``: over the spots of a section, measured values averaged with those of the neighbours, as TRIPLEX;
        ``"section"``: over the spots of a section, as measured. Sections under 10 spots are left out of all, with a warning.
    genes
        Default: all that every layer predicts. Name the panel of a benchmark to compare with it.

    Returns
    -------
    pandas.DataFrame
        A row a predictor and protocol: ``pearson_mean`` and ``pearson_median`` over the genes of the mean over patients, its
        difference ``minus_section`` to the same predictor under ``"section"``, and what was judged. ``minus_first`` is the correlation minus
        that of the first of ``layers`` under the same protocol, paired by gene and patient (of one patient: by section), with its 95 % t
        interval over patients ``minus_first_low``, ``minus_first_high``, from 3 on. ``is_reference`` marks depth, mean
        colour (with an image) and coordinates, lines that are fitted on the other patients (of one patient: the other sections).
        A constant prediction of a gene that varies counts as a correlation of 0; genes that were measured as constant are left
        out (``n_constant``).

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
    asked = np.atleast_1d(np.array(protocols, object))
    chosen = list(dict.fromkeys(validate.one_of(name, PROTOCOLS, "protocols") for name in asked))
    if taken := [layer for layer in layers if layer in (DEPTH, COLOUR, COORDINATES)]:
        raise ValueError(f"`layers` {taken}: a reference has that name; give the layer another one")
    if not layers or not chosen:
        raise ValueError(f"`{'protocols' if layers else 'layers'}` is empty; name one or several")
    data = list(data) if isinstance(data, Iterator) else data
    read = partial(paired_spots, sample_key=sample_key, section_key=section_key, table_key=table_key)
    pairs = []
    for layer in layers:  # A comprehension would be a frame of its own, and warnings would name it.
        pairs.append(read(data, layer, layer_scale, measured, measured_scale))
    found, truth = in_common(pairs)
    predicted = dict(zip(layers, found, strict=True))
    panel = _panel([spots.genes for spots in predicted.values()], genes)
    _warn_of_shared(pairs, truth, panel if genes is None else None)
    units, patients = (pd.factorize(names)[0] for names in (truth.units, truth.samples))
    owner = pd.Series(patients).groupby(units).first().to_numpy()
    groups = patients if patients.any() else units
    seen = {name: values[:, None] for name, values in fields(data, truth.tables, truth, layers[0]).items()}
    if truth.xy is not None:
        if not np.isfinite(truth.xy).all():
            for table in truth.tables:
                spots_of(table)
        seen[COORDINATES] = np.empty((len(units), 3))
        for unit in range(len(owner)):
            seen[COORDINATES][units == unit] = position(truth.xy[units == unit])
    elif "triplex" in chosen:
        raise ValueError("`protocols` 'triplex' averages neighbours, and `data` has no obsm['spatial']; leave it out")
    every = np.ones(len(units), bool)
    # Sections, or spots of all, of one patient stand for themselves.
    alone = not patients.any()
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    for start in range(0, len(panel), step := max(1, _BLOCK // len(units))):
        block = panel[start : start + step]
        values = truth.values(every, block).astype(np.float64)
        target = {"triplex": _smoothed(values, truth.xy, units)} if "triplex" in chosen else {}
        guesses = {layer: spots.values(every, block) for layer, spots in predicted.items()}
        if groups.any():
            centred = values - pd.DataFrame(values).groupby(units).transform("mean").to_numpy()
            guesses |= {name: fitted_on_others(x, centred, groups) for name, x in seen.items()}
        for name, guess in guesses.items():
            for protocol in chosen:
                of, by = (patients, np.arange(patients.max() + 1)) if protocol == "hest" else (units, owner)
                aim = target.get(protocol, values)
                r = pd.DataFrame([correlation(guess[of == group], aim[of == group]) for group in range(len(by))])
                scores.setdefault((name, protocol), []).append((r if alone else r.groupby(by).mean()).to_numpy())
    n = {"n_spots": len(units), "n_sections": len(owner), "n_patients": int(patients.max()) + 1}
    by_unit = {key: np.concatenate(r, axis=1) for key, r in scores.items()}
    rows = [
        _row(name, name not in predicted, protocol, r, by_unit[layers[0], protocol]) | n
        for (name, protocol), r in by_unit.items()
    ]
    table = pd.DataFrame(rows)
    section = table[table["protocol"] == "section"].set_index("predictor")["pearson_mean"]
    table.insert(
        table.columns.get_loc("pearson_median"),
        "minus_section",
        table["pearson_mean"] - table["predictor"].map(section),
    )
    return table


def in_common(pairs: Sequence[tuple[SpotData, SpotData]], parameter: str = "data") -> tuple[list[SpotData], SpotData]:
    """Spots that every layer predicts, in sections that have enough of them: each layer's, and as measured."""
    ids = [np.concatenate([i * 2**40 + rows for i, rows in enumerate(spots.rows)]) for spots, _ in pairs]
    shared = reduce(np.intersect1d, ids)
    found = [[spots.take(np.isin(own, shared)) for spots in pair] for own, pair in zip(ids, pairs, strict=True)]
    names, units = np.unique(found[0][1].units.astype(str), return_inverse=True)
    kept = np.bincount(units, minlength=1)[units] >= MIN_SPOTS
    if not kept.any():
        raise ValueError(
            f"`{parameter}`: none of the {len(names)} sections has {MIN_SPOTS} spots that every layer predicts"
        )
    if not kept.all():
        warnings.warn(
            f"`{parameter}`: [{validate.format_list(names[np.unique(units[~kept])])}] have fewer than {MIN_SPOTS} spots that every layer "
            "predicts and are left out, under every protocol",
            UserWarning,
            stacklevel=3,
        )
    return [pair[0].take(kept) for pair in found], found[0][1].take(kept)


def _warn_of_shared(pairs: Sequence[tuple[SpotData, SpotData]], truth: SpotData, panel: pd.Index | None) -> None:
    """Say that layers are judged on a part of the spots or genes that one of them predicts."""
    spots, genes = max(len(own.labels) for own, _ in pairs), max(len(own.genes) for own, _ in pairs)
    lost = [f"{len(truth.labels):,} of {spots:,} spots"] if len({len(own.labels) for own, _ in pairs}) > 1 else []
    if panel is not None and len(panel) < genes:
        lost.append(f"{len(panel):,} of {genes:,} genes")
    if lost:
        warnings.warn(
            f"`layers` predict other spots or genes than each other: they are compared on what all predict, {' and '.join(lost)}",
            UserWarning,
            stacklevel=3,
        )


def _panel(known: Sequence[pd.Index], asked: Sequence[str] | None) -> pd.Index:
    """Genes that every layer has, or those that were asked for."""
    shared = reduce(lambda a, b: a[find_genes(a, b) >= 0], known)
    wanted = list(shared if asked is None else dict.fromkeys(validate.names(asked, "genes", one=True)))
    at = find_genes(wanted, shared, one_to_one=False)
    if not len(wanted) or (at < 0).any():
        absent = [gene for gene, place in zip(wanted, at, strict=True) if place < 0]
        raise ValueError(
            f"`genes` {absent[:5]}: genes that every layer predicts are needed, such as {list(shared[:3])}"
        )
    return shared[at]


def _smoothed(values: np.ndarray, xy: np.ndarray | None, units: np.ndarray) -> np.ndarray:
    """Mean of each spot and its neighbours in the section."""
    out = np.empty_like(values)
    for unit in np.unique(units):
        rows = np.flatnonzero(units == unit)
        places = np.asarray(xy)[rows]
        weights = neighbour_weights(places, pitch_of(places))
        n = np.diff(weights.indptr)[:, None]
        out[rows] = (n * (weights @ values[rows]) + values[rows]) / (n + 1)
    return out


def fitted_on_others(x: np.ndarray, values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Least squares of centred values on numbers of each spot, fitted on the other groups."""
    out = np.empty_like(values)
    for group in np.unique(groups):
        held = groups == group
        out[held] = x[held] @ np.linalg.lstsq(x[~held], values[~held], rcond=None)[0]
    return out


def correlation(guess: np.ndarray, aim: np.ndarray) -> np.ndarray:
    """Pearson correlation of each gene, 0 where a constant is predicted of one that varies."""
    r = pearson(guess, aim)
    missed = np.isnan(r) & np.isfinite(guess).all(axis=0) & np.isfinite(pearson(aim, aim))
    return np.where(missed, 0, r)


def _row(name: str, is_reference: bool, protocol: str, by_unit: np.ndarray, first: np.ndarray) -> dict[str, object]:
    r, _, _ = bounds(by_unit)
    known = r[np.isfinite(r)]
    mean, median = (known.mean(), np.median(known)) if len(known) else (np.nan, np.nan)
    row = {"predictor": name, "is_reference": is_reference, "protocol": protocol, "pearson_mean": mean}
    # Genes first: they share the spots of a patient, which is the unit.
    ((gap,), (low,), (high,)) = bounds(bounds((by_unit - first).T)[0][:, None], most=2)
    row |= {"minus_first": gap, "minus_first_low": low, "minus_first_high": high}
    return row | {"pearson_median": median, "n_genes": len(known), "n_constant": len(r) - len(known)}
