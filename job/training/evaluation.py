"""Loss, accuracy and confusion of a network on a split; each image counts exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from job.console import counted
from job.data.batches import PlainImages
from job.data.loader import Loader, iterate_batches
from job.data.samplers import RankShare
from job.data.splits import UNLABELLED
from job.distributed.collectives import total
from job.errors import DataError, GammaslimError
from job.models.outputs import logits_of
from job.processes import rank, world_size
from job.slimming.calibration.memory_format import ImageFormat
from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from accelerate import Accelerator
    from torch import nn

    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split
    from job.distributed.stop import Watch

MAX_CLASSES = 10_000  # the confusion matrix then takes 0.8 GB
PIXELS = 256 * 32 * 32  # of an evaluation batch per process, approximately


def batch_size_at(size: int) -> int:
    """Return the batch size of a process for images of side ``size`` pixels, without training."""
    return max(1, min(256, PIXELS // size**2))


@dataclass(frozen=True)
class Evaluation:
    """Loss and confusion: (C, C) int64, images by true class (row) and predicted class.

    ``predictions`` (N,) int64 are the predicted classes in the order of the split; -1 for an image
    that could not be read.
    """

    loss: float
    confusion: torch.Tensor
    predictions: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of images evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return int(self.confusion.diagonal().sum()) / self.count

    @property
    def metric(self) -> str:
        """Name of the accuracy in keys."""
        return ACCURACY

    @property
    def others(self) -> dict[str, float]:
        """Metrics next to the accuracy: none."""
        return {}

    @property
    def class_accuracy(self) -> list[float | None]:
        """Fraction of correct predictions per true class; None for a class without images."""
        counts = self.confusion.sum(1).tolist()
        correct = self.confusion.diagonal().tolist()
        return [c / n if n else None for c, n in zip(correct, counts, strict=True)]


class Evaluator:
    """Evaluates networks on one split; keeps its loader and workers between calls."""

    def __init__(
        self,
        split: Split,
        num_classes: int,
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        workers: int,
    ) -> None:
        highest = int(split.labels.max(initial=0))
        if highest >= num_classes:
            raise DataError(
                f"the data have a class {highest} but the network has "
                f"{counted(num_classes, 'class')}, "
                "numbered from 0"
            )
        if num_classes > MAX_CLASSES:
            raise DataError(f"{num_classes:,} classes are too many: at most {MAX_CLASSES:,}")
        self.split, self.preprocessing, self.num_classes = split, preprocessing, num_classes
        self.accelerator = accelerator
        self.batch_size = batch_size_at(preprocessing.size)
        self.batches = Loader(
            PlainImages(split, preprocessing, mask_unreadable=True),
            RankShare(len(split), self.batch_size, rank(), world_size()),
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def _outputs(
        self, network: nn.Module, progress: Callable[[Iterable[Any]], Iterable[Any]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits (B, C) float32 and labels (B,) of each batch of this rank's images."""
        device = self.accelerator.device
        if next(network.parameters()).device.type != device.type:  # "cpu" is also called "cpu:0"
            # avoid an unnecessary .to(): it replaces the gradient accumulators and so removes DDP's
            # hooks; the processes would then train independently
            network.to(device)
        network.eval()
        fitted = ImageFormat(network)
        with torch.inference_mode(), self.accelerator.autocast():
            for images, labels in progress(iterate_batches(self.batches, device)):
                inputs = fitted(self.preprocessing.to_input(images))
                yield logits_of(network(inputs)).float(), labels

    def try_batch(self, network: nn.Module) -> None:
        """Evaluate ``network`` on the first batch."""
        next(self._outputs(network, lambda batches: batches), None)

    def __call__(
        self,
        network: nn.Module,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
        watch: Watch | None = None,
    ) -> Evaluation:
        """Evaluate ``network`` on the whole split; collective, with the same result everywhere.

        Raises StopRequest when ``watch`` reports a stop request.
        """
        device, classes = self.accelerator.device, self.num_classes
        # the loss, and the number of images that can no longer be read and are left out
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # the last number counts the images without a label
        confusion = torch.zeros(classes**2 + 1, dtype=torch.int64, device=device)
        # batches that every process has
        common = len(self.split) // world_size() // self.batch_size
        predicted = []
        for number, (logits, labels) in enumerate(self._outputs(network, progress)):
            if watch and number < common:
                watch.check()
            readable, classes_of = labels != UNLABELLED, logits.argmax(1)
            predicted.append(torch.where(readable, classes_of, UNLABELLED))
            if self.split.lenient:
                sums[1] += (~readable).sum()
            # nothing here waits for a GPU: a boolean index and bincount would
            sums[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)
            pairs = torch.where(readable, labels * classes + classes_of, classes**2)
            confusion.index_add_(0, pairs, torch.ones_like(pairs))
        total(sums), total(confusion)
        loss, left_out = sums.tolist()
        count = len(self.split) - int(left_out)
        if not count:
            raise DataError("no image of the split can be read now")
        predictions = self._gathered(predicted, torch.int64).cpu()
        pairs = confusion[:-1].view(classes, classes).cpu()
        result = Evaluation(loss / count, pairs, predictions)
        if result.count != count:
            raise GammaslimError(f"{result.count} of {count} images were evaluated")
        return result

    def predict(
        self,
        network: nn.Module,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches,
    ) -> tuple[list[int], list[float]]:
        """Return the predicted class and its softmax probability for every image; collective.

        Both are in the order of the split. Images that can no longer be read get class -1.
        """
        predictions, readable = [], []
        for logits, labels in self._outputs(network, progress):
            predictions.append(logits.double().softmax(1).max(1))
            readable.append(labels != UNLABELLED)
        classes = [
            torch.where(known, best.indices, UNLABELLED)
            for best, known in zip(predictions, readable, strict=True)
        ]
        probabilities = self._gathered([best.values for best in predictions], torch.float64)
        return self._gathered(classes, torch.int64).tolist(), probabilities.tolist()

    def _gathered(self, batches: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the values (N,) of all images in the order of the split; collective."""
        values = torch.zeros(len(self.split), dtype=dtype, device=self.accelerator.device)
        if batches:
            values[rank() :: world_size()] = torch.cat(batches)
        return total(values)
