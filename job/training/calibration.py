"""Calibration images: a sample of the training split, preprocessed as in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.data.loader import Loader, iterate_batches
from job.data.task_items import plain_items
from job.processes import rank, world_size
from job.slimming.calibration.batch import MAX_IMAGES, image_limit
from job.training.evaluation import batch_size_at
from job.training.objective import ClassificationObjective

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from accelerate import Accelerator

    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split
    from job.distributed.stop import Watch
    from job.training.objective import Objective


class Calibration:
    """A fixed sample of the training images, in an order drawn by ``seed``; keeps its loader."""

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        workers: int,
        seed: int,
        watch: Watch | None = None,
        *,
        most: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or ClassificationObjective(preprocessing)
        self.labelled = objective is None  # targets of other tasks are no labels
        self.preprocessing, self.accelerator, self.watch = preprocessing, accelerator, watch
        self.most = image_limit(preprocessing.size) if most is None else most
        self.progress = progress
        self.sampler = _FirstShare(len(split), batch_size_at(preprocessing.size), seed)
        self.loader = Loader(
            plain_items(split, preprocessing),
            self.sampler,
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def check(self) -> None:
        """Raise StopRequest on every process when a stop is requested; collective."""
        if self.watch:
            self.watch.check()

    def batches(
        self, count: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield this rank's share of the first ``count`` images: inputs (B, 3, S, S), labels (B,).

        By default ``count`` is ``most``. Collective. Raises StopRequest when a stop is requested.
        """
        device = self.accelerator.device
        self.sampler.count = self.most if count is None else count
        for number, batch in enumerate(iterate_batches(self.loader, device)):
            if number < self.sampler.common:
                self.check()
            if self.progress:
                self.progress(number, len(self.sampler))
            inputs, targets = self.objective.place(batch)
            yield self.objective.batched(inputs), targets if self.labelled else None


class _FirstShare:
    """Batch sampler: images r, r + W, … of rank r among the first ``count`` of a permutation."""

    def __init__(self, total: int, batch_size: int, seed: int) -> None:
        key = np.random.Generator(np.random.Philox(seed))
        self.order, self.batch_size = key.permutation(total), batch_size
        self.count = MAX_IMAGES

    @property
    def common(self) -> int:
        """Number of batches that every process has."""
        return min(self.count, len(self.order)) // world_size() // self.batch_size

    def _indices(self) -> list[int]:
        indices: list[int] = self.order[: self.count][rank() :: world_size()].tolist()
        return indices

    def __len__(self) -> int:
        return -(-len(self._indices()) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        indices = self._indices()
        for start in range(0, len(indices), self.batch_size):
            yield indices[start : start + self.batch_size]
