"""From a decoded picture to the network's input: three presets, parameters from the epoch table.

- ``homework``: random crop at raw resolution with symmetric padding of small pictures, flip,
  rotation within 15 degrees; evaluation takes the centre. (Hung-yi Lee ML2020, HW3 and HW7)
- ``small``: pad 4, random crop, flip, for pictures of a few dozen pixels (He et al. 2016, 4.2).
- ``imagenet``: random resized crop, flip, normalise (Szegedy et al. 2015; torchvision's recipe).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from job.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from job.data.table import Draw

PRESETS = ("homework", "small", "imagenet")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ANGLE = 15.0  # degrees
SMALL_PAD = 4  # pixels
CROP_AREA = (0.08, 1.0)  # share of the picture
CROP_RATIO = (3 / 4, 4 / 3)  # width to height


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become inputs of ``size`` x ``size`` pixels."""

    preset: str
    size: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read back what ``to_dict`` gave; raises DataError."""
        preset, size = values.get("preset"), values.get("size")
        if preset not in PRESETS or not isinstance(size, int) or size < 1:
            raise DataError(f"unknown preprocessing {dict(values)}")
        return cls(preset, size)

    def to_dict(self) -> dict[str, Any]:
        """As stored in model.json."""
        return asdict(self) | {"mean": self.mean, "std": self.std}

    @property
    def mean(self) -> tuple[float, ...]:
        """Subtracted from each channel after scaling to [0, 1]."""
        return IMAGENET_MEAN if self.preset == "imagenet" else (0.0, 0.0, 0.0)

    @property
    def std(self) -> tuple[float, ...]:
        """Each channel is divided by it."""
        return IMAGENET_STD if self.preset == "imagenet" else (1.0, 1.0, 1.0)

    def train(self, picture: Image.Image, draw: Draw) -> Image.Image:
        """The augmented picture, RGB of ``size`` x ``size``."""
        augment = {"homework": _homework, "small": _small, "imagenet": _resized_crop}
        augmented: Image.Image = augment[self.preset](picture, draw, self.size)
        return augmented

    def evaluate(self, picture: Image.Image) -> Image.Image:
        """The picture without chance: its centre, RGB of ``size`` x ``size``."""
        if self.preset == "imagenet":
            picture = F.resize(picture, round(self.size * 256 / 224))
        centre: Image.Image = F.center_crop(picture, [self.size, self.size])
        return centre

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, same device, channels last in memory."""
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if self.preset != "imagenet":
            return scaled
        mean = scaled.new_tensor(self.mean).view(3, 1, 1)
        return scaled.sub_(mean).div_(scaled.new_tensor(self.std).view(3, 1, 1))


def draw_offset(uniform: float, slack: int) -> int:
    """A whole number from 0 to ``slack``, all equally likely."""
    return int(uniform * (slack + 1))


def draw_flip(draw: Draw) -> bool:
    """Whether the picture is mirrored: half the time."""
    return draw.flip < 0.5


def _crop_and_flip(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    top = draw_offset(draw.top, picture.height - size)
    left = draw_offset(draw.left, picture.width - size)
    return _flip(F.crop(picture, top, left, size, size), draw)


def _flip(picture: Image.Image, draw: Draw) -> Image.Image:
    mirrored: Image.Image = F.hflip(picture) if draw_flip(draw) else picture
    return mirrored


def _homework(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    # as torchvision's RandomCrop(pad_if_needed=True): the whole shortfall on both sides
    short_x, short_y = max(0, size - picture.width), max(0, size - picture.height)
    if short_x or short_y:
        picture = F.pad(picture, [short_x, short_y], padding_mode="symmetric")
    picture = _crop_and_flip(picture, draw, size)
    rotated: Image.Image = F.rotate(picture, (2 * draw.angle - 1) * MAX_ANGLE)
    return rotated


def _small(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    framed = F.center_crop(picture, [max(size, picture.height), max(size, picture.width)])
    return _crop_and_flip(F.pad(framed, [SMALL_PAD, SMALL_PAD]), draw, size)


def _resized_crop(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    # one draw a picture, held to the picture's edges, where torchvision tries up to ten times
    area = (
        picture.width * picture.height * (CROP_AREA[0] + draw.area * (CROP_AREA[1] - CROP_AREA[0]))
    )
    log_ratio = [math.log(r) for r in CROP_RATIO]
    ratio = math.exp(log_ratio[0] + draw.ratio * (log_ratio[1] - log_ratio[0]))
    width = min(picture.width, max(1, round(math.sqrt(area * ratio))))
    height = min(picture.height, max(1, round(math.sqrt(area / ratio))))
    top = draw_offset(draw.top, picture.height - height)
    left = draw_offset(draw.left, picture.width - width)
    picture = F.resized_crop(
        picture, top, left, height, width, [size, size], InterpolationMode.BILINEAR
    )
    return _flip(picture, draw)


def small_arrays(images: Any, draws: list[Draw], size: int) -> np.ndarray[Any, Any]:
    """The ``small`` preset on a whole batch of arrays at once.

    images (N, H, W) or (N, H, W, 3) uint8 are the split's; returns (B, size, size[, 3]) uint8, the
    same pixels as ``Preprocessing.train`` gives one by one.
    """
    batch = center_arrays(images[[d.index for d in draws]], size, at_least=True)
    pad = [(0, 0), (SMALL_PAD, SMALL_PAD), (SMALL_PAD, SMALL_PAD)] + [(0, 0)] * (batch.ndim - 3)
    batch = np.pad(batch, pad)
    top = np.array([draw_offset(d.top, batch.shape[1] - size) for d in draws], np.intp)
    left = np.array([draw_offset(d.left, batch.shape[2] - size) for d in draws], np.intp)
    rows, columns = top[:, None] + np.arange(size), left[:, None] + np.arange(size)
    flipped = np.array([draw_flip(d) for d in draws], bool)
    columns[flipped] = columns[flipped, ::-1]
    crops = batch[np.arange(len(draws))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return np.asarray(crops)


def center_arrays(batch: Any, size: int, *, at_least: bool = False) -> np.ndarray[Any, Any]:
    """Zero-pad or crop (B, H, W[, 3]) to ``size`` about the centre, as torchvision's center_crop.

    With ``at_least`` nothing is cropped.
    """
    for axis in (1, 2):
        missing = size - batch.shape[axis]
        if missing > 0:
            pad = [(0, 0)] * batch.ndim
            pad[axis] = (missing // 2, (missing + 1) // 2)
            batch = np.pad(batch, pad)
        elif missing < 0 and not at_least:
            start = round(-missing / 2)
            batch = batch.take(range(start, start + size), axis)
    return np.asarray(batch)
