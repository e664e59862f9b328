"""Training data of a whole network: targets, neighbours, the order of batches, and the spots that are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch

from ...models._embedding import row_blocks
from ...models._network import SYMMETRIES
from .._folds import grouped_folds
from .presets import Preset


class Targets:
    """Log-normalised expression of several sections, sparse and maybe on disk; indexing rows gives a dense array."""

    def __init__(self, sections: Sequence[scipy.sparse.csr_array], measured: np.ndarray):
        self.sections, self.measured = tuple(sections), np.asarray(measured, bool)
        sizes = [part.shape[0] for part in self.sections]
        self._starts = np.cumsum([0, *sizes])
        self._section = np.repeat(np.arange(len(sizes)), sizes)
        self.shape = (int(self._starts[-1]), self.measured.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return the targets of some spots, ``(len(rows), g)`` float32; NaN for genes that were not measured."""
        rows = np.arange(len(self))[rows]
        out = np.empty((len(rows), self.shape[1]), np.float32)
        sections = self._section[rows]
        for i in np.unique(sections):
            here = np.flatnonzero(sections == i)
            part = self.sections[i][rows[here] - self._starts[i]].toarray()
            part[:, ~self.measured[i]] = np.nan
            out[here] = part
        return out


def blocks(targets: np.ndarray | Targets, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield dense targets of spots, about a thousand at a time."""
    return (targets[rows[block]] for block in row_blocks(len(rows)))


def column_means(targets: np.ndarray | Targets, rows: np.ndarray) -> np.ndarray:
    """Return the mean of each gene over the spots in which it was measured; NaN if there are none."""
    total, count = np.zeros(targets.shape[1]), np.zeros(targets.shape[1], np.int64)
    for values in blocks(targets, rows):
        total += np.nansum(values, axis=0, dtype=np.float64)
        count += (~np.isnan(values)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.where(count > 0, count, np.nan)


@dataclass(frozen=True)
class PatchSet:
    """Data of the training spots."""

    patches: np.ndarray  # (n, 3, s, s) uint8 of the training window; may be a memory map
    targets: np.ndarray | Targets  # (n, g) float32 log-normalised; NaN if not measured
    codes: np.ndarray  # (n,) classes, -1 without a label
    sections: np.ndarray  # (n,) codes
    patients: np.ndarray  # (n,) codes
    target_mask: np.ndarray  # (g,) bool
    coordinates: np.ndarray | None = None  # (n, 2) µm, for blocks
    neighbours: np.ndarray | None = None  # (n, 8), see neighbour_table

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(eq=False)
class BatchLoader:
    """Loads batches of training spots, which depend only on seed, epoch and position, so that a run can be resumed.

    A thread prepares the next batch. Each of ``world`` processes takes every ``world``-th spot of a batch. Only spots in the mask
    ``allowed`` serve as neighbours.
    """

    data: PatchSet
    rows: np.ndarray
    _: KW_ONLY
    batch_size: int
    seed: int
    neighbours: bool = False
    allowed: np.ndarray | None = None
    rank: int = 0
    world: int = 1
    epoch: int = 0  # of the next batch
    position: int = 0

    @property
    def table(self) -> np.ndarray | None:
        """Neighbours of each spot, if they are used."""
        return self.data.neighbours if self.neighbours else None

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        # Batch normalisation needs two spots per process: a smaller last batch is skipped in this epoch.
        return max(1, full + (rest >= 2 * self.world))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the rest of the epoch; the position advances when a batch is yielded."""
        epoch, n = self.epoch, len(self)
        order, turns = self._order(epoch)
        with ThreadPoolExecutor(1, thread_name_prefix="he2gene-patches") as pool:
            pending = pool.submit(self._batch, order, turns, self.position)
            for position in range(self.position, n):
                batch = pending.result()
                if position + 1 < n:
                    pending = pool.submit(self._batch, order, turns, position + 1)
                self.epoch, self.position = (epoch, position + 1) if position + 1 < n else (epoch + 1, 0)
                yield batch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the spots, and the symmetries of each spot and (from the second column) of its neighbours."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.rows)
        k = 0 if self.table is None else self.table.shape[1]
        return order, rng.integers(len(SYMMETRIES), size=(len(self.data), 1 + k), dtype=np.int8)

    def _batch(self, order: np.ndarray, turns: np.ndarray, position: int) -> dict[str, torch.Tensor]:
        rows = order[position * self.batch_size : (position + 1) * self.batch_size][self.rank :: self.world]
        data = self.data
        batch = {
            "patches": self._oriented_patches(rows, turns[rows, 0]),
            "targets": torch.from_numpy(np.asarray(data.targets[rows], np.float32)),
            "codes": torch.from_numpy(data.codes[rows].astype(np.int64)),
        }
        if self.table is not None:
            table = self.table[rows]
            usable = (table >= 0) & (True if self.allowed is None else self.allowed[table])
            owner, column = np.nonzero(usable)
            found = table[owner, column]
            batch["neighbours"] = self._oriented_patches(found, turns[rows[owner], 1 + column])
            batch["owner"] = torch.from_numpy(owner)
            # Spots without labels do not count as having the same label.
            same = (data.codes[found] == data.codes[rows[owner]]) & (data.codes[found] >= 0)
            batch["same"] = torch.from_numpy(same)
        return batch

    def _oriented_patches(self, rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
        out = np.empty((len(rows), *self.data.patches.shape[1:]), np.uint8)
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
            quarter, mirrored = SYMMETRIES[turn]
            patch = np.rot90(self.data.patches[row], quarter, axes=(1, 2))
            out[i] = patch[:, :, ::-1] if mirrored else patch
        return torch.from_numpy(out)


class RowLoader:
    """Loads held-out spots in order, without symmetries; each of ``world`` processes takes every ``world``-th spot."""

    def __init__(self, data: PatchSet, rows: np.ndarray, *, batch_size: int, rank: int = 0, world: int = 1):
        self.data, self.rows, self.batch_size = data, rows[rank::world], max(1, batch_size // world)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield patches, targets of the target genes, and section codes."""
        for block in row_blocks(len(self.rows), self.batch_size):
            rows = self.rows[block]
            yield {
                "patches": torch.from_numpy(np.asarray(self.data.patches[rows])),
                "targets": torch.from_numpy(np.asarray(self.data.targets[rows][:, self.data.target_mask], np.float32)),
                "sections": torch.from_numpy(self.data.sections[rows].astype(np.int64)),
            }


N_NEIGHBOURS = 8
#: Largest distance of neighbours, in pitches: above the diagonal of a square grid (1.41), below the next ring of a hexagonal one (1.73).
_MAX_DISTANCE = 1.57


def neighbour_table(
    coordinates: np.ndarray, pitch_um: float | None = None, sections: np.ndarray | None = None
) -> np.ndarray:
    """Return the neighbours of each spot on its grid, ``(n, 8)`` int64, nearest first, -1 if there are fewer.

    There are up to 8 on a square grid, and 6 on a hexagonal one. Grids may be rotated, and spots may deviate by a tenth of the
    pitch, which is by default estimated for each section. Coordinates ``(n, 2)`` are in µm.

    Examples
    --------
    >>> import numpy as np
    >>> neighbour_table(np.array([[0.0, 0.0], [200.0, 0.0], [600.0, 0.0]]), 200.0)[:, 0]
    array([ 1,  0, -1])
    """
    from scipy.spatial import KDTree

    coordinates = np.asarray(coordinates, float)
    sections = np.zeros(len(coordinates), int) if sections is None else sections
    table = np.full((len(coordinates), N_NEIGHBOURS), -1, np.int64)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        if len(rows) < 2:
            continue
        tree = KDTree(coordinates[rows])
        # One more, since the nearest spot is the spot itself.
        distance, found = tree.query(coordinates[rows], k=min(N_NEIGHBOURS + 1, len(rows)))
        pitch, to_others = pitch_um, distance[:, 1:]
        if pitch is None:
            pitch = to_others[to_others <= 1.3 * np.median(to_others[:, 0])].mean()
        near = (found != np.arange(len(rows))[:, None]) & (distance <= _MAX_DISTANCE * pitch)
        for row, (candidates, kept) in enumerate(zip(found, near, strict=True)):
            chosen = candidates[kept][:N_NEIGHBOURS]
            table[rows[row], : len(chosen)] = rows[chosen]
    return table


class Split(NamedTuple):
    """Unit of the groups that are held out, and positions of training and held-out spots."""

    unit: str
    train: np.ndarray
    held_out: np.ndarray


def split(
    data: PatchSet, preset: Preset, validation: str = "grouped", seed: int = 0, rows: np.ndarray | None = None
) -> Split:
    """Choose the held-out spots for early stopping: the fold of groups whose size is nearest to ``preset.validation_share``.

    ``"grouped"`` holds out patients, else sections, else blocks; ``"random"`` holds out spots as in the paper, which leaks.
    """
    rows = np.arange(len(data)) if rows is None else rows
    if validation == "random":
        order = np.random.default_rng([seed, 1]).permutation(rows)
        n = len(rows) - int(len(rows) * (1 - preset.validation_share))
        return Split("spot", np.sort(order[n:]), np.sort(order[:n]))
    unit, folds = balanced_folds(data, preset, rows)
    held = np.abs(np.bincount(folds) / len(rows) - preset.validation_share).argmin()
    return Split(unit, rows[folds != held], rows[folds == held])


def balanced_folds(data: PatchSet, preset: Preset, rows: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the unit, and folds of about the size of ``preset.validation_share``, at most one per group."""
    coordinates = None if data.coordinates is None else data.coordinates[rows]
    arrays = (data.sections[rows], data.patients[rows], coordinates)
    unit, folds = grouped_folds(*arrays)
    if unit == "block":
        return unit, folds
    return grouped_folds(*arrays, n_folds=max(2, round(1 / preset.validation_share)), unit=unit)
