"""From a decoded image to the network's input: three presets, parameters from the epoch table.

- ``homework``: random crop at raw resolution with symmetric padding of small images, flip,
  rotation within 15 degrees; evaluation takes the centre. (Hung-yi Lee ML2020, HW3 and HW7)
- ``small``: pad 4, random crop, flip, for images of a few dozen pixels (He et al. 2016, 4.2).
- ``imagenet``: random resized crop, flip, normalise (Szegedy et al. 2015; torchvision's recipe).

A preset is how training augments; resizing, interpolation, mean and std are its own or given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from job.data.geometry import (
    INTERPOLATIONS,
    LONGEST,
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
MAX_ANGLE = 15.0  # degrees
SMALL_PAD = 4  # pixels
CROP_AREA = (0.08, 1.0)  # share of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width to height


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
            return _resized_crop(image, draw, self.size, _resampling(self.interpolation))
        augment = {"homework": _homework, "small": _small}[self.preset]
        return augment(self.resized(image), draw, self.size)

    def evaluate(self, image: Image.Image) -> Image.Image:
        """The image without chance: its centre, RGB of ``size`` x ``size``."""
        image = self.resized(image)
        left, top = (_centre(side, self.size) for side in image.size)
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
            image = _without_long_ends(image)
        size = self.resizing.size_of(image.size)
        return image.resize(size, _resampling(self.interpolation))

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, same device, channels last in memory."""
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if (self.mean, self.std) == PLAIN:
            return scaled
        mean = scaled.new_tensor(self.mean).view(3, 1, 1)
        return scaled.sub_(mean).div_(scaled.new_tensor(self.std).view(3, 1, 1))


def draw_offset(uniform: float, slack: int) -> int:
    """A whole number from 0 to ``slack``, all equally likely."""
    return int(uniform * (slack + 1))


def draw_flip(draw: Draw) -> bool:
    """Whether the image is mirrored: half the time."""
    return draw.flip < 0.5


def _centre(side: int, size: int) -> int:
    """Where ``size`` pixels about the centre of ``side`` begin, below 0 in front of it.

    Rounded as torchvision's center_crop does it, which pads a whole image before it crops.
    """
    return -((size - side) // 2) if side < size else round((side - size) / 2)


def _without_long_ends(image: Image.Image) -> Image.Image:
    """The middle of an image of more than 64 times its other side: only that will be seen.

    Resized as a whole, a line of a million pixels would be 256 million high.
    """
    most = LONGEST * min(image.size)
    if max(image.size) <= most:
        return image
    left, top = (max(0, (side - most) // 2) for side in image.size)
    return image.crop((left, top, min(image.width, left + most), min(image.height, top + most)))


def _resampling(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _flip(image: Image.Image, draw: Draw) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw_flip(draw) else image


def _homework(image: Image.Image, draw: Draw, size: int) -> Image.Image:
    # as torchvision's RandomCrop(pad_if_needed=True): the whole shortfall on both sides; but a
    # side that is long enough is cropped first, or a line of an image would be padded to a sheet
    short_x, short_y = max(0, size - image.width), max(0, size - image.height)
    left = draw_offset(draw.left, image.width + 2 * short_x - size)
    top = draw_offset(draw.top, image.height + 2 * short_y - size)
    across = (0, image.width) if short_x else (left, left + size)
    down = (0, image.height) if short_y else (top, top + size)
    image = image.crop((across[0], down[0], across[1], down[1]))
    if short_x or short_y:
        margins = [(short_y, short_y), (short_x, short_x), (0, 0)]
        image = Image.fromarray(np.pad(np.asarray(image), margins, "symmetric"))
        left, top = left * bool(short_x), top * bool(short_y)
        image = image.crop((left, top, left + size, top + size))
    return _flip(image, draw).rotate((2 * draw.angle - 1) * MAX_ANGLE)


def _small(image: Image.Image, draw: Draw, size: int) -> Image.Image:
    # centred in a frame of at least ``size``, padded all round; only the crop itself is made
    left = _small_offset(image.width, size, draw.left)
    top = _small_offset(image.height, size, draw.top)
    return _flip(image.crop((left, top, left + size, top + size)), draw)


def _small_offset(side: int, size: int, uniform: float) -> int:
    """Where the crop begins on a side of the image: below 0 in the padding in front of it."""
    frame = max(size, side)
    return _centre(side, frame) - SMALL_PAD + draw_offset(uniform, frame + 2 * SMALL_PAD - size)


def _resized_crop(
    image: Image.Image, draw: Draw, size: int, resampling: Image.Resampling
) -> Image.Image:
    # one draw per image, held to the image's edges, where torchvision tries up to ten times
    area = image.width * image.height * (CROP_AREA[0] + draw.area * (CROP_AREA[1] - CROP_AREA[0]))
    log_ratio = [math.log(r) for r in CROP_RATIO]
    ratio = math.exp(log_ratio[0] + draw.ratio * (log_ratio[1] - log_ratio[0]))
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    top = draw_offset(draw.top, image.height - height)
    left = draw_offset(draw.left, image.width - width)
    image = image.crop((left, top, left + width, top + height))
    return _flip(image.resize((size, size), resampling), draw)


def small_arrays(images: Any, draws: list[Draw], size: int) -> np.ndarray[Any, Any]:
    """The ``small`` preset on a whole batch of arrays at once.

    images (N, H, W) or (N, H, W, 3) uint8 are the split's; returns (B, size, size[, 3]) uint8, the
    same pixels as ``Preprocessing.train`` gives one by one.
    """
    height, width = images.shape[1:3]
    top = np.array([_small_offset(height, size, d.top) for d in draws], np.intp)
    left = np.array([_small_offset(width, size, d.left) for d in draws], np.intp)
    rows, columns = top[:, None] + np.arange(size), left[:, None] + np.arange(size)
    flipped = np.array([draw_flip(d) for d in draws], bool)
    columns[flipped] = columns[flipped, ::-1]
    index = np.array([d.index for d in draws], np.intp)[:, None, None]
    crops = images[
        index, rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None, :]
    ]
    crops[(rows < 0) | (rows >= height)] = 0
    outside = (columns < 0) | (columns >= width)
    crops[np.broadcast_to(outside[:, None, :], crops.shape[:3])] = 0
    return np.asarray(crops)


def center_arrays(images: Any, indices: list[int], size: int) -> np.ndarray[Any, Any]:
    """Images of (N, H, W[, 3]) cropped or zero-padded to ``size`` about the centre.

    As torchvision's center_crop; cropped before they are copied.
    """
    top, left = (max(0, _centre(side, size)) for side in images.shape[1:3])
    batch = images[:, top : top + size, left : left + size][indices]
    missing = [size - side for side in batch.shape[1:3]]
    pad = [(m // 2, (m + 1) // 2) for m in missing]
    return np.pad(batch, [(0, 0), *pad, *[(0, 0)] * (batch.ndim - 3)])
