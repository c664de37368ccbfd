"""Calibration batches: their form, and how many images are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from job.slimming.inputs import Example

# images (B, C, H, W), or a pair of the network's inputs and labels (B,); the labels may be None
CalibrationBatch = torch.Tensor | tuple[Example, torch.Tensor | None]
# each call returns the calibration batches of this process, on the device of the network
Batches = Callable[[], Iterable[CalibrationBatch]]

MAX_IMAGES, MIN_IMAGES = 4096, 512  # more images change the statistics little
MAX_CALIBRATION_PIXELS = MAX_IMAGES * 64**2  # of one channel of all images together


def image_limit(size: int) -> int:
    """Return how many images of ``size`` x ``size`` pixels are used at most."""
    return max(MIN_IMAGES, min(MAX_IMAGES, MAX_CALIBRATION_PIXELS // max(1, size) ** 2))


def inputs_of(batch: CalibrationBatch) -> Example:
    """Return the inputs of the network in a batch, without its labels."""
    return batch if isinstance(batch, torch.Tensor) else batch[0]
