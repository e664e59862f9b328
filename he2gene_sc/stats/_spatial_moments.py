"""Sufficient statistics of the spatial test for all genes: effects, and residual contrasts independent of the effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from ._accuracy import column_blocks
from ._covariance import Blocks

#: Largest number of genes per chunk, and of values, which limits memory with many spots.
CHUNK, _NUMBERS = 1024, 2**23
#: Least SD of a covariate within groups that other covariates do not explain, relative to its total SD.
_MIN_SD = 1e-6


@dataclass(frozen=True)
class Moments:
    """Statistics of all genes in the basis of blocks; pairs are for the group and for the other spots."""

    effect: np.ndarray  # (g,)
    contrasts: np.ndarray  # (q, g) float32, residuals in the complement of section × group means, in units of `scale`
    energy: np.ndarray  # (2, g) sums of squares of the contrasts
    inside: np.ndarray  # (2, g) sums of squares of the residuals within blocks, in units of `scale`
    scale: np.ndarray  # (g,) residual variance for independent spots; NaN for a constant gene
    label: np.ndarray  # (m,) label without section means and covariates
    size: float  # sum of squares of the label over the spots
    unseen: np.ndarray  # (2,) sums of squares of the label within blocks
    complement: np.ndarray  # (m, q), columns of the group first
    n_contrasts: tuple[int, ...]
    n_inside: tuple[int, ...]
    sides: np.ndarray  # (2, m) masks of the blocks in the group, and of the others
    sections: np.ndarray  # (m, s) unit vectors
    n_free: int  # residual degrees of freedom of the spots

    @classmethod
    def from_values(
        cls, values: np.ndarray, group: np.ndarray, codes: np.ndarray, blocks: Blocks, design: Design
    ) -> Moments:
        """Compute the statistics of values ``(n, g)``."""
        n, g = values.shape
        label, sections = design.label, design.sections
        in_blocks = blocks.project(np.column_stack([sections / np.sqrt(sections.sum(0)), label]))
        first = np.zeros(len(blocks.size), int)
        first[blocks.of_spot] = np.arange(n)
        masks = (group, ~group)
        sides = np.stack([group[first], ~group[first]])
        own = np.column_stack([label * mask for mask in masks])
        unseen = np.maximum(np.square(own).sum(0) - np.square(blocks.project(own)).sum(0), 0)
        parts = [
            _complement(blocks.project(basis)[side], side) for basis, side in zip(design.bases, sides, strict=True)
        ]
        n_contrasts = tuple(part.shape[1] for part in parts)
        n_inside = tuple(int(mask.sum() - side.sum()) for side, mask in zip(sides, masks, strict=True))
        complement = np.hstack(parts)
        n_free = n - sum(basis.shape[1] for basis in design.bases)
        effect, scale, inside, energies = np.empty(g), np.empty(g), np.zeros((2, g)), np.empty((2, g))
        contrasts = np.empty((complement.shape[1], g), np.float32)
        for part in gene_chunks(n, g):
            chunk = values[:, part].astype(np.float64)
            size = np.abs(chunk).max(0)
            # NaN spreads to every mean; such genes are left out below.
            with np.errstate(invalid="ignore"):
                effect[part], chunk = design.fit(chunk)
            both = np.stack([np.einsum("ij,ij->j", chunk[mask], chunk[mask]) for mask in masks])
            energy = both.sum(0)
            varies = np.isfinite(energy) & (energy > (1e-7 * size) ** 2 * n)
            chunk[:, ~varies], both[:, ~varies] = 0, 0
            scale[part] = np.where(varies, energy, np.nan) / n_free
            unit = np.where(varies, np.sqrt(energy / n_free), 1)
            chunk = complement.T @ blocks.project(chunk) / unit
            contrasts[:, part] = chunk
            for i, rows in enumerate((slice(n_contrasts[0]), slice(n_contrasts[0], None))):
                energies[i, part] = np.einsum("ij,ij->j", chunk[rows], chunk[rows])
                if n_inside[i]:
                    inside[i, part] = np.maximum(both[i] / unit**2 - energies[i, part], 0)
        return cls(
            effect=effect,
            contrasts=contrasts,
            energy=energies,
            inside=inside,
            scale=scale,
            label=in_blocks[:, -1],
            size=float(label @ label),
            unseen=unseen,
            complement=complement,
            n_contrasts=n_contrasts,
            n_inside=n_inside,
            sides=sides,
            sections=in_blocks[:, :-1],
            n_free=n_free,
        )


@dataclass(frozen=True)
class Design:
    """Label, sections and covariates of the spots.

    The effect is estimated by least squares with common slopes. Residuals, which give the covariance, have slopes by group.
    """

    label: np.ndarray  # (n,) label without section means and covariates
    sections: np.ndarray  # (n, s) 0 or 1
    shared: np.ndarray  # (n, c) unit vectors of the covariates within sections
    # (n, q) each, for the group and for the other spots: unit vectors of section means and covariates
    bases: tuple[np.ndarray, np.ndarray]

    @classmethod
    def from_groups(cls, group: np.ndarray, codes: np.ndarray, covariates: np.ndarray | None = None) -> Design:
        """Make the design of a group ``(n,)`` bool and section codes ``(n,)``."""
        n = len(group)
        covariates = np.empty((n, 0)) if covariates is None else _standardise(np.asarray(covariates, np.float64))
        sections = (codes[:, None] == np.unique(codes)).astype(float)
        centred = covariates - _means(covariates, sections)
        shared = _basis(centred)
        label = group - _means(group.astype(float)[:, None], sections)[:, 0]
        label = label - shared @ (shared.T @ label)
        bases = []
        for side in (group, ~group):
            cells = sections * side[:, None]
            cells = cells[:, cells.any(0)]
            inside = (covariates - _means(covariates, cells)) * side[:, None]
            bases.append(np.hstack([cells / np.sqrt(cells.sum(0)), _basis(inside)]))
        return cls(label, sections, shared, (bases[0], bases[1]))

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
    if not values.shape[1]:
        return values
    left, sizes, _ = np.linalg.svd(values, full_matrices=False)
    return left[:, sizes > _MIN_SD * np.sqrt(len(values))]


def _complement(columns: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Orthonormal basis ``(m, q)`` of the orthogonal complement of the columns, in the blocks of a side."""
    basis = np.zeros((len(side), max(int(side.sum()) - columns.shape[1], 0)))
    basis[side] = linalg.qr(columns)[0][:, columns.shape[1] :]
    return basis
