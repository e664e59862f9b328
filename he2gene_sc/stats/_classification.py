"""Agreement of predicted classes and their probabilities with labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Number of bins of the confidence.
N_BINS = 10


@dataclass(frozen=True)
class ClassScores:
    """Result of :func:`class_scores`. Balanced accuracy and F1 are means over the classes that occur as labels."""

    n: int  # labelled spots
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    calibration_error: float
    macro_auroc: float  # over the classes with an AUROC
    support: np.ndarray  # (c,) labelled spots of each class
    recall: np.ndarray  # (c,) NaN for absent classes
    f1: np.ndarray
    auroc: np.ndarray  # (c,) one class against the rest; NaN for absent classes or if all spots are of one class
    confusion: np.ndarray  # (c, c) labels by predictions


def class_scores(proba: np.ndarray, codes: np.ndarray) -> ClassScores:
    """Compare class probabilities ``(n, c)``, with rows of sum 1, with labels ``(n,)``."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

    proba, codes = np.asarray(proba, np.float64), np.asarray(codes)
    if not len(codes):
        raise ValueError("`codes` is empty; at least one labelled spot is needed")
    classes = np.arange(proba.shape[1])
    found = proba.argmax(1)
    _, recall, f1, support = precision_recall_fscore_support(codes, found, labels=classes, zero_division=0)
    occurs = support > 0
    recall, f1 = np.where(occurs, recall, np.nan), np.where(occurs, f1, np.nan)
    auroc = np.full(len(classes), np.nan)
    for c in classes[occurs & (support < len(codes))]:
        auroc[c] = roc_auc_score(codes == c, proba[:, c])
    return ClassScores(
        n=len(codes),
        accuracy=float((found == codes).mean()),
        balanced_accuracy=float(np.nanmean(recall)),
        macro_f1=float(np.nanmean(f1)),
        calibration_error=calibration_error(proba, codes),
        macro_auroc=float(np.nanmean(auroc)) if np.isfinite(auroc).any() else float("nan"),
        support=support,
        recall=recall,
        f1=f1,
        auroc=auroc,
        confusion=confusion_matrix(codes, found, labels=classes),
    )


def calibration_error(proba: np.ndarray, codes: np.ndarray, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error of the most probable class (Guo et al., ICML 2017), with equally wide bins."""
    confidence, right = proba.max(1), proba.argmax(1) == codes
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in np.unique(bins)]
    return float(np.sum(gaps) / len(codes))
