"""How well one ranking of genes agrees with another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranking_agreement(
    predicted: np.ndarray,
    measured: np.ndarray,
    significant: np.ndarray,
    *,
    predicted_scores: np.ndarray,
    measured_scores: np.ndarray,
    k: Sequence[int] = (),
) -> dict[str, float]:
    """Compare the effects and scores of the same genes in two data sets; NaN where there is nothing to compare.

    ``spearman`` of effects; ``sign_agreement`` of all and of ``_significant`` genes; ``auroc`` of
    measured-significant genes by size of the predicted score; ``precision_at_<k>``, the share of the top k
    predicted that are top k measured, and ``chance_at_<k>``, k / g.
    """
    from scipy import stats

    predicted, measured = np.asarray(predicted, float), np.asarray(measured, float)
    significant = np.asarray(significant, bool)
    n = len(predicted)
    same = np.sign(predicted) == np.sign(measured)
    varies = n > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    out = {
        "spearman": float(stats.spearmanr(predicted, measured).statistic) if varies else np.nan,
        "sign_agreement": float(same.mean()) if n else np.nan,
        "sign_agreement_significant": float(same[significant].mean()) if significant.any() else np.nan,
        "auroc": _auroc(np.abs(predicted_scores), significant),
    }
    for length in k:
        fits = n >= length
        tops = [set(np.argsort(-np.asarray(s), kind="stable")[:length]) for s in (predicted_scores, measured_scores)]
        out[f"precision_at_{length}"] = len(tops[0] & tops[1]) / length if fits else np.nan
        out[f"chance_at_{length}"] = length / n if fits else np.nan
    return out


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else np.nan
