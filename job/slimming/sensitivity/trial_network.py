"""Trial network: a copy in which one channel group at a time is reduced, to measure its loss.

The consumers of the group are fitted to their previous outputs from the statistics of their inputs.
A pass computes only the layers from the first consumer on and replays the earlier ones.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.processes import rank, world_size
from job.slimming.compensation.constants import layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.normal_equations import RIDGE, fit_held_out
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.graph.selection import unwrap_selection
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.planning.plan import keep_all
from job.slimming.sensitivity.output_loss import (
    are_logits,
    loss_terms,
    mean_loss,
    reference_outputs,
)
from job.slimming.sensitivity.replay import Replay
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import InputStatistics
    from job.slimming.calibration.progress import Progress
    from job.slimming.compensation.cut_pair import Fit
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.ranked_groups import RankedGroup


class TrialNetwork:
    """Copy of a network in which one channel group at a time is reduced."""

    def __init__(
        self,
        network: nn.Module,
        graph: ChannelGraph,
        example: Example,
        statistics: Mapping[str, InputStatistics],
        output_loss: str | None = None,
    ) -> None:
        self.graph, self.statistics, self.output_loss = graph, statistics, output_loss
        self.logits = False  # whether the outputs of the last batch were logits
        self.uses = Counter(call.weight for call in graph.calls)
        biases = {
            layer: LayerChannels(bias=True) for layer in layers_without_constant(network, graph)
        }
        self.network = apply_plan(network, biases)
        self.pair = CutPair(network, self.network, graph, keep_all(graph), biases, example)

    def losses(
        self,
        groups: Sequence[RankedGroup],
        points: Sequence[Sequence[int]],
        batches: Sequence[Example],
        consumers: Mapping[str, Sequence[Consumer]],
        progress: Progress,
    ) -> torch.Tensor:
        """Return the losses (points,) of all groups, one group after the other, over all processes.

        Every process calls ``progress`` at the same steps.
        """
        device = next(self.network.parameters()).device
        most = torch.zeros(world_size(), dtype=torch.float64, device=device)
        most[rank()] = len(batches)
        rounds = int(total(most).max())
        evaluations = sum(map(len, points))
        terms: torch.Tensor | None = None
        with eval_with_hooks(self.network, []):
            for number in range(rounds):
                replay, reference, parts = None, list[torch.Tensor](), list[torch.Tensor]()
                if number < len(batches):
                    replay = self._replay(batches[number])
                    reference = reference_outputs(replay.outputs)
                    self.logits = are_logits(reference, self.output_loss)
                for place, (ranked, counts) in enumerate(zip(groups, points, strict=True)):
                    progress(
                        "measuring output losses",
                        number * len(groups) + place + 1,
                        rounds * len(groups),
                    )
                    if replay:
                        of_group = consumers[ranked.group.name]
                        parts += self._terms(replay, reference, ranked, counts, of_group)
                if replay:
                    stacked = torch.stack(parts)
                    terms = stacked if terms is None else terms + stacked
        tensors = torch.zeros(3, dtype=torch.float64, device=device)
        if terms is not None:
            tensors = tensors.new_tensor([terms.shape[1], 1.0, float(self.logits)])
        shape = total(tensors)
        if not shape[1]:
            return torch.zeros(evaluations, dtype=torch.float64)
        self.logits = bool(shape[2])
        if terms is None:
            size = int(shape[0] / shape[1])
            terms = torch.zeros(evaluations, size, 2, dtype=torch.float64, device=device)
        return mean_loss(total(terms)).cpu()

    def _replay(self, batch: Example) -> Replay:
        blocks = not self.graph.forward.keeps_activations  # a replayed block would not keep any
        return Replay(self.network, batch, blocks=blocks)

    def _terms(
        self,
        replay: Replay,
        reference: Sequence[torch.Tensor],
        ranked: RankedGroup,
        counts: Sequence[int],
        consumers: Sequence[Consumer],
    ) -> Iterator[torch.Tensor]:
        """Yield the terms (tensors, 2) of the loss of one batch at each point of one group."""
        place = replay.first_call({consumer.layer: self._uses(consumer) for consumer in consumers})
        for count in counts:
            keep = keep_all(self.graph)
            keep[ranked.units[count:].reshape(-1)] = False
            with self._reduced(consumers, keep):
                yield loss_terms(reference, replay.run_from(place), logits=self.logits)

    def _uses(self, consumer: Consumer) -> int:
        return self.uses[f"{consumer.layer}.weight"]

    @contextmanager
    def _reduced(self, consumers: Sequence[Consumer], keep: Ids) -> Iterator[None]:
        """Fit ``consumers`` to the channels of the mask ``keep`` within the context."""
        changed = [t for consumer in consumers for t in self._tensors(consumer.layer)]
        saved = [tensor.detach().clone() for tensor in changed]
        try:
            for consumer in consumers:
                self.pair.apply_fits(consumer, self._fits(consumer, keep))
            yield
        finally:
            with torch.no_grad():
                for tensor, values in zip(changed, saved, strict=True):
                    tensor.copy_(values)

    def _fits(self, consumer: Consumer, keep: Ids) -> Iterator[Fit]:
        """Yield, for each group, the fit of all inputs by the kept ones: (C, C) and (C,)."""
        measured = self.statistics[consumer.layer]
        for part, stays in replace(self.pair, keep=keep).kept_columns(consumer):
            kept, missing = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
            order = part.start + torch.cat([kept, missing])
            fitted, held_out = (
                moments.select(order, len(kept)) for moments in (measured.fitted, measured.held_out)
            )
            _, (change, constant) = fit_held_out(fitted, held_out, RIDGE)
            slope, constants = torch.diag(stays.double()), torch.zeros(len(stays)).double()
            slope[:, stays] = slope[:, stays].index_copy(0, missing, change[0].T)
            constants[missing] = constant[0]
            yield slope, constants

    def _tensors(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the tensors that a fit of the layer ``name`` may change."""
        layer = self.network.get_submodule(name)
        yield layer.get_parameter("weight")
        if layer.bias is not None:
            yield layer.get_parameter("bias")
        for norm in self.graph.forward.norms_after.get(name, ()):
            module = unwrap_selection(self.network.get_submodule(norm))
            if module.running_mean is not None:
                yield module.get_buffer("running_mean")
