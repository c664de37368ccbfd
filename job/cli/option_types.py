"""What the options take, beyond click's own types."""

from __future__ import annotations

import math
from typing import Any

import click

from job.config import AUTO
from job.data.geometry import PRESETS, Channels, Resize, parse_channels, parse_crop
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.errors import UsageError, did_you_mean
from job.slimming.planning.target import Budget

POSITIVE = click.IntRange(1)
SEED = click.IntRange(0, 2**63 - 1)


class Finite(click.FloatRange):
    """A float within bounds, and neither infinite nor nan, which pass click's own comparison."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """As FloatRange does; fails for what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class SplitName(click.Choice):  # type: ignore[type-arg]
    """A split by its canonical name or another that it goes by, as train, val, dev or test."""

    def __init__(self) -> None:
        super().__init__(tuple(SPLIT_NAMES))

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The canonical name."""
        return super().convert(CANONICAL.get(str(value).lower(), value), param, ctx)


class ProcessCount(click.ParamType):  # type: ignore[type-arg]
    """A number of processes, or ``auto`` (None)."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """The number; fails below 1."""
        if value in ("auto", None):
            return None
        return _whole(value, POSITIVE, self, param, ctx)


class RoundCount(click.ParamType):  # type: ignore[type-arg]
    """A number of rounds, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """The number, or ``auto``; fails below 0."""
        return AUTO if value == AUTO else _whole(value, click.IntRange(0), self, param, ctx)


def _whole(
    value: Any, bounds: click.IntRange, kind: click.ParamType[Any], param: Any, ctx: Any
) -> int:
    try:
        int(value)
    except ValueError:
        kind.fail(f"{value!r} is neither a whole number nor auto", param, ctx)
    return int(bounds(value, param, ctx))


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``K=V``, the value as an int, a float, true or false where it is one."""

    name = "K=V"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int | float | bool | str]:
        """Split and convert; fails without ``=``."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is not of the form K=V", param, ctx)
        for kind in (int, float):
            try:
                return key, kind(text)
            except ValueError:
                continue
        return key, {"true": True, "false": False}.get(text.lower(), text)


class Target(click.ParamType):  # type: ignore[type-arg]
    """``METRIC=VALUE``: what to cut to, as job.slimming.planning.target reads it."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The text, once it is known to be a target."""
        try:
            Budget.parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Transform(click.ParamType):  # type: ignore[type-arg]
    """A preset, or whose preprocessing to take: ``timm:NAME``, ``torchvision:WEIGHTS``."""

    name = "NAME"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The text; whether a package knows its name is found out where that is needed."""
        text, known = str(value), ("auto", *PRESETS)
        package, colon, name = text.partition(":")
        if text in known or (package in ("timm", "torchvision") and colon and name):
            return text
        names = [*known, "timm:NAME", "torchvision:WEIGHTS"]
        message = f"{text!r} is none of {', '.join(names)}{did_you_mean(text, names)}"
        return str(self.fail(message, param, ctx))


class PerChannel(click.ParamType):  # type: ignore[type-arg]
    """One number for all channels, or three, also as separate words, see ``joined``."""

    name = "R G B"

    def __init__(self, *, positive: bool = False) -> None:
        self.positive = positive

    def convert(self, value: Any, param: Any, ctx: Any) -> Channels:
        """Three numbers from 0 to 1."""
        try:
            return parse_channels(value, positive=self.positive)
        except UsageError as error:
            self.fail(str(error), param, ctx)

    @staticmethod
    def joined(args: list[str], names: set[str]) -> list[str]:
        """``args`` with the three numbers behind an option of ``names`` as one."""
        found, rest = [], list(args)
        while rest:
            found.append(word := rest.pop(0))
            if word == "--":
                return found + rest
            if word in names and len(rest) >= 3 and all(map(_is_number, rest[:3])):
                found.append(" ".join(rest[:3]))
                del rest[:3]
        return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Resizing(click.ParamType):  # type: ignore[type-arg]
    """``256``, ``256x256``, ``longer:256`` or ``none``."""

    name = "PIXELS"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The text, once it is known to be one of these."""
        try:
            return str(Resize.parse(str(value)))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Crop(click.ParamType):  # type: ignore[type-arg]
    """A share of the resized side, or pixels."""

    name = "SHARE|PIXELS"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number."""
        try:
            return parse_crop(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
