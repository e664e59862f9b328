"""Annotation head on components of unstandardised features, with equal weights of patients and classes.

Features that are standardised by slide do not show how much of a slide is cancer, so the proportions of classes in training
would decide. Unstandardised features separate tissues across patients. The head is also trained on recoloured copies of the
sections, so that it depends less on stain and scanner; see ``docs/experiments.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...models._embedding import Basis, Context
from .._calibrate import UNSEEN_LOGIT
from .._sections import Section
from .heads import components, components_of, fit_softmax, moments, principal_directions

#: Number of components of a spot, and of the ring around it.
N_COMPONENTS = 64
#: Inverse of the L2 penalty of the regression.
STRENGTH = 0.05
#: Neighbours whose mean is used beside a spot; slides are not standardised.
ANNOTATION_CONTEXT = Context(((50.0, 353.0),), (1.0,), None)


@dataclass(frozen=True)
class AnnotationHead:
    """Map from the features of the spots of a slide to logits of classes."""

    basis: Basis  # mixing holds the weights of the classes
    bias: np.ndarray  # (c,)

    def logits(self, section: Section) -> np.ndarray:
        """Return the logits of all spots of a section, under the first symmetry, ``(n, c)``."""
        return components(section, self.basis) @ self.basis.mixing + self.bias

    def tensors(self, temperature: float) -> dict[str, np.ndarray]:
        """Return the calibrated arrays for a model folder."""
        return {
            "annotation.mean": self.basis.mean,
            "annotation.scale": self.basis.scale,
            "annotation.projection": self.basis.projection.astype(np.float16),
            "annotation.weight": (self.basis.mixing / temperature).astype(np.float32),
            "annotation.bias": (self.bias / temperature).astype(np.float32),
        }


def fit_annotation(
    sections: Sequence[Section], rows: Sequence[np.ndarray], weights: np.ndarray, n_classes: int
) -> AnnotationHead | None:
    """Fit components and regression on the chosen rows ``(n,)`` of each section; ``None`` without any label.

    Sections without labels are used for the components. All sections with labels have the same number of recoloured copies,
    which together have the weight of the section. Classes that do not occur get a bias that no spot can overcome.
    """
    used = [(section, chosen) for section, chosen in zip(sections, rows, strict=True) if chosen.any()]
    if not any((section.codes[chosen] >= 0).any() for section, chosen in used):
        return None
    basis = _basis(used, weights)
    found, codes, patients, shares = [], [], [], []
    for section, chosen in used:
        labelled = chosen & (section.codes >= 0)
        if not labelled.any():
            continue
        n_views = section.features.shape[1]
        views = [(section.features[:, view], 1.0) for view in range(n_views)]
        views += [(features, n_views / len(section.recoloured)) for features in section.recoloured]
        for features, share in views:
            found.append(components_of(section, basis, features)[labelled])
            codes.append(section.codes[labelled])
            patients.append(np.full(labelled.sum(), section.patient, object))
            shares.append(np.full(labelled.sum(), share))
    parts, labels = np.concatenate(found), np.concatenate(codes)
    weight = equal_weights(labels, np.concatenate(patients)) * np.concatenate(shares)
    centre = np.average(parts, axis=0, weights=weight)
    slope, bias = fit_softmax(parts - centre, labels, n_classes, STRENGTH, weight)
    bias = np.where(bias == UNSEEN_LOGIT, UNSEEN_LOGIT, bias - centre @ slope)
    return AnnotationHead(Basis(basis.mean, basis.scale, basis.projection, slope, ANNOTATION_CONTEXT), bias)


def equal_weights(codes: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return weights of spots with mean 1: classes have equal weight, and within a class so do the patients that have it."""
    weight = np.zeros(len(codes))
    for code in np.unique(codes):
        here = codes == code
        names, group, n = np.unique(patients[here].astype(str), return_inverse=True, return_counts=True)
        weight[here] = 1 / (n[group] * len(names))
    return weight * len(weight) / weight.sum()


def _basis(used: Sequence[tuple[Section, np.ndarray]], weights: np.ndarray) -> Basis:
    """Return mean, scale (including differences between patients) and principal components; patients have equal weight."""
    names = [section.patient for section, _ in used]
    share = np.array([1 / names.count(name) for name in names]) / len(set(names))
    found = (part * moments(section.features, chosen) for part, (section, chosen) in zip(share, used, strict=True))
    mean, square = sum(found, start=np.zeros((2, len(weights))))
    scale = np.sqrt(np.maximum(square - np.square(mean), 0))
    scale = np.where(scale > 1e-6 * (np.abs(mean) + 1), scale, 0)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    gram = np.zeros((len(weights), len(weights)))
    for part, (section, chosen) in zip(share, used, strict=True):
        views = section.features.shape[1]
        for view in range(views):
            features = np.asarray(section.features[chosen, view], np.float32)
            z = ANNOTATION_CONTEXT.standardise(features, mean, scale) * weights
            gram += part / (views * len(z)) * (z.T @ z)
    projection = weights[:, None] * principal_directions(gram, min(N_COMPONENTS, len(weights)))
    return Basis(mean, scale, projection.astype(np.float32), np.empty((0, 0)), ANNOTATION_CONTEXT)
