"""How well each gene is predicted where nothing of it was trained on, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse

from ..stats import noise_ceiling
from ._sections import Section

if TYPE_CHECKING:
    from ._held_out import HeldOut
    from ._metadata import ModelMetadata

#: Lower bound of the held-out correlation above which a gene may be called reliable.
RELIABLE_PCC = 0.1
#: Groups without which no bound is given: that of two rests on a single difference.
MIN_GROUPS = 3
#: Patients from which figures are of held-out patients, not sections: a bound over fewer says next to nothing.
ENOUGH_PATIENTS = 5
#: What a figure has to be of, for a gene to be called reliable by it.
TELLING = ("patient", "section")
#: Sections that the noise ceiling is averaged over, and splits of each.
_CEILING_SECTIONS, _CEILING_SPLITS = 8, 2
_VALUES_AT_ONCE = 20_000_000


def bounds(
    pcc: np.ndarray, min_groups: int = MIN_GROUPS, most: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each gene over held-out groups ``(groups, g)`` and its 95 % t interval within ± ``most``, ``(g,)`` each."""
    from scipy.stats import t

    n = np.isfinite(pcc).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(pcc, axis=0) / np.where(n > 0, n, np.nan)
        sd = np.sqrt(np.nansum(np.square(pcc - mean), axis=0) / (n - 1))
        half = np.where(n >= min_groups, t.ppf(0.975, np.maximum(n - 1, 1)) * sd / np.sqrt(n), np.nan)
    return mean, np.clip(mean - half, -most, most), np.clip(mean + half, -most, most)


