"""Parsing of the options for resizing, crops and channel values. Does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_args

from job.config import InterpolationName
from job.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = get_args(InterpolationName)
FITS = {"shorter": "", "both": "x", "longer": "longer:"}  # resized sides -> spelling of the option
MAX_RESIZE = 8192  # pixels: the side of a resized image
MIN_STD = 1e-4  # one of 255 grey levels is 0.004
MAX_SHARE = 2.0  # a crop up to this is a share of the resized side, above it pixels

Size = tuple[int, int]  # width and height in pixels
Box = tuple[int, int, int, int]  # left, top, right and bottom
Channels = tuple[float, float, float]  # one number for each of red, green and blue


class Croppable(Protocol):
    """An RGB image that is cropped or resized: decoded by Pillow, or in a cache."""

    @property
    def width(self) -> int:
        """Width in pixels."""

    @property
    def height(self) -> int:
        """Height in pixels."""

    @property
    def size(self) -> Size:
        """Width and height in pixels."""

    def crop(self, box: Box) -> Image.Image:
        """Return the part inside ``box``; pixels outside the image are black."""

    def resize(self, size: Size, resample: int) -> Image.Image:
        """Return the image resized to ``size``, as Pillow does with the filter ``resample``."""


@dataclass(frozen=True)
class Resize:
    """Resizing of the ``shorter`` or ``longer`` side, or ``both``, to ``side`` pixels (0: none)."""

    side: int = 0
    fit: str = "shorter"

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid side or fit."""
        if not (type(self.side) is int and 0 <= self.side <= MAX_RESIZE and self.fit in FITS):
            raise ValueError(f"resizing to {self.side!r} pixels by {self.fit!r}")

    @classmethod
    def parse(cls, text: str) -> Resize:
        """Parse ``256``, ``256x256``, ``longer:256`` or ``none``; raises UsageError."""
        match = re.fullmatch(r"(longer:)?([0-9]{1,4})(?:x([0-9]{1,4}))?", text.strip().lower())
        if text.strip().lower() == "none":
            return cls()
        if not match or (match[1] and match[3]) or not 1 <= int(match[2]) <= MAX_RESIZE:
            raise UsageError(
                f"{text!r} is not of the form 256 (the shorter side), 256x256 (both sides), "
                f"longer:256 or none, at most {MAX_RESIZE} pixels"
            )
        if match[3] and int(match[3]) != int(match[2]):
            raise UsageError(f"{text!r} is not square, but inputs are: use {match[2]}x{match[2]}")
        fit = "longer" if match[1] else "both" if match[3] else "shorter"
        return cls(int(match[2]), fit)

    def __str__(self) -> str:
        if not self.side:
            return "none"
        return f"{self.side}x{self.side}" if self.fit == "both" else f"{FITS[self.fit]}{self.side}"

    def size_of(self, size: Size) -> Size:
        """Return the (width, height) after resizing ``size``, rounded as in torchvision."""
        if not self.side:
            return size
        if self.fit == "both":
            return self.side, self.side
        if self.fit == "longer":
            ratio = max(size) / self.side
            return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
        shorter = min(size)
        return self.side * size[0] // shorter, self.side * size[1] // shorter


def limited_size(size: Size, max_side: int | None) -> Size:
    """Return (width, height) in proportion, with sides of at most ``max_side`` pixels."""
    width, height = size
    if not max_side or max(size) <= max_side:
        return width, height
    ratio = max_side / max(size)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def parse_channels(value: Any, *, positive: bool = False) -> Channels:
    """Parse one number for all channels, or one each, from 0 to 1; ``value`` is text or a list.

    With ``positive``, numbers are at least 0.0001. Raises UsageError.
    """
    parts = value if isinstance(value, (list, tuple)) else re.split(r"[\s,;]+", _bare(value))
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 3) or any(isinstance(part, bool) for part in parts):
        raise UsageError(f"{value!r} is neither one number nor three, e.g. 0.485 0.456 0.406")
    least = MIN_STD if positive else 0
    if any(not math.isfinite(n) or n < least for n in numbers):
        raise UsageError(f"{value!r}: each number must be from {least:g} to 1")
    if max(numbers) > 1:
        scaled = " ".join(f"{n / 255:.4g}" for n in numbers)
        raise UsageError(
            f"{value!r} is on the scale from 0 to 255: divide by 255, which gives {scaled}"
        )
    red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
    return red, green, blue


def _bare(value: Any) -> str:
    return str(value).strip().strip("[]()").strip()


def parse_crop(value: Any) -> float:
    """Parse a crop: a share of the resized side, up to 2, or pixels; raises UsageError."""
    try:
        crop = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        crop = math.nan
    if not 0 < crop <= MAX_RESIZE or (crop > MAX_SHARE and crop != int(crop)):
        raise UsageError(
            f"{value!r} is neither a share of the resized side, e.g. 0.875, nor a number of pixels"
        )
    return crop
