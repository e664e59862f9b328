"""Checkpoints of a run: the best weights so far, its history, and a file to resume from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from .run_options import LAST

#: Loss, relative to that of the first step, above which training has diverged.
_DIVERGENCE_RATIO = 10.0
#: Attributes of a :class:`Keeper` from which a run is resumed.
_STATE = ("best", "best_epoch", "history", "stopped", "position", "first", "loss")


class Keeper(Callback):
    """Keeps the best weights, stops early, and writes a checkpoint after every epoch and every ``every`` steps.

    Its state is in the checkpoint, so a resumed run ends like one that was not interrupted.
    """

    def __init__(self, folder: Path, *, patience: int, every: int, run: dict[str, Any]):
        self.folder, self.patience, self.every, self.run = folder, patience, every, run
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch = -1
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self.first: float | None = None
        self.position: dict[str, int] | None = None
        self.loss = [0.0, 0]  # sum over the steps of the epoch, and their number

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Broadcast the folder of the first process to all processes."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_STATE, "run")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restore the position in the epoch; a run that had stopped early stays stopped."""
        if self.position is not None:
            # Lightning does not restore a loader from a checkpoint at the end of an epoch.
            loader: Any = trainer.train_dataloader
            loader.load_state_dict(self.position)
        trainer.should_stop = self.stopped

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sum the loss; write a checkpoint every ``every`` steps."""
        if self.first is None:
            self.first = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        self.loss = [self.loss[0] + float(outputs["loss"]), self.loss[1] + 1]
        # After the last batch, the checkpoint of the epoch is written, after validation.
        last = trainer.fit_loop.epoch_loop.batch_progress.current.ready == trainer.num_training_batches
        if trainer.global_step % self.every == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare with the best epoch, decide whether to stop, and write a checkpoint."""
        epoch, preset, error = trainer.current_epoch, pl_module.preset, pl_module.val_loss
        mean = torch.tensor(self.loss[0] / self.loss[1], device=pl_module.device)
        loss = float(trainer.strategy.reduce(mean, reduce_op="mean"))
        self.loss = [0.0, 0]
        # The rate of the optimizer is already that of the next epoch.
        row = {"epoch": epoch, "lr": preset.lr * preset.lr_factor ** (epoch // preset.lr_step), "loss": loss}
        self.history.append(row | {"held_out_error": error, "held_out_pearson": pl_module.val_pearson})
        if not error < float("inf") or (self.first is not None and loss > _DIVERGENCE_RATIO * self.first):
            raise RuntimeError(
                f"training diverged: in epoch {epoch} the loss is {loss:.4g} (in the first step it was "
                f"{self.first:.4g}) and the held-out error {error:.4g}. {pl_module.advice()}"
            )
        if self.best_epoch < 0 or error < self.history[self.best_epoch]["held_out_error"]:
            self.best_epoch = epoch
            self.best = {key: value.detach().cpu().clone() for key, value in pl_module.state_dict().items()}
        self.stopped = epoch - self.best_epoch >= self.patience
        trainer.should_stop = trainer.should_stop or self.stopped
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Replace the checkpoint atomically: if the process is killed, the old or the new one is complete."""
        loader: Any = trainer.train_dataloader
        self.position = loader.state_dict()
        if trainer.world_size > 1:
            # The first process writes the file, so the loss must be the mean over all.
            total = torch.tensor(self.loss[0], device=trainer.strategy.root_device)
            self.loss[0] = float(trainer.strategy.reduce(total, reduce_op="mean"))
        new = self.folder / f"{LAST}.new"
        try:
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                with new.open("rb+") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            new.unlink(missing_ok=True)
            hint = ". The last one is intact: continue with `resume=True`" if (self.folder / LAST).is_file() else ""
            raise OSError(
                f"the checkpoint could not be written to {str(self.folder)!r} ({error}); free space there or choose another "
                f"`checkpoint_dir`{hint}"
            ) from error
        if trainer.is_global_zero:
            os.replace(new, self.folder / LAST)  # noqa: PTH105 - atomic on every system
        trainer.strategy.barrier()


def check_checkpoint(path: Path, run: dict[str, Any]) -> None:
    """Raise if a file to resume from is damaged, not a checkpoint, or of another run."""
    try:
        theirs = dict(torch.load(path, map_location="cpu", weights_only=True)["callbacks"]["Keeper"]["run"])
    except Exception as error:  # A damaged file can make torch raise any type.
        raise ValueError(
            f"`resume`: {str(path)!r} is damaged, is not a checkpoint of such a run, or holds objects that cannot be loaded safely, "
            f"such as the state of one of `callbacks` ({type(error).__name__}: {' '.join(str(error).split())[:200]}). If it is "
            "damaged, remove it to start again; or choose another `checkpoint_dir`"
        ) from error
    changed = _differences(theirs, run)
    if changed:
        raise ValueError(
            f"`resume`: {LAST} in {str(path.parent)!r} is of another run ({'; '.join(changed)}); resume with the same "
            "data and settings, or choose another `checkpoint_dir`"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """List, in words, how two runs differ; digests are only named."""
    found = []
    for key in sorted(theirs.keys() | ours.keys(), key=str):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(new, dict):
            old = old if isinstance(old, dict) else {}
            other = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
            found += [f"{key} has other {', '.join(other)}"] if other else []
        elif old != new:
            found.append(f"{key} was {old!r}, is {new!r}")
    return found
