"""Recovery after a cut: label-free distillation from the wide network (Hinton et al. 2015).

The narrow network learns the outputs and the features of the wide one on augmented calibration
images. BatchNorm statistics do not change. A tenth of the images is held out, and the weights with
the lowest loss on them are kept, possibly those before recovery. If the loss after an epoch exceeds
the lowest one by more than a fifth, training continues from the best weights at a lower learning
rate.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.processes import is_main, world_size
from job.slimming.calibration.memory_format import in_image_format
from job.slimming.calibration.progress import no_progress
from job.slimming.graph.modes import training_mode
from job.slimming.graph.snapshot import preserve_state
from job.slimming.recovery.losses import Comparison, features_of
from job.slimming.recovery.samples import Samples, augmented, chunk_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from job.slimming.calibration.batch import Batches
    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.recovery.samples import Order

STEP_SAMPLES = 32  # samples of a step, over all processes
LEARNING_RATE = 2e-4  # of Adam, with a cosine schedule to 0
WARM_UP = 0.15  # fraction of the steps in which the learning rate rises
MAX_LOSS_RATIO = 1.2  # of the held-out loss to the lowest one; above it, the best weights return
RATE_FACTOR = 1 / 3  # of the learning rate when the best weights return
HELD_OUT_VIEWS = 256  # smallest number of augmented views of the held-out samples
HELD_OUT_DRAW = 2**32  # number of the first of these views; views of training have the epoch


@dataclass(frozen=True)
class Recovered:
    """Result of a recovery: losses of the outputs on the held-out samples, before and after.

    ``epoch`` is the epoch whose weights are kept; 0 stands for those before recovery.
    """

    before: float
    after: float
    epoch: int


def recover(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    keep: Ids,
    batches: Batches,
    epochs: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Recovered:
    """Train ``narrow`` for ``epochs`` to reproduce ``wide``, and keep the best weights.

    ``keep`` (count,) is the mask of the kept channels of ``graph``, the graph of the wide network.
    ``batches`` returns the calibration batches of this process. This is collective: gradients are
    over the samples of all processes. The result depends only on the arguments.
    """
    progress("preparing recovery", 0, 0)
    device = next(narrow.parameters()).device
    samples = Samples(in_image_format(narrow, batches)(), device)
    comparison = Comparison(wide, narrow, features_of(wide, narrow, graph, keep))
    with _frozen(wide), _learning(narrow) as parameters:
        return Recovery(samples, comparison, parameters, seed, progress).run(epochs)


class Recovery:
    """State of a recovery in progress."""

    def __init__(
        self,
        samples: Samples,
        comparison: Comparison,
        parameters: list[nn.Parameter],
        seed: int,
        progress: Progress,
    ) -> None:
        self.samples, self.comparison, self.parameters = samples, comparison, parameters
        self.seed, self.progress = seed, progress
        self.optimizer = torch.optim.Adam(parameters)
        self.rate = LEARNING_RATE
        self.chunk = chunk_size(samples)

    def run(self, epochs: int) -> Recovered:
        """Train, then load the weights with the lowest loss on held-out samples."""
        if not (len(self.samples.learned) and len(self.samples.held_out) and self.parameters):
            return Recovered(math.nan, math.nan, 0)
        self.comparison.measure((v for v, _ in self._held_out_views()), self.parameters[0].device)
        before = lowest = self.held_out_loss()
        best, weights = 0, self._weights()
        for epoch in range(1, epochs + 1):
            self._train(epoch, epochs)
            loss = self.held_out_loss()
            if loss < lowest:
                lowest, best, weights = loss, epoch, self._weights()
            elif not loss <= MAX_LOSS_RATIO * lowest:  # or not a number
                self._set_weights(weights)
                self.rate *= RATE_FACTOR
                self.optimizer = torch.optim.Adam(self.parameters)
        self._set_weights(weights)
        return Recovered(before, lowest, best)

    def _train(self, epoch: int, epochs: int) -> None:
        """Take the optimizer steps of an epoch."""
        order = self.samples.order(epoch, self.seed)
        steps = -(-len(order) // STEP_SAMPLES)
        for step in range(steps):
            self.progress(f"recovering, epoch {epoch} of {epochs}, step", step + 1, steps)
            part = ((epoch - 1) * steps + step + 1) / (epochs * steps)
            rate = self.rate * min(1, part / WARM_UP) * (1 + math.cos(math.pi * part)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.step(order[step * STEP_SAMPLES : (step + 1) * STEP_SAMPLES], epoch)

    def step(self, numbers: Order, epoch: int) -> None:
        """Take an optimizer step on the samples ``numbers`` of all processes."""
        self.optimizer.zero_grad()
        for inputs, count in self._views(numbers, epoch):
            losses = self.comparison.losses(inputs)
            loss = losses.outputs + losses.features
            (loss * (count / len(numbers))).backward()  # type: ignore[no-untyped-call]
        if world_size() > 1:
            _sum_gradients(self.parameters)
        self.optimizer.step()

    def held_out_loss(self) -> float:
        """Return the mean loss of the outputs on views of the held-out samples; collective."""
        self.progress("measuring recovery", 0, 0)
        sums = torch.zeros(2, dtype=torch.float64, device=self.parameters[0].device)
        with torch.no_grad():
            for inputs, count in self._held_out_views():
                loss = self.comparison.losses(inputs).outputs
                sums += torch.stack([loss.double() * count, sums.new_tensor(count)])
        value, count = total(sums).tolist()
        return float(value / count)

    def _held_out_views(self) -> Iterator[tuple[Example, int]]:
        """Yield augmented views of the held-out samples, the same ones at every call.

        Reconstruction fitted the narrow network to the images themselves, so that its loss on them
        is too low.
        """
        numbers = self.samples.held_out
        for view in range(-(-HELD_OUT_VIEWS // len(numbers))):
            yield from self._views(numbers, HELD_OUT_DRAW + view)

    def _views(self, numbers: Order, draw: int) -> Iterator[tuple[Example, int]]:
        """Yield this process's samples of ``numbers``, augmented by ``draw``, and their count."""
        for share in self.samples.shares(numbers, self.chunk):
            inputs = augmented(share, self.samples.count, draw, self.seed)
            yield inputs, len(share.numbers)

    def _weights(self) -> list[torch.Tensor]:
        """Copy the weights of the main process to all processes and return a copy; collective."""
        with torch.no_grad():
            for parameter in self.parameters if world_size() > 1 else ():
                total(parameter if is_main() else parameter.zero_())
            return [parameter.detach().clone() for parameter in self.parameters]

    def _set_weights(self, weights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(value)


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over all processes in one operation; collective."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = total(torch.cat([part.flatten() for part in parts]))
    pieces = torch.split(summed, [part.numel() for part in parts])
    for parameter, part in zip(parameters, pieces, strict=True):
        parameter.grad = part.view_as(parameter)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Put ``network`` in eval mode within the context, and restore its state at the end."""
    with preserve_state(network), training_mode(network, training=False):
        yield


@contextmanager
def _learning(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters to train, in eval mode, which freezes the BatchNorm statistics."""
    learned = [p for p in network.parameters() if p.is_floating_point()]
    before = [(p, p.requires_grad, p.grad) for p in learned]
    with preserve_state(network), training_mode(network, training=False), torch.enable_grad():
        for parameter in learned:
            parameter.requires_grad_(True)
            parameter.grad = None
        try:
            yield learned
        finally:
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
