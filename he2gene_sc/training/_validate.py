"""Grouped cross-validation: what is held out is a whole section or a whole patient, never a spot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..stats import pearson
from ._closed_form import Basis, Heads, fit_basis, fit_softmax

#: Penalties tried, in units of the number of features.
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
N_VARIABLE = 50


@dataclass(frozen=True)
class TrainingSet:
    """Everything that is known of the training spots.

    Attributes
    ----------
    features
        ``(n, r, f)`` float32, see :class:`he2gene_sc.models._network.FeatureExtractor`; the identity comes first.
    targets
        ``(n, g)`` float32, log-normalised expression.
    codes
        ``(n,)`` class codes, -1 without a label.
    sections, patients
        ``(n,)`` codes.
    n_colour
        Number of colour features, the last of the ``f``.
    """

    features: np.ndarray
    targets: np.ndarray
    codes: np.ndarray
    sections: np.ndarray
    patients: np.ndarray
    n_colour: int

    def rows(self, chosen: np.ndarray) -> TrainingSet:
        """Take some of the spots."""
        arrays = ("features", "targets", "codes", "sections", "patients")
        return replace(self, **{name: getattr(self, name)[chosen] for name in arrays})

    def basis(self, n_latent: int, colour_share: float) -> Basis:
        """Reduce the features and collect the statistics of the ridge, see :func:`fit_basis`."""
        return fit_basis(
            self.features,
            self.targets,
            self.sections,
            n_latent=n_latent,
            n_colour=self.n_colour,
            colour_share=colour_share,
        )

    def softmax(self, heads: Heads, n_classes: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Fit the annotation on the labelled spots under every symmetry: weights ``(k, c)`` and biases ``(c,)``."""
        labelled = np.flatnonzero(self.codes >= 0)
        r = self.features.shape[1]
        embedding = np.concatenate([heads.embed(self.features[labelled, j]) for j in range(r)])
        return fit_softmax(embedding, np.tile(self.codes[labelled], r), n_classes, strength / r)

    def colour_only(self) -> TrainingSet:
        """Keep nothing but the colour features, which no symmetry changes."""
        return replace(self, features=self.features[:, :1, self.features.shape[2] - self.n_colour :])


@dataclass(frozen=True)
class HeldOut:
    """Held-out predictions of every spot, each by a model that has not seen its group.

    Attributes
    ----------
    pcc
        ``(groups, g)``: Pearson correlation of each gene within each held-out section.
    skill
        ``(g,)`` against the training mean, over all held-out spots.
    panel, variable
        Per section, mean correlation over the target genes and over the most variable ones, both chosen on the
        sections that were trained on.
    sections
        Code of each row of ``pcc``.
    logits
        ``(n, c)`` of the annotation.
    """

    pcc: np.ndarray
    skill: np.ndarray
    panel: np.ndarray
    variable: np.ndarray
    sections: np.ndarray
    logits: np.ndarray


def panels(
    targets: np.ndarray, sections: np.ndarray, n_target: int, n_variable: int = N_VARIABLE
) -> tuple[np.ndarray, np.ndarray]:
    """Genes of highest mean, and of highest variance within sections, highest first.

    The variance is averaged over the sections: pooled, it would pick the genes in which patients differ, whose
    pattern on the tissue may be flat.
    """
    mean = targets.mean(0, dtype=np.float64)
    variance = np.mean([targets[sections == s].var(0, dtype=np.float64) for s in np.unique(sections)], axis=0)
    return np.argsort(-mean, kind="stable")[:n_target], np.argsort(-variance, kind="stable")[:n_variable]


def cross_validate(
    data: TrainingSet,
    groups: np.ndarray,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    strengths: tuple[float, ...] = STRENGTHS,
    n_classes: int,
    n_latent: int,
    n_target: int,
    colour_share: float,
) -> tuple[float, float, HeldOut]:
    """Hold out one group after the other and choose the penalties.

    Parameters
    ----------
    data
        The spots.
    groups
        ``(n,)`` codes of what is held out together: sections or patients.
    penalties, strengths
        Tried for expression (chosen by the mean correlation of the target genes) and annotation (by the likelihood).
    n_classes, n_latent, n_target, colour_share
        As in training.

    Returns
    -------
    penalty, strength, HeldOut
        The best of each, and the held-out predictions they give. They are chosen on the same folds that the figures
        are taken from: one number among a handful.
    """
    n, g = data.targets.shape
    predicted = np.zeros((len(penalties), n, g), np.float32)
    means = np.zeros((n, g), np.float32)
    logits = np.zeros((len(strengths), n, n_classes))
    chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for group in np.unique(groups):
        test = groups == group
        train = data.rows(~test)
        basis = train.basis(n_latent, colour_share)
        seen = data.features[test, 0]
        for i, penalty in enumerate(penalties):
            predicted[i, test] = basis.ridge(penalty).predict(seen)
        means[test] = basis.target_mean
        for section in np.unique(data.sections[test]):
            chosen[section] = panels(train.targets, train.sections, n_target)
        if n_classes and (train.codes >= 0).any():
            heads = basis.ridge(1.0)
            for i, strength in enumerate(strengths):
                weight, bias = train.softmax(heads, n_classes, strength)
                logits[i, test] = heads.embed(seen) @ weight + bias
    sections = np.array(sorted(chosen))
    best, scores = 0, []
    for i in range(len(penalties)):
        pcc = _by_section(predicted[i], data, sections)
        scores.append(np.mean([np.nanmean(np.nan_to_num(pcc[j, chosen[s][0]])) for j, s in enumerate(sections)]))
    best = int(np.argmax(scores))
    pcc = _by_section(predicted[best], data, sections)
    strongest = _most_likely(logits, data.codes) if n_classes else 0
    error = np.square(predicted[best] - data.targets).sum(0, dtype=np.float64)
    base = np.square(means - data.targets).sum(0, dtype=np.float64)
    held_out = HeldOut(
        pcc=pcc,
        skill=1 - error / np.where(base > 0, base, 1),
        panel=np.array([np.nan_to_num(pcc[j, chosen[s][0]]).mean() for j, s in enumerate(sections)]),
        variable=np.array([np.nan_to_num(pcc[j, chosen[s][1]]).mean() for j, s in enumerate(sections)]),
        sections=sections,
        logits=logits[strongest],
    )
    return penalties[best], strengths[strongest], held_out


def _by_section(predicted: np.ndarray, data: TrainingSet, sections: np.ndarray) -> np.ndarray:
    return np.stack([pearson(predicted[data.sections == s], data.targets[data.sections == s]) for s in sections])


def _most_likely(logits: np.ndarray, codes: np.ndarray) -> int:
    from scipy.special import log_softmax

    labelled = np.flatnonzero(codes >= 0)
    likelihood = log_softmax(logits[:, labelled], axis=2)[:, np.arange(len(labelled)), codes[labelled]]
    # A class that a fold has never seen costs every strength the same; it must not decide.
    return int(np.argmax(np.maximum(likelihood, -10).mean(1)))
