"""How a network is trained on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._core import validate

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
#: File of a run that can be gone on with.
LAST = "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class RunOptions(validate.Checked):
    """How a network is trained on this machine, whatever the preset.

    Batch normalisation takes its statistics from each part of ``patches_at_once``; the losses are of the whole
    batch.
    """

    patches_at_once: int | None = None  # at a time in the encoder; default: the batch
    precision: str | int | None = None  # as in lightning.Trainer; default: bf16-mixed on CUDA
    devices: int | str | Sequence[int] | None = None  # as in lightning.Trainer; a batch counts all
    num_nodes: int = 1
    strategy: str = "auto"
    checkpoint_dir: str | Path | None = None  # for last.ckpt; default: temporary
    checkpoint_steps: int = 500  # besides one after every epoch
    resume: bool = False  # from last.ckpt, if there is one
    callbacks: Sequence[Any] = ()  # without a logger or checkpoints of their own

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
                f"`precision` is {self.precision!r}, valid: {list(PRECISIONS)}; the weights themselves stay single"
            )
        fits = isinstance(self.callbacks, list | tuple)
        if fits and self.callbacks:
            from lightning.pytorch import Callback

            fits = all(isinstance(callback, Callback) for callback in self.callbacks)
        if not fits:
            raise ValueError(
                f"`callbacks` is {self.callbacks!r}; a list of Lightning callbacks is needed, which may be empty"
            )
        if self.checkpoint_dir is not None:
            validate.folder_or_file(self.checkpoint_dir, "checkpoint_dir")
        if self.resume and self.checkpoint_dir is None:
            raise ValueError("`resume` needs the `checkpoint_dir` of the run that was stopped")

    def check_folder(self, begun: str = LAST) -> None:
        """Refuse a folder that cannot be written, or that holds a run at such a place which is not gone on with."""
        if self.checkpoint_dir is None:
            return
        place = Path(self.checkpoint_dir).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise OSError(
                error.errno,
                f"`checkpoint_dir` {str(self.checkpoint_dir)!r} cannot be written ({error.strerror}); choose another",
                str(place),
            ) from error
        if not self.resume and any(place.glob(begun)):
            raise FileExistsError(
                f"`checkpoint_dir` {str(self.checkpoint_dir)!r} holds a run; go on with `resume=True`, or choose another folder"
            )
