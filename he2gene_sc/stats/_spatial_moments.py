"""Sufficient statistics of the spatial test for all genes: effects, and residual contrasts independent of the effect."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import linalg

from ._accuracy import column_blocks
from ._covariance import Blocks

#: Largest number of genes per chunk, and of values, which limits memory with many spots.
CHUNK, _NUMBERS = 1024, 2**23
#: Least SD of a covariate within groups that other covariates do not explain, relative to its total SD.
_MIN_SD = 1e-6


class Moments:
    """Statistics of values ``(n, g)`` in the basis of blocks; pairs are for the group and for the other spots."""

    def __init__(self, values: np.ndarray, group: np.ndarray, blocks: Blocks, design: Design) -> None:
        n, g = values.shape
        label, sections, masks = design.label, design.sections, (group, ~group)
        in_blocks = blocks.project(np.column_stack([sections / np.sqrt(sections.sum(0)), label]))
        #: (m, s) unit vectors, and (m,) label without section means and covariates
        self.sections, self.label = in_blocks[:, :-1], in_blocks[:, -1]
        self.size = float(label @ label)  # sum of squares of the label over the spots
        first = np.zeros(len(blocks.size), int)
        first[blocks.of_spot] = np.arange(n)
        self.sides = np.stack(
            [mask[first] for mask in masks]
        )  # (2, m) masks of the blocks in the group, and of the others
        own = np.column_stack([label * mask for mask in masks])
        #: (2,) sums of squares of the label within blocks
        self.unseen = np.maximum(np.square(own).sum(0) - np.square(blocks.project(own)).sum(0), 0)
        parts = [
            _complement(blocks.project(basis)[side], side) for basis, side in zip(design.bases, self.sides, strict=True)
        ]
        self.complement = np.hstack(parts)  # (m, q), columns of the group first
        self.n_contrasts = np.array([part.shape[1] for part in parts])
        self.n_inside = np.stack(masks).sum(1) - self.sides.sum(1)
        self.n_free = design.n_free
        self.effect = np.empty(g)
        self.scale = np.empty(g)  # residual variance for independent spots; NaN for a constant gene
        #: (q, g) residuals in the complement of section × group means, in units of `scale`
        self.contrasts = np.empty((self.complement.shape[1], g), np.float32)
        self.energy = np.empty((2, g))  # sums of squares of the contrasts
        self.inside = np.zeros((2, g))  # sums of squares of the residuals within blocks, in units of `scale`
        for part in gene_chunks(n, g):
            chunk = values[:, part].astype(np.float64)
            size = np.abs(chunk).max(0)
            # NaN spreads to every mean; such genes are left out below.
            with np.errstate(invalid="ignore"):
                self.effect[part], chunk = design.fit(chunk)
            both = np.stack([np.einsum("ij,ij->j", chunk[mask], chunk[mask]) for mask in masks])
            energy = both.sum(0)
            varies = np.isfinite(energy) & (energy > (1e-7 * size) ** 2 * n)
            chunk[:, ~varies], both[:, ~varies] = 0, 0
            self.scale[part] = np.where(varies, energy, np.nan) / self.n_free
            unit = np.where(varies, np.sqrt(energy / self.n_free), 1)
            self.contrasts[:, part] = chunk = self.complement.T @ blocks.project(chunk) / unit
            for i, rows in enumerate((slice(self.n_contrasts[0]), slice(self.n_contrasts[0], None))):
                self.energy[i, part] = np.einsum("ij,ij->j", chunk[rows], chunk[rows])
                if self.n_inside[i]:
                    self.inside[i, part] = np.maximum(both[i] / unit**2 - self.energy[i, part], 0)


class Design:
    """Group ``(n,)`` bool, section codes ``(n,)`` and covariates ``(n, c)`` of the spots.

    The effect is estimated by least squares with common slopes. Residuals, which give the covariance, have slopes by group.
    """

    def __init__(self, group: np.ndarray, codes: np.ndarray, covariates: np.ndarray | None = None) -> None:
        n = len(group)
        covariates = np.empty((n, 0)) if covariates is None else _standardise(np.asarray(covariates, np.float64))
        self.sections = sections = (codes[:, None] == np.unique(codes)).astype(float)  # (n, s)
        #: (n, c) unit vectors of the covariates within sections
        self.shared = _basis(covariates - _means(covariates, sections))
        label = group - _means(group.astype(float)[:, None], sections)[:, 0]
        self.label = label - self.shared @ (self.shared.T @ label)  # (n,) without section means and covariates
        #: (n, q) each, for the group and for the other spots: unit vectors of section means and covariates
        self.bases = []
        for side in (group, ~group):
            cells = sections * side[:, None]
            cells = cells[:, cells.any(0)]
            inside = (covariates - _means(covariates, cells)) * side[:, None]
            self.bases.append(np.hstack([cells / np.sqrt(cells.sum(0)), _basis(inside)]))
        self.n_free = n - sum(basis.shape[1] for basis in self.bases)  # residual degrees of freedom of the spots

    def fit(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Effects ``(g,)`` and residuals ``(n, g)``."""
        values = values - _means(values, self.sections)
        effect = self.label @ values / (self.label @ self.label)
        for basis in self.bases:
            values -= basis @ (basis.T @ values)
        return effect, values

    def residuals(self, values: np.ndarray) -> np.ndarray:
        """Values without section means and covariates, ``(n, g)``."""
        values = values - _means(values, self.sections)
        return values - self.shared @ (self.shared.T @ values)


def gene_chunks(n: int, g: int) -> Iterator[slice]:
    """Slices of the genes for chunks of limited size, given ``n`` spots."""
    return column_blocks((max(n, _NUMBERS // CHUNK), g), _NUMBERS)


def _means(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Mean ``(n, k)`` of the cell of each spot; 0 for spots outside all cells."""
    return cells @ ((cells / cells.sum(0)).T @ values)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Scale columns to mean 0 and SD 1; constant columns become 0."""
    gap, spread = values - values.mean(0), values.std(0)
    return np.where(spread > 1e-9 * np.abs(values).max(0), gap / np.where(spread > 0, spread, 1), 0)


def _basis(values: np.ndarray) -> np.ndarray:
    """Orthonormal basis of standardised columns, without columns that hardly vary or depend on other columns."""
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    return left[:, sizes > _MIN_SD * np.sqrt(len(values))]


def _complement(columns: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Orthonormal basis ``(m, q)`` of the orthogonal complement of the columns, in the blocks of a side."""
    basis = np.zeros((len(side), max(int(side.sum()) - columns.shape[1], 0)))
    basis[side] = linalg.qr(columns)[0][:, columns.shape[1] :]
    return basis
