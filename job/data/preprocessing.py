"""Preprocessing of decoded images to network inputs, for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from PIL import Image

from job.data.augmentation import center_offset, crop_long_ends, limit_side, resampling
from job.data.geometry import INTERPOLATIONS, Channels, Resize, parse_channels
from job.data.presets import PRESETS, UNSCALED
from job.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.data.geometry import Croppable
    from job.data.sample_order import Draw


class PreprocessingRecord(TypedDict):
    """Preprocessing in model.json; ``resize`` is None without resizing."""

    preset: str
    size: int
    mean: Channels
    std: Channels
    resize: int | None
    fit: str
    interpolation: str
    max_side: NotRequired[int]  # only if images are reduced
    shape: NotRequired[tuple[int, ...]]  # only if inputs are not square RGB images


MAX_INPUT = 2**24  # values along an axis of an input


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images to inputs of ``size`` x ``size`` pixels.

    Training augments as ``preset`` does; evaluation resizes and takes the centre crop. After
    scaling to [0, 1], ``mean`` is subtracted from each channel and the result is divided by
    ``std``. See ``of`` for the values of a preset. Before everything else, images are reduced to
    sides of at most ``max_side`` pixels. ``shape`` is that of one input, e.g. (C, H, W), if a task
    makes inputs that are not RGB images of ``size`` x ``size``.
    """

    preset: str
    size: int
    resize: Resize
    interpolation: str
    mean: Channels
    std: Channels
    max_side: int | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        preset: str,
        size: int,
        resize: Resize | None = None,
        interpolation: str = "bilinear",
        mean: Channels | None = None,
        std: Channels | None = None,
    ) -> Preprocessing:
        """Return the preprocessing of ``preset`` at ``size``; other arguments override it."""
        values = PRESETS[preset]
        resize = values.resize(size) if resize is None else resize
        return cls(
            preset, size, resize, interpolation, mean or values.scale[0], std or values.scale[1]
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what ``to_dict`` returned, in this version or an earlier one; raises DataError."""
        preset, size = values.get("preset"), values.get("size")
        interpolation = values.get("interpolation", "bilinear")
        if preset not in PRESETS or type(size) is not int or size < 1:
            raise DataError(f"unknown preprocessing {dict(values)}")
        default = cls.of(preset, size)
        try:
            if interpolation not in INTERPOLATIONS:
                raise ValueError(f"no interpolation {interpolation}")
            if "resize" in values:
                side = values["resize"]
                resize = Resize(0 if side is None else side, values.get("fit", "shorter"))
            else:
                resize = default.resize
            mean = parse_channels(values.get("mean", default.mean))
            std = parse_channels(values.get("std", default.std), positive=True)
            max_side = values.get("max_side")
            if max_side is not None and (type(max_side) is not int or max_side < 1):
                raise ValueError(f"sides of at most {max_side!r} pixels")
            shape = _parse_shape(values.get("shape"))
        except (ValueError, TypeError, UsageError) as error:
            raise DataError(f"unknown preprocessing {dict(values)}: {error}") from error
        return cls(preset, size, resize, interpolation, mean, std, max_side, shape)

    def to_dict(self) -> PreprocessingRecord:
        """Return the record stored in model.json."""
        record: PreprocessingRecord = {
            "preset": self.preset,
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "resize": self.resize.side or None,
            "fit": self.resize.fit,
            "interpolation": self.interpolation,
        }
        if self.max_side:
            record["max_side"] = self.max_side
        if self.shape:
            record["shape"] = self.shape
        return record

    @property
    def input_size(self) -> int | tuple[int, ...]:
        """The side of RGB images in pixels, or the shape of one input."""
        return self.shape or self.size

    @property
    def inputs(self) -> tuple[object, ...]:
        """All values that determine a network's inputs in evaluation."""
        interpolation = self.interpolation if self.resize.side else ""
        values = self.size, self.mean, self.std, self.resize, interpolation, self.max_side
        return (*values, self.shape) if self.shape else values

    def describe(self) -> str:
        """Return the preset, the size, and the values that differ from the preset, as text."""
        default, parts = Preprocessing.of(self.preset, self.size), []
        if self.resize != default.resize or self.interpolation != default.interpolation:
            how = f" ({self.interpolation})" if self.resize.side else ""
            parts.append(f"resize {self.resize}{how}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values != getattr(default, name):
                parts.append(f"{name} {' '.join(f'{value:g}' for value in values)}")
        if self.max_side:
            parts.append(f"images reduced to {self.max_side} pixels")
        return ", ".join([f"{self.preset} transforms at {self.size} pixels", *parts])

    def train(self, image: Croppable, draw: Draw, *, rotate: bool = True) -> Image.Image:
        """Augment an image by the random numbers in ``draw``, to RGB of ``size`` x ``size``.

        Without ``rotate``, the rotation of the preset is left to `job.data.rotation`.
        """
        preset, image = PRESETS[self.preset], limit_side(image, self.max_side)
        if not preset.augmentation_resizes:
            image = self.resized(image)
        crop = preset.augment(image, draw, self.size, resampling(self.interpolation))
        return crop.rotate(preset.angle(draw)) if rotate and preset.angle else crop

    def evaluate(self, image: Croppable) -> Image.Image:
        """Resize an image and take the centre crop, RGB of ``size`` x ``size``."""
        image = self.resized(limit_side(image, self.max_side))
        left, top = (center_offset(side, self.size) for side in image.size)
        box = (left, top, left + self.size, top + self.size)
        if self.resize.fit != "longer" or min(image.size) >= self.size:
            return image.crop(box)
        # timm's border mode pads with the mean colour
        canvas = Image.new("RGB", (self.size, self.size), tuple(round(255 * m) for m in self.mean))
        right, bottom = map(min, box[2:], image.size)
        inside = image.crop((max(left, 0), max(top, 0), right, bottom))
        canvas.paste(inside, (max(-left, 0), max(-top, 0)))
        return canvas

    def resized(self, image: Croppable) -> Croppable:
        """Return an image resized by ``resize``."""
        if not self.resize.side:
            return image
        if self.resize.fit == "shorter":
            image = crop_long_ends(image)
        size = self.resize.size_of(image.size)
        return image.resize(size, resampling(self.interpolation))

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images (B, H, W, 3) uint8 to inputs (B, 3, H, W) float32, channels last."""
        scaled = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if (self.mean, self.std) == UNSCALED:
            return scaled
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        return scaled.sub_(mean).div_(std)


@cache
def _per_channel(values: Channels, device: torch.device) -> torch.Tensor:
    """Return ``values`` as (3, 1, 1) float32; cached, because each copy to a GPU synchronises."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def _parse_shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of one input; raises ValueError for anything else."""
    if value is None:
        return None
    sides = tuple(value)
    if not sides or any(type(side) is not int or not 1 <= side <= MAX_INPUT for side in sides):
        raise ValueError(f"inputs of the shape {value!r}")
    return sides
