"""Importance by how much the loss would change, to first order (Molchanov et al. 2019)."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from job.distributed.collectives import total
from job.errors import UsageError
from job.slimming.graph.selection import batchnorms
from job.slimming.graph.snapshot import preserve_state
from job.slimming.graph.trace import tensors_in, training_mode
from job.slimming.graph.union import FIXED
from job.slimming.inputs import call_network, map_batched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.moments import Batch
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example


def taylor_importance(network: nn.Module, graph: ChannelGraph, batches: Iterable[Batch]) -> Scores:
    """(Σ γ ∂L/∂γ + β ∂L/∂β)² over the BatchNorms that a channel passes, summed over batches.

    γ ∂L/∂γ + β ∂L/∂β is how the loss reacts to a gate on the BatchNorm's output (ibid., eq. 8 and
    section 3.3). ``batches`` are pairs of pictures and labels (B,), of each process its own; what
    has no label, or -1, is left out. nan where no BatchNorm ranks a channel. Raises UsageError when
    no process has labels, or they do not fit the network.
    """
    names = {norm for group in graph.groups for norm in group.norms}
    places = [p for p in graph.slots if p.layer in names and p.side in ("through", "select")]
    known = batchnorms(network)
    norms = [known[place.layer] for place in places]
    tensors = [t for norm in norms for t in (norm.weight, norm.bias)]
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    scores = np.zeros(graph.count)  # number 0, of no channel, counts the batches
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with preserve_state(network), training_mode(network, training=False), torch.enable_grad():
            for inputs, labels in _labelled(batches):
                loss = F.cross_entropy(_logits(call_network(network, inputs), labels), labels)
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
                change = np.zeros(graph.count)
                for number, place in enumerate(places):
                    pair = slice(2 * number, 2 * number + 2)
                    np.add.at(change, place.ids, _gate(tensors[pair], gradients[pair]))
                change[FIXED] = 1
                scores += change**2
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
    device = tensors[0].device if tensors else None
    scores = total(torch.from_numpy(scores).to(device)).cpu().numpy()
    if not scores[FIXED]:
        raise UsageError("--importance taylor needs labelled calibration images, there are none")
    ranked = np.zeros(graph.count, bool)
    for place in places:
        ranked[place.ids] = True
    scores[~ranked] = np.nan
    return scores


def _logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits (B, C) among a network's outputs; raises UsageError where labels do not fit."""
    count, highest = len(labels), int(labels.max())
    found = [t for t in tensors_in(outputs) if t.dim() == 2 and len(t) == count]
    if not found:
        raise UsageError("--importance taylor needs a network that gives logits (B, classes)")
    if highest >= found[0].shape[1]:
        raise UsageError(
            f"--importance taylor: there is a label {highest}, the network has "
            f"{found[0].shape[1]} classes, numbered from 0"
        )
    return found[0]


def _labelled(batches: Iterable[Batch]) -> Iterator[tuple[Example, torch.Tensor]]:
    for batch in batches:
        inputs, labels = (batch, None) if isinstance(batch, torch.Tensor) else batch
        if labels is None:
            continue
        known = labels >= 0
        if known.all():
            yield inputs, labels
        elif known.any():
            yield map_batched(inputs, operator.itemgetter(known)), labels[known]


def _gate(
    tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """γ ∂L/∂γ + β ∂L/∂β (C,) of one BatchNorm; 0 where it did not run."""
    parts = [
        (tensor.detach() * gradient).double()
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
    ]
    gate: np.ndarray[Any, np.dtype[np.float64]] = (
        sum(parts, torch.zeros_like(tensors[0], dtype=torch.float64)).detach().cpu().numpy()
    )
    return gate
