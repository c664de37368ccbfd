"""Preprocessing options: ``--transform`` and the options that override its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from job.config import PreprocessingConfig
from job.data.geometry import MAX_RESIZE, MAX_SHARE, Resize
from job.data.preprocessing import Preprocessing
from job.data.presets import PRESETS, default_preset
from job.data.pretrained import SOURCES, pretrained, scaled
from job.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(PreprocessingConfig):
    """``--transform`` and the options that override it; None keeps the value of the transform."""

    @classmethod
    def of(cls, options: PreprocessingConfig) -> PreprocessingOptions:
        """Select the options of preprocessing among those of a command."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raise UsageError for an unknown name, or for sizes that contradict each other."""
        if self._names_weights:
            pretrained(self.transform)
        self._input_size()

    def resolve(self, largest: int) -> Preprocessing:
        """Return the preprocessing for images with sides of at most ``largest`` pixels.

        Raises UsageError.
        """
        if self._names_weights:
            return self._apply(pretrained(self.transform))
        side = Resize.parse(self.resize).side if self.resize else 0
        auto = self.transform == "auto"
        preset = default_preset(side or largest) if auto else self.transform
        default = PRESETS[preset].default_size(side or largest)
        default = min(default, side) if side else default
        return self._apply(lambda size: Preprocessing.of(preset, size or default))

    def override(self, stored: Preprocessing) -> Preprocessing:
        """Return the preprocessing stored with a model, changed by these options.

        Raises UsageError.
        """
        if self._names_weights:
            return self.resolve(0)

        def by_size(size: int | None) -> Preprocessing:
            if self.transform != "auto":
                return Preprocessing.of(self.transform, size or stored.size)
            if stored.resize == Preprocessing.of(stored.preset, stored.size).resize:
                resize = Preprocessing.of(stored.preset, size or stored.size).resize
                return replace(stored, size=size or stored.size, resize=resize)
            return scaled(stored, size)

        return self._apply(by_size)

    @property
    def _names_weights(self) -> bool:
        return self.transform.partition(":")[0] in SOURCES

    def _input_size(self) -> int | None:
        """Return the input side that ``--image-size``, ``--crop`` and ``--resize`` give."""
        size, crop = self.image_size, self.crop
        if crop is None:
            return size
        if crop > MAX_SHARE:
            if size not in (None, int(crop)):
                raise UsageError(
                    f"--crop {crop:g} and --image-size {size} contradict each other: the crop is "
                    "the network's input"
                )
            return int(crop)
        side = Resize.parse(self.resize).side if self.resize else None
        if side == 0:
            raise UsageError(
                f"--crop {crop:g} is a share of the resized side, but --resize is none"
            )
        if side and size is None:
            return max(1, round(side * crop))
        if side and size and side != _resized_side(size, crop) and size != round(side * crop):
            raise UsageError(
                f"--crop {crop:g}, --resize {self.resize} and --image-size {size} contradict each "
                f"other: leave one out"
            )
        return size

    def _apply(self, by_size: Callable[[int | None], Preprocessing]) -> Preprocessing:
        """Apply the options to ``by_size(size)``, where size is None without size options."""
        default = by_size(self._input_size())
        resize = Resize.parse(self.resize) if self.resize else default.resize
        if self.crop and self.crop <= MAX_SHARE and not self.resize:
            resize = Resize(_resized_side(default.size, self.crop), resize.fit)
        return replace(
            default,
            resize=resize,
            interpolation=self.interpolation or default.interpolation,
            mean=self.mean or default.mean,
            std=self.std or default.std,
        )


def _resized_side(size: int, share: float) -> int:
    """Return ``size / share``, the side to resize to, rounded down as in timm."""
    side = math.floor(size / share)
    if not 1 <= side <= MAX_RESIZE:
        raise UsageError(
            f"--crop {share:g} of {size} pixels resizes to {side}: at most {MAX_RESIZE} pixels"
        )
    return side
