"""Loss of a network's outputs relative to the outputs before a change.

For logits (B, C) the loss is the Kullback-Leibler divergence of the softmax, in nats. For other
outputs it is the squared error relative to their squares, averaged over the output tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from job.slimming.inputs import tensors_in

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT_LOSSES = ("kl", "squared_error")  # of logits of classes, and of any other outputs


def reference_outputs(outputs: Any) -> list[torch.Tensor]:
    """Return copies of the floating-point tensors in ``outputs``, which are compared."""
    return [tensor.clone() for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def loss_terms(
    reference: Sequence[torch.Tensor], outputs: Any, *, logits: bool | None = None
) -> torch.Tensor:
    """Return the numerator and denominator of the loss of each output tensor, (tensors, 2) float64.

    ``logits`` tells whether the outputs are logits; None for what their shape suggests.
    Terms of several batches are added before ``mean_loss`` divides them. Values that are not finite
    in ``reference`` are ignored.
    """
    changed = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if are_logits(reference) if logits is None else logits:
        wide, narrow = (F.log_softmax(tensor[0].double(), 1) for tensor in (reference, changed))
        divergence = F.kl_div(narrow, wide, log_target=True, reduction="sum")
        return torch.stack([divergence, divergence.new_tensor(float(len(wide)))])[None]
    return torch.stack(list(map(_squared_error, reference, changed)))


def are_logits(outputs: Sequence[torch.Tensor], loss: str | None = None) -> bool:
    """Return whether ``outputs`` is a single tensor (B, C) with at least two classes.

    Of a regression it can be, too, whose ``loss`` is then ``squared_error``: the divergence of the
    softmax is blind to a change that all values of a row have in common.
    """
    shaped = len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1
    return shaped and loss != "squared_error"


def mean_loss(terms: torch.Tensor) -> torch.Tensor:
    """Return the losses (…) of summed ``terms`` (…, tensors, 2)."""
    return (terms[..., 0] / terms[..., 1].clamp_min(1e-300)).mean(-1)


def _squared_error(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    wide, narrow = wide.double(), narrow.double()
    if wide.shape != narrow.shape:  # a network whose output sizes depend on values
        return wide.new_ones(2)
    finite = wide.isfinite()
    error = torch.where(finite, narrow - wide, 0).nan_to_num(posinf=0, neginf=0).square().sum()
    return torch.stack([error, torch.where(finite, wide, 0).square().sum()])
