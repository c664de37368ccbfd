"""Batches of images, made in loader processes: read, augmented or centre-cropped, stacked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from job.data.augmentation import center_crop_arrays
from job.data.cache.cached_split import CachedSplit, ImageArray
from job.data.presets import PRESETS
from job.data.rotation import rotation_coefficients
from job.data.splits import UNLABELLED, ArraySplit, Split
from job.errors import DataError, StorageError

if TYPE_CHECKING:
    from job.data.geometry import Croppable
    from job.data.preprocessing import Preprocessing
    from job.data.sample_order import Draw

Batch = tuple[torch.Tensor, torch.Tensor]  # images (B, H, W, 3) uint8, labels (B,) int64
Failure = DataError | StorageError
FAILURES = (DataError, StorageError)
AnyBatch = TypeVar("AnyBatch")


class UnrotatedBatch(NamedTuple):
    """A batch that the device rotates, by coefficients (B, 6) int32 of `job.data.rotation`."""

    images: torch.Tensor
    labels: torch.Tensor
    rotation: torch.Tensor


TrainingBatch = Batch | UnrotatedBatch


class IncompleteBatch(NamedTuple, Generic[AnyBatch]):
    """A batch in which unreadable images are replaced; ``reasons`` has an error for each."""

    batch: AnyBatch
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class AugmentedImages:
    """The augmented images of a split, indexed by rows of the epoch table.

    With ``rotate_later``, `job.data.device_batches` rotates them.
    """

    split: Split
    preprocessing: Preprocessing
    rotate_later: bool = False

    def __getitems__(
        self, draws: list[Draw]
    ) -> TrainingBatch | IncompleteBatch[TrainingBatch] | Failure:
        """Return one rank's share of a global batch, possibly empty.

        Errors are returned, because one raised in a loader process would show its traceback.
        """
        size, indices = self.preprocessing.size, [draw.index for draw in draws]
        augment_arrays = PRESETS[self.preprocessing.preset].augment_arrays
        if augment_arrays and (array := _array_of(self.split, self.preprocessing, len(draws))):
            rows = [replace(draw, index=int(array.rows[draw.index])) for draw in draws]
            return _batch(augment_arrays(array.images, rows, size), self.split, indices, size)
        reader, angle = ImageReader(self.split), PRESETS[self.preprocessing.preset].angle
        later = self.rotate_later and angle
        train = partial(self.preprocessing.train, rotate=not later)
        try:
            arrays = [np.asarray(train(reader.read(draw.index), draw)) for draw in draws]
        except FAILURES as error:
            return error
        batch: TrainingBatch = _batch(arrays, self.split, indices, size)
        if later:
            rotation = rotation_coefficients([later(draw) for draw in draws], size)
            batch = UnrotatedBatch(batch[0], batch[1], rotation)
        return reader.with_reasons(batch)


@dataclass(frozen=True)
class PlainImages:
    """The images of a split without augmentation, indexed by number.

    With ``mask_unreadable``, images that can no longer be read get the label -1.
    """

    split: Split
    preprocessing: Preprocessing
    mask_unreadable: bool = False

    def __getitems__(self, indices: list[int]) -> Batch | IncompleteBatch[Batch] | Failure:
        """Return the batch of the images at ``indices``; errors as in ``AugmentedImages``."""
        size = self.preprocessing.size
        if array := _array_of(self.split, self.preprocessing, len(indices)):
            rows = [int(array.rows[index]) for index in indices]
            images = center_crop_arrays(array.images, rows, size)
            return _batch(images, self.split, indices, size)
        reader = ImageReader(self.split)
        try:
            crops = [self.preprocessing.evaluate(reader.read(i)) for i in indices]
        except FAILURES as error:
            return error
        batch = _batch([np.asarray(crop) for crop in crops], self.split, indices, size)
        if self.mask_unreadable and reader.reasons:
            batch[1][[index in reader.reasons for index in indices]] = UNLABELLED
        return reader.with_reasons(batch)


class ImageReader:
    """Reader of the images of one batch.

    In a lenient split, an unreadable image is replaced by another image of its class. The choice
    depends only on the split: every rank and every restart reads the same images.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.reasons: dict[int, str] = {}  # by index of an image that could not be read

    def read(self, index: int) -> Croppable:
        """Return image ``index``, or the next readable image of its class.

        Raises StorageError, and DataError when the split is not lenient or no image is left.
        """
        try:
            return self.split.image(index)
        except DataError as error:
            if not self.split.lenient:
                raise
            self.reasons[index] = str(error)
            for other in self._others(index):
                try:
                    return self.split.image(other)
                except DataError:
                    continue
            raise

    def _others(self, index: int) -> list[int]:
        """Return the other images of the class, starting after ``index``."""
        labels = self.split.labels
        same = np.flatnonzero(labels == labels[index])
        position = int(np.searchsorted(same, index))
        return [*same[position + 1 :].tolist(), *same[:position].tolist()]

    def with_reasons(self, batch: AnyBatch) -> AnyBatch | IncompleteBatch[AnyBatch]:
        """Return ``batch``, marked as incomplete if an image could not be read."""
        return IncompleteBatch(batch, tuple(self.reasons.values())) if self.reasons else batch


def _array_of(split: Split, preprocessing: Preprocessing, count: int) -> ImageArray | None:
    """Return all images as one array if they have one size and are not resized, else None.

    ``count`` is the number of images that the caller reads from it.
    """
    if preprocessing.resize.side:
        return None
    if isinstance(split, CachedSplit):  # its images are already reduced to max_side
        return split.array(count)
    if isinstance(split, ArraySplit) and not preprocessing.max_side:
        return ImageArray(split.images, range(len(split)))
    return None


def _batch(images: Any, split: Split, indices: list[int], size: int) -> Batch:
    stacked = np.asarray(images, np.uint8)
    if stacked.ndim == 3:
        stacked = np.repeat(stacked[..., None], 3, axis=3)
    stacked = np.ascontiguousarray(stacked.reshape(len(indices), size, size, 3))
    return torch.from_numpy(stacked), torch.from_numpy(split.labels[indices])
