"""Training data of a whole network, and the order in which it is seen."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ...models._network import SYMMETRIES
from .targets import Targets


@dataclass(frozen=True)
class PatchSet:
    """Everything that is known of the training spots; arrays of the wrong length, type or values are an error."""

    patches: np.ndarray  # (n, 3, s, s) uint8 of the training window; maybe a memory map
    targets: np.ndarray | Targets  # (n, g) float32 log-normalised, NaN where not listed
    codes: np.ndarray  # (n,) classes, -1 without a label
    sections: np.ndarray  # (n,) codes
    patients: np.ndarray  # (n,) codes
    target_mask: np.ndarray  # (g,) bool
    coordinates: np.ndarray | None = None  # (n, 2) µm, for blocks
    neighbours: np.ndarray | None = None  # (n, 8), see neighbour_table

    def __post_init__(self) -> None:
        n, shape = len(self.targets), np.shape(self.patches)
        if len(shape) != 4 or shape[:2] != (n, 3) or shape[2] != shape[3] or self.patches.dtype != np.uint8:
            raise ValueError(f"`patches` is {shape} {self.patches.dtype}; ({n}, 3, s, s) uint8 is needed")
        for name in ("codes", "sections", "patients", "coordinates", "neighbours"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"`{name}` has {len(value)} entries for {n} spots")
        if np.shape(self.target_mask) != (self.targets.shape[1],) or not np.any(self.target_mask):
            raise ValueError(
                f"`target_mask` must say of each of {self.targets.shape[1]} genes if it is a target; some are"
            )
        # NaN are passed over, and no second array of that size is made.
        parts = [p.data for p in self.targets.sections] if isinstance(self.targets, Targets) else [self.targets]
        if any(
            np.fmin.reduce(p, axis=None, initial=0) < 0 or np.isinf(np.fmax.reduce(p, axis=None))
            for p in parts
            if p.size
        ):
            raise ValueError("`targets` has values below 0 or infinite ones; log-normalised counts are needed")
        if self.neighbours is not None and (np.max(self.neighbours, initial=-1) >= n):
            raise ValueError(f"`neighbours` names spot {np.max(self.neighbours)}, there are {n}")

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.targets)


class BatchLoader:
    """Batches of training spots that depend only on seed, epoch and position, so that they can be resumed.

    The next batch is made in a thread. Of ``world`` processes, each takes every ``world``-th spot of a batch.
    """

    def __init__(
        self,
        data: PatchSet,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        neighbours: bool = False,
        present: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.rows, self.batch_size, self.seed = data, rows, batch_size, seed
        self.neighbours, self.present = data.neighbours if neighbours else None, present
        self.rank, self.world = rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        # Batch normalisation cannot learn from one spot: it waits for an epoch with another order.
        return max(1, full + (rest >= 2 * self.world))

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a position."""
        self.epoch, self.position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what is left of the epoch; the position moves as a batch is handed over."""
        epoch, n = self.epoch, len(self)
        order, turns = self._order(epoch)
        with ThreadPoolExecutor(1, thread_name_prefix="he2gene-patches") as pool:
            ahead = pool.submit(self._batch, order, turns, self.position)
            for position in range(self.position, n):
                batch = ahead.result()
                if position + 1 < n:
                    ahead = pool.submit(self._batch, order, turns, position + 1)
                self.epoch, self.position = (epoch, position + 1) if position + 1 < n else (epoch + 1, 0)
                yield batch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the spots, and symmetry of each and (from the second column) of its neighbours."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.rows)
        k = 0 if self.neighbours is None else self.neighbours.shape[1]
        return order, rng.integers(len(SYMMETRIES), size=(len(self.data), 1 + k), dtype=np.int8)

    def _batch(self, order: np.ndarray, turns: np.ndarray, position: int) -> dict[str, torch.Tensor]:
        rows = order[position * self.batch_size : (position + 1) * self.batch_size][self.rank :: self.world]
        data = self.data
        batch = {
            "patches": self._cut(rows, turns[rows, 0]),
            "targets": torch.from_numpy(np.asarray(data.targets[rows], np.float32)),
            "codes": torch.from_numpy(data.codes[rows].astype(np.int64)),
        }
        if self.neighbours is not None:
            table = self.neighbours[rows]
            there = (table >= 0) & (True if self.present is None else self.present[table])
            owner, column = np.nonzero(there)
            found = table[owner, column]
            batch["neighbours"] = self._cut(found, turns[rows[owner], 1 + column])
            batch["owner"] = torch.from_numpy(owner)
            # Without labels nobody knows that they are the same.
            same = (data.codes[found] == data.codes[rows[owner]]) & (data.codes[found] >= 0)
            batch["same"] = torch.from_numpy(same)
        return batch

    def _cut(self, rows: np.ndarray, turns: np.ndarray) -> torch.Tensor:
        out = np.empty((len(rows), *self.data.patches.shape[1:]), np.uint8)
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
            quarter, mirrored = SYMMETRIES[turn]
            patch = np.rot90(self.data.patches[row], quarter, axes=(1, 2))
            out[i] = patch[:, :, ::-1] if mirrored else patch
        return torch.from_numpy(out)


class RowLoader:
    """Held-out spots in their order, as they are; with several processes, each takes every ``world``-th."""

    def __init__(self, data: PatchSet, rows: np.ndarray, *, batch_size: int, rank: int = 0, world: int = 1):
        self.data, self.rows, self.batch_size = data, rows[rank::world], max(1, batch_size // world)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield patches, targets of the target genes, and section codes."""
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield {
                "patches": torch.from_numpy(np.asarray(self.data.patches[rows])),
                "targets": torch.from_numpy(np.asarray(self.data.targets[rows][:, self.data.target_mask], np.float32)),
                "sections": torch.from_numpy(self.data.sections[rows].astype(np.int64)),
            }
