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
from PIL import Image

from job.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.data.table import Draw

PRESETS = ("homework", "small", "imagenet")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ANGLE = 15.0  # degrees
SMALL_PAD = 4  # pixels
LONGEST = 64  # sides to one, of a picture that `imagenet` resizes whole
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
        if preset not in PRESETS or type(size) is not int or size < 1:
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
            picture = _resized(_without_long_ends(picture), round(self.size * 256 / 224))
        left, top = (_centre(side, self.size) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))

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


def _centre(side: int, size: int) -> int:
    """Where ``size`` pixels about the centre of ``side`` begin, below 0 in front of it.

    Rounded as torchvision's center_crop does it, which pads a whole picture before it crops.
    """
    return -((size - side) // 2) if side < size else round((side - size) / 2)


def _without_long_ends(picture: Image.Image) -> Image.Image:
    """The middle of a picture of more than 64 times its other side: only that will be seen.

    Resized as a whole, a line of a million pixels would be 256 million high.
    """
    most = LONGEST * min(picture.size)
    if max(picture.size) <= most:
        return picture
    left, top = (max(0, (side - most) // 2) for side in picture.size)
    return picture.crop(
        (left, top, min(picture.width, left + most), min(picture.height, top + most))
    )


def _resized(picture: Image.Image, short: int) -> Image.Image:
    """With ``short`` pixels on its shorter side, the other rounded down, as torchvision does it."""
    least = min(picture.size)
    width, height = (short * side // least for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _flip(picture: Image.Image, draw: Draw) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw_flip(draw) else picture


def _homework(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    # as torchvision's RandomCrop(pad_if_needed=True): the whole shortfall on both sides; but a
    # side that is long enough is cropped first, or a line of a picture would be padded to a sheet
    short_x, short_y = max(0, size - picture.width), max(0, size - picture.height)
    left = draw_offset(draw.left, picture.width + 2 * short_x - size)
    top = draw_offset(draw.top, picture.height + 2 * short_y - size)
    across = (0, picture.width) if short_x else (left, left + size)
    down = (0, picture.height) if short_y else (top, top + size)
    picture = picture.crop((across[0], down[0], across[1], down[1]))
    if short_x or short_y:
        margins = [(short_y, short_y), (short_x, short_x), (0, 0)]
        picture = Image.fromarray(np.pad(np.asarray(picture), margins, "symmetric"))
        left, top = left * bool(short_x), top * bool(short_y)
        picture = picture.crop((left, top, left + size, top + size))
    return _flip(picture, draw).rotate((2 * draw.angle - 1) * MAX_ANGLE)


def _small(picture: Image.Image, draw: Draw, size: int) -> Image.Image:
    # centred in a frame of at least ``size``, padded all round; only the crop itself is made
    left = _small_offset(picture.width, size, draw.left)
    top = _small_offset(picture.height, size, draw.top)
    return _flip(picture.crop((left, top, left + size, top + size)), draw)


def _small_offset(side: int, size: int, uniform: float) -> int:
    """Where the crop begins on a side of the picture: below 0 in the padding in front of it."""
    frame = max(size, side)
    return _centre(side, frame) - SMALL_PAD + draw_offset(uniform, frame + 2 * SMALL_PAD - size)


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
    picture = picture.crop((left, top, left + width, top + height))
    return _flip(picture.resize((size, size), Image.Resampling.BILINEAR), draw)


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
    """Pictures of (N, H, W[, 3]) cropped or zero-padded to ``size`` about the centre.

    As torchvision's center_crop; cropped before they are copied.
    """
    top, left = (max(0, _centre(side, size)) for side in images.shape[1:3])
    batch = images[:, top : top + size, left : left + size][indices]
    missing = [size - side for side in batch.shape[1:3]]
    pad = [(m // 2, (m + 1) // 2) for m in missing]
    return np.pad(batch, [(0, 0), *pad, *[(0, 0)] * (batch.ndim - 3)])
