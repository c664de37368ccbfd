"""From a decoded image to the network's input: three presets, parameters from the epoch table.

- ``homework``: random crop at raw resolution with symmetric padding of small images, flip,
  rotation within 15 degrees; evaluation takes the centre. (Hung-yi Lee ML2020, HW3 and HW7)
- ``small``: pad 4, random crop, flip, for images of a few dozen pixels (He et al. 2016, 4.2).
- ``imagenet``: random resized crop, flip, normalise (Szegedy et al. 2015; torchvision's recipe).

A preset is how training augments; resizing, interpolation, mean and std are its own or given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from job.data.augmentation import (
    augment_homework,
    augment_imagenet,
    augment_small,
    center_offset,
    crop_long_ends,
    resampling,
)
from job.data.geometry import (
    INTERPOLATIONS,
    MAX_RESIZE,
    PRESETS,
    Channels,
    Resize,
    parse_channels,
)
from job.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.data.sample_order import Draw

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


OWN: Channels = (-1.0, -1.0, -1.0)  # in place of the preset's mean or std
PLAIN: tuple[Channels, Channels] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std of [0, 1]


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs of ``size`` x ``size`` pixels: ``preset`` is how training augments.

    Evaluation resizes and takes the centre. ``mean`` is subtracted from each channel after scaling
    to [0, 1], which is then divided by ``std``. What is left out is the preset's own.
    """

    preset: str
    size: int
    resize: Resize | None = None
    interpolation: str = "bilinear"
    mean: Channels = OWN
    std: Channels = OWN

    def __post_init__(self) -> None:
        """Fill in the preset's own values."""
        imagenet = self.preset == "imagenet"
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else PLAIN
        if self.resize is None:
            side = min(MAX_RESIZE, round(self.size * 256 / 224)) if imagenet else 0
            resize = Resize(side)
            object.__setattr__(self, "resize", resize)
        for name, own in (("mean", mean), ("std", std)):
            if getattr(self, name) is OWN:
                object.__setattr__(self, name, own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read back what ``to_dict`` gave, now or before there were all keys; raises DataError."""
        preset, size = values.get("preset"), values.get("size")
        interpolation = values.get("interpolation", "bilinear")
        if preset not in PRESETS or type(size) is not int or size < 1:
            raise DataError(f"unknown preprocessing {dict(values)}")
        own = cls(preset, size)
        try:
            if interpolation not in INTERPOLATIONS:
                raise ValueError(f"no interpolation {interpolation}")
            if "resize" in values:
                side = values["resize"]
                resize = Resize(0 if side is None else side, values.get("fit", "shorter"))
            else:
                resize = own.resizing
            mean = parse_channels(values.get("mean", own.mean))
            std = parse_channels(values.get("std", own.std), positive=True)
        except (ValueError, TypeError, UsageError) as error:
            raise DataError(f"unknown preprocessing {dict(values)}: {error}") from error
        return cls(own.preset, size, resize, interpolation, mean, std)

    def to_dict(self) -> dict[str, Any]:
        """As stored in model.json; ``resize`` is null where images are taken as they are."""
        return {
            "preset": self.preset,
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "resize": self.resizing.side or None,
            "fit": self.resizing.fit,
            "interpolation": self.interpolation,
        }

    @property
    def resizing(self) -> Resize:
        """What evaluation, and training but for ``imagenet``, does first."""
        assert self.resize is not None
        return self.resize

    @property
    def inputs(self) -> tuple[object, ...]:
        """All that tells which numbers a network gets of an image in evaluation."""
        interpolation = self.interpolation if self.resizing.side else ""
        return self.size, self.mean, self.std, self.resizing, interpolation

    def describe(self) -> str:
        """For the console: the preset and the size, then what is not the preset's own."""
        own, parts = Preprocessing(self.preset, self.size), []
        if self.resizing != own.resizing or self.interpolation != own.interpolation:
            how = f" ({self.interpolation})" if self.resizing.side else ""
            parts.append(f"resize {self.resizing}{how}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values != getattr(own, name):
                parts.append(f"{name} {' '.join(f'{value:g}' for value in values)}")
        return ", ".join([f"{self.preset} transforms at {self.size} pixels", *parts])

    def train(self, image: Image.Image, draw: Draw) -> Image.Image:
        """The augmented image, RGB of ``size`` x ``size``."""
        if self.preset == "imagenet":
            return augment_imagenet(image, draw, self.size, resampling(self.interpolation))
        augment = {"homework": augment_homework, "small": augment_small}[self.preset]
        return augment(self.resized(image), draw, self.size)

    def evaluate(self, image: Image.Image) -> Image.Image:
        """The image without chance: its centre, RGB of ``size`` x ``size``."""
        image = self.resized(image)
        left, top = (center_offset(side, self.size) for side in image.size)
        box = (left, top, left + self.size, top + self.size)
        if self.resizing.fit != "longer" or min(image.size) >= self.size:
            return image.crop(box)
        # what timm calls border: in the colour of the mean
        paper = Image.new("RGB", (self.size, self.size), tuple(round(255 * m) for m in self.mean))
        right, bottom = map(min, box[2:], image.size)
        inside = image.crop((max(left, 0), max(top, 0), right, bottom))
        paper.paste(inside, (max(-left, 0), max(-top, 0)))
        return paper

    def resized(self, image: Image.Image) -> Image.Image:
        """The image as ``resize`` has it."""
        if not self.resizing.side:
            return image
        if self.resizing.fit == "shorter":
            image = crop_long_ends(image)
        size = self.resizing.size_of(image.size)
        return image.resize(size, resampling(self.interpolation))

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, same device, channels last in memory."""
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if (self.mean, self.std) == PLAIN:
            return scaled
        mean = scaled.new_tensor(self.mean).view(3, 1, 1)
        return scaled.sub_(mean).div_(scaled.new_tensor(self.std).view(3, 1, 1))
