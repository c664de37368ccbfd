"""Rotation of a whole batch on its device, with the pixels that Pillow gives image by image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

BITS = 16  # of the fraction of a coordinate


def rotation_coefficients(angles: Iterable[float], size: int) -> torch.Tensor:
    """Return the coefficients c (B, 6) int32 of rotations by ``angles`` in degrees.

    Pixel (x, y) of image b is read from column ``(c[b, 2] + c[b, 1] * y + c[b, 0] * x) >> BITS``.
    The other three coefficients give the row. Images are ``size`` x ``size``, at most 2**14. The
    coefficients are equal to those of ``Image.rotate`` with nearest-neighbour resampling, in
    Pillow's fixed point.
    """
    rows = [_coefficients(angle, size / 2) for angle in angles]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 6)


def _coefficients(angle: float, centre: float) -> list[int]:
    radians = -math.radians(angle % 360.0)
    cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
    numbers = []
    for across, down in ((cosine, sine), (-sine, cosine)):
        offset = across * -centre + down * -centre + 0.0 + centre
        numbers += [across, down, offset + across * 0.5 + down * 0.5]
    return [math.floor(number * 2**BITS + 0.5) for number in numbers]


def rotate_batch(images: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Rotate ``images`` (B, S, S, 3) uint8 about their centres; pixels from outside are black.

    ``coefficients`` (B, 6) int32 come from ``rotation_coefficients``, on the same device. Returns
    (B, S, S, 3) uint8. Does not wait for the device.
    """
    count, size = len(images), images.shape[1]
    steps = torch.arange(size, dtype=torch.int32, device=images.device)
    c = coefficients[:, :, None, None]
    columns = (c[:, 2] + c[:, 1] * steps[:, None] + c[:, 0] * steps) >> BITS  # (B, S, S)
    rows = (c[:, 5] + c[:, 4] * steps[:, None] + c[:, 3] * steps) >> BITS
    inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    source = rows.clamp(0, size - 1) * size + columns.clamp(0, size - 1)
    index = source.long().view(count, size * size, 1).expand(-1, -1, 3)
    rotated = images.reshape(count, size * size, 3).gather(1, index).view_as(images)
    return rotated.mul_(inside[..., None])
