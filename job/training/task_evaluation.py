"""Loss and metrics of a network on the items of a task; each item counts exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.data.loader import Loader, iterate_batches
from job.data.samplers import RankShare
from job.data.task_items import ItemSplit, TaskItems
from job.distributed.collectives import gather, total
from job.processes import rank, world_size
from job.slimming.calibration.memory_format import ImageFormat
from job.training.evaluation import batch_size_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from accelerate import Accelerator
    from torch import nn

    from job.distributed.stop import Watch
    from job.training.objective import OwnObjective, SplitScores


class TaskEvaluator:
    """Evaluates networks on one split of a task; keeps its loader and workers between calls.

    ``size`` is the longer side of the inputs, which the batch size follows from.
    """

    def __init__(
        self,
        split: ItemSplit,
        objective: OwnObjective,
        size: int,
        accelerator: Accelerator,
        workers: int,
    ) -> None:
        self.split, self.objective, self.accelerator = split, objective, accelerator
        self.batch_size = batch_size_at(size)
        self.batches = Loader(
            TaskItems(split),
            RankShare(len(split), self.batch_size, rank(), world_size()),
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def _sums(
        self, network: nn.Module, progress: Callable[[Iterable[Any]], Iterable[Any]]
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """Yield the sums and details of each batch of this rank's items."""
        device = self.accelerator.device
        if next(network.parameters()).device.type != device.type:  # see Evaluator
            network.to(device)
        module = self.objective.module(network).eval()
        fitted = ImageFormat(network)
        with torch.inference_mode():
            for batch in progress(iterate_batches(self.batches, device)):
                inputs, targets = self.objective.place(batch)
                inputs = fitted(inputs)
                with self.accelerator.autocast():
                    outputs = module(inputs)
                sums = self.objective.measure(outputs, inputs, targets)[1]
                yield sums, self.objective.details(outputs, targets) if len(inputs) else []

    def try_batch(self, network: nn.Module) -> None:
        """Evaluate ``network`` on the first batch."""
        next(self._sums(network, lambda batches: batches), None)

    def __call__(
        self,
        network: nn.Module,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
        watch: Watch | None = None,
    ) -> SplitScores:
        """Evaluate ``network`` on the whole split; collective, with the same result everywhere.

        Raises StopRequest when ``watch`` reports a stop request.
        """
        device = self.accelerator.device
        sums = torch.zeros(self.objective.length, dtype=torch.float64, device=device)
        common = len(self.split) // world_size() // self.batch_size  # batches of every process
        details: list[Any] = []
        for number, (part, more) in enumerate(self._sums(network, progress)):
            if watch and number < common:
                watch.check()
            sums += part
            details += more
        every = [detail for share in gather(details) for detail in share]
        return self.objective.scores(total(sums), len(self.split), every)
