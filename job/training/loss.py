"""The loss of a batch, with auxiliary classifiers and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

from job.models.outputs import AUXILIARY_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from job.training.distillation import Distillation


def batch_loss(
    logits: torch.Tensor,
    auxiliary: Iterable[torch.Tensor],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    distillation: Distillation | None,
) -> torch.Tensor:
    """Return the sum of the losses of a batch, a scalar.

    ``logits`` and each of ``auxiliary`` are (B, C), ``inputs`` (B, 3, H, W), ``labels`` (B,).
    Auxiliary classifiers learn from the labels, with a weight of AUXILIARY_WEIGHT.
    """
    if distillation:
        loss = distillation.loss(logits, inputs, labels)
    else:
        loss = F.cross_entropy(logits, labels, reduction="sum")
    for output in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(output, labels, reduction="sum")
    return loss
