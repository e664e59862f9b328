"""Lightning module of a network in training, and its losses."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...models import EncoderSpec
from ...models._encoders.stages import stage_sizes
from ...models._network import Preprocess
from .patches import BatchLoader, PatchSet, RowLoader, Split
from .presets import Preset


class TrainingModule(LightningModule):
    """Encoder and linear heads with the losses of a preset.

    ``rows`` are the training spots, and the held-out spots for early stopping. Below 2 classes there is no annotation head.
    """

    target_mask: torch.Tensor
    _sums: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        spec: EncoderSpec,
        preset: Preset,
        data: PatchSet,
        rows: Split,
        *,
        n_classes: int,
        patches_at_once: int | None = None,
        seed: int,
    ):
        super().__init__()
        self.spec, self.preset, self.data, self.rows = spec, preset, data, rows
        self.patches_at_once, self.seed = patches_at_once, seed
        self.preprocess = Preprocess(spec)
        self.encoder = encoder
        (width,) = stage_sizes(encoder.eval(), None, spec.input_px)
        self.genes = nn.Linear(width, data.targets.shape[1])
        n_logits = 1 if preset.exact else n_classes
        self.annotation = nn.Linear(width, n_logits) if n_classes > 1 else None
        self.register_buffer("target_mask", torch.from_numpy(np.asarray(data.target_mask, bool)), persistent=False)
        self.val_loss = self.val_pearson = float("nan")

    def train_dataloader(self) -> BatchLoader:
        # Held-out spots are not neighbours, except in the validation of the paper.
        allowed = np.full(len(self.data), self.rows.unit == "spot")
        allowed[self.rows.train] = True
        neighbours = self.preset.neighbour_weight > 0
        options = {"seed": self.seed, "neighbours": neighbours, "allowed": allowed, **self._share()}
        return BatchLoader(self.data, self.rows.train, **options)

    def val_dataloader(self) -> RowLoader:
        return RowLoader(self.data, self.rows.held_out, **self._share())

    def _share(self) -> dict[str, Any]:
        """Return the size of a batch, and which part of it this process takes."""
        trainer = self.trainer
        return {"batch_size": self.preset.batch_size, "rank": trainer.global_rank, "world": trainer.world_size}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        preset = self.preset
        optimizer = torch.optim.Adam(self.parameters(), lr=preset.lr, weight_decay=preset.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, preset.lr_step, preset.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch; raise if it is not finite."""
        # Random numbers of the encoder (dropout) must be the same in a resumed run.
        seed = np.random.SeedSequence([self.seed, self.global_step, self.global_rank]).generate_state(1).item()
        # `torch.manual_seed` records each call, with its stack, for every accelerator that is not initialised.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} in epoch {self.current_epoch}, step {self.global_step}. {self.advice()}"
            )
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["patches"]))
        return loss

    def advice(self) -> str:
        lr, precision = self.preset.lr, str(self.trainer.precision)
        mixed = f"; use precision='32-true' instead of {precision!r}" if precision.startswith(("bf16", "16")) else ""
        return (
            f"Lower `lr` (it is {lr:g}; try {lr / 10:g}); check that the sections hold raw counts and that no spot is nearly "
            f"empty; check that the images are H&E{mixed}"
        )

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of losses of a batch of :class:`he2gene_sc.training._gradient.patches.BatchLoader`."""
        preset, x, mask = self.preset, batch["patches"], self.target_mask
        n = len(x)
        if "neighbours" in batch:
            # Spots and neighbours share one pass, as in the paper; absent neighbours are not part of it.
            x = torch.cat([x, batch["neighbours"]])
        features = self.encode(self.preprocess(x))
        predicted = self.genes(features[:n]).float()
        target, aux = gene_loss(predicted, batch["targets"], mask)
        loss = target + preset.aux_weight * aux
        if self.annotation is not None:
            logits = self.annotation(features[:n]).float()
            loss = loss + preset.annotation_weight * annotation_loss(logits, batch["codes"])
        if "neighbours" in batch:
            neighbours = F.linear(features[n:], self.genes.weight[mask], self.genes.bias[mask]).float()
            distance = neighbour_loss(predicted[:, mask], neighbours, batch["owner"], batch["same"])
            loss = loss + preset.neighbour_weight * distance
        return loss

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode a batch in parts of ``patches_at_once``; activations are recomputed for the gradient."""
        if self.patches_at_once is None or len(x) <= self.patches_at_once:
            return self.encoder(x)

        def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
            return contextlib.nullcontext(), _freeze_batch_statistics(self.encoder)

        parts = x.chunk(math.ceil(len(x) / self.patches_at_once))
        return torch.cat([checkpoint(self.encoder, part, use_reentrant=False, context_fn=contexts) for part in parts])

    def on_validation_epoch_start(self) -> None:
        # Six sums per section and target gene; Apple's MPS has no double precision.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        n_sections, n_targets = int(self.data.sections.max()) + 1, int(self.target_mask.sum())
        self._sums = torch.zeros((6, n_sections, n_targets), dtype=dtype, device=self.device)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Add a batch to the sums from which error and correlation follow."""
        features = self.encoder(self.preprocess(batch["patches"]))
        predicted = self.genes(features).float()[:, self.target_mask].to(self._sums.dtype)
        measured = batch["targets"].to(self._sums.dtype)
        measured_mask = ~measured.isnan()
        x, y = torch.where(measured_mask, predicted, 0), measured.nan_to_num()
        for total, part in zip(self._sums, (measured_mask.to(x.dtype), x, y, x * x, y * y, x * y), strict=True):
            total.index_add_(0, batch["sections"], part)

    def on_validation_epoch_end(self) -> None:
        """Compute held-out error and mean correlation from the sums of all processes."""
        n, x, y, xx, yy, xy = self.trainer.strategy.reduce(self._sums, reduce_op="sum").cpu().double().numpy()
        self.val_loss = float((xx - 2 * xy + yy).sum() / n.sum())
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.sqrt((xx - x * x / n) * (yy - y * y / n))
            r = np.where((n > 1) & (size > 1e-9 * (1 + yy)), (xy - x * y / n) / size, 0)
        self.val_pearson = float(r[n > 1].mean()) if (n > 1).any() else float("nan")
        self.log("held-out error", self.val_loss, prog_bar=True, rank_zero_only=True)
        self.log("held-out Pearson", self.val_pearson, prog_bar=True, rank_zero_only=True)


@contextlib.contextmanager
def _freeze_batch_statistics(network: nn.Module) -> Iterator[None]:
    """Keep the statistics of batch normalisation while a batch is recomputed, so that it is not counted twice."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(norm, norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, count in saved:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def gene_loss(
    predicted: torch.Tensor, measured: torch.Tensor, target_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean squared errors of target and of auxiliary genes where measured is not NaN; 0 if nothing was measured."""
    measured_mask = ~measured.isnan()
    squared = torch.where(measured_mask, predicted - measured.nan_to_num(), 0).square().sum(0)
    count = measured_mask.sum(0)
    target, aux = ((squared * mask).sum() / (count * mask).sum().clamp(min=1) for mask in (target_mask, ~target_mask))
    return target, aux


def annotation_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of logits ``(b, c)`` over labelled spots; codes are ``(b,)``, -1 without a label."""
    if logits.shape[1] == 1:
        labelled = codes >= 0
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], codes.clamp(min=0).to(logits.dtype), reduction="none")
        return torch.where(labelled, loss, 0).sum() / labelled.sum().clamp(min=1)
    return F.cross_entropy(logits, codes, ignore_index=-1, reduction="sum") / (codes >= 0).sum().clamp(min=1)


def neighbour_loss(
    predicted: torch.Tensor, neighbour: torch.Tensor, owner: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared distance of predictions ``(b, t)`` to the mean of neighbours ``(m, t)`` with the same label."""
    weight = same.to(neighbour.dtype)
    count = torch.zeros_like(predicted[:, 0]).index_add(0, owner, weight)
    mean = torch.zeros_like(predicted).index_add(0, owner, neighbour * weight[:, None]) / count.clamp(min=1)[:, None]
    has_neighbours = count > 0
    squared = torch.where(has_neighbours[:, None], predicted - mean, 0).square().sum()
    return squared / (has_neighbours.sum() * predicted.shape[1]).clamp(min=1)
