"""Pictures to calibrate by: some of the training split, as evaluation sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.data.batches import PlainImages
from job.data.loader import build_loader, iterate_batches
from job.processes import rank, world_size
from job.slimming.calibration.batch import MOST_IMAGES, image_limit
from job.training.evaluation import batch_size_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from accelerate import Accelerator

    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split
    from job.distributed.stop import Watch


class Calibration:
    """The same pictures for every use, in an order drawn by the seed; keeps its loader."""

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
    ) -> None:
        self.preprocessing, self.accelerator, self.watch = preprocessing, accelerator, watch
        self.most = image_limit(preprocessing.size) if most is None else most
        self.progress = progress
        self.sampler = _FirstShare(len(split), batch_size_at(preprocessing.size), seed)
        self.loader = build_loader(
            PlainImages(split, preprocessing),
            self.sampler,
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def check(self) -> None:
        """Raise StopRequest on every process when somebody has asked to stop; collective."""
        if self.watch:
            self.watch.check()

    def batches(self, count: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's part of the first ``count`` pictures: (B, 3, S, S) inputs and labels (B,).

        By default of ``image_limit`` their size.
        All processes go through theirs together. Raises StopRequest when ``watch`` says so.
        """
        device = self.accelerator.device
        self.sampler.count = self.most if count is None else count
        for number, (images, labels) in enumerate(iterate_batches(self.loader)):
            if number < self.sampler.common:
                self.check()
            if self.progress:
                self.progress(number, len(self.sampler))
            inputs = self.preprocessing.to_input(images.to(device, non_blocking=True))
            yield inputs, labels.to(device, non_blocking=True)


class _FirstShare:
    """Batch sampler: pictures r, r + W, … of rank r among the first ``count`` of a permutation."""

    def __init__(self, total: int, batch_size: int, seed: int) -> None:
        key = np.random.Generator(np.random.Philox(seed))
        self.order, self.batch_size = key.permutation(total), batch_size
        self.count = MOST_IMAGES

    @property
    def common(self) -> int:
        """Batches that every process has."""
        return min(self.count, len(self.order)) // world_size() // self.batch_size

    def _own(self) -> list[int]:
        own: list[int] = self.order[: self.count][rank() :: world_size()].tolist()
        return own

    def __len__(self) -> int:
        return -(-len(self._own()) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        own = self._own()
        for start in range(0, len(own), self.batch_size):
            yield own[start : start + self.batch_size]
