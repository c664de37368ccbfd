"""Importance by the first-order change of the loss without a channel (Molchanov et al. 2019)."""

from __future__ import annotations

import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from job.distributed.collectives import total
from job.errors import UsageError
from job.slimming.graph.modes import training_mode
from job.slimming.graph.selection import batchnorms
from job.slimming.graph.snapshot import preserve_state
from job.slimming.graph.union import FIXED
from job.slimming.importance.scores import NO_LABELS
from job.slimming.inputs import call_network, map_batched, tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example


def taylor_importance(
    network: nn.Module, graph: ChannelGraph, batches: Iterable[CalibrationBatch]
) -> Scores:
    """Return (Σ γ ∂L/∂γ + β ∂L/∂β)² of each channel (count,), summed over batches.

    The sum Σ is over the BatchNorms of the channel.
    γ ∂L/∂γ + β ∂L/∂β is the derivative of the loss with respect to a gate on the output of the
    BatchNorm (Molchanov et al. 2019, eq. 8 and section 3.3). ``batches`` are pairs of images and
    labels (B,) of this process; images without a label, or with label -1, are skipped. Autograd
    must be enabled. The score is nan for channels without a BatchNorm. Raises UsageError if no
    process has labels, or if labels do not fit the network.
    """
    ranking, norms = {norm for group in graph.groups for norm in group.norms}, batchnorms(network)
    slots = [s for s in graph.slots if s.layer in ranking and s.side in ("through", "select")]
    tensors = [t for s in slots for t in (norms[s.layer].weight, norms[s.layer].bias)]
    scores = np.zeros(graph.count)  # entry 0 is not a channel and counts the batches
    with _requiring_grad(tensors), preserve_state(network), training_mode(network, training=False):
        for inputs, labels in _labelled_only(batches):
            loss = F.cross_entropy(_class_logits(call_network(network, inputs), labels), labels)
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            change = np.zeros(graph.count)
            for number, slot in enumerate(slots):
                pair = slice(2 * number, 2 * number + 2)
                np.add.at(change, slot.ids, _gate_gradient(tensors[pair], gradients[pair]))
            change[FIXED] = 1
            scores += change**2
    device = tensors[0].device if tensors else None
    scores = total(torch.from_numpy(scores).to(device)).cpu().numpy()
    if not scores[FIXED]:
        raise UsageError(f"--importance taylor {NO_LABELS}")
    has_norm = np.zeros(graph.count, bool)
    for slot in slots:
        has_norm[slot.ids] = True
    scores[~has_norm] = np.nan
    return scores


@contextmanager
def _requiring_grad(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _class_logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, C) among the outputs; raises UsageError if labels do not fit."""
    count, highest = len(labels), int(labels.max())
    logits = next((t for t in tensors_in(outputs) if t.dim() == 2 and len(t) == count), None)
    if logits is None:
        raise UsageError("--importance taylor needs a network that returns logits (B, classes)")
    if highest >= logits.shape[1]:
        raise UsageError(
            f"--importance taylor: label {highest} is out of range for the network's "
            f"{logits.shape[1]} classes, numbered from 0"
        )
    return logits


def _labelled_only(batches: Iterable[CalibrationBatch]) -> Iterator[tuple[Example, torch.Tensor]]:
    for batch in batches:
        inputs, labels = (batch, None) if isinstance(batch, torch.Tensor) else batch
        if labels is None:
            continue
        has_label = labels >= 0
        if has_label.all():
            yield inputs, labels
        elif has_label.any():
            yield map_batched(inputs, operator.itemgetter(has_label)), labels[has_label]


def _gate_gradient(
    tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return γ ∂L/∂γ + β ∂L/∂β (C,) of one BatchNorm; 0 if it did not run."""
    parts = [
        (tensor.detach() * gradient).double()
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
    ]
    gate: np.ndarray[Any, np.dtype[np.float64]] = (
        sum(parts, torch.zeros_like(tensors[0], dtype=torch.float64)).detach().cpu().numpy()
    )
    return gate
