"""Train a whole network by gradient descent: arrays in, weights and held-out predictions out."""

from __future__ import annotations

import copy
import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..._core import logs
from ...models import EncoderSpec
from ...models._embedding import row_blocks
from ...models._network import keep_heap
from .._memory import check_memory
from .patches import PatchSet, Split, blocks, split
from .presets import Preset
from .run_options import LAST, RunOptions
from .weights import calibrate, name_tensors, predict_rows


@dataclass(frozen=True)
class Fitted:
    """A trained network and its predictions of held-out spots."""

    tensors: dict[str, np.ndarray]  # encoder.*, genes.weight (f, g), genes.bias (g,), annotation.* of the best epoch
    history: list[dict[str, float]]  # one row per epoch: epoch, lr, loss, held_out_error, held_out_pearson
    best_epoch: int
    unit: str  # patient, section, block or spot
    rows: np.ndarray  # (h,) positions of the predicted spots
    expression: np.ndarray  # (h, g) float32 from the training window, floored at 0
    proba: np.ndarray  # (h, c) float32; c is 0 without an annotation head
    trained: np.ndarray  # positions of the training spots
    temperature: float | None  # by which the annotation head was divided


def fit_network(
    data: PatchSet,
    preset: Preset,
    encoder: nn.Module,
    spec: EncoderSpec,
    *,
    run: RunOptions | None = None,
    rows: Split | None = None,
    predicted: np.ndarray | None = None,
    n_classes: int | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> Fitted:
    """Train a copy of an encoder and linear heads by a preset.

    ``rows`` are the result of :func:`split`. ``predicted`` defaults to the held-out spots. With ``n_classes`` below 2 there is
    no annotation head. ``names`` are lists that must be equal to resume a run. On the CPU, a seed gives the same bits for the
    same number of threads. The global random state is not changed.
    """
    run = RunOptions() if run is None else run
    rows = split(data, preset, seed=seed) if rows is None else rows
    _check(data, rows)
    run.check_folder()
    if n_classes is None:
        n_classes = int(data.codes.max(initial=-1)) + 1
    predicted = rows.held_out if predicted is None else predicted
    from lightning.pytorch import Trainer

    from .checkpoint import Keeper, check_checkpoint
    from .module import TrainingModule

    device = torch.device(device)
    accelerator = device.type
    devices: Any = run.devices
    if devices is None:
        devices = 1 if device.index is None else [device.index]
    precision: Any = run.precision or ("32-true" if preset.exact else default_precision(accelerator))
    if accelerator == "cpu":
        n_neighbours = 0 if data.neighbours is None or not preset.neighbour_weight else data.neighbours.shape[1]
        patches = min(preset.batch_size, len(rows.train)) * (1 + n_neighbours)
        check_memory(
            encoder,
            spec.input_px,
            patches=min(patches, run.patches_at_once or patches),
            spots=preset.batch_size,
            n_genes=data.targets.shape[1],
            n_held_out=len(predicted),
        )
    with (
        tempfile.TemporaryDirectory(prefix="he2gene-") as temporary,
        silence_lightning(),
        torch.random.fork_rng(),
        keep_heap(accelerator),
    ):
        folder = Path(temporary if run.checkpoint_dir is None else run.checkpoint_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        encoder = copy.deepcopy(encoder).requires_grad_(True)
        module = TrainingModule(
            encoder, spec, preset, data, rows, n_classes=n_classes, patches_at_once=run.patches_at_once, seed=seed
        ).train()
        facts = _facts(data, preset, spec, rows, names or {}) | {"seed": seed, "patches_at_once": run.patches_at_once}
        keeper = Keeper(folder, patience=preset.patience, every=run.checkpoint_steps, run=facts)
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=run.num_nodes,
            strategy=run.strategy,
            precision=precision,
            max_epochs=preset.max_epochs,
            gradient_clip_val=preset.clip,
            callbacks=[keeper, *run.callbacks],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=show_progress,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        last = folder / LAST
        resumes = run.resume and last.is_file()
        if resumes:
            check_checkpoint(last, facts)
        try:
            trainer.fit(module, ckpt_path=str(last) if resumes else None)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the device is out of memory: pass a small `patches_at_once`, lower `batch_size` (it is {preset.batch_size}), or "
                "take a smaller encoder; hg.tl.train takes both as preset=hg.PaperRecipe(..., patches_at_once=..., batch_size=...)"
            ) from error
        if not keeper.best:
            if not last.is_file():
                raise RuntimeError(
                    "one of `callbacks` stopped training before its first epoch ended. No weights were kept; let it stop later"
                )
            # The processes of a spawning strategy have ended; only the file remains.
            keeper.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["callbacks"]["Keeper"])
        module.load_state_dict(keeper.best)
        module.to(trainer.strategy.root_device)
        tensors = name_tensors(module)
        temperature = None if preset.exact else calibrate(module, tensors, rows.held_out)
        found = predicted, *predict_rows(module, tensors, predicted)
    return Fitted(tensors, keeper.history, keeper.best_epoch, rows.unit, *found, rows.train, temperature)


def _check(data: PatchSet, rows: Split) -> None:
    if len(rows.train) < 2 or not len(rows.held_out):
        raise ValueError(f"{len(rows.train)} training and {len(rows.held_out)} held-out spots are too few")
    for part, chosen in (("training", rows.train), ("held-out", rows.held_out)):
        if all(np.isnan(values[:, data.target_mask]).all() for values in blocks(data.targets, chosen)):
            raise ValueError(f"no {part} section measured any of the target genes")


def _facts(
    data: PatchSet, preset: Preset, spec: EncoderSpec, rows: Split, names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the settings that must be equal to resume a run, and digests of its data; ``max_epochs`` may change."""
    facts = {key: value for key, value in vars(preset).items() if isinstance(value, int | float | str)}
    if not preset.exact:
        # Checkpoints of earlier versions lack this field.
        del facts["exact"]
    del facts["max_epochs"]
    # One pass over the pixels costs less than an epoch.
    arrays: dict[str, Iterable[np.ndarray | bytes]] = {
        "pixels": (data.patches[block] for block in row_blocks(len(data), 256)),
        "expression": blocks(data.targets, np.arange(len(data))),
        "labels": [data.codes],
        "grouping": [data.sections, data.patients, data.target_mask],
        "places": [array for array in (data.coordinates, data.neighbours) if array is not None],
    }
    arrays |= {f"names of {kind}": ["\n".join(map(str, values)).encode()] for kind, values in names.items()}
    digests = {kind: _digest(parts) for kind, parts in arrays.items()}
    return facts | {"encoder": spec.name, "held_out": _digest([rows.train, rows.held_out]), "data": digests}


def _digest(arrays: Iterable[np.ndarray | bytes]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def default_precision(accelerator: str) -> str:
    return "bf16-mixed" if accelerator == "cuda" else "32-true"


def is_first_process() -> bool:
    """Return whether this is the only process of a run, or the process of global rank zero."""
    from lightning.pytorch.utilities import rank_zero_only

    # Lightning sets the rank if it starts processes, or reads it from the environment of another launcher.
    return not getattr(rank_zero_only, "rank", None)


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's tips and its advice on loaders."""
    with logs.silence("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        yield
