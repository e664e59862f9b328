"""Held-out accuracy of each gene, and the rule of reliable genes."""

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
#: Fewest groups for a bound: with two groups it would be based on a single difference.
MIN_GROUPS = 3
#: Fewest patients for metrics over held-out patients rather than sections: with fewer, bounds are too wide.
MIN_PATIENTS = 5
#: Units of held-out metrics by which a gene may be called reliable.
GROUP_UNITS = ("patient", "section")
#: Most sections over which the noise ceiling is averaged, and splits per section.
_CEILING_SECTIONS, _CEILING_SPLITS = 8, 2
_VALUES_AT_ONCE = 20_000_000
#: Terms of depth that a correlation given depth is conditioned on.
_N_DEPTH = 3


def bounds(
    pcc: np.ndarray, min_groups: int = MIN_GROUPS, most: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of each gene over held-out groups ``(groups, g)`` and its 95 % t interval, clipped to ± ``most``, ``(g,)`` each."""
    from scipy.stats import t

    n, mean = np.isfinite(pcc).sum(0), _mean_of_measured(pcc)
    with np.errstate(invalid="ignore", divide="ignore"):
        sd = np.sqrt(np.nansum(np.square(pcc - mean), axis=0) / (n - 1))
        half = np.where(n >= min_groups, t.ppf(0.975, np.maximum(n - 1, 1)) * sd / np.sqrt(n), np.nan)
    return mean, np.clip(mean - half, -most, most), np.clip(mean + half, -most, most)


def _mean_of_measured(values: np.ndarray) -> np.ndarray:
    n = np.isfinite(values).sum(0)
    return np.nansum(values, axis=0) / np.where(n > 0, n, np.nan)


def mean_by_patient(pcc: np.ndarray, patients: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Average the sections of each patient, ``(sections, g)`` to ``(patients, g)``; NaN if none measured the gene."""
    names = np.asarray(patients)
    return np.stack([_mean_of_measured(pcc[names == name]) for name in dict.fromkeys(patients)])


def patient_bound(pcc: np.ndarray, n_spots: Sequence[int], patients: Sequence[str]) -> np.ndarray:
    """Return the lower 95 % bound ``(patients, g)`` of each patient's mean correlation, from its number of spots (Fisher's z).

    Spots count as independent, although neighbours are not, so this is a minimum requirement.
    """
    error = 1 / np.maximum(np.asarray(n_spots, float) - 3, 0.1)
    names = np.asarray(patients)
    found = []
    for name in dict.fromkeys(patients):
        part = names == name
        own = pcc[part]
        is_measured = np.isfinite(own)
        z = np.arctanh(np.clip(np.where(is_measured, own, 0), -0.999999, 0.999999))
        errors = np.where(is_measured, error[part, None], 0)
        n = np.where(is_measured.any(0), is_measured.sum(0), np.nan)
        found.append(np.tanh((z.sum(0) - 1.96 * np.sqrt(errors.sum(0))) / n))
    return np.stack(found)


def new_patient_bound(pcc_given_depth: np.ndarray, n_spots: np.ndarray) -> np.ndarray:
    """Return the one-sided 95 % lower bound ``(g,)`` of the mean correlation given depth over held-out patients.

    It is -1 for genes with too few patients. Since patients are few, the variance between them beyond that of spots
    (Fisher's z) is pooled over genes (Smyth, Stat Appl Genet Mol Biol 2004).
    """
    is_measured = np.isfinite(pcc_given_depth)
    n = is_measured.sum(0)
    enough = n >= MIN_GROUPS
    if not enough.any():
        return np.full(pcc_given_depth.shape[1], -1.0)
    z = np.arctanh(np.clip(np.where(is_measured, pcc_given_depth, 0), -0.999999, 0.999999))
    error = np.where(is_measured, 1 / np.maximum(np.asarray(n_spots, float) - 3 - _N_DEPTH, 0.1)[:, None], 0)
    mean = z.sum(0) / np.maximum(n, 1)
    variance = np.where(is_measured, np.square(z - mean), 0).sum(0) / np.maximum(n - 1, 1)
    of_spots = error.sum(0) / np.maximum(n, 1)
    spread = max(0.0, float((variance - of_spots)[enough].mean()))
    deviation = np.sqrt((n * spread + error.sum(0)) / np.maximum(n, 1) ** 2)
    return np.where(enough, np.tanh(mean - 1.645 * deviation), -1.0)


def is_better(differences: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return whether genes are predicted better than each reference, ``(g,)``, from paired differences ``(patients, g)`` by name.

    The one-sided 95 % lower bound of the mean difference must be above 0, with the variance between patients pooled over genes.
    For depth, the mean must be above 0: :func:`new_patient_bound` already conditions on depth, and a second bound would cost
    the power of three patients.
    """
    better = True
    for name, difference in differences.items():
        n = np.isfinite(difference).sum(0)
        mean = np.nansum(difference, axis=0) / np.maximum(n, 1)
        variance = np.nansum(np.square(difference - mean), axis=0) / np.maximum(n - 1, 1)
        # Genes without any variance are left out of the pooled variance.
        used = (n >= MIN_GROUPS) & (variance > 0)
        spread = variance[used].mean() if used.any() and name != "depth" else 0.0
        better &= (n >= MIN_GROUPS) & (mean > 1.645 * np.sqrt(spread / np.maximum(n, 1)))
    return np.asarray(better)


def section_pcc(sections: Sequence[Section], pcc: np.ndarray) -> np.ndarray:
    """Return correlations per section, with 0 for constant genes and NaN for genes that were not measured."""
    # By section, since arrays of all sections and genes are large.
    found = np.empty(pcc.shape)
    for own, section, values in zip(found, sections, pcc, strict=True):
        own[:] = np.where(section.measured, np.nan_to_num(values), np.nan)
    return found


def ceilings(sections: Sequence[Section]) -> np.ndarray:
    """Return the noise ceiling of each gene, ``(g,)``, averaged over up to eight sections; 0 if the halves of counts disagree."""
    chosen = sections[:: -(-len(sections) // _CEILING_SECTIONS)]
    g = chosen[0].targets.shape[1]
    total, n = np.zeros(g), np.zeros(g)
    for section in chosen:
        counts = with_unmodelled_counts(section)
        step = max(1, _VALUES_AT_ONCE // len(section))
        for start in range(0, g, step):
            genes = np.arange(start, min(start + step, g))
            found = np.nan_to_num(noise_ceiling(counts, genes=genes, n_splits=_CEILING_SPLITS))
            total[genes] += np.where(section.measured[genes], found, 0)
        n += section.measured
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def with_unmodelled_counts(section: Section) -> scipy.sparse.csr_array:
    """Return raw counts with one more column: the counts of genes outside the model, which are part of the totals."""
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
    """Return the gene table of a model, and the rule of reliable genes in words.

    ``references`` are held-out predictions from references without genes, by name and, like ``held_out``, by unit.
    Metrics are over held-out patients if there are :data:`MIN_PATIENTS`, else over sections, else over the available unit.
    """
    patients = [section.patient for section in sections]
    n_patients = len(set(patients))
    unit = next(iter(held_out))
    if "patient" in held_out and n_patients >= MIN_PATIENTS:
        unit = "patient"
    # Arrays of all sections and genes are large: only one is kept at a time.
    of_sections = section_pcc(sections, held_out[unit].pcc)
    patient_low = minimum_over_patients(patient_bound(of_sections, [len(section) for section in sections], patients))
    grouped = mean_by_patient(of_sections, patients) if unit == "patient" else of_sections
    mean, low, high = bounds(grouped)
    # A gene measured in a single group was never tested on another.
    tested = np.isfinite(grouped).sum(0) > (unit in GROUP_UNITS)
    del of_sections, grouped
    mean, skill = np.where(tested, mean, np.nan), np.where(tested, held_out[unit].skill, np.nan)
    known = good_on_known_patients(unit, low, skill)
    if unit == "section":
        known &= np.nan_to_num(patient_low) > RELIABLE_PCC
    new_patient, given_depth = np.full((2, len(mean)), np.nan)
    reliable = np.zeros(len(mean), bool)
    if "patient" in held_out:
        across, pcc_given_depth = (
            mean_by_patient(section_pcc(sections, getattr(held_out["patient"], name)), patients)
            for name in ("pcc", "pcc_given_depth")
        )
        new_patient, given_depth = (mean_of_several(x, across) for x in (across, pcc_given_depth))
        spots_of_patient = pd.Series([len(section) for section in sections]).groupby(patients, sort=False).sum()
        reliable = new_patient_bound(pcc_given_depth, spots_of_patient.to_numpy()) > RELIABLE_PCC
        reliable &= good_in_each_patient(across)
        if unit == "section":
            known &= good_in_each_patient(across)
    reference_columns, better = _compare_with_references(sections, held_out, references)
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
            **reference_columns,
            "reliable": reliable,
            "reliable_known_patient": known,
        },
    )
    n_held = n_patients if "patient" in held_out else 0
    return table, f"{_new_patient_rule(n_held)} {_known_patient_rule(unit, len(sections), n_held)}"


def _compare_with_references(
    sections: Sequence[Section], held_out: Mapping[str, HeldOut], references: Mapping[str, Mapping[str, HeldOut]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return columns of the gene table on each reference, over held-out patients if possible, and whether genes beat all of them."""
    unit = "patient" if "patient" in held_out else next(iter(held_out))
    names = [section.patient if unit == "patient" else section.name for section in sections]
    own = mean_by_patient(section_pcc(sections, held_out[unit].pcc), names)
    columns: dict[str, np.ndarray] = {}
    differences: dict[str, np.ndarray] = {}
    for name, found in references.items():
        reference = mean_by_patient(section_pcc(sections, found[unit].pcc), names)
        differences[name] = own - reference
        mean, low, high = bounds(differences[name], most=2)
        values_of = {f"pcc_{name}": bounds(reference)[0], f"minus_{name}": mean}
        several = np.isfinite(own).sum(0) > (unit in GROUP_UNITS)
        columns |= {column: np.where(several, values, np.nan) for column, values in values_of.items()}
        columns |= {f"minus_{name}_low": low, f"minus_{name}_high": high}
    return columns, is_better(differences)


def minimum_over_patients(values: np.ndarray) -> np.ndarray:
    """Return the minimum over the patients that measured each gene, ``(g,)``; NaN if none did."""
    smallest = np.where(np.isfinite(values), values, np.inf).min(0)
    return np.where(np.isfinite(smallest), smallest, np.nan)


def good_in_each_patient(pcc: np.ndarray) -> np.ndarray:
    """Return whether the correlation ``(patients, g)`` is above the limit in each patient that measured the gene, ``(g,)``."""
    return np.nan_to_num(minimum_over_patients(pcc)) > RELIABLE_PCC


def good_on_known_patients(unit: str, low: np.ndarray, skill: np.ndarray) -> np.ndarray:
    """Return whether bound and skill on held-out sections or patients are above their limits, ``(g,)``."""
    return (unit in GROUP_UNITS) & (np.nan_to_num(low) > RELIABLE_PCC) & (skill > 0)


def mean_of_several(values: np.ndarray, pcc: np.ndarray) -> np.ndarray:
    """Return means ``(g,)`` of values ``(patients, g)``; NaN for genes whose correlation is known in fewer than two patients."""
    return np.where(np.isfinite(pcc).sum(0) > 1, bounds(values)[0], np.nan)


def too_few_patients(n_patients: int) -> str:
    """Return the rule for new patients, in words, if fewer than :data:`MIN_GROUPS` patients were held out."""
    return f"Reliability on a new patient needs {MIN_GROUPS} held-out patients; this model has {n_patients or 'none'}."


def known_patient_rule(groups: str, least: int = MIN_GROUPS, between: str = "") -> str:
    """Return the rule for known patients, in words; ``groups`` are those of the bound, ``between`` are further conditions."""
    return (
        "On a known patient a gene is called reliable where the lower 95 % bound of its held-out Pearson correlation (t over the "
        f"{groups}; at least {least} are needed) is above {RELIABLE_PCC}{between} and its held-out skill against the training "
        "mean is positive"
    )


def no_groups(held_out: str = "none") -> str:
    """Return the rule for known patients, in words, if neither sections nor patients were held out."""
    return f"Reliability on a known patient needs held-out sections or patients; this model has {held_out}"


def _new_patient_rule(n_patients: int) -> str:
    if n_patients < MIN_GROUPS:
        return too_few_patients(n_patients)
    return (
        f"the lower 95 % bound of its mean correlation given the counts of each spot, over {n_patients} patients held out whole, "
        f"is above {RELIABLE_PCC} (differences between patients pooled over the genes), so is its correlation in each of them, and it is "
        "better than what sees no gene: the mean paired difference to depth, and the lower 95 % bound of that to colour and to "
        "coordinates, are above 0."
    )


def _known_patient_rule(unit: str, n_sections: int, n_patients: int) -> str:
    if unit not in GROUP_UNITS:
        return no_groups()
    if unit == "patient":
        over = f"{n_patients} patients, held out"
    elif not n_patients:
        over = f"{n_sections} sections, held out; valid only for known patients"
    else:
        over = f"{n_sections} sections, held out while others of their patient may be trained on"
    each = ", so is the bound of its mean in each patient that measured it (from the number of spots)"
    rule = known_patient_rule(over, between=each if unit == "section" else "")
    if unit == "section" and n_patients:
        rule += (
            f", and its correlation in each of the {n_patients} patients, held out whole, is above {RELIABLE_PCC} too (a bound "
            f"over patients needs {MIN_PATIENTS} of them)"
        )
    return rule
