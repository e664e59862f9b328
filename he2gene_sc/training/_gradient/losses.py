"""Losses of the HE2Gene recipes. What is unknown of a spot is masked: it adds neither value nor gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gene_loss(
    predicted: torch.Tensor, measured: torch.Tensor, target_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared errors of target and auxiliary genes over what was measured.

    Parameters
    ----------
    predicted
        ``(b, g)``.
    measured
        ``(b, g)``, NaN where a section does not list the gene.
    target_mask
        ``(g,)``, which genes are targets.

    Returns
    -------
    torch.Tensor, torch.Tensor
        Scalars, target and auxiliary; 0 where nothing was measured.
    """
    seen = ~measured.isnan()
    squared = torch.where(seen, predicted - measured.nan_to_num(), 0).square().sum(0)
    count = seen.sum(0)
    target, aux = ((squared * mask).sum() / (count * mask).sum().clamp(min=1) for mask in (target_mask, ~target_mask))
    return target, aux


def annotation_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of ``(b, c)`` logits over the spots with a label; codes are ``(b,)``, -1 without one.

    With two classes it is the binary cross entropy of the difference of the logits; a single logit is that of code 1.
    """
    if logits.shape[1] == 1:
        labelled = codes >= 0
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], codes.clamp(min=0).to(logits.dtype), reduction="none")
        return torch.where(labelled, loss, 0).sum() / labelled.sum().clamp(min=1)
    return F.cross_entropy(logits, codes, ignore_index=-1, reduction="sum") / (codes >= 0).sum().clamp(min=1)


def neighbour_loss(
    predicted: torch.Tensor, neighbour: torch.Tensor, owner: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """Mean squared distance of a spot's prediction to the mean over its neighbours that carry the same label.

    Parameters
    ----------
    predicted
        ``(b, t)`` target genes of the spots.
    neighbour
        ``(m, t)`` of the neighbours that are there.
    owner
        ``(m,)``, whose neighbour each is.
    same
        ``(m,)``, whether both carry the same label.

    Returns
    -------
    torch.Tensor
        Scalar; spots without such a neighbour do not count.
    """
    weight = same.to(neighbour.dtype)
    count = torch.zeros_like(predicted[:, 0]).index_add(0, owner, weight)
    mean = torch.zeros_like(predicted).index_add(0, owner, neighbour * weight[:, None]) / count.clamp(min=1)[:, None]
    there = count > 0
    squared = torch.where(there[:, None], predicted - mean, 0).square().sum()
    return squared / (there.sum() * predicted.shape[1]).clamp(min=1)
