"""Losses of the HE2Gene recipes. What is unknown of a spot is masked: it adds neither value nor gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gene_loss(
    predicted: torch.Tensor, measured: torch.Tensor, target_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared errors of target and auxiliary genes where measured is not NaN; 0 where nothing was measured."""
    seen = ~measured.isnan()
    squared = torch.where(seen, predicted - measured.nan_to_num(), 0).square().sum(0)
    count = seen.sum(0)
    target, aux = ((squared * mask).sum() / (count * mask).sum().clamp(min=1) for mask in (target_mask, ~target_mask))
    return target, aux


def annotation_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of ``(b, c)`` logits over the spots with a label; codes are ``(b,)``, -1 without one."""
    if logits.shape[1] == 1:
        labelled = codes >= 0
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], codes.clamp(min=0).to(logits.dtype), reduction="none")
        return torch.where(labelled, loss, 0).sum() / labelled.sum().clamp(min=1)
    return F.cross_entropy(logits, codes, ignore_index=-1, reduction="sum") / (codes >= 0).sum().clamp(min=1)


def neighbour_loss(
    predicted: torch.Tensor, neighbour: torch.Tensor, owner: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """Mean squared distance of predictions ``(b, t)`` to the mean of neighbours ``(m, t)`` of the same label."""
    weight = same.to(neighbour.dtype)
    count = torch.zeros_like(predicted[:, 0]).index_add(0, owner, weight)
    mean = torch.zeros_like(predicted).index_add(0, owner, neighbour * weight[:, None]) / count.clamp(min=1)[:, None]
    there = count > 0
    squared = torch.where(there[:, None], predicted - mean, 0).square().sum()
    return squared / (there.sum() * predicted.shape[1]).clamp(min=1)
