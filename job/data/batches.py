"""Batches of images as workers make them: read, augmented or centred, stacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from job.data.augmentation import center_arrays, small_arrays
from job.data.splits import UNLABELLED, ArraySplit, Split
from job.errors import DataError, StorageError

if TYPE_CHECKING:
    from PIL import Image

    from job.data.preprocessing import Preprocessing
    from job.data.sample_order import Draw

Batch = tuple[torch.Tensor, torch.Tensor]  # images (B, H, W, 3) uint8, labels (B,) int64
Failure = DataError | StorageError
FAILURES = (DataError, StorageError)


@dataclass(frozen=True)
class TrainingImages:
    """Augmented images by table row; what the loader's workers see."""

    split: Split
    preprocessing: Preprocessing

    def __getitems__(self, draws: list[Draw]) -> Batch | Incomplete | Failure:
        """One rank's part of a global batch, possibly empty; an error travels as a value."""
        size, whole = self.preprocessing.size, not self.preprocessing.resizing.side
        if self.preprocessing.preset == "small" and whole and isinstance(self.split, ArraySplit):
            images = small_arrays(self.split.images, draws, size)
            return _batch(images, self.split, [d.index for d in draws], size)
        reader = Reader(self.split)
        try:
            crops = [self.preprocessing.train(reader.read(d.index), d) for d in draws]
        except FAILURES as error:  # raised here, a worker's traceback would become its message
            return error
        arrays = [np.asarray(crop) for crop in crops]
        return reader.told(_batch(arrays, self.split, [d.index for d in draws], size))


@dataclass(frozen=True)
class EvaluationImages:
    """Images as evaluation sees them, by index."""

    split: Split
    preprocessing: Preprocessing
    leave_out: bool = False  # what cannot be read any more, by the label -1

    def __getitems__(self, indices: list[int]) -> Batch | Incomplete | Failure:
        """The images at ``indices``."""
        size = self.preprocessing.size
        if not self.preprocessing.resizing.side and isinstance(self.split, ArraySplit):
            images = center_arrays(self.split.images, indices, size)
            return _batch(images, self.split, indices, size)
        reader = Reader(self.split)
        try:
            crops = [self.preprocessing.evaluate(reader.read(i)) for i in indices]
        except FAILURES as error:
            return error
        batch = _batch([np.asarray(crop) for crop in crops], self.split, indices, size)
        if self.leave_out and reader.failed:
            batch[1][[index in reader.failed for index in indices]] = UNLABELLED
        return reader.told(batch)


class Reader:
    """Reads a batch's images; in a lenient split another of the class stands in for one that fails.

    Which one depends on nothing but the split, so every rank and every attempt takes the same.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.failed: dict[int, str] = {}  # images that could not be read, and why

    def read(self, index: int) -> Image.Image:
        """Image ``index``, or the next of its class that can be read.

        Raises DataError where there is none or the split is not lenient, and StorageError.
        """
        try:
            return self.split.image(index)
        except DataError as error:
            if not self.split.lenient:
                raise
            self.failed[index] = str(error)
            for other in self._others(index):
                try:
                    return self.split.image(other)
                except DataError:
                    continue
            raise

    def _others(self, index: int) -> list[int]:
        labels = self.split.labels
        same = np.flatnonzero(labels == labels[index])
        place = int(np.searchsorted(same, index))
        return [*same[place + 1 :].tolist(), *same[:place].tolist()]

    def told(self, batch: Batch) -> Batch | Incomplete:
        """``batch``, with what is to be said of it."""
        return Incomplete(batch, tuple(self.failed.values())) if self.failed else batch


class Incomplete(NamedTuple):
    """A batch in which other images stand in for some that cannot be read; ``why`` says which."""

    batch: Batch
    why: tuple[str, ...]


def _batch(images: Any, split: Split, indices: list[int], size: int) -> Batch:
    stacked = np.asarray(images, np.uint8)
    if stacked.ndim == 3:
        stacked = np.repeat(stacked[..., None], 3, axis=3)
    stacked = np.ascontiguousarray(stacked.reshape(len(indices), size, size, 3))
    return torch.from_numpy(stacked), torch.from_numpy(split.labels[indices])
