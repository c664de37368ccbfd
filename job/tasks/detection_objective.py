"""The objective of detection: the network's own losses, and mean average precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from job.models.detectors import detection_losses, find_boxes
from job.slimming.inputs import tensors_in
from job.tasks.average_precision import match_image, mean_average_precision
from job.training.objective import SplitScores, as_sums
from job.training.trial import has_unused_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from job.models.input_size import InputSize
    from job.tasks.average_precision import ImageMatches
    from job.training.distillation import Distillation
    from job.training.objective import Run

METRICS = ("map", "map50")  # at IoUs from 0.5 to 0.95, and at 0.5; the first chooses models


class DetectionTarget(TypedDict):
    """Target of an image: boxes (n, 4) in pixels, their labels (n,), and which are crowds (n,).

    ``number`` is the index of the image, and ``seed`` the seed for sampling boxes in training.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    crowd: torch.Tensor
    number: int
    seed: int


class DetectorOutputs(TypedDict):
    """Losses of a batch, their sum and count, and the boxes found in each image in eval mode."""

    loss: torch.Tensor
    count: torch.Tensor | int
    boxes: list[dict[str, torch.Tensor]]


class ImagesAndTargets(NamedTuple):
    """Inputs of a detector in training: images (3, H, W) float32 in [0, 1], and their targets."""

    images: list[torch.Tensor]
    targets: list[DetectionTarget]


class DetectorModule(torch.nn.Module):
    """Module around a detector that returns the sum of its losses and their count.

    In eval mode it also returns the boxes that it finds.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: ImagesAndTargets) -> DetectorOutputs:
        """Return ``loss``, ``count``, and in eval mode ``boxes``, of a batch."""
        images, targets = inputs
        trained = [_without_crowds(target) for target in targets]
        loss, count = detection_losses(self.network, images, trained)
        found = [] if self.training else find_boxes(self.network, images)
        return {"loss": loss, "count": count, "boxes": found}


@dataclass(frozen=True)
class DetectionObjective:
    """Losses of a detector and mean average precision. The sums are the loss and its count.

    ``transform`` is the network's own resizing and normalisation of images.
    """

    transform: Any
    metric: str = METRICS[0]
    length: int = 2

    def module(self, network: nn.Module, run: Run | None = None) -> nn.Module:  # noqa: D102
        return DetectorModule(network)

    def has_unused_parameters(self, network: nn.Module, size: InputSize) -> bool:  # noqa: D102
        return has_unused_parameters(network, size, floats_in)

    def place(self, batch: Any) -> tuple[Any, Any]:
        """Return images as float32 in [0, 1] with their targets, and the targets."""
        images, targets = batch
        return ImagesAndTargets([image.float().div_(255) for image in images], targets), targets

    def batched(self, inputs: Any) -> torch.Tensor:
        """Return the inputs (B, 3, H, W) that the layers of the network get for some images."""
        batch: torch.Tensor = self.transform(inputs.images)[0].tensors
        return batch

    def measure(  # noqa: D102
        self,
        outputs: Any,
        inputs: Any,
        targets: Any,
        distillation: Distillation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = outputs["loss"]
        parts = loss.detach(), outputs["count"]
        return loss, torch.cat([as_sums(part, loss.device) for part in parts])

    def details(self, outputs: Any, targets: Any) -> list[ImageMatches]:
        """Return the matched boxes of each image, which the metric is computed from."""
        return [
            match_image(
                target["number"],
                _arrays(found["boxes"], found["labels"], found["scores"].float()),
                _arrays(target["boxes"], target["labels"], target["crowd"]),
            )
            for found, target in zip(outputs["boxes"], targets, strict=True)
        ]

    def auxiliary(self, _outputs: Any) -> int:  # noqa: D102
        return 0

    def counted(self, sums: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return sums[1]

    def scores(
        self, sums: torch.Tensor, _samples: int, details: Sequence[ImageMatches] | None = None
    ) -> SplitScores:
        """Return the loss of a split, and its metrics if there are ``details``."""
        loss, count = sums.tolist()
        found = (
            {}
            if details is None
            else dict(zip(METRICS, mean_average_precision(details), strict=True))
        )
        return SplitScores(loss / count if count else float("nan"), self.metric, found)


def floats_in(outputs: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in the outputs of a network."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _without_crowds(target: DetectionTarget) -> DetectionTarget:
    """Return the target for training, without crowds: their boxes contain several objects."""
    kept = ~target["crowd"]
    return {**target, "boxes": target["boxes"][kept], "labels": target["labels"][kept]}


def _arrays(*tensors: torch.Tensor) -> Any:
    return tuple(tensor.detach().cpu().numpy() for tensor in tensors)
