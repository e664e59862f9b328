"""Settings of a training run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._core import validate

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
#: File from which a run can be resumed.
LAST = "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class RunOptions(validate.Checked):
    """Settings of a training run on this machine, independent of the preset.

    Batch normalisation uses the statistics of each part of ``patches_at_once``; losses are over the whole batch.
    """

    patches_at_once: int | None = None  # most patches at once in the encoder; default: the whole batch
    precision: str | int | None = None  # as in lightning.Trainer; default: bf16-mixed on CUDA
    devices: int | str | Sequence[int] | None = None  # as in lightning.Trainer; a batch is shared by all
    num_nodes: int = 1
    strategy: str = "auto"
    checkpoint_dir: str | Path | None = None  # for last.ckpt; default: temporary
    checkpoint_steps: int = 500  # steps between checkpoints, in addition to one after every epoch
    resume: bool = False  # from last.ckpt, if there is one
    callbacks: Sequence[Any] = ()  # Lightning callbacks, without a logger or checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patches_at_once is not None:
            validate.whole_number(self.patches_at_once, "patches_at_once", 2)
        validate.whole_number(self.num_nodes, "num_nodes")
        validate.whole_number(self.checkpoint_steps, "checkpoint_steps")
        if validate.is_whole(self.precision):
            self.set(precision=str(self.precision))
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(
                f"`precision` is {self.precision!r}, valid: {list(PRECISIONS)}; weights are always in single precision"
            )
        is_valid = isinstance(self.callbacks, list | tuple)
        if is_valid and self.callbacks:
            from lightning.pytorch import Callback

            is_valid = all(isinstance(callback, Callback) for callback in self.callbacks)
        if not is_valid:
            raise ValueError(
                f"`callbacks` is {self.callbacks!r}; a list of Lightning callbacks is needed, which may be empty"
            )
        if self.checkpoint_dir is not None:
            validate.folder_or_file(self.checkpoint_dir, "checkpoint_dir")
        if self.resume and self.checkpoint_dir is None:
            raise ValueError("`resume` needs the `checkpoint_dir` of the run that was stopped")

    def check_folder(self, begun: str = LAST) -> None:
        """Raise if the folder cannot be written, or holds a file ``begun`` (a pattern) of a run that is not resumed."""
        if self.checkpoint_dir is None:
            return
        from ...models._folder import check_writable

        place = Path(self.checkpoint_dir).expanduser()
        check_writable(place, self.checkpoint_dir, "checkpoint_dir")
        if not self.resume and any(place.glob(begun)):
            raise FileExistsError(
                f"`checkpoint_dir` {str(self.checkpoint_dir)!r} holds a run; continue it with `resume=True`, or choose another folder"
            )
