"""Held-out accuracy of each gene, and the rule of reliable genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse

from ..stats import noise_ceiling
from ._held_out import HeldOut
from ._metadata import ModelMetadata
from ._sections import Section, groups_of

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
#: Terms of depth that a correlation given depth is conditioned on.
_N_DEPTH = 3


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return number, mean and variance of the measured values of each gene over the first axis; the mean of none is NaN."""
    n = np.isfinite(values).sum(0)
    mean = np.nansum(values, axis=0) / np.where(n > 0, n, np.nan)
    return n, mean, np.nansum(np.square(values - mean), axis=0) / np.maximum(n - 1, 1)


def bounds(
    pcc: np.ndarray, min_groups: int = MIN_GROUPS, most: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of each gene over held-out groups ``(groups, g)`` and its 95 % t interval, clipped to ± ``most``, ``(g,)`` each."""
    from scipy.stats import t

    n, mean, variance = _moments(pcc)
    quantile = t.ppf(0.975, np.maximum(n - 1, 1))
    half = np.where(n >= min_groups, quantile * np.sqrt(variance) / np.sqrt(np.maximum(n, 1)), np.nan)
    return mean, np.clip(mean - half, -most, most), np.clip(mean + half, -most, most)


def mean_by_patient(pcc: np.ndarray, patients: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Average the sections of each patient, ``(sections, g)`` to ``(patients, g)``; NaN if none measured the gene."""
    names = np.asarray(patients)
    return np.stack([_moments(pcc[names == name])[1] for name in dict.fromkeys(patients)])


def _fishers_z(pcc: np.ndarray, n_free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Fisher's z of correlations ``(groups, g)``, and its variance, from degrees of freedom ``(groups,)``; NaN is kept."""
    z = np.arctanh(np.clip(pcc, -0.999999, 0.999999))
    return z, np.where(np.isfinite(z), 1 / np.maximum(n_free, 0.1)[:, None], np.nan)


def patient_bound(pcc: np.ndarray, n_spots: Sequence[int], patients: Sequence[str]) -> np.ndarray:
    """Return the lower 95 % bound ``(patients, g)`` of each patient's mean correlation, from its number of spots (Fisher's z).

    Spots count as independent, although neighbours are not, so this is a minimum requirement.
    """
    names, found = np.asarray(patients), []
    for name in dict.fromkeys(patients):
        z, variance = _fishers_z(pcc[names == name], np.asarray(n_spots, float)[names == name] - 3)
        n = np.isfinite(z).sum(0)
        deviation = np.sqrt(np.nansum(variance, axis=0))
        found.append(np.tanh((np.nansum(z, axis=0) - 1.96 * deviation) / np.where(n > 0, n, np.nan)))
    return np.stack(found)


def new_patient_bound(pcc_given_depth: np.ndarray, n_spots: np.ndarray) -> np.ndarray:
    """Return the one-sided 95 % lower bound ``(g,)`` of the mean correlation given depth over held-out patients.

    It is -1 for genes with too few patients. Since patients are few, the variance between them beyond that of spots
    (Fisher's z) is pooled over genes (Smyth, Stat Appl Genet Mol Biol 2004).
    """
    z, of_spots = _fishers_z(pcc_given_depth, np.asarray(n_spots, float) - 3 - _N_DEPTH)
    n, mean, variance = _moments(z)
    enough = n >= MIN_GROUPS
    if not enough.any():
        return np.full(len(n), -1.0)
    n, error = np.maximum(n, 1), np.nansum(of_spots, axis=0)
    spread = max(0.0, float((variance - error / n)[enough].mean()))
    return np.where(enough, np.tanh(mean - 1.645 * np.sqrt((n * spread + error) / n**2)), -1.0)


def is_better(differences: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return whether genes are predicted better than each reference, ``(g,)``, from paired differences ``(patients, g)`` by name.

    The one-sided 95 % lower bound of the mean difference must be above 0, with the variance between patients pooled over genes.
    For depth, the mean must be above 0: :func:`new_patient_bound` already conditions on depth, and a second bound would cost
    the power of three patients.
    """
    better = True
    for name, difference in differences.items():
        n, mean, variance = _moments(difference)
        # Genes without any variance are left out of the pooled variance.
        used = (n >= MIN_GROUPS) & (variance > 0)
        spread = variance[used].mean() if used.any() and name != "depth" else 0.0
        better &= (n >= MIN_GROUPS) & (mean > 1.645 * np.sqrt(spread / np.maximum(n, 1)))
    return np.asarray(better)


def section_pcc(sections: Sequence[Section], pcc: np.ndarray) -> np.ndarray:
    """Return correlations per section, with 0 for constant genes and NaN for genes that were not measured."""
    # By section, since arrays of all sections and genes are large.
    found = np.array(pcc)
    for own, section in zip(found, sections, strict=True):
        own[:] = np.where(section.measured, np.nan_to_num(own), np.nan)
    return found


def ceilings(sections: Sequence[Section]) -> np.ndarray:
    """Return the noise ceiling of each gene, ``(g,)``, averaged over up to eight sections; 0 if the halves of counts disagree."""
    found = []
    for section in sections[:: -(-len(sections) // _CEILING_SECTIONS)]:
        ceiling = noise_ceiling(with_unmodelled_counts(section), n_splits=_CEILING_SPLITS)[:-1]
        found.append(np.where(section.measured, np.nan_to_num(ceiling), np.nan))
    return _moments(np.stack(found))[1]


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

    ``references`` are held-out predictions from references without genes, like ``held_out`` by unit, then by name.
    Metrics are over held-out patients if there are :data:`MIN_PATIENTS`, else over sections, else over the available unit.
    """
    patients = groups_of(sections, "patient")
    spots_of_patient = pd.Series([len(section) for section in sections]).groupby(patients, sort=False).sum()
    n_patients = len(spots_of_patient) if "patient" in held_out else 0
    unit = "patient" if n_patients >= MIN_PATIENTS else next(iter(held_out))
    # Arrays of all sections and genes are large: only one is kept at a time.
    of_sections = section_pcc(sections, held_out[unit].pcc)
    patient_low = np.fmin.reduce(patient_bound(of_sections, [len(section) for section in sections], patients))
    grouped = mean_by_patient(of_sections, patients) if unit == "patient" else of_sections
    mean, low, high = bounds(grouped)
    # A gene measured in a single group was never tested on another.
    tested = np.isfinite(grouped).sum(0) > (unit in GROUP_UNITS)
    del of_sections, grouped
    mean, skill = np.where(tested, mean, np.nan), np.where(tested, held_out[unit].skill, np.nan)
    known = (unit in GROUP_UNITS) & (low > RELIABLE_PCC) & (skill > 0)
    if unit == "section":
        known &= patient_low > RELIABLE_PCC
    reference_columns, reliable = _compare_with_references(sections, held_out, references)
    new_patient, given_depth = np.full((2, len(mean)), np.nan)
    if n_patients:
        across, pcc_given_depth = (
            mean_by_patient(section_pcc(sections, values), patients)
            for values in (held_out["patient"].pcc, held_out["patient"].pcc_given_depth)
        )
        several = np.isfinite(across).sum(0) > 1
        new_patient, given_depth = (np.where(several, bounds(x)[0], np.nan) for x in (across, pcc_given_depth))
        in_each = np.fmin.reduce(across) > RELIABLE_PCC
        is_above = new_patient_bound(pcc_given_depth, spots_of_patient.to_numpy()) > RELIABLE_PCC
        reliable = reliable & is_above & in_each
        if unit == "section":
            known &= in_each
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
            "reliable": reliable & (n_patients > 0),
            "reliable_known_patient": known,
        },
    )
    return table, _rule(unit, len(sections), n_patients)


def _compare_with_references(
    sections: Sequence[Section], held_out: Mapping[str, HeldOut], references: Mapping[str, Mapping[str, HeldOut]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return columns of the gene table on each reference, over held-out patients if possible, and whether genes beat all of them."""
    unit = "patient" if "patient" in held_out else next(iter(held_out))
    groups = groups_of(sections, unit)
    own = mean_by_patient(section_pcc(sections, held_out[unit].pcc), groups)
    several = np.isfinite(own).sum(0) > (unit in GROUP_UNITS)
    columns, differences = {}, {}
    for name, found in references[unit].items():
        reference = mean_by_patient(section_pcc(sections, found.pcc), groups)
        differences[name] = own - reference
        mean, low, high = bounds(differences[name], most=2)
        columns[f"pcc_{name}"] = np.where(several, bounds(reference)[0], np.nan)
        columns[f"minus_{name}"] = np.where(several, mean, np.nan)
        columns |= {f"minus_{name}_low": low, f"minus_{name}_high": high}
    return columns, is_better(differences)


def rule_in_words(
    unit: str,
    n_patients: int,
    new_patient: str,
    groups: str,
    *,
    least: int = MIN_GROUPS,
    between: str = "",
    no_groups: str,
) -> str:
    """Return the rule of reliable genes in words; ``new_patient`` is that for new patients, if enough were held out.

    ``groups`` are those of the bound for known patients, of which ``least`` are needed, and ``between`` are further conditions.
    ``no_groups`` was held out if that was neither sections nor patients.
    """
    if n_patients < MIN_GROUPS:
        found = n_patients or "none"
        new_patient = f"Reliability on a new patient needs {MIN_GROUPS} held-out patients; this model has {found}."
    if unit not in GROUP_UNITS:
        return f"{new_patient} Reliability on a known patient needs held-out sections or patients; this model has {no_groups}"
    return (
        f"{new_patient} On a known patient a gene is called reliable where the lower 95 % bound of its held-out Pearson correlation "
        f"(t over the {groups}; at least {least} are needed) is above {RELIABLE_PCC}{between} and its held-out skill against the "
        "training mean is positive"
    )


def _rule(unit: str, n_sections: int, n_patients: int) -> str:
    new_patient = (
        f"the lower 95 % bound of its mean correlation given the counts of each spot, over {n_patients} patients held out whole, "
        f"is above {RELIABLE_PCC} (differences between patients pooled over the genes), so is its correlation in each of them, and it is "
        "better than what sees no gene: the mean paired difference to depth, and the lower 95 % bound of that to colour and to "
        "coordinates, are above 0."
    )
    groups, between, end = f"{n_patients} patients, held out", "", ""
    if unit == "section":
        groups = f"{n_sections} sections, held out"
        groups += (
            " while others of their patient may be trained on" if n_patients else "; valid only for known patients"
        )
        between = ", so is the bound of its mean in each patient that measured it (from the number of spots)"
        if n_patients:
            end = (
                f", and its correlation in each of the {n_patients} patients, held out whole, is above {RELIABLE_PCC} too (a bound "
                f"over patients needs {MIN_PATIENTS} of them)"
            )
    return rule_in_words(unit, n_patients, new_patient, groups, between=between, no_groups="none") + end
