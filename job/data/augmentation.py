"""Augmentation of training images from the epoch table, and the centre crop of evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from job.data.geometry import limited_size

if TYPE_CHECKING:
    from job.data.geometry import Croppable
    from job.data.sample_order import Draw

MAX_ANGLE = 15.0  # degrees
SMALL_PAD = 4  # pixels
CROP_AREA = (0.08, 1.0)  # share of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
MAX_ASPECT_RATIO = 64  # of an image that is resized by its shorter side


def augment_homework(
    image: Croppable, draw: Draw, size: int, _resampling: Image.Resampling
) -> Image.Image:
    """Take a random crop and flip; sides that are too short are padded symmetrically.

    Like torchvision's RandomCrop(pad_if_needed=True), pads both ends by the full shortfall.
    """
    # crop long sides before padding the short ones: a padded long thin image would be huge
    short_x, short_y = max(0, size - image.width), max(0, size - image.height)
    left = draw_offset(draw.left, image.width + 2 * short_x - size)
    top = draw_offset(draw.top, image.height + 2 * short_y - size)
    across = (0, image.width) if short_x else (left, left + size)
    down = (0, image.height) if short_y else (top, top + size)
    crop = image.crop((across[0], down[0], across[1], down[1]))
    if short_x or short_y:
        margins = [(short_y, short_y), (short_x, short_x), (0, 0)]
        padded = Image.fromarray(np.pad(np.asarray(crop), margins, "symmetric"))
        left, top = left * bool(short_x), top * bool(short_y)
        crop = padded.crop((left, top, left + size, top + size))
    return _flip(crop, draw)


def draw_angle(draw: Draw) -> float:
    """Return the degrees, within MAX_ANGLE, to rotate an image by."""
    return (2 * draw.angle - 1) * MAX_ANGLE


def augment_small(
    image: Croppable, draw: Draw, size: int, _resampling: Image.Resampling
) -> Image.Image:
    """Pad by 4 pixels, take a random crop, flip. Smaller images are centred in ``size`` first."""
    left = _small_offset(image.width, size, draw.left)
    top = _small_offset(image.height, size, draw.top)
    return _flip(image.crop((left, top, left + size, top + size)), draw)


def augment_imagenet(
    image: Croppable, draw: Draw, size: int, resampling: Image.Resampling
) -> Image.Image:
    """Crop a random area and aspect ratio, resize to ``size`` x ``size``, flip.

    One draw per image, clipped to the image's edges, where torchvision tries up to ten times.
    """
    area = image.width * image.height * (CROP_AREA[0] + draw.area * (CROP_AREA[1] - CROP_AREA[0]))
    log_ratio = [math.log(r) for r in CROP_RATIO]
    ratio = math.exp(log_ratio[0] + draw.ratio * (log_ratio[1] - log_ratio[0]))
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    top = draw_offset(draw.top, image.height - height)
    left = draw_offset(draw.left, image.width - width)
    crop = image.crop((left, top, left + width, top + height))
    return _flip(crop.resize((size, size), resampling), draw)


def augment_small_arrays(images: Any, draws: list[Draw], size: int) -> np.ndarray[Any, Any]:
    """Apply ``augment_small`` to a batch of images in memory; the pixels are the same.

    ``images`` (N, H, W) or (N, H, W, 3) uint8 holds a whole split. Returns (B, size, size[, 3])
    uint8, one crop for each of the B ``draws``.
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


def center_crop_arrays(images: Any, indices: list[int], size: int) -> np.ndarray[Any, Any]:
    """Crop or zero-pad the images at ``indices`` of (N, H, W[, 3]) to ``size`` about the centre.

    Same as torchvision's center_crop, but crops before copying to save memory.
    """
    top, left = (max(0, center_offset(side, size)) for side in images.shape[1:3])
    batch = images[:, top : top + size, left : left + size][indices]
    missing = [size - side for side in batch.shape[1:3]]
    pad = [(m // 2, (m + 1) // 2) for m in missing]
    return np.pad(batch, [(0, 0), *pad, *[(0, 0)] * (batch.ndim - 3)])


def draw_offset(uniform: float, slack: int) -> int:
    """Map a uniform number in [0, 1) to an integer from 0 to ``slack``, all equally likely."""
    return int(uniform * (slack + 1))


def draw_flip(draw: Draw) -> bool:
    """Return whether to mirror the image, with probability 0.5."""
    return draw.flip < 0.5


def center_offset(side: int, size: int) -> int:
    """Return where a centred crop of ``size`` pixels starts; negative if padding is needed.

    Rounds as torchvision's center_crop does, which pads the image before it crops.
    """
    return -((size - side) // 2) if side < size else round((side - size) / 2)


def crop_long_ends(image: Croppable) -> Croppable:
    """Crop the ends of images more than 64 times as long as wide, which the centre crop omits.

    Without this, an image of 1,000,000 x 1 pixels would be resized to 256 million pixels.
    """
    max_length = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= max_length:
        return image
    left, top = (max(0, (side - max_length) // 2) for side in image.size)
    return image.crop(
        (left, top, min(image.width, left + max_length), min(image.height, top + max_length))
    )


def limit_side(image: Croppable, max_side: int | None) -> Croppable:
    """Reduce an image with a side longer than ``max_side`` pixels, in proportion."""
    size = limited_size(image.size, max_side)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def resampling(interpolation: str) -> Image.Resampling:
    """Return Pillow's resampling filter for ``bilinear``, ``bicubic``, …"""
    return Image.Resampling[interpolation.upper()]


def _flip(image: Image.Image, draw: Draw) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw_flip(draw) else image


def _small_offset(side: int, size: int, uniform: float) -> int:
    """Return where the random crop of the padded image starts; negative inside the padding."""
    frame = max(size, side)
    offset = draw_offset(uniform, frame + 2 * SMALL_PAD - size)
    return center_offset(side, frame) - SMALL_PAD + offset
