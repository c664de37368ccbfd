"""What ``--transform`` and the single options ask for, and the preprocessing that it means."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from job.config import PreprocessingConfig
from job.data.geometry import LARGEST_SHARE, MAX_RESIZE, Resize
from job.data.preprocessing import Preprocessing
from job.data.pretrained import SOURCES, pretrained, scaled
from job.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = 64  # pixels: images up to this side get the `small` preset by default


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(PreprocessingConfig):
    """``--transform``, and what overrides it: None is left as the transform has it."""

    @classmethod
    def of(cls, options: PreprocessingConfig) -> PreprocessingOptions:
        """Select the options of preprocessing among those of a command."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raise UsageError for an unknown name, or for sizes that contradict each other."""
        if self.transform.partition(":")[0] in SOURCES:
            pretrained(self.transform)
        self._size()

    def resolve(self, largest: int) -> Preprocessing:
        """The preprocessing of images whose largest side is ``largest``; raises UsageError."""
        if self.transform.partition(":")[0] in SOURCES:
            return self._override(pretrained(self.transform))
        side = Resize.parse(self.resize).side if self.resize else 0
        preset = self.transform
        if preset == "auto":
            preset = "small" if (side or largest) <= SMALL else "homework"

        def at(size: int | None) -> Preprocessing:
            default = default_size(preset, side or largest)
            return Preprocessing(preset, size or (min(default, side) if side else default))

        return self._override(at)

    def override(self, own: Preprocessing) -> Preprocessing:
        """What a saved model's ``own`` becomes by these options; raises UsageError."""
        if self.transform.partition(":")[0] in SOURCES:
            return self.resolve(0)

        def at(size: int | None) -> Preprocessing:
            if self.transform != "auto":
                return Preprocessing(self.transform, size or own.size)
            preset = Preprocessing(own.preset, own.size)
            if own.resizing == preset.resizing:
                other = Preprocessing(own.preset, size or own.size).resizing
                return replace(own, size=size or own.size, resize=other)
            return scaled(own, size)

        return self._override(at)

    def _size(self) -> int | None:
        """The side of the inputs, where the options say it; they must agree."""
        size, crop = self.image_size, self.crop
        if crop is None:
            return size
        if crop > LARGEST_SHARE:
            if size not in (None, int(crop)):
                raise UsageError(
                    f"--crop {crop:g} and --image-size {size} contradict each other: the crop is "
                    "the network's input"
                )
            return int(crop)
        side = Resize.parse(self.resize).side if self.resize else None
        if side == 0:
            raise UsageError(
                f"--crop {crop:g} is a share of the resized side: not of --resize none"
            )
        if side and size is None:
            return max(1, round(side * crop))
        if side and size and side != _resized_side(size, crop) and size != round(side * crop):
            raise UsageError(
                f"--crop {crop:g}, --resize {self.resize} and --image-size {size} contradict each "
                f"other: leave one out"
            )
        return size

    def _override(self, at: Callable[[int | None], Preprocessing]) -> Preprocessing:
        own = at(self._size())
        resize = Resize.parse(self.resize) if self.resize else own.resizing
        if self.crop and self.crop <= LARGEST_SHARE and not self.resize:
            resize = Resize(_resized_side(own.size, self.crop), resize.fit)
        return replace(
            own,
            resize=resize,
            interpolation=self.interpolation or own.interpolation,
            mean=self.mean or own.mean,
            std=self.std or own.std,
        )


def _resized_side(size: int, share: float) -> int:
    """Rounded down, as timm does it."""
    side = math.floor(size / share)
    if not 1 <= side <= MAX_RESIZE:
        raise UsageError(
            f"--crop {share:g} of {size} pixels resizes to {side}: at most {MAX_RESIZE} pixels"
        )
    return side


def default_size(preset: str, largest: int) -> int:
    """The input's side by default, from the largest side of any image.

    ``small``: that side rounded up to a multiple of 16, 32 to 64 (28 is padded to 32). Else the
    homework's 256, or 224 for ``imagenet``.
    """
    if preset == "small":
        return min(max(32, -(-largest // 16) * 16), SMALL)
    return {"homework": 256, "imagenet": 224}[preset]
