"""Calibration batches: their types, and the limit of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from job.slimming.inputs import Example

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
