"""Calibration batches: their types, the limit of images, and batches joined to larger ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from job.slimming.inputs import Example, batch_signature, concatenate, sample_count

# images (B, C, H, W), or a pair of inputs of the network and labels (B,) or None
CalibrationBatch = torch.Tensor | tuple[Example, torch.Tensor | None]
# function that returns the calibration batches of this process, on the device of the network
Batches = Callable[[], Iterable[CalibrationBatch]]

MAX_IMAGES, MIN_IMAGES = 4096, 512  # more images hardly change the statistics
MAX_CALIBRATION_PIXELS = MAX_IMAGES * 64**2  # in one channel of all images


def image_limit(size: int) -> int:
    """Return the largest number of images of ``size`` x ``size`` pixels that is used."""
    return max(MIN_IMAGES, min(MAX_IMAGES, MAX_CALIBRATION_PIXELS // max(1, size) ** 2))


def inputs_of(batch: CalibrationBatch) -> Example:
    """Return the inputs of the network in a batch, without its labels."""
    return batch if isinstance(batch, torch.Tensor) else batch[0]


@dataclass(frozen=True)
class JoinedBatch:
    """Concatenated batches of ``sizes`` samples."""

    inputs: Example
    sizes: tuple[int, ...]


def join_batches(batches: Iterable[Example], size: int) -> Iterator[JoinedBatch]:
    """Yield batches of the same shape joined to at most ``size`` samples."""
    for _, alike in itertools.groupby(batches, key=batch_signature):
        part: list[Example] = []
        for batch in alike:
            if part and sum(map(sample_count, part)) + sample_count(batch) > size:
                yield _join(part)
                part = []
            part.append(batch)
        if part:
            yield _join(part)


def _join(batches: Sequence[Example]) -> JoinedBatch:
    return JoinedBatch(concatenate(batches), tuple(map(sample_count, batches)))
