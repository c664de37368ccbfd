"""Presets of ``--transform``: training augmentation, with default sizes and channel values.

- ``homework``: Hung-yi Lee's ML2020, homework 3 and 7.
- ``small``: He et al. 2016, section 4.2, for images of a few dozen pixels.
- ``imagenet``: Szegedy et al. 2015, as in torchvision's recipe.

To add a preset, write its function in job.data.augmentation, add an entry to ``PRESETS``, and add
its name to ``PresetName`` of job.config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.data.augmentation import (
    augment_homework,
    augment_imagenet,
    augment_small,
    augment_small_arrays,
    draw_angle,
)
from job.data.geometry import MAX_RESIZE, Channels, Croppable, Resize

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from PIL import Image

    from job.data.sample_order import Draw

LARGEST_SMALL = 64  # pixels: images up to this side get ``small`` by default
UNSCALED: tuple[Channels, Channels] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # inputs in [0, 1]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preset:
    """A preset of ``--transform``."""

    help: str
    # (image, draw, size, resampling) -> training image, RGB of size x size
    augment: Callable[[Croppable, Draw, int, Image.Resampling], Image.Image]
    # largest side of any image -> side of the inputs
    default_size: Callable[[int], int]
    # side of the inputs -> resizing of evaluation, and of training unless the preset resizes itself
    resize: Callable[[int], Resize] = lambda _: Resize()
    augmentation_resizes: bool = False
    # draw -> degrees to rotate the training image by
    angle: Callable[[Draw], float] | None = None
    # mean and standard deviation of each channel
    scale: tuple[Channels, Channels] = UNSCALED
    # optional ``augment`` for a batch: images (N, H, W[, 3]) of a split, B draws, size -> (B, size,
    # size[, 3]), with the same pixels
    augment_arrays: Callable[[Any, list[Draw], int], np.ndarray[Any, Any]] | None = None


def _multiple_of_16(largest: int) -> int:
    """Round up to a multiple of 16, from 32 to 64, e.g. 28 to 32."""
    return min(max(32, -(-largest // 16) * 16), LARGEST_SMALL)


def _resize_for_crop(size: int) -> Resize:
    """Return the resizing for a crop of ``size``: 256 pixels for 224, else in proportion."""
    return Resize(min(MAX_RESIZE, round(size * 256 / 224)))


PRESETS = {
    "homework": Preset(
        "random crop with symmetric padding, flip, rotation within 15 degrees",
        augment_homework,
        angle=draw_angle,
        default_size=lambda _: 256,
    ),
    "small": Preset(
        "padding by 4 pixels, random crop, flip",
        augment_small,
        default_size=_multiple_of_16,
        augment_arrays=augment_small_arrays,
    ),
    "imagenet": Preset(
        "random resized crop, flip, ImageNet's mean and standard deviation",
        augment_imagenet,
        default_size=lambda _: 224,
        resize=_resize_for_crop,
        scale=IMAGENET,
        augmentation_resizes=True,
    ),
}


def default_preset(largest: int) -> str:
    """Return the preset of ``--transform auto`` for images of at most ``largest`` pixels a side."""
    return "small" if largest <= LARGEST_SMALL else "homework"
