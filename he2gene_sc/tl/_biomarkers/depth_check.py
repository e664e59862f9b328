"""Check whether groups differ with depth like the spots within them, which the adjustment for depth assumes."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from ... import stats
from ...stats._accuracy import column_blocks
from .contrast import Contrast, DepthCells

#: Share of the depth adjustment that the groups show below or above which it is doubtful, and size of its wrong part (its square over
#: that of the standard error) from which this is reported; larger above, since genes of the denser group often follow depth within it.
_TOO_LITTLE, _TOO_MUCH = (2 / 3, 0.5), (1.5, 1.0)
#: Parts of a section, and fewest spots of each group in a part.
_PARTS, _PART_SPOTS = 4, 5
#: Values that are converted to double precision at a time.
_NUMBERS = 2**23


def doubt_over_samples(contrast: Contrast) -> tuple[str, str]:
    """State if groups do not differ with depth like the spots within them, and what to do; empty texts if they do."""
    if contrast.adjustment is None or contrast.spot_variance is None:
        return "", ""
    raw = contrast.differences + contrast.adjustment
    return _doubt(*stats.depth_followed(raw, contrast.adjustment, contrast.spot_variance))


def doubt_over_parts(
    values: np.ndarray, group: np.ndarray, log_depth: np.ndarray, parts: np.ndarray, test: stats.SpatialTest
) -> tuple[str, str]:
    """State if groups do not differ with depth like the spots within them, for one or a few sections; and what to do.

    Parts of the sections stand for samples. The standard error is that of the test.

    ``parts`` ``(n,)`` numbers the parts; -1 for spots outside all of them. Slopes of one part are compared with differences in
    another, so their errors do not count as depth.
    """
    kept, n = parts >= 0, int(parts.max()) + 1
    if n < 3:
        return "", ""
    code = parts[kept] * 2 + ~group[kept]
    x = log_depth[kept] - log_depth[kept].mean()
    ones_and_x, rows = np.append(np.ones(len(x)), x), np.append(code, code + 2 * n)
    weights = csr_array((ones_and_x, (rows, np.tile(np.flatnonzero(kept), 2))), (4 * n, len(values)))
    blocks = [weights @ values[:, part].astype(np.float64) for part in column_blocks(values.shape, _NUMBERS)]
    both = np.hstack(blocks).reshape(2, n, 2, -1)
    sums, products = both[0].transpose(1, 0, 2), both[1]
    spots = np.bincount(code, minlength=2 * n).reshape(n, 2)
    depths, squares = (np.bincount(code, numbers, 2 * n).reshape(n, 2) for numbers in (x, np.square(x)))
    adjustment, *_ = DepthCells(depths, squares, products).effects(np.eye(2, dtype=bool), spots.T, sums)
    raw = sums[0] / spots[:, :1] - sums[1] / spots[:, 1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = test.effect / test.scores
    known = np.isfinite(error)
    error = error[known]
    return _doubt(*stats.depth_followed(raw[:, known], adjustment[:, known], np.square(error), error))


def section_parts(group: np.ndarray, xy: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Cut the spots of a group, and the others, into up to four parts along the longest axis of their section; -1 for none."""
    parts = np.full(len(group), -1)
    n = 0
    for section in np.unique(sections):
        here = sections == section
        sides = [np.flatnonzero(here & side) for side in (group, ~group)]
        k = min(_PARTS, *(len(side) // _PART_SPOTS for side in sides))
        if not k:
            continue
        axis = np.linalg.svd(xy[here] - xy[here].mean(0), full_matrices=False)[2][0]
        for side in sides:
            rank = np.argsort(np.argsort(xy[side] @ axis, kind="stable"), kind="stable")
            parts[side] = n + rank * k // len(side)
        n += k
    return parts


def _doubt(followed: float, size: float) -> tuple[str, str]:
    little = followed < _TOO_LITTLE[0] and size > _TOO_LITTLE[1]
    if not little and not (followed > _TOO_MUCH[0] and size > _TOO_MUCH[1]):
        return "", ""
    found = (
        f"within groups, depth predicts a {'larger' if little else 'smaller'} difference than is observed (observed / predicted: "
        f"{max(followed, 0):.0%}). The adjustment may create false differences"
    )
    if little:
        return found, "Trust only genes that are also significant with design=hg.Design(depth=None)"
    return found, (
        "Counts of single spots may be too noisy for the slope: pass a column with their mean over neighbouring spots as "
        "hg.Design(depth=...), and trust only genes that are significant in both results"
    )
