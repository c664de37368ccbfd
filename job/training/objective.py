"""Objectives: how a batch reaches the network, its loss, and sums for the metrics of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from job.errors import DataError, UsageError
from job.models.outputs import Logits
from job.processes import world_size
from job.slimming.inputs import map_tensors, tensors_in
from job.training.attempt import attempt
from job.training.epoch import ACCURACY
from job.training.loss import batch_loss
from job.training.trial import has_unused_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from job.data.preprocessing import Preprocessing
    from job.models.input_size import InputSize
    from job.training.distillation import Distillation
    from job.training.task import Task

    Run = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class SplitScores:
    """Means over a split: the loss, and metrics by name, without those that had no count."""

    loss: float
    metric: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The metric that chooses models."""
        return self.metrics[self.metric]

    @property
    def others(self) -> dict[str, float]:
        """The other metrics."""
        return {name: value for name, value in self.metrics.items() if name != self.metric}

    @property
    def predictions(self) -> None:
        """None: there are no predicted classes."""


class Objective(Protocol):
    """Interface of the trainer to a task."""

    @property
    def length(self) -> int:
        """Number of sums."""

    def module(self, network: nn.Module, run: Run | None = None) -> nn.Module:
        """Return the module to train, a wrapper that calls ``run`` or else ``network``."""

    def has_unused_parameters(self, network: nn.Module, size: InputSize) -> bool:
        """Return whether DDP must look for parameters without a gradient; collective."""

    def place(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """Return the inputs of the network and the targets of a batch on the device."""

    def measure(
        self,
        outputs: Any,
        inputs: torch.Tensor,
        targets: Any,
        distillation: Distillation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch, a scalar, and its sums (length,) float64."""

    def auxiliary(self, outputs: Any) -> int:
        """Return the number of auxiliary classifiers in ``outputs``."""

    def counted(self, sums: torch.Tensor) -> torch.Tensor | None:
        """Return the count that the loss is divided by; None for the number of samples."""

    def scores(self, sums: torch.Tensor, samples: int) -> SplitScores:
        """Return the loss and metrics of a split of ``samples`` samples from its ``sums``."""

    def batched(self, inputs: Any) -> torch.Tensor:
        """Return inputs as one tensor (B, …), as the layers of the network get them."""


class OwnObjective(Objective, Protocol):
    """Objective with the additional interface that the evaluation of other tasks needs."""

    @property
    def metric(self) -> str:
        """Name of the metric that chooses models."""

    def details(self, outputs: Any, targets: Any) -> list[Any]:
        """Return what the metrics need of each sample beyond sums; empty if nothing."""

    def scores(
        self, sums: torch.Tensor, samples: int, details: Sequence[Any] | None = None
    ) -> SplitScores:
        """Return the means of a split, and the metrics of the ``details`` of all samples."""


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross entropy and accuracy of images with one label each.

    The sums are the loss and the number of correct predictions.
    """

    preprocessing: Preprocessing
    length: int = 2

    def module(self, network: nn.Module, run: Run | None = None) -> nn.Module:  # noqa: D102
        return Logits(network, run)

    def has_unused_parameters(self, network: nn.Module, size: InputSize) -> bool:  # noqa: D102
        return has_unused_parameters(network, size)

    def place(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs (B, 3, S, S) float32 and labels (B,)."""
        images, labels = batch
        return self.preprocessing.to_input(images), labels

    def measure(  # noqa: D102
        self,
        outputs: Any,
        inputs: torch.Tensor,
        targets: Any,
        distillation: Distillation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, *auxiliary = (output.float() for output in outputs)
        loss = batch_loss(logits, auxiliary, inputs, targets, distillation)
        correct = (logits.argmax(1) == targets).sum()
        return loss, torch.stack([loss.detach().double(), correct.double()])

    def auxiliary(self, outputs: Any) -> int:  # noqa: D102
        return len(outputs) - 1

    def counted(self, _sums: torch.Tensor) -> None:  # noqa: D102
        return None

    def batched(self, inputs: Any) -> torch.Tensor:  # noqa: D102
        return inputs  # type: ignore[no-any-return]

    def scores(self, sums: torch.Tensor, samples: int) -> SplitScores:  # noqa: D102
        loss, accuracy = (sums / samples).tolist()
        return SplitScores(loss, ACCURACY, {ACCURACY: accuracy})


class Outputs(torch.nn.Module):
    """Network that returns the outputs of ``network``, or those that ``run`` computes."""

    def __init__(self, network: nn.Module, run: Run | None = None) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, inputs: torch.Tensor) -> Any:
        """Return the outputs for ``inputs``."""
        return self.run(inputs) if self.run else self.network(inputs)


@dataclass(frozen=True)
class TaskObjective:
    """Loss and metrics of a user's task; ``layout`` gives the elements of the sums, by name.

    The sums are the loss and its count, then those of ``metrics`` and their counts. ``names`` are
    those of the metrics, if the task has a method ``scores``.
    """

    task: Task
    layout: Mapping[str, int]
    names: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The metric that chooses models: the first one."""
        return next(iter(self.names or self.layout))

    @property
    def length(self) -> int:  # noqa: D102
        return 2 + 2 * sum(self.layout.values())

    def module(self, network: nn.Module, run: Run | None = None) -> nn.Module:  # noqa: D102
        return Outputs(network, run)

    def has_unused_parameters(self, network: nn.Module, size: InputSize) -> bool:  # noqa: D102
        return has_unused_parameters(network, size, _floats_in)

    def place(self, batch: Any) -> tuple[torch.Tensor, Any]:  # noqa: D102
        inputs, targets = batch
        convert = getattr(self.task, "inputs", None)
        return convert(inputs) if convert else inputs, targets

    def measure(  # noqa: D102
        self,
        outputs: Any,
        inputs: torch.Tensor,
        targets: Any,
        distillation: Distillation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = map_tensors(outputs, lambda t: t.float() if t.is_floating_point() else t)
        if not len(inputs):  # this process has no sample of the global batch
            loss = torch.stack([tensor.sum() for tensor in _floats_in(outputs)])
            return loss.sum() * 0, torch.zeros(self.length, dtype=torch.float64, device=loss.device)
        loss, count = _of_task("loss", self.task.loss, outputs, targets)
        if world_size() > 1:  # DDP waits for outputs that the loss of this batch leaves out
            loss = loss + torch.stack([t[:0].sum() for t in _floats_in(outputs) if t.dim()]).sum()
        with torch.no_grad():
            detached = map_tensors(outputs, torch.Tensor.detach)
            found = _of_task("metrics", self.task.metrics, detached, targets)
        if found.keys() != self.layout.keys():
            raise UsageError(
                f"metrics() returned {', '.join(map(str, found)) or 'nothing'} for a batch, and "
                f"{', '.join(self.layout)} before: return the same metrics for every batch"
            )
        parts = [loss.detach(), count, *(part for name in self.layout for part in found[name])]
        sums = torch.cat([as_sums(part, loss.device) for part in parts])
        if distillation:
            wide = distillation.outputs(inputs)
            own: Any = self.task.distillation_loss  # type: ignore[attr-defined]
            soft = _of_task("distillation_loss", own, outputs, wide, distillation.temperature)
            loss = distillation.alpha * soft + (1 - distillation.alpha) * loss
            sums[0] = loss.detach()
        return loss, sums

    def auxiliary(self, _outputs: Any) -> int:  # noqa: D102
        return 0

    def counted(self, sums: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return sums[1]

    def batched(self, inputs: Any) -> torch.Tensor:  # noqa: D102
        return inputs  # type: ignore[no-any-return]

    def details(self, _outputs: Any, _targets: Any) -> list[Any]:
        """Return nothing: metrics are sums."""
        return []

    def scores(  # noqa: D102
        self, sums: torch.Tensor, samples: int, _details: Sequence[Any] | None = None
    ) -> SplitScores:
        loss, count, start, totals = float(sums[0]), float(sums[1]), 2, {}
        if samples and count <= 0:
            raise DataError(
                f"loss() returned counts that sum up to {count:g} for a split: the loss is the sum "
                "over the count, which must be positive"
            )
        for name, size in self.layout.items():
            totals[name] = sums[start : start + size], sums[start + size : start + 2 * size]
            start += 2 * size
        if self.names:
            on_cpu = {name: (sums.cpu(), counts.cpu()) for name, (sums, counts) in totals.items()}
            found = _of_task("scores", self.task.scores, on_cpu)  # type: ignore[attr-defined]
            metrics = {name: float(found[name]) for name in self.names}
        else:
            metrics = {
                name: mean_ratio(*pair)
                for name, pair in totals.items()
                if name == self.metric or (pair[1] > 0).any()
            }
            if samples and not (totals[self.metric][1] > 0).any():
                raise DataError(
                    f"the metric {self.metric}, which chooses models, has no value for a split: "
                    "metrics() returned a count of 0 for all of its items"
                )
        mean = loss / count if count else math.nan
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong and (math.isfinite(mean) or not samples):  # else the loss tells more
            why = "metrics() returned a sum or count that is not finite for some of its items"
            raise DataError(
                f"the metric {wrong[0]} of a split is {metrics[wrong[0]]}: "
                f"{'scores() returned it' if self.names else why}"
            )
        return SplitScores(mean, self.metric, metrics)


def _of_task(name: str, method: Callable[..., Any], *args: Any) -> Any:
    """Call a method of the user's task; raises DataError, with the line, if it fails."""
    return attempt(f"{name}() of the task fails", method, *args, kind=DataError)


def _floats_in(outputs: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in the outputs of a network."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def mean_ratio(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Return the mean of ``sums`` (n,) over ``counts`` (n,) where there are any, else 0."""
    has_count = counts > 0
    ratios = sums[has_count] / counts[has_count]
    return float(ratios.mean()) if len(ratios) else 0.0


def as_sums(value: Any, device: torch.device) -> torch.Tensor:
    """Return a number, or numbers, as a flat tensor (n,) float64 on the device."""
    if isinstance(value, bool | int | float):  # a copy to a GPU would wait for it
        return torch.full((1,), float(value), dtype=torch.float64, device=device)
    return torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(-1)
