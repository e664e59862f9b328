"""Agreement of predicted with measured expression, of rankings of genes, and of predicted classes with labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

TARGET_SUM = 1e4
#: Values per block of genes: 4 MB in double precision, which fits into a processor cache.
_BLOCK_SIZE = 2**19
#: Spots times genes of a block in :func:`noise_ceiling`.
_SPLIT = 2**22
#: Number of bins of the confidence of classes.
N_BINS = 10


def log_normalise(counts: np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix) -> np.ndarray:
    """Natural log of (1 + counts per 10,000) of each spot, ``(n, g)`` float32; a spot without counts is 0."""
    if isinstance(counts, np.ndarray) or not scipy.sparse.issparse(counts):
        dense = np.asarray(counts)
    else:
        dense = counts.toarray()
    total = dense.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(TARGET_SUM * dense / np.where(total > 0, total, 1)).astype(np.float32)


def column_blocks(shape: tuple[int, int], size: int = _BLOCK_SIZE) -> Iterator[slice]:
    """Yield slices of the columns of an ``(n, g)`` array with about ``size`` values each."""
    n, g = shape
    step = max(1, size // max(1, n))
    for start in range(0, g, step):
        yield slice(start, min(g, start + step))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation ``(g,)`` of each column of two ``(n, g)`` arrays; NaN where one of them is constant."""
    aa, ab, bb = _products(a, b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ab / np.sqrt(aa * bb)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return sums ``(3, g)`` of a², a b and b² of centred columns; NaN where one of them is constant."""
    a, b = np.asarray(a), np.asarray(b)
    result = np.empty((3, a.shape[1]))
    for block in column_blocks(a.shape):
        (x, x_varies), (y, y_varies) = centre_columns(a[:, block]), centre_columns(b[:, block])
        sums = [np.einsum("ij,ij->j", *pair) for pair in ((x, x), (x, y), (y, y))]
        result[:, block] = np.where(x_varies & y_varies, sums, np.nan)
    return result


def centre_columns(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean of each column; also return a mask of the columns that vary by more than rounding errors."""
    x = np.array(x, np.float64)
    largest = np.maximum(x.max(axis=0, initial=0), -x.min(axis=0, initial=0))
    x -= x.mean(axis=0)
    return x, np.maximum(x.max(axis=0, initial=0), -x.min(axis=0, initial=0)) > 1e-12 * largest


def skill(predicted: np.ndarray, measured: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Share ``(g,)`` of the squared error of a constant reference (the training mean) that the prediction removes.

    1 is perfect, 0 is as good as the reference, negative is worse; NaN if the reference is perfect.
    """
    error = np.square(np.asarray(predicted, np.float64) - measured).sum(0)
    base = np.square(np.asarray(reference, np.float64) - measured).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, 1 - error / base, np.nan)


def noise_ceiling(
    counts: np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix,
    *,
    genes: np.ndarray | None = None,
    n_splits: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Best correlation that a prediction can reach with counts ``(n, g)``, from binomial halves of the counts.

    The correlation r of the log-normalised halves, averaged over splits, gives the reliability 2r / (1 + r)
    (Spearman–Brown); the ceiling is its root. Depth, and all variation beyond counting noise, counts as signal: up to
    .9 for overdispersed counts without a pattern (see :func:`ceiling_of_neighbours`), about .1 for Poisson counts. 0
    if the halves do not agree, NaN for a constant gene. Total counts are over all genes, also if ``genes`` are selected.
    """
    rng = np.random.default_rng(seed)
    whole = scipy.sparse.csc_array(counts)
    n, n_genes = whole.shape
    # Counts are small: kept in few bytes, they take a fraction of the memory of the table.
    largest = int(np.rint(whole.data.max(initial=0)))
    values = np.rint(whole.data).astype(np.min_scalar_type(-largest - 1))
    half = np.empty_like(values)
    blocks = [(block, slice(*whole.indptr[[block.start, block.stop]])) for block in column_blocks((n, n_genes), _SPLIT)]
    r_sum, n_valid = np.zeros(n_genes), np.zeros(n_genes)
    for _ in range(n_splits):
        totals = np.zeros((2, n))
        for _, part in blocks:
            half[part] = rng.binomial(values[part], 0.5)
            totals[0] += np.bincount(whole.indices[part], weights=half[part], minlength=n)
            totals[1] += np.bincount(whole.indices[part], weights=values[part] - half[part], minlength=n)
        totals[totals == 0] = 1
        for block, part in blocks:
            spots, width = whole.indices[part], block.stop - block.start
            column = np.repeat(np.arange(width), np.diff(whole.indptr)[block])
            x = np.log1p(TARGET_SUM * half[part] / totals[0][spots])
            y = np.log1p(TARGET_SUM * (values[part] - half[part]) / totals[1][spots])
            r = _sparse_pearson(x, y, column, n, width)
            r_sum[block] += np.nan_to_num(r)
            n_valid[block] += np.isfinite(r)
    r = np.divide(r_sum, n_valid, out=np.full(n_genes, np.nan), where=n_valid > 0)
    r = np.clip(r if genes is None else r[np.asarray(genes)], 0, 1)
    return np.sqrt(2 * r / (1 + r))


def _sparse_pearson(x: np.ndarray, y: np.ndarray, column: np.ndarray, n: int, n_columns: int) -> np.ndarray:
    """Pearson correlation of sparse columns of ``n`` spots with one sparsity pattern."""

    def sums(z: np.ndarray) -> np.ndarray:
        return np.bincount(column, weights=z, minlength=n_columns)

    mean_x, mean_y, xx, yy = sums(x) / n, sums(y) / n, sums(x * x), sums(y * y)
    var_x, var_y = xx - n * mean_x**2, yy - n * mean_y**2
    varies = (var_x > 1e-12 * xx) & (var_y > 1e-12 * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, (sums(x * y) - n * mean_x * mean_y) / np.sqrt(var_x * var_y), np.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman correlation ``(g,)`` of columns, with mean ranks for ties; NaN for a constant column or one with NaN."""
    from scipy.stats import rankdata

    a, b = np.asarray(a), np.asarray(b)
    result = np.empty(a.shape[1])
    for block in column_blocks(a.shape):
        # Rows are contiguous in memory, so sorting rows is several times as fast as sorting columns.
        rows = (np.ascontiguousarray(x[:, block].T) for x in (a, b))
        result[block] = pearson(*(rankdata(x, axis=1, nan_policy="propagate").T for x in rows))
    return result


def sd_ratio(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the SD of the prediction divided by that of the measurement; NaN if either is constant."""
    of_predicted, _, of_measured = _products(predicted, measured)
    return np.sqrt(of_predicted / of_measured)


def slope(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Slope ``(g,)`` of measured on predicted: below 1 if the prediction exaggerates; NaN if either is constant."""
    of_predicted, shared, _ = _products(predicted, measured)
    return shared / of_predicted


def ranking_agreement(
    predicted: np.ndarray,
    measured: np.ndarray,
    significant: np.ndarray,
    *,
    predicted_scores: np.ndarray,
    measured_scores: np.ndarray,
    k: Sequence[int] = (),
) -> dict[str, float]:
    """Compare the effects and scores of the same genes in two data sets; NaN if a score is not defined.

    ``spearman`` of effects; ``sign_agreement`` of all and of ``_significant`` genes; ``auroc`` of
    measured-significant genes by absolute predicted score; ``precision_at_<k>``, the share of the top k
    predicted genes among the top k measured genes, and ``chance_at_<k>``, k / g.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    predicted, measured = np.asarray(predicted, float), np.asarray(measured, float)
    significant = np.asarray(significant, bool)
    n = len(predicted)
    same = np.sign(predicted) == np.sign(measured)
    varies = n > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    out = {
        "spearman": float(spearmanr(predicted, measured).statistic) if varies else np.nan,
        "sign_agreement": float(same.mean()) if n else np.nan,
        "sign_agreement_significant": float(same[significant].mean()) if significant.any() else np.nan,
        "auroc": float(roc_auc_score(significant, np.abs(predicted_scores))) if 0 < significant.sum() < n else np.nan,
    }
    for length in k:
        fits = n >= length
        tops = [set(np.argsort(-np.asarray(s), kind="stable")[:length]) for s in (predicted_scores, measured_scores)]
        out[f"precision_at_{length}"] = len(tops[0] & tops[1]) / length if fits else np.nan
        out[f"chance_at_{length}"] = length / n if fits else np.nan
    return out


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