def by_patient(pcc: np.ndarray, patients: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Average the sections of each patient: ``(sections, g)`` to ``(patients, g)``; NaN where none measured the gene."""
    names = np.asarray(patients)
    parts = (pcc[names == name] for name in dict.fromkeys(patients))
    with np.errstate(invalid="ignore"):
        return np.stack(
            [
                np.nansum(part, axis=0) / np.where(np.isfinite(part).any(0), np.isfinite(part).sum(0), np.nan)
                for part in parts
            ]
        )


def bound_within(pcc: np.ndarray, n_spots: Sequence[int], patients: Sequence[str]) -> np.ndarray:
    """Lower 95 % bound ``(patients, g)`` of each patient's mean correlation, from the error of its spots (Fisher's z).

    Spots count as independent, which neighbours are not: it is the least to ask for.
    """
    error = 1 / np.maximum(np.asarray(n_spots, float) - 3, 0.1)
    names = np.asarray(patients)
    found = []
    for name in dict.fromkeys(patients):
        part = names == name
        own = pcc[part]
        there = np.isfinite(own)
        z = np.arctanh(np.clip(np.where(there, own, 0), -0.999999, 0.999999))
        errors = np.where(there, error[part, None], 0)
        n = np.where(there.any(0), there.sum(0), np.nan)
        found.append(np.tanh((z.sum(0) - 1.96 * np.sqrt(errors.sum(0))) / n))
    return np.stack(found)


def new_patient_bound(given: np.ndarray, n_spots: np.ndarray, n_depth: int = 3) -> np.ndarray:
    """One-sided 95 % lower bound ``(g,)`` of the mean over held-out patients of correlations given depth; else -1.

    With few patients, the variance between them beyond that of spots (Fisher's z) is pooled over genes
    (Smyth, Stat Appl Genet Mol Biol 2004). ``n_depth`` numbers describe depth.
    """
    there = np.isfinite(given)
    n = there.sum(0)
    enough = n >= MIN_GROUPS
    if not enough.any():
        return np.full(given.shape[1], -1.0)
    z = np.arctanh(np.clip(np.where(there, given, 0), -0.999999, 0.999999))
    error = np.where(there, 1 / np.maximum(np.asarray(n_spots, float) - 3 - n_depth, 0.1)[:, None], 0)
    mean = z.sum(0) / np.maximum(n, 1)
    between = np.where(there, np.square(z - mean), 0).sum(0) / np.maximum(n - 1, 1) - error.sum(0) / np.maximum(n, 1)
    spread = max(0.0, float(between[enough].mean()))
    deviation = np.sqrt((n * spread + error.sum(0)) / np.maximum(n, 1) ** 2)
    return np.where(enough, np.tanh(mean - 1.645 * deviation), -1.0)


def is_better(differences: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether genes are predicted better than each reference, ``(g,)``, from paired differences ``(patients, g)`` by name.

    The one-sided 95 % lower bound of the mean is above 0, the variance between patients pooled over genes. Of depth the mean
    is enough: :func:`new_patient_bound` is of what is left given depth, and a second bound costs the power of three patients.
    """
    better = True
    for name, difference in differences.items():
        n = np.isfinite(difference).sum(0)
        mean = np.nansum(difference, axis=0) / np.maximum(n, 1)
        variance = np.nansum(np.square(difference - mean), axis=0) / np.maximum(n - 1, 1)
        # A gene that is constant everywhere says nothing about the others.
        used = (n >= MIN_GROUPS) & (variance > 0)
        spread = variance[used].mean() if used.any() and name != "depth" else 0.0
        better &= (n >= MIN_GROUPS) & (mean > 1.645 * np.sqrt(spread / np.maximum(n, 1)))
    return np.asarray(better)


def section_pcc(sections: Sequence[Section], pcc: np.ndarray) -> np.ndarray:
    """Correlations of the sections where a gene that is constant counts as 0, and one that was not measured as NaN."""
    found = np.empty(pcc.shape)
    for own, section, values in zip(found, sections, pcc, strict=True):
        own[:] = np.where(section.measured, np.nan_to_num(values), np.nan)
    return found


def ceilings(sections: Sequence[Section]) -> np.ndarray:
    """Noise ceiling of each gene, ``(g,)``, over up to eight sections that measured it; 0 where halves disagree."""
    chosen = sections[:: -(-len(sections) // _CEILING_SECTIONS)]
    g = chosen[0].targets.shape[1]
    total, n = np.zeros(g), np.zeros(g)
    for section in chosen:
        counts = with_rest(section)
        step = max(1, _VALUES_AT_ONCE // len(section))
        for start in range(0, g, step):
            genes = np.arange(start, min(start + step, g))
            found = np.nan_to_num(noise_ceiling(counts, genes=genes, n_splits=_CEILING_SPLITS))
            total[genes] += np.where(section.measured[genes], found, 0)
        n += section.measured
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def with_rest(section: Section) -> scipy.sparse.csr_array:
    """Raw counts with one more column: what was counted of genes that are not learned, which belongs to the totals."""
    counts = section.counts()
    rest = np.maximum(np.rint(section.totals - np.asarray(counts.sum(axis=1)).ravel()), 0).astype(np.int64)
    return scipy.sparse.hstack([counts, scipy.sparse.csr_array(rest[:, None])], format="csr")


def gene_table(
    sections: Sequence[Section],
    metadata: ModelMetadata,
    held_out: Mapping[str, HeldOut],
    references: Mapping[str, Mapping[str, HeldOut]],
    target: np.ndarray,
    variable: np.ndarray,
) -> tuple[pd.DataFrame, str]:
    """Make the gene table of a model, and say in words what makes a gene reliable.

    ``references`` are held-out predictions of what sees no gene, by name and unit as ``held_out`` is.
    Metrics are of held-out patients if there are :data:`ENOUGH_PATIENTS`, else of sections, else of what there is.
    """
    patients = [section.patient for section in sections]
    n_patients = len(set(patients))
    unit = next(iter(held_out))
    if "patient" in held_out and n_patients >= ENOUGH_PATIENTS:
        unit = "patient"
    # One array of all sections and genes at a time.
    of_sections = section_pcc(sections, held_out[unit].pcc)
    patient_low = least(bound_within(of_sections, [len(section) for section in sections], patients))
    grouped = by_patient(of_sections, patients) if unit == "patient" else of_sections
    mean, low, high = bounds(grouped)
    # A gene of a single group was never predicted for another.
    tested = np.isfinite(grouped).sum(0) > (unit in TELLING)
    del of_sections, grouped
    mean, skill = np.where(tested, mean, np.nan), np.where(tested, held_out[unit].skill, np.nan)
    known = (unit in TELLING) & (np.nan_to_num(low) > RELIABLE_PCC) & (skill > 0)
    if unit == "section":
        known &= np.nan_to_num(patient_low) > RELIABLE_PCC
    new_patient, given_depth = np.full((2, len(mean)), np.nan)
    reliable = np.zeros(len(mean), bool)
    if "patient" in held_out:
        across, given = (
            by_patient(section_pcc(sections, getattr(held_out["patient"], name)), patients) for name in ("pcc", "given")
        )
        several = np.isfinite(across).sum(0) > 1
        new_patient, given_depth = (np.where(several, bounds(x)[0], np.nan) for x in (across, given))
        spots_of_patient = pd.Series([len(section) for section in sections]).groupby(patients, sort=False).sum()
        reliable = new_patient_bound(given, spots_of_patient.to_numpy()) > RELIABLE_PCC
        reliable &= np.nan_to_num(least(across)) > RELIABLE_PCC
        if unit == "section":
            known &= np.nan_to_num(least(across)) > RELIABLE_PCC
    beside, better = _against(sections, held_out, references)
    reliable &= better
    total = sum(section.sums(np.ones(len(section), bool))[0] for section in sections)
    spots = sum(len(section) * section.measured for section in sections)
    detected = sum(np.diff(section.targets.indptr) * section.measured for section in sections)
    table = metadata.table(
        target,
        variable,
        total / np.maximum(spots, 1),
        {
            "pcc": mean,
            "pcc_low": low,
            "pcc_high": high,
            "pcc_patient_low": patient_low,
            "pcc_new_patient": new_patient,
            "pcc_given_depth": given_depth,
            "ceiling": ceilings(sections),
            "detected": np.where(spots > 0, detected / np.maximum(spots, 1), np.nan),
            "skill": skill,
            **beside,
            "reliable": reliable,
            "reliable_known_patient": known,
        },
    )
    n_held = n_patients if "patient" in held_out else 1
    return (
        table,
        f"{_new_patient_rule(n_held)} On a known patient a gene is called reliable where {_rule(unit, len(sections), n_held)}",
    )


def _against(
    sections: Sequence[Section], held_out: Mapping[str, HeldOut], references: Mapping[str, Mapping[str, HeldOut]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of the gene table on each reference, over held-out patients if there are any; whether a gene is better than all."""
    unit = "patient" if "patient" in held_out else next(iter(held_out))
    names = [section.patient if unit == "patient" else section.name for section in sections]
    own = by_patient(section_pcc(sections, held_out[unit].pcc), names)
    columns: dict[str, np.ndarray] = {}
    differences: dict[str, np.ndarray] = {}
    for name, found in references.items():
        reference = by_patient(section_pcc(sections, found[unit].pcc), names)
        differences[name] = own - reference
        mean, low, high = bounds(differences[name], most=2)
        told = {f"pcc_{name}": bounds(reference)[0], f"minus_{name}": mean}
        several = np.isfinite(own).sum(0) > (unit in TELLING)
        columns |= {column: np.where(several, values, np.nan) for column, values in told.items()}
        columns |= {f"minus_{name}_low": low, f"minus_{name}_high": high}
    return columns, is_better(differences)


def least(of_patients: np.ndarray) -> np.ndarray:
    """Least over the patients that measured the gene, ``(g,)``; NaN where none did."""
    least = np.where(np.isfinite(of_patients), of_patients, np.inf).min(0)
    return np.where(np.isfinite(least), least, np.nan)


def _new_patient_rule(n_patients: int) -> str:
    if n_patients < MIN_GROUPS:
        return (
            f"figures of {MIN_GROUPS} held-out patients say so; there are {n_patients if n_patients > 1 else 'none'}."
        )
    return (
        f"the lower 95 % bound of its mean correlation given the counts of each spot, over {n_patients} patients held out whole, "
        f"is above {RELIABLE_PCC} (differences between patients pooled over the genes), so is its correlation in each of them, and it is "
        "better than what sees no gene: the mean paired difference to depth, and the lower 95 % bound of that to colour and to "
        "coordinates, are above 0."
    )


def _rule(unit: str, n_sections: int, n_patients: int) -> str:
    if unit not in TELLING:
        return "figures of held-out sections or patients say so; there are none"
    if unit == "patient":
        over = f"{n_patients} patients, held out"
    elif n_patients == 1:
        over = f"{n_sections} sections, held out; this speaks for patients that are known"
    else:
        over = f"{n_sections} sections, held out while others of their patient may be trained on"
    rule = (
        f"the lower 95 % bound of its held-out Pearson correlation (t over the {over}; at least {MIN_GROUPS} are needed) is "
        f"above {RELIABLE_PCC}"
    )
    if unit == "section":
        rule += ", so is the bound of its mean in each patient that measured it (from the number of spots)"
    rule += " and its held-out skill against the training mean is positive"
    if unit == "section" and n_patients > 1:
        rule += (
            f", and its correlation in each of the {n_patients} patients, held out whole, is above {RELIABLE_PCC} too (a bound "
            f"over patients needs {ENOUGH_PATIENTS} of them)"
        )
    return rule
